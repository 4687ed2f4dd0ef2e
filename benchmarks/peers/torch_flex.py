"""torch's FlexAttention, compiled, with a block mask: dense causal, and block-sparse lists."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .problem import BLOCK_SPARSE, DENSE, Offer, Problem, found, on_cuda

NAME = "FlexAttention"
DENSE_BLOCK = 128


def available(device: torch.device) -> tuple[bool, str]:
    if why := on_cuda(device):
        return False, why
    works, detail = found("torch.nn.attention.flex_attention")
    if works:
        works, detail = found("triton", "triton")
        detail = f"torch {torch.__version__}, triton {detail}" if works else detail
    return works, detail


@cache
def compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """int32 counts ``[1, heads, n]`` and block numbers ``[1, heads, n, n]``, the selected ones
    first."""
    counts = mask.sum(-1, dtype=torch.int32)
    lists = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    for head in range(mask.shape[1]):  # by head: sorting takes 64-bit indices
        order = mask[0, head].to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        lists[0, head] = order
    return counts, lists


def block_mask(problem: Problem) -> Any:
    """Its BlockMask: diagonal blocks with the causal mask, the other selected ones whole.

    Made of lists: `create_block_mask` would hold a mask of all pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = problem.block or DENSE_BLOCK
    n = problem.tokens // size
    if problem.kind == DENSE:
        mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=problem.q.device).tril()
    else:
        assert problem.mask is not None
        mask = problem.mask
    diagonal = torch.eye(n, dtype=torch.bool, device=mask.device)
    return BlockMask.from_kv_blocks(
        *block_lists(mask & diagonal),
        *block_lists(mask & ~diagonal),
        BLOCK_SIZE=size,
        mask_mod=causal,
        seq_lengths=(problem.tokens, problem.tokens),
    )


def offers(problem: Problem) -> Iterator[Offer]:
    if problem.kind not in (DENSE, BLOCK_SPARSE):
        return
    call = partial(
        compiled(),
        problem.q,
        problem.k,
        problem.v,
        block_mask=block_mask(problem),
        enable_gqa=True,
        kernel_options={"BLOCK_M": 64, "BLOCK_N": 64} if problem.block == 64 else None,
    )
    yield Offer(NAME, call, prepared="its block mask, and the compilation")
