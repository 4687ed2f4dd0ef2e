"""Block-Sparse-Attention (`block_sparse_attn`): blocks of 128x128, a mask for each query head."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .problem import BLOCK_SPARSE, Offer, Problem, found, on_cuda

NAME = "Block-Sparse-Attention"


def available(device: torch.device) -> tuple[bool, str]:
    if why := on_cuda(device):
        return False, why
    return found("block_sparse_attn", "block_sparse_attn")


def offers(problem: Problem) -> Iterator[Offer]:
    if problem.kind != BLOCK_SPARSE or problem.block != 128:
        return
    from block_sparse_attn import block_sparse_attn_func

    assert problem.mask is not None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (problem.q, problem.k, problem.v))
    device, n = q.device, problem.tokens
    ends = torch.tensor([0, n], dtype=torch.int32, device=device)
    kinds = torch.ones(problem.heads, dtype=torch.int32, device=device)

    def call() -> torch.Tensor:
        with torch.no_grad():
            out = block_sparse_attn_func(
                q, k, v, ends, ends, kinds, None, problem.mask, n, n, 0.0, is_causal=True
            )
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)[None]

    yield Offer(NAME, call, prepared="tensors with heads after tokens; its lists are in its time")
