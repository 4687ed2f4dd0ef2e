"""FlashAttention-3, dense: `fa3_fwd_interface` (package fa3-fwd) or `flash_attn_interface`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from prefill_attention import fa3_module
from torch import Tensor

from .problem import DENSE, Offer, Problem, found, on_cuda

NAME = "FlashAttention-3"


def available(device: torch.device) -> tuple[bool, str]:
    if why := on_cuda(device):
        return False, why
    module = fa3_module()
    if module is None:
        return False, "neither fa3_fwd_interface nor flash_attn_interface can be imported"
    return found(module, "fa3-fwd", "flash-attn-3", "flash_attn_3")


def offers(problem: Problem) -> Iterator[Offer]:
    if problem.kind != DENSE:
        return
    module = fa3_module()
    assert module is not None
    attend = importlib.import_module(module).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

    def call() -> Tensor:
        out = attend(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    yield Offer(NAME, call)
