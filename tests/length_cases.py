"""Batches of unequal length, padded with NaN; the operators on them; a sequence alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers import Case, Place, make_qkv, random_blocks, random_lists
from torch import Tensor

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash, reference


class Batch(NamedTuple):
    """Sizes of the padded storage, and the lengths in it."""

    case: Case
    q_lens: list[int]
    kv_lens: list[int]

    def __str__(self) -> str:
        return f"{self.case}-lens"

    def lengths(self):
        return enumerate(zip(self.q_lens, self.kv_lens, strict=True))

    def tensors(self, place: Place, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
        return lens_of(self.q_lens, self.kv_lens, place, dtype)


def lens_of(q_lens, kv_lens, place: Place, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    return {
        "q_lens": torch.tensor(q_lens, dtype=dtype, device=place.device),
        "kv_lens": torch.tensor(kv_lens, dtype=dtype, device=place.device),
    }


BATCHES = [
    Batch(Case(4, 4, 2, 200, 300, 128), [63, 1, 0, 200], [170, 65, 150, 300]),
    Batch(Case(4, 4, 1, 130, 130, 96), [65, 130, 64, 0], [65, 130, 129, 0]),
    Batch(Case(4, 4, 4, 65, 257, 64), [1, 63, 65, 64], [1, 63, 257, 200]),
]
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=str)
PATTERNS = [VerticalSlash(40, 110), BlockSparse(2), AShape(4, 20), Dense()]
ADAPTIVE = [
    VerticalSlash(60, 190, share=0.6),
    BlockSparse(3, share=0.6, method="antidiagonal"),
    BlockSparse(3, share=0.5),
    BlockSparse(2, method="antidiagonal", stride=4),
]


def padded(batch: Batch, place: Place, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_qkv(batch.case, place, seed)
    for b, (m, n) in batch.lengths():
        q[b, :, m:] = math.nan
        k[b, :, n:] = math.nan
        v[b, :, n:] = math.nan
    return q, k, v


# --- the operators as functions of (q, k, v, index, lengths) ------------------------------------


def a_shape(q, k, v, index=(), **lens):
    return sparseattn.a_shape_attention(q, k, v, sink=4, window=70, return_lse=True, **lens)


def vertical_slash(q, k, v, index, **lens):
    return sparseattn.vertical_slash_attention(q, k, v, *index, return_lse=True, **lens)


def block_sparse(q, k, v, index, **lens):
    return sparseattn.block_sparse_attention(
        q, k, v, *index, block_q=128, block_kv=64, return_lse=True, **lens
    )


def mixed(q, k, v, index=(), **lens):
    return sparseattn.sparse_attention(q, k, v, PATTERNS, return_lse=True, **lens)


def adaptive(q, k, v, index=(), **lens):
    return sparseattn.sparse_attention(q, k, v, ADAPTIVE, return_lse=True, **lens)


ATTEND = [a_shape, vertical_slash, block_sparse, mixed, adaptive]
attend_by = pytest.mark.parametrize("attend", ATTEND, ids=lambda f: f.__name__)
attend_by_index = pytest.mark.parametrize("attend", ATTEND[:3], ids=lambda f: f.__name__)


def index_of(attend, batch: Batch, place: Place, seed: int = 0) -> tuple[Tensor, ...]:
    if attend is vertical_slash:
        lists = random_lists(batch.case, 30, 12, seed)
    elif attend is block_sparse:
        lists = (random_blocks(batch.case, 128, 64, seed, share=0.6),)
    else:
        lists = ()
    return tuple(x.to(place.device) for x in lists)


def cut(attend, index: tuple[Tensor, ...], b: int, m: int, n: int) -> tuple[Tensor, ...]:
    """The index of a sequence alone."""
    if attend is block_sparse:
        return (index[0][b : b + 1, :, : -(-m // 128), : -(-n // 64)],)
    return tuple(x[b : b + 1] for x in index)


def mask_of(attend, batch: Batch, index: tuple[Tensor, ...], place: Place) -> Tensor:
    """bool [B, Hq, q_len, kv_len], from the oracle's masks of single sequences."""
    case = batch.case
    mask = torch.zeros(case.batch, case.q_heads, case.q_len, case.kv_len, dtype=torch.bool)
    mask = mask.to(place.device)
    for b, (m, n) in batch.lengths():
        for h in range(case.q_heads if m else 0):
            if attend is a_shape:
                one = reference.a_shape_mask(m, n, 4, 70, place.device)
            elif attend is vertical_slash:
                one = reference.vertical_slash_mask(m, n, index[0][b, h], index[1][b, h])
            else:
                one = reference.block_sparse_mask(m, n, index[0][b, h], 128, 64)
            mask[b, h, :m, :n] = one
    return mask


def check_alone(attend, batch: Batch, result, q, k, v, index) -> None:
    """Each sequence has the bits of the same call on its own slice; other rows are empty."""
    out, lse = result
    for b, (m, n) in batch.lengths():
        assert (out[b, :, m:] == 0).all() and lse[b, :, m:].isneginf().all()
        if m == 0:
            continue
        one = slice(b, b + 1)
        alone = attend(q[one, :, :m], k[one, :, :n], v[one, :, :n], cut(attend, index, b, m, n))
        assert torch.equal(out[one, :, :m], alone[0]), f"sequence {b}"
        assert torch.equal(lse[one, :, :m], alone[1]), f"sequence {b}"
