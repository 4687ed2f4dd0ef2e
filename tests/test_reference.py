"""The oracle itself, against the definitions spelt out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Case, Place, make_qkv, random_lists

from sparseattn import reference
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash

LENGTHS = [(1, 1), (1, 90), (64, 64), (65, 65), (130, 130), (70, 201)]
CPU = Place("cpu", torch.float64)


def pair_mask(q_len: int, kv_len: int, visible) -> torch.Tensor:
    """visible(row, position, key) for each pair with key <= position."""
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for row in range(q_len):
        position = row + kv_len - q_len
        for key in range(position + 1):
            mask[row, key] = visible(row, position, key)
    return mask


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
def test_dense_and_a_shape_masks(q_len, kv_len):
    expected = pair_mask(q_len, kv_len, lambda i, p, k: True)
    assert torch.equal(reference.dense_mask(q_len, kv_len), expected)
    for sink, window in [(0, 0), (0, 1), (3, 0), (4, 20), (500, 500)]:
        expected = pair_mask(q_len, kv_len, lambda i, p, k: k < sink or p - k < window)  # noqa: B023
        assert torch.equal(reference.a_shape_mask(q_len, kv_len, sink, window), expected)


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
def test_vertical_slash_mask(q_len, kv_len):
    gen = torch.Generator().manual_seed(q_len)
    for count in (0, 1, 4):
        columns = torch.randint(-2, kv_len + 2, (count,), generator=gen).tolist()
        offsets = torch.randint(-2, kv_len + 70, (count,), generator=gen).tolist()

        def visible(row, position, key):
            end = kv_len - q_len + 64 * (row // 64 + 1)
            covered = any(o >= 0 and end - 64 - o <= key <= end - o - 1 for o in offsets)  # noqa: B023
            return key in columns or covered  # noqa: B023

        expected = pair_mask(q_len, kv_len, visible)
        got = reference.vertical_slash_mask(q_len, kv_len, columns, offsets)
        assert torch.equal(got, expected)


def test_every_pair_on_a_listed_diagonal_is_covered():
    mask = reference.vertical_slash_mask(200, 300, [], [0, 77])
    rows = torch.arange(200)
    assert mask[rows, rows + 100].all() and mask[rows, rows + 23].all()


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("block_q, block_kv", [(64, 64), (64, 128), (128, 64)])
def test_block_sparse_mask(q_len, kv_len, block_q, block_kv):
    shape = (-(-q_len // block_q), -(-kv_len // block_kv))
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = pair_mask(q_len, kv_len, lambda i, p, k: blocks[i // block_q, k // block_kv])
    got = reference.block_sparse_mask(q_len, kv_len, blocks, block_q, block_kv)
    assert torch.equal(got, expected)


def test_attention_by_hand():
    q = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
    k = torch.tensor([0.5, -1.0, 2.0]).reshape(1, 1, 3, 1)
    v = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 1, 3, 1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    out, lse = reference.masked_attention(q, k, v, mask)
    first = [math.exp(0.5), math.exp(-1.0)]
    second = [math.exp(1.0), math.exp(4.0)]
    expected = [
        (10 * first[0] + 20 * first[1]) / sum(first),
        (10 * second[0] + 30 * second[1]) / sum(second),
    ]
    assert out.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert lse.flatten().tolist() == pytest.approx(
        [math.log(sum(first)), math.log(sum(second))], rel=1e-12
    )


def test_attention_agrees_with_torch():
    q, k, v = make_qkv(Case(2, 6, 2, 50, 80, 32), CPU)
    mask = torch.rand(2, 6, 50, 80, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    )
    out, lse = reference.masked_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    scores = (q @ k.repeat_interleave(3, 1).mT * 0.3).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_empty_rows_and_unseen_keys(monkeypatch):
    q, k, v = make_qkv(Case(1, 2, 1, 8, 8, 16), CPU)
    mask = reference.a_shape_mask(8, 8, sink=0, window=3).clone()
    mask[5] = False
    mask[:, 4] = False
    expected = reference.masked_attention(q, k, v, mask)
    k[:, :, 4], v[:, :, 4] = math.nan, math.inf
    monkeypatch.setattr(reference, "_CHUNK", 40)  # several chunks of rows give the same
    out, lse = reference.masked_attention(q, k, v, mask)
    torch.testing.assert_close((out, lse), expected, rtol=1e-14, atol=1e-14)
    assert (out[:, :, 5] == 0).all() and lse[:, :, 5].isneginf().all()
    assert out.isfinite().all()


def test_measures():
    q, k, _ = make_qkv(Case(2, 4, 2, 30, 50, 16), CPU)
    dense = reference.dense_mask(30, 50)
    assert reference.density(dense) == 1.0
    assert reference.density(dense & (torch.arange(50) < 10)) == pytest.approx(
        300 / sum(range(21, 51))
    )
    torch.testing.assert_close(reference.mass_kept(q, k, dense), torch.ones(2, 4).double())
    mask = torch.rand(2, 4, 30, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~dense, -math.inf)
    expected = (scores.softmax(-1) * mask).sum(-1).mean(-1)
    torch.testing.assert_close(reference.mass_kept(q, k, mask), expected)


def test_masses_pair_by_pair():
    q, k, _ = make_qkv(Case(1, 2, 1, 9, 20, 16), CPU)
    columns, offsets = reference.vertical_slash_mass(q, k, last_q=5)
    expected_columns, expected_offsets = torch.zeros(2, 2, 20, dtype=torch.float64)
    for head in range(2):
        for row in range(4, 9):
            position = row + 11
            scores = k[0, 0, : position + 1] @ q[0, head, row] / 4
            for key, weight in enumerate(scores.softmax(0)):
                expected_columns[head, key] += weight
                expected_offsets[head, position - key] += weight
    torch.testing.assert_close(columns[0], expected_columns)
    torch.testing.assert_close(offsets[0], expected_offsets)


def test_selection_order_forced_and_pads():
    q = torch.zeros(1, 1, 1, 16)
    k = torch.randn(1, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    columns, offsets = reference.estimate_vertical_slash(
        q, k, num_columns=3, num_offsets=9, sink=0, local=0
    )
    assert columns.tolist() == [[[0, 1, 2]]], "equal masses rank by the smaller index"
    assert offsets.tolist() == [[[0, 1, 2, 3, 4, 5, -1, -1, -1]]]
    q = -30 * k[:, :, :1]  # all mass away from key 0
    columns, _ = reference.estimate_vertical_slash(q, k, num_columns=1, num_offsets=0, sink=1)
    assert columns.tolist() == [[[0]]]


def test_block_estimate():
    q, k, _ = make_qkv(Case(1, 2, 1, 150, 331, 16), CPU)
    scores = reference.block_scores(q, k, 64)
    assert scores.shape == (1, 2, 3, 6)
    # Rows start at position 181: query block 0 spans 181..244, 1 spans 245..308, 2 309..330.
    assert scores[0, 0].isneginf().sum(-1).tolist() == [2, 1, 0]
    assert scores[0, 0].isposinf().nonzero().tolist() == [[0, 2], [1, 3], [2, 4]]
    expected = q[0, 1, 128:150].mean(0) @ k[0, 0, 320:].mean(0)
    torch.testing.assert_close(scores[0, 1, 2, 5], expected)
    mask = reference.estimate_block_sparse(q, k, top_k=5)
    assert mask.sum(-1).unique().tolist() == [4, 5]
    assert reference.estimate_block_sparse(q, k, top_k=1)[0, 0].nonzero().tolist() == [
        [0, 2],
        [1, 3],
        [2, 4],
    ]


def test_operator_forms():
    case = Case(2, 4, 2, 100, 130, 16)
    q, k, v = make_qkv(case, CPU)
    columns, offsets = random_lists(case, 10, 9, seed=0)
    patterns = [Dense(), AShape(4, 20), VerticalSlash(120, 30), BlockSparse(2)]
    out, _lse = reference.sparse_attention(q, k, v, patterns, return_lse=True)
    mask = reference.pattern_mask(q, k, patterns)
    assert torch.equal(out, reference.masked_attention(q, k, v, mask)[0])
    estimated = reference.estimate_vertical_slash(q, k, num_columns=120, num_offsets=30)
    forms = [
        reference.a_shape_attention(q, k, v, sink=0, window=130),
        reference.a_shape_attention(q, k, v, sink=4, window=20),
        reference.vertical_slash_attention(q, k, v, *estimated),
        reference.block_sparse_attention(q, k, v, reference.estimate_block_sparse(q, k, top_k=2)),
    ]
    for head, form in enumerate(forms):
        torch.testing.assert_close(out[:, head], form[:, head], rtol=1e-12, atol=1e-12)
    out = reference.vertical_slash_attention(q, k, v, columns, offsets)
    assert (out[:, -1] == 0).all() and out.dtype == torch.float64
