"""Shares and antidiagonal scores in batches of unequal length: each sequence as if it were alone.

Padding is NaN throughout. ``test_lengths`` runs attention with adaptive patterns, too.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Case, Place
from length_cases import BATCHES, Batch, every_batch, padded
from test_adaptive import check_share, masses_of
from test_adaptive_blocks import SCORES, check_best, score_slack
from torch import Tensor

import sparseattn
from sparseattn import BlockSparse, VerticalSlash, reference

LISTS = [
    {"num_columns": 60, "num_offsets": 300},
    {"num_columns": 400, "num_offsets": 400},
    {"num_columns": 40, "num_offsets": 230, "last_q": 17, "sink": 4, "local": 10},
    {"num_columns": 20, "num_offsets": 90, "sink": 0, "local": 0},
    {"num_columns": 0, "num_offsets": 200, "last_q": 1, "local": 2},
    {"num_columns": 300, "num_offsets": 0},
]


def own_slices(batch: Batch, q: Tensor, k: Tensor):
    """(b, rows, keys, the sequence's q and k) of every sequence."""
    for b, (m, n) in batch.lengths():
        yield b, m, n, (q[b : b + 1, :, :m], k[b : b + 1, :, :n])


def check_lists(batch: Batch, got: tuple[Tensor, Tensor], q, k, share, options) -> None:
    for b, m, _, own in own_slices(batch, q, k):
        columns, offsets = (x[b : b + 1] for x in got)
        if m == 0:
            assert (columns == -1).all() and (offsets == -1).all()
            continue
        rows = min(options.get("last_q", 64), m)
        check_share((columns, offsets), masses_of(*own, options), rows, share, options)


@pytest.mark.parametrize("options", LISTS, ids=lambda o: "-".join(map(str, o.values())))
@every_batch
def test_lists_by_share(batch, options, place):
    q, k, _ = padded(batch, place)
    q = q * 2
    for share in (0.3, 0.7, 0.95, 1.0):
        how = options | {"share": share}
        got = sparseattn.estimate_vertical_slash(q, k, **how, **batch.tensors(place))
        check_lists(batch, got, q, k, share, options)
        for b, m, _, own in own_slices(batch, q, k):
            if m == 0:
                continue
            alone = sparseattn.estimate_vertical_slash(*own, **how)
            for x, y in zip(got, alone, strict=True):
                assert torch.equal(x[b : b + 1], y), f"sequence {b}"


def test_lists_of_long_sequences(place):
    """Many chunks of keys and many runs, of which the shorter sequences have a few."""
    batch = Batch(Case(5, 4, 2, 129, 4500, 64), [129, 1, 70, 100, 0], [4500, 200, 2300, 513, 900])
    q, k, _ = padded(batch, place)
    q = q * 2
    options = {"num_columns": 300, "num_offsets": 2000}
    for share in (0.5, 0.9):
        lens = batch.tensors(place, torch.int64)
        got = sparseattn.estimate_vertical_slash(q, k, **options, share=share, **lens)
        check_lists(batch, got, q, k, share, options)


def check_blocks(batch: Batch, got: Tensor, q, k, top_k: int, share: float | None, how) -> None:
    block = how["block"]
    for b, m, n, own in own_slices(batch, q, k):
        nq, nk = -(-m // block), -(-n // block)
        assert not got[b, :, nq:].any() and (m == 0 or not got[b, :, :, nk:].any())
        if m == 0:
            continue
        part = got[b : b + 1, :, :nq, :nk]
        alone = sparseattn.estimate_block_sparse(*own, top_k=top_k, share=share, **how)
        assert torch.equal(part, alone), f"sequence {b}"
        scores = reference.block_scores(*own, **how)
        slack = score_slack(scores, how["method"])
        check_best(part, scores, slack)
        assert part[scores.isposinf()].all(), "the block of the first row is forced"
        count = (scores > -math.inf).sum(-1).clamp(max=top_k)
        if share is None:
            assert torch.equal(part.sum(-1), count)
            continue
        kept = (reference.block_weights(*own, **how) * part).sum(-1)
        near = 4 * slack * q.shape[-1] ** -0.5 + 1e-4
        assert ((part.sum(-1) == count) | (kept >= share - near)).all(), "the share is not reached"


@pytest.mark.parametrize(("method", "stride"), SCORES)
@pytest.mark.parametrize("block", [64, 128])
@every_batch
def test_blocks_by_share(batch, block, method, stride, place):
    q, k, _ = padded(batch, place)
    q, k = q * 2 + 0.2, k * 2 + 0.2
    how = {"block": block, "method": method, "stride": stride}
    for top_k, share in [(1, None), (2, None), (1, 0.5), (3, 0.5), (1000, 0.3), (1000, 0.8)]:
        options = {"top_k": top_k, "share": share, **how}
        got = sparseattn.estimate_block_sparse(q, k, **options, **batch.tensors(place))
        check_blocks(batch, got, q, k, top_k, share, how)


@pytest.mark.parametrize("method", ["mean", "antidiagonal"])
def test_blocks_of_several_panels(method, place):
    """More than 128 blocks: sequences that end in, at and before the second panel, or have none."""
    case = Case(5, 2, 1, 8300, 8500, 64)
    batch = Batch(case, [8300, 8193, 8192, 70, 0], [8500, 8193, 8300, 8400, 0])
    q, k, _ = padded(batch, place)
    q, k = q * 2 + 0.2, k * 2 + 0.2
    how = {"block": 64, "method": method, "stride": 8}
    options = {"top_k": 20, "share": 0.1, **how}
    got = sparseattn.estimate_block_sparse(q, k, **options, **batch.tensors(place))
    check_blocks(batch, got, q, k, 20, 0.1, how)


@pytest.mark.parametrize("lens", [{"q_lens": [0] * 4}, {"kv_lens": [0] * 4}], ids=str)
def test_nobody_has_rows(lens, place):
    batch = BATCHES[0]
    q, k, v = padded(Batch(batch.case, [0] * 4, [0] * 4), place)
    lens = {name: torch.tensor(x, device=place.device) for name, x in lens.items()}
    for x in sparseattn.estimate_vertical_slash(
        q, k, num_columns=50, num_offsets=200, share=0.9, **lens
    ):
        assert (x == -1).all()
    for method in ("mean", "antidiagonal"):
        how = {"top_k": 3, "share": 0.9, "method": method}
        assert not sparseattn.estimate_block_sparse(q, k, **how, **lens).any()
    patterns = [VerticalSlash(50, 200, share=0.9), BlockSparse(3, 0.9, "antidiagonal")] * 2
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True, **lens)
    assert (out == 0).all() and lse.isneginf().all()


def test_oracle_takes_lengths(main_place: Place):
    """The oracle's estimates with lengths: its estimates on the slices."""
    batch = BATCHES[0]
    q, k, _ = padded(batch, main_place)
    lens = batch.tensors(main_place)
    columns, offsets = reference.estimate_vertical_slash(
        q, k, num_columns=60, num_offsets=230, share=0.7, **lens
    )
    how = {"top_k": 3, "share": 0.6, "method": "antidiagonal"}
    blocks = reference.estimate_block_sparse(q, k, **how, **lens)
    for b, m, n, own in own_slices(batch, q, k):
        if m == 0:
            assert (columns[b] == -1).all() and (offsets[b] == -1).all() and not blocks[b].any()
            continue
        alone = reference.estimate_vertical_slash(*own, num_columns=60, num_offsets=230, share=0.7)
        assert torch.equal(columns[b], alone[0][0]) and torch.equal(offsets[b], alone[1][0])
        nq, nk = -(-m // 64), -(-n // 64)
        assert torch.equal(blocks[b, :, :nq, :nk], reference.estimate_block_sparse(*own, **how)[0])
        assert not blocks[b, :, nq:].any() and not blocks[b, :, :, nk:].any()
