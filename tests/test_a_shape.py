"""a_shape_attention against the oracle."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CASES,
    LAYOUTS,
    Case,
    check_attention,
    check_mask,
    check_no_influence,
    full_mask,
    make_qkv,
    merge,
    poison_unseen,
    relayout,
)

import sparseattn
from sparseattn import reference

SIZES = [(0, 1), (5, 0), (30, 100), (64, 64), (0, 0), (1, 63), (100_000, 0), (0, 2**31 - 1)]


def mask_of(case: Case, sink: int, window: int, device: str) -> torch.Tensor:
    return full_mask(reference.a_shape_mask(case.q_len, case.kv_len, sink, window, device), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_oracle(case, place):
    for seed, (sink, window) in enumerate(SIZES):
        q, k, v = make_qkv(case, place, seed)
        mask = mask_of(case, sink, window, place.device)
        k, v = poison_unseen(k, v, mask)
        out, lse = sparseattn.a_shape_attention(q, k, v, sink=sink, window=window, return_lse=True)
        check_attention(out, lse, q, k, v, mask)
        alone = sparseattn.a_shape_attention(q, k, v, sink=sink, window=window)
        assert torch.equal(alone, out), "asking for the LSE changes no bit"


@pytest.mark.parametrize("case", [Case(1, 2, 1, 200, 200, 64), Case(2, 2, 2, 70, 333, 64)], ids=str)
@pytest.mark.parametrize("sink, window", [(3, 70), (64, 1), (130, 65), (0, 0)])
def test_mask_to_the_key(case, sink, window, main_place):
    def attend(q, k, v):
        return sparseattn.a_shape_attention(q, k, v, sink=sink, window=window, return_lse=True)

    check_mask(attend, mask_of(case, sink, window, main_place.device), case, main_place)


def test_rows_that_see_nothing(place):
    q, k, v = make_qkv(Case(2, 4, 2, 100, 130, 64), place)
    k.fill_(torch.nan)
    v.fill_(torch.inf)
    out, lse = sparseattn.a_shape_attention(q, k, v, sink=0, window=0, return_lse=True)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, place):
    case = Case(2, 4, 2, 100, 170, 64)
    q, k, v = make_qkv(case, place)
    expected = sparseattn.a_shape_attention(q, k, v, sink=4, window=50, return_lse=True)
    mask = mask_of(case, 4, 50, place.device)
    check_attention(*expected, q, k, v, mask)
    for which in range(3):
        inputs = [q, k, v]
        inputs[which] = relayout(inputs[which], layout)
        got = sparseattn.a_shape_attention(*inputs, sink=4, window=50, return_lse=True)
        check_attention(*got, q, k, v, mask)


def test_broadcast_batch_and_heads(place):
    case = Case(3, 4, 2, 65, 130, 64)
    q, k, v = make_qkv(case, place)
    q, k, v = q[:1].expand_as(q), k[:, :1].expand_as(k), v[:1, :1].expand_as(v)
    out, lse = sparseattn.a_shape_attention(q, k, v, sink=4, window=50, return_lse=True)
    check_attention(out, lse, q, k, v, mask_of(case, 4, 50, place.device))


def test_output_layout(main_place):
    q, k, v = make_qkv(Case(2, 4, 2, 33, 65, 64), main_place)
    out, lse = sparseattn.a_shape_attention(q, k, v, sink=4, window=50, return_lse=True)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    assert lse.shape == (2, 4, 33) and lse.dtype == torch.float32 and lse.is_contiguous()


@pytest.mark.parametrize("scale", [0.01, 0.5, 1.0])
def test_scale(scale, place):
    case = Case(1, 2, 2, 130, 130, 64)
    q, k, v = make_qkv(case, place)
    out, lse = sparseattn.a_shape_attention(
        q, k, v, sink=4, window=50, scale=scale, return_lse=True
    )
    check_attention(out, lse, q, k, v, mask_of(case, 4, 50, place.device), scale)


@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_large_scores(factor, place):
    """From soft rows to rows where one key takes all; weights overflow without a running max."""
    case = Case(1, 2, 1, 150, 150, 128)
    q, k, v = make_qkv(case, place)
    q = q * factor
    out, lse = sparseattn.a_shape_attention(q, k, v, sink=4, window=90, return_lse=True)
    check_attention(out, lse, q, k, v, mask_of(case, 4, 90, place.device))


def test_one_dominating_key_and_equal_scores(place):
    case = Case(1, 2, 1, 200, 200, 64)
    q, k, v = make_qkv(case, place)
    q[:, 0] = 0  # every score equal
    q[:, 1] = 1
    k[:, :, 2] = 8  # score 64 in head 1, from the sinks
    out, lse = sparseattn.a_shape_attention(q, k, v, sink=4, window=30, return_lse=True)
    check_attention(out, lse, q, k, v, mask_of(case, 4, 30, place.device))


@pytest.mark.parametrize(
    "case", [Case(1, 4, 2, 200, 200, 64), Case(2, 2, 1, 100, 300, 128)], ids=str
)
def test_masked_finite_values_have_no_influence(case, place):
    q, k, v = make_qkv(case, place)

    def attend(q, k, v):
        return sparseattn.a_shape_attention(q, k, v, sink=3, window=40, return_lse=True)

    for seed in range(4):
        check_no_influence(attend, q, k, v, mask_of(case, 3, 40, place.device), seed)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_scores_that_rise(dim, place):
    """Scores that rise by tens and hundreds from step to step, for rows of either sign.

    A softmax whose reference is a maximum of earlier keys has to move it: 2^40 and 2^127, which
    are 28 and 88 here, are where sums grow large and exponentials overflow.
    """
    case = Case(1, 2, 1, 200, 1024, dim)
    q, k, v = make_qkv(case, place)
    stairs = torch.tensor([0.0, 3.0, 40.0, 41.0, 250.0, 0.0, 380.0, 382.0], device=place.device)
    q[..., 0] = 16.0
    q[:, :, 1::3, 0] = -16.0
    q[:, :, 2::3, 0] = 2.0
    k[..., 0] = (stairs.repeat_interleave(128) * dim**0.5 / 16).to(place.dtype)
    for sink, window in [(0, 5000), (130, 300)]:
        out, lse = sparseattn.a_shape_attention(q, k, v, sink=sink, window=window, return_lse=True)
        check_attention(out, lse, q, k, v, mask_of(case, sink, window, place.device))


def test_sinks_and_window_merge(place):
    """Where sinks and windows do not meet, the two parts join through their LSE."""
    case = Case(1, 4, 2, 100, 300, 64)
    q, k, v = make_qkv(case, place)
    parts = [
        sparseattn.a_shape_attention(q, k, v, sink=s, window=w, return_lse=True)
        for s, w in [(10, 0), (0, 64)]
    ]
    out, lse = merge(parts)
    check_attention(out.to(place.dtype), lse.float(), q, k, v, mask_of(case, 10, 64, place.device))


@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128])
def test_head_dims(dim, place):
    if place.device == "cuda" and dim < 64:
        pytest.skip("the GPU takes 64, 96, 128")
    case = Case(1, 2, 1, 129, 150, dim)
    q, k, v = make_qkv(case, place)
    mask = mask_of(case, 4, 70, place.device)
    k, v = poison_unseen(k, v, mask)
    out, lse = sparseattn.a_shape_attention(q, k, v, sink=4, window=70, return_lse=True)
    check_attention(out, lse, q, k, v, mask)
