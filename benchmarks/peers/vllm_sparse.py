"""vLLM's vertical-slash kernel: `sparse_attn_func` of vllm.vllm_flash_attn, and its converter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from . import lists64
from .problem import VERTICAL_SLASH, Offer, Problem, found, on_cuda

NAME = "vLLM sparse"
MODULES = (
    "vllm.vllm_flash_attn",
    "vllm.vllm_flash_attn.flash_attn_interface",
    "vllm_flash_attn",
)


def kernel() -> Any:
    """sparse_attn_func, from where it is; None where it is not."""
    for name in MODULES:
        if found(name)[0]:
            function = getattr(importlib.import_module(name), "sparse_attn_func", None)
            if function is not None:
                return function
    return None


def available(device: torch.device) -> tuple[bool, str]:
    if why := on_cuda(device):
        return False, why
    works, detail = found("vllm._custom_ops", "vllm")
    if not works:
        return works, detail
    if not hasattr(importlib.import_module("vllm._custom_ops"), "convert_vertical_slash_indexes"):
        return False, f"vllm {detail}: no convert_vertical_slash_indexes"
    if kernel() is None:
        return False, f"vllm {detail}: no sparse_attn_func in {', '.join(MODULES)}"
    return True, detail


def offers(problem: Problem) -> Iterator[Offer]:
    if problem.kind != VERTICAL_SLASH:
        return
    convert = importlib.import_module("vllm._custom_ops").convert_vertical_slash_indexes
    length, columns, offsets = lists64.converter_inputs(problem)

    def prepare() -> Any:
        return convert(length, length, columns, offsets, problem.tokens, 64, 64, causal=True)

    lists = lists64.Lists(*prepare())
    attend = kernel()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))

    def call() -> torch.Tensor:
        out = attend(
            q,
            k,
            v,
            lists.tile_count,
            lists.tile_start,
            lists.column_count,
            lists.column,
            causal=True,
        )
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    yield Offer(
        NAME,
        call,
        prepare,
        f"{lists64.PREPARED}; tensors with heads after tokens (not in its time)",
        lists64.DIFFERS,
        lists.keys(problem.tokens),
        lists.pairs,
    )
