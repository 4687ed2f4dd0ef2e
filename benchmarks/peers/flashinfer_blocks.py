"""FlashInfer's VariableBlockSparseAttentionWrapper with blocks of one size, a mask for each head.

Its wrapper for blocks of fixed size has one mask for all heads, so it cannot compute the problem.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .problem import BLOCK_SPARSE, Offer, Problem, found, on_cuda

NAME = "FlashInfer"
MOST_ENTRIES = 2**28  # of its list of key positions, int32, one for each row of blocks


def available(device: torch.device) -> tuple[bool, str]:
    if why := on_cuda(device):
        return False, why
    return found("flashinfer", "flashinfer-python")


def offers(problem: Problem) -> Iterator[Offer]:
    if problem.kind != BLOCK_SPARSE:
        return
    import flashinfer

    assert problem.mask is not None
    mask, heads = problem.mask[0].contiguous(), problem.heads
    entries = int(mask.sum()) * problem.block
    if entries > MOST_ENTRIES:
        raise MemoryError(f"its list would have {entries / 1e9:.1f}e9 positions of keys")
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=mask.device)
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(workspace)
    sizes = torch.full(mask.shape[:2], problem.block, dtype=torch.int32, device=mask.device)

    def prepare() -> None:
        # Causal over the gathered keys: a row's last block is its diagonal one, so that is causal
        # over positions, too.
        wrapper.plan(
            block_mask_map=mask,
            block_row_sz=sizes,
            block_col_sz=sizes,
            num_qo_heads=heads,
            num_kv_heads=heads,
            head_dim=problem.head_dim,
            causal=True,
            q_data_type=problem.q.dtype,
        )

    prepare()
    k, v = (x[0].contiguous() for x in problem.repeated)
    q = problem.q[0].contiguous()
    yield Offer(
        NAME,
        lambda: wrapper.run(q, k, v)[None],
        prepare,
        "its plan; keys and values repeated to the query heads, as a mask is a key head's "
        "(not in its time)",
    )
