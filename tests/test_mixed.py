"""sparse_attention: a pattern for every head, estimated and attended in one call."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, Case, Place, check_attention, full_mask, make_qkv, relayout

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash, reference

MIXES = {
    "all-kinds": [
        VerticalSlash(40, 110),
        Dense(),
        BlockSparse(2),
        AShape(10, 100),
        VerticalSlash(150, 60),
        AShape(0, 65),
        BlockSparse(1),
        VerticalSlash(5, 200),
    ],
    "all-dense": [Dense()] * 8,
    "all-a-shape": [AShape(h, 10 * h) for h in range(8)],
    "all-vertical-slash": [VerticalSlash(30 + h, 100 + 5 * h) for h in range(8)],
    "all-block-sparse": [BlockSparse(1 + h % 3) for h in range(8)],
    "empty-heads": [
        AShape(0, 0),
        VerticalSlash(0, 0),
        Dense(),
        VerticalSlash(0, 101),
        VerticalSlash(35, 0),
        AShape(0, 0),
        BlockSparse(1),
        VerticalSlash(0, 0),
    ],
}
CASES = [
    Case(2, 8, 2, 239, 301, 64),
    Case(1, 8, 8, 64, 500, 128),
    Case(1, 8, 1, 400, 400, 96),
    Case(2, 8, 4, 1, 90, 64),
]


def one_head(q, k, v, pattern, head: int):
    """A head of sparse_attention, composed from the single-pattern operators."""
    if isinstance(pattern, AShape):
        both = sparseattn.a_shape_attention(
            q, k, v, sink=pattern.sink, window=pattern.window, return_lse=True
        )
    elif isinstance(pattern, VerticalSlash):
        lists = sparseattn.estimate_vertical_slash(
            q, k, num_columns=pattern.columns, num_offsets=pattern.offsets
        )
        both = sparseattn.vertical_slash_attention(q, k, v, *lists, return_lse=True)
    elif isinstance(pattern, BlockSparse):
        blocks = sparseattn.estimate_block_sparse(q, k, top_k=pattern.top_k)
        both = sparseattn.block_sparse_attention(q, k, v, blocks, return_lse=True)
    else:
        both = None
    return None if both is None else (both[0][:, head], both[1][:, head])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_estimate_then_attention(case, mix, place):
    patterns = MIXES[mix]
    q, k, v = make_qkv(case, place)
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True)
    mask = full_mask(reference.dense_mask(case.q_len, case.kv_len, place.device), case)
    group = case.q_heads // case.kv_heads
    for head, pattern in enumerate(patterns):
        expected = one_head(q, k, v, pattern, head)
        if expected is None:
            h, g = slice(head, head + 1), slice(head // group, head // group + 1)
            check_attention(out[:, h], lse[:, h], q[:, h], k[:, g], v[:, g], mask[:, h])
        else:
            assert torch.equal(out[:, head], expected[0]), f"head {head}, {pattern}"
            assert torch.equal(lse[:, head], expected[1]), f"head {head}, {pattern}"
    assert torch.equal(sparseattn.sparse_attention(q, k, v, patterns), out)


def separable(place: Place, q_len: int, kv_len: int):
    """q and k whose masses lie far apart, so that fp64 and the operators select the same."""
    case = Case(2, 4, 2, q_len, kv_len, 64)
    q, k, v = make_qkv(case, place)
    q, k = q * 0.05, k * 0.05
    q[..., 0] = 8
    steps = torch.linspace(0, 24, kv_len, device=place.device)
    order = torch.randperm(kv_len, generator=torch.Generator().manual_seed(0)).to(place.device)
    k[:, :, order, 0] = steps.to(place.dtype)
    return case, q, k, v


@pytest.mark.parametrize("q_len, kv_len", [(200, 200), (129, 300)])
def test_against_oracle(q_len, kv_len, place):
    """End to end, estimates included, on inputs whose selection is clear."""
    _case, q, k, v = separable(place, q_len, kv_len)
    patterns = [VerticalSlash(45, 0), BlockSparse(2), AShape(4, 40), Dense()]
    mask = reference.pattern_mask(q, k, patterns)
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True)
    check_attention(out, lse, q, k, v, mask)


def test_scale_reaches_every_kind(place):
    """AShape and Dense have no estimate: the oracle applies; estimates keep 1 / sqrt(D)."""
    case = Case(1, 2, 1, 130, 150, 64)
    q, k, v = make_qkv(case, place)
    patterns = [AShape(4, 40), Dense()]
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, scale=0.3, return_lse=True)
    mask = reference.pattern_mask(q, k, patterns)
    check_attention(out, lse, q, k, v, mask, 0.3)

    patterns = [VerticalSlash(35, 105), BlockSparse(2)]
    out = sparseattn.sparse_attention(q, k, v, patterns, scale=0.3)
    lists = sparseattn.estimate_vertical_slash(q, k, num_columns=35, num_offsets=105)
    blocks = sparseattn.estimate_block_sparse(q, k, top_k=2)
    assert torch.equal(
        out[:, 0], sparseattn.vertical_slash_attention(q, k, v, *lists, scale=0.3)[:, 0]
    )
    assert torch.equal(
        out[:, 1], sparseattn.block_sparse_attention(q, k, v, blocks, scale=0.3)[:, 1]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, place):
    case = Case(2, 8, 4, 130, 230, 64)
    q, k, v = make_qkv(case, place)
    expected = sparseattn.sparse_attention(q, k, v, MIXES["all-kinds"])
    got = sparseattn.sparse_attention(*(relayout(x, layout) for x in (q, k, v)), MIXES["all-kinds"])
    assert torch.equal(got, expected), "strides change no bit"


def test_full_patterns_are_dense(place):
    case = Case(1, 4, 2, 150, 210, 64)
    q, k, v = make_qkv(case, place)
    patterns = [VerticalSlash(210, 0), VerticalSlash(0, 210), BlockSparse(4), AShape(0, 210)]
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True)
    mask = full_mask(reference.dense_mask(150, 210, place.device), case)
    check_attention(out, lse, q, k, v, mask)


def test_patterns_may_be_a_tuple(main_place):
    q, k, v = make_qkv(Case(1, 2, 1, 70, 70, 64), main_place)
    patterns = [AShape(4, 40), BlockSparse(1)]
    assert torch.equal(
        sparseattn.sparse_attention(q, k, v, tuple(patterns)),
        sparseattn.sparse_attention(q, k, v, patterns),
    )


def test_torch_op_takes_flat_patterns(main_place):
    q, k, v = make_qkv(Case(1, 8, 4, 100, 200, 64), main_place)
    patterns = MIXES["all-kinds"]
    flat = [x for p in patterns for x in (p.code, *p.sizes())]
    out, lse = torch.ops.sparseattn.sparse_attention(q, k, v, flat, return_lse=True)
    expected = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
