"""estimate_vertical_slash and estimate_block_sparse against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ESTIMATE_CASES, LAYOUTS, Case, make_qkv, relayout
from torch import Tensor

import sparseattn
from sparseattn import reference


def check_selection(got: Tensor, mass: Tensor, forced: int, count: int) -> None:
    """Fails unless ``got`` [B, Hq, count] selects the largest ``mass`` [B, Hq, n], forced first.

    fp32 sums may swap entries whose masses differ by less than 1e-4 of the last one chosen;
    wherever the margin is wider the selected set is exact.
    """
    n = mass.shape[-1]
    kept = min(count, n)
    assert got.shape == (*mass.shape[:2], count) and got.dtype == torch.int32
    assert (got[..., kept:] == -1).all(), "pads follow the selected"
    got = got[..., :kept].long()
    if kept == 0:
        return
    assert (got >= 0).all() and (got < n).all()
    assert (got.diff(dim=-1) > 0).all(), "ascending and distinct"
    if kept <= forced:
        expected = torch.arange(kept, device=got.device).expand_as(got)
        assert torch.equal(got, expected), "forced entries by the smaller index"
        return
    mass = mass.clone()
    mass[..., :forced] = math.inf
    chosen = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, got, True)
    last = mass.topk(kept, dim=-1).values[..., -1:]
    slack = last * 1e-4 + 1e-12
    assert not (~chosen & (mass > last + slack)).any(), "a larger mass was left out"
    assert not (chosen & (mass < last - slack)).any(), "a smaller mass was selected"
    close = ((mass - last).abs() <= slack).sum(-1)
    assert close.double().mean() < max(3, 0.05 * n), "the margin is too narrow to test anything"


@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_vertical_slash_against_oracle(case, place):
    settings = [
        {"num_columns": 50, "num_offsets": 120},
        {"num_columns": 200, "num_offsets": 40},
        {"num_columns": 20, "num_offsets": 301, "last_q": 17, "sink": 4, "local": 64},
        {"num_columns": 33, "num_offsets": 33, "last_q": 1, "sink": 0, "local": 0},
        {"num_columns": 0, "num_offsets": 7, "local": 2},
        {"num_columns": 5000, "num_offsets": 0},
    ]
    for seed, options in enumerate(settings):
        q, k, _ = make_qkv(case, place, seed)
        q = q * 2  # some mass stands out
        columns, offsets = sparseattn.estimate_vertical_slash(q, k, **options)
        expected = reference.vertical_slash_mass(q, k, options.get("last_q", 64))
        check_selection(columns, expected[0], options.get("sink", 30), options["num_columns"])
        check_selection(offsets, expected[1], options.get("local", 100), options["num_offsets"])
        assert columns.device == q.device


def planted(place, q_len: int, kv_len: int):
    """Keys that stand out: columns 40, 77, 120 for head 0's group, offset 130 for head 2's."""
    case = Case(1, 4, 2, q_len, kv_len, 64)
    q, k, _ = make_qkv(case, place)
    q, k = q * 0.1, k * 0.1
    q[:, :2, :, 0] = 8
    k[:, 0, [40, 77, 120], 0] = 6
    gen = torch.Generator().manual_seed(7)
    signs = (torch.randint(0, 2, (kv_len, 64), generator=gen) * 2 - 1).to(place.device, place.dtype)
    rows = torch.arange(q_len, device=place.device) + kv_len - q_len
    k[:, 1] = signs
    q[:, 2:] = signs[(rows - 130).clamp(min=0)]
    return q, k


def test_planted_columns_and_offsets_are_found(place):
    for q_len, kv_len in [(300, 300), (100, 431)]:
        q, k = planted(place, q_len, kv_len)
        columns, offsets = sparseattn.estimate_vertical_slash(
            q, k, num_columns=5, num_offsets=4, sink=2, local=3
        )
        for head in range(2):
            assert columns[0, head].tolist() == [0, 1, 40, 77, 120]
        for head in range(2, 4):
            assert offsets[0, head].tolist() == [0, 1, 2, 130]
        exact = reference.estimate_vertical_slash(
            q, k, num_columns=5, num_offsets=4, sink=2, local=3
        )
        assert torch.equal(columns[:, :2], exact[0][:, :2])
        assert torch.equal(offsets[:, 2:], exact[1][:, 2:])


def test_equal_masses_rank_by_index(place):
    """One row of equal scores: every mass is the same number, so the first ones win."""
    q, k, _ = make_qkv(Case(2, 2, 1, 70, 500, 64), place)
    columns, offsets = sparseattn.estimate_vertical_slash(
        q * 0, k, num_columns=40, num_offsets=130, last_q=1
    )
    assert torch.equal(columns, torch.arange(40, device=q.device).int().expand(2, 2, -1))
    assert torch.equal(offsets, torch.arange(130, device=q.device).int().expand(2, 2, -1))


def test_only_the_last_rows_count(place):
    q, k, _ = make_qkv(Case(1, 2, 1, 200, 260, 64), place)
    options = {"num_columns": 40, "num_offsets": 110, "last_q": 32}
    expected = sparseattn.estimate_vertical_slash(q, k, **options)
    other = q.clone()
    other[:, :, :-32] = 1e4
    got = sparseattn.estimate_vertical_slash(other, k, **options)
    alone = sparseattn.estimate_vertical_slash(q[:, :, -32:], k, **options)
    for one in (got, alone):
        assert torch.equal(one[0], expected[0]) and torch.equal(one[1], expected[1])


def test_large_scores(place):
    """Rows whose mass is one key's: exponentials overflow without the row's maximum."""
    q, k, _ = make_qkv(Case(1, 2, 1, 100, 300, 64), place)
    q = q * 100
    columns, offsets = sparseattn.estimate_vertical_slash(
        q, k, num_columns=12, num_offsets=14, sink=2, local=3
    )
    exact = reference.vertical_slash_mass(q, k)
    # Almost all mass is on few keys; ranks below are underflow, so compare the mass captured.
    for got, mass in zip((columns, offsets), exact, strict=True):
        assert (got.diff(dim=-1) > 0).all()
        most = mass.topk(got.shape[-1] - 3, dim=-1).values.sum(-1)
        assert (mass.gather(-1, got.long()).sum(-1) >= most * 0.999).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, place):
    q, k, _ = make_qkv(Case(2, 4, 2, 130, 300, 64), place)
    moved = [relayout(x, layout) for x in (q, k)]
    options = {"num_columns": 40, "num_offsets": 110}
    expected = sparseattn.estimate_vertical_slash(q, k, **options)
    got = sparseattn.estimate_vertical_slash(*moved, **options)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(
        sparseattn.estimate_block_sparse(*moved, top_k=2),
        sparseattn.estimate_block_sparse(q, k, top_k=2),
    )


def check_blocks(got: Tensor, scores: Tensor, top_k: int) -> None:
    """As check_selection, for rows of blocks; slack is that of fp32 sums of scores."""
    candidates = (scores > -math.inf).sum(-1)
    assert got.shape == scores.shape and got.dtype == torch.bool
    assert torch.equal(got.sum(-1), candidates.clamp(max=top_k))
    assert got[scores.isposinf()].all(), "the block of the first row is forced"
    assert not got[scores.isneginf()].any(), "blocks after the last row are no candidates"
    rank = min(top_k, scores.shape[-1])
    last = scores.topk(rank, dim=-1).values[..., -1:]
    slack = scores.where(scores.isfinite(), 0.0).abs().amax() * 1e-5
    open_rows = last.isfinite()
    assert not (open_rows & ~got & (scores > last + slack)).any()
    assert not (open_rows & got & (scores < last - slack)).any()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_block_sparse_against_oracle(case, block, place):
    for seed, top_k in enumerate([1, 2, 3, 1000]):
        q, k, _ = make_qkv(case, place, seed)
        q, k = q + 0.1, k + 0.1
        got = sparseattn.estimate_block_sparse(q, k, top_k=top_k, block=block)
        assert got.device == q.device
        check_blocks(got, reference.block_scores(q, k, block), top_k)


def test_planted_block_is_found(place):
    q, k, _ = make_qkv(Case(1, 2, 1, 320, 448, 64), place)
    k[:, :, 128:192] += q.float().mean((0, 1, 2)).to(k.dtype) + 1
    q += 1
    got = sparseattn.estimate_block_sparse(q, k, top_k=2)
    rows = torch.arange(5, device=q.device)
    expected = torch.zeros(5, 7, dtype=torch.bool, device=q.device)
    expected[rows, rows + 2] = True
    expected[:, 2] = True
    assert torch.equal(got[:, :, 1:], expected[1:].expand(1, 2, 4, 7))
    assert torch.equal(got, reference.estimate_block_sparse(q, k, top_k=2))


def test_equal_block_scores_rank_by_index(place):
    q, k, _ = make_qkv(Case(1, 2, 1, 640, 640, 64), place)
    got = sparseattn.estimate_block_sparse(q * 0, k, top_k=3)
    expected = torch.zeros(10, 10, dtype=torch.bool)
    for row in range(10):
        chosen = [row, *[j for j in range(10) if j < row][:2]]
        expected[row, chosen] = True
    assert torch.equal(got.cpu(), expected.expand(1, 2, 10, 10))


def test_no_row_is_empty(place):
    """With every estimate the first row of each query block still sees its own key."""
    case = Case(1, 4, 2, 150, 345, 64)
    q, k, v = make_qkv(case, place)
    blocks = sparseattn.estimate_block_sparse(q, k, top_k=1)
    _, lse = sparseattn.block_sparse_attention(q, k, v, blocks, return_lse=True)
    assert lse.isfinite().all()
