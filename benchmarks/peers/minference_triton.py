"""MInference's Triton kernels (package minference): vertical-slash, and block-sparse 64x64."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor

from . import lists64
from .problem import BLOCK_SPARSE, VERTICAL_SLASH, Offer, Problem, found, on_cuda

NAME = "MInference Triton"
SLASH = "minference.ops.pit_sparse_flash_attention_v2"
BLOCKS = "minference.ops.block_sparse_flash_attention"
COPIES = "keys and values repeated to the query heads"


def available(device: torch.device) -> tuple[bool, str]:
    if why := on_cuda(device):
        return False, why
    works, detail = found("minference")
    if not works and not kernels_only("minference"):
        return works, detail
    for module in ("minference.cuda", SLASH, BLOCKS):
        works, detail = found(module, "minference")
        if not works:
            break
    return works, detail


def kernels_only(package: str) -> bool:
    """Puts an empty package in place of one whose own import fails, so that its submodules can be
    imported: the kernels need none of the models that it patches. False where it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return False
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]  # what the failed import has left
    empty = types.ModuleType(package)
    empty.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = empty
    return True


def offers(problem: Problem) -> Iterator[Offer]:
    length = torch.tensor([problem.tokens], dtype=torch.int32, device=problem.q.device)
    scale = problem.head_dim**-0.5
    if problem.kind == VERTICAL_SLASH:
        attend = importlib.import_module(SLASH)._triton_mixed_sparse_attention
        convert = importlib.import_module("minference.cuda").convert_vertical_slash_indexes
        given = lists64.converter_inputs(problem)
        prepare = lambda: convert(*given, problem.tokens, 64, 64)  # noqa: E731
        lists = lists64.Lists(*prepare())
        k, v = problem.repeated

        def call() -> Tensor:
            return attend(
                problem.q,
                k,
                v,
                length,
                lists.tile_count,
                lists.tile_start,
                lists.column_count,
                lists.column,
                scale,
                64,
                64,
            )

        yield Offer(
            NAME,
            call,
            prepare,
            f"{lists64.PREPARED}; {COPIES} (not in its time)",
            lists64.DIFFERS,
            lists.keys(problem.tokens),
            lists.pairs,
        )
    elif problem.kind == BLOCK_SPARSE and problem.block == 64 and problem.per_row is not None:
        attend_blocks = importlib.import_module(BLOCKS)._triton_block_sparse_attention
        blocks = first_blocks(problem)
        k, v = problem.repeated
        yield Offer(
            NAME,
            lambda: attend_blocks(problem.q, k, v, length, blocks, scale, 64, 64),
            prepared=f"lists of blocks; {COPIES}",
        )


def first_blocks(problem: Problem) -> Tensor:
    """int32 ``[1, heads, n, per_row]``: ascending; of row m the first m + 1 count."""
    assert problem.mask is not None and problem.per_row is not None
    width = min(problem.per_row, problem.mask.shape[-1])
    rows = []
    for head in range(problem.heads):
        order = problem.mask[0, head].to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        rows.append(order.indices[:, :width].int())
    return torch.stack(rows)[None].contiguous()
