"""Blocks selected by a share of the attention mass, and antidiagonal block scores."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ESTIMATE_CASES, Case, make_qkv, randn
from test_adaptive import SHARES
from torch import Tensor

import sparseattn
from sparseattn import reference

SCORES = [("mean", 16), ("antidiagonal", 4), ("antidiagonal", 16), ("antidiagonal", 32)]


def score_slack(scores: Tensor, method: str) -> float:
    """How far a score may be from the oracle's: fp32 sums, and on CUDA, where the oracle rounds
    residue means as the operator does, now and then a mean that is rounded the other way."""
    largest = scores.where(scores.isfinite(), 0.0).abs().max().item()
    flips = 0.02 if scores.is_cuda and method == "antidiagonal" else 0.0
    return 2e-5 * largest + 1e-6 + flips


@pytest.mark.parametrize(("method", "stride"), SCORES)
@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_block_share_against_oracle(case, method, stride, place):
    for seed, (top_k, block) in enumerate([(1, 64), (3, 128), (4, 64), (1000, 64)]):
        q, k, _ = make_qkv(case, place, seed)
        q, k = q * 2 + 0.2, k * 2 + 0.2
        how = {"block": block, "method": method, "stride": stride}
        scores = reference.block_scores(q, k, **how)
        weights = reference.block_weights(q, k, **how)
        slack = score_slack(scores, method)
        plain = sparseattn.estimate_block_sparse(q, k, top_k=top_k, **how)
        assert torch.equal(plain.sum(-1), (scores > -math.inf).sum(-1).clamp(max=top_k))
        check_best(plain, scores, slack)
        for share in SHARES:
            got = sparseattn.estimate_block_sparse(q, k, top_k=top_k, share=share, **how)
            assert (got <= plain).all(), "a share only drops blocks"
            assert got[scores.isposinf()].all(), "the block of the first row is forced"
            check_best(got, scores, slack)
            kept, near = (weights * got).sum(-1), 4 * slack * q.shape[-1] ** -0.5 + 1e-4
            full = got.sum(-1) == plain.sum(-1)
            assert (full | (kept >= share - near)).all(), "the share is not reached"
            # Without the least of those chosen (the forced one apart) the share is not reached.
            chosen = weights.masked_fill(~got | scores.isposinf(), math.inf)
            least = chosen.amin(-1)
            open_rows = least.isfinite()
            assert (kept - least < share + near)[open_rows].all(), "fewer would be enough"


def check_best(got: Tensor, scores: Tensor, slack: float) -> None:
    """No block left out scores more than one selected."""
    lowest = scores.masked_fill(~got, math.inf).amin(-1, keepdim=True)
    best_left = scores.masked_fill(got, -math.inf).amax(-1, keepdim=True)
    open_rows = lowest.isfinite() & best_left.isfinite()
    assert (best_left <= lowest + 2 * slack)[open_rows].all(), "a better block was left out"


def test_block_share_equals_oracle_where_scores_are_apart(place):
    """Scores a whole number of units apart: the same blocks to the last one."""
    blocks, dim = 12, 64
    gen = torch.Generator().manual_seed(0)
    levels = torch.stack([torch.randperm(blocks, generator=gen) for _ in range(2)])
    q = torch.zeros(1, 2, 64 * blocks, dim)
    k = torch.zeros(1, 2, 64 * blocks, dim)
    q[..., 0] = 4
    k[..., 0] = levels.repeat_interleave(64, dim=1)
    q, k = q.to(place.device, place.dtype), k.to(place.device, place.dtype)
    for method in ("mean", "antidiagonal"):
        counts = []
        for share in (0.1, 0.4, 0.6, 0.9, 0.99, 1.0):
            how = {"top_k": 9, "share": share, "method": method}
            got = sparseattn.estimate_block_sparse(q, k, **how)
            assert torch.equal(got, reference.estimate_block_sparse(q, k, **how))
            counts.append(got.sum().item())
        assert counts == sorted(counts) and counts[0] < counts[-1]


def test_equal_blocks_by_index(place):
    q, k, _ = make_qkv(Case(1, 1, 1, 640, 640, 64), place)
    got = sparseattn.estimate_block_sparse(q * 0, k, top_k=8, share=0.45)
    expected = torch.zeros(10, 10, dtype=torch.bool, device=q.device)
    for row in range(10):
        expected[row, row] = True
        expected[row, : math.ceil(0.45 * (row + 1)) - 1] = True
    assert torch.equal(got[0, 0], expected)


# --- antidiagonal scores ------------------------------------------------------------------------


def test_antidiagonal_scores_by_pairs():
    """The definition, pair by pair, on whole and on partial blocks."""
    q, k = torch.randn(1, 1, 150, 16), torch.randn(1, 1, 200, 16)
    products = (q @ k.mT)[0, 0].double()
    for stride in (4, 16):
        scores = reference.block_scores(q, k, 64, "antidiagonal", stride)[0, 0]
        i, j = torch.arange(64)[:, None], torch.arange(64)[None, :]
        pairs = (i + j) % stride == stride - 1
        for a, b in [(0, 1), (1, 0)]:
            block = products[64 * a : 64 * a + 64, 64 * b : 64 * b + 64]
            torch.testing.assert_close(scores[a, b], block[pairs].mean(), rtol=1e-5, atol=1e-6)
    # 22 query rows: all residues of stride 16, each the mean of the one or two rows it has.
    means = torch.stack([q[0, 0, 128 + r :: 16].mean(0) for r in range(16)])
    keys = torch.stack([k[0, 0, r:64:16].mean(0) for r in range(16)]).flip(0)
    got = reference.block_scores(q, k, 64, "antidiagonal", 16)[0, 0, 2, 0]
    torch.testing.assert_close(got, (means * keys).sum().double() / 16, rtol=1e-5, atol=1e-6)


def test_antidiagonal_finds_what_cancels_in_means(place):
    """q_i . k_j is +64 on odd diagonals of block 2 and -64 on even ones: its mean is 0."""
    rows = 64 * 6
    sign = (torch.arange(rows) % 2 * 2 - 1).to(place.device, place.dtype)
    q = randn(1, 2, rows, 64, place=place, seed=0) * 0.1
    k = randn(1, 1, rows, 64, place=place, seed=1) * 0.1
    q[..., 0] = 8 * sign
    k[:, :, 128:192, 0] = -8 * sign[128:192]
    for stride in (4, 8, 16, 32):
        got = sparseattn.estimate_block_sparse(q, k, top_k=2, method="antidiagonal", stride=stride)
        assert got[:, :, 2:, 2].all()
        scores = reference.block_scores(q, k, 64, "antidiagonal", stride)[:, :, 3:, 2]
        assert (scores - 64).abs().max() < 2
    mean = reference.block_scores(q, k, 64)[:, :, 3:, 2]
    assert mean.abs().max() < 2
    assert not sparseattn.estimate_block_sparse(q, k, top_k=2)[:, :, 3:, 2].all()


def test_antidiagonal_finds_a_column(place):
    q, k, _ = make_qkv(Case(1, 2, 1, 448, 448, 64), place)
    k[:, :, 150] += 8 * q.float().mean((0, 1, 2)).sign().to(k.dtype)
    q += 2 * q.float().mean((0, 1, 2)).sign().to(q.dtype)
    got = sparseattn.estimate_block_sparse(q, k, top_k=2, method="antidiagonal")
    assert got[:, :, 2:, 2].all()
