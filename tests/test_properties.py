"""Properties of the cover rule and of plans, drawn by hypothesis, seen through public calls."""

from __future__ import annotations

import torch
from helpers import (
    Case,
    block_masks,
    check_attention,
    check_mask,
    full_mask,
    make_qkv,
    random_lists,
    vertical_slash_masks,
)
from hypothesis import given
from hypothesis import strategies as st

import sparseattn
from sparseattn import reference

SEEDS = st.integers(0, 2**16)


@st.composite
def lengths(draw, longest: int = 400) -> tuple[int, int]:
    near_edges = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193])
    kv_len = draw(st.one_of(near_edges, st.integers(1, longest)))
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    return q_len, kv_len


@st.composite
def slash_lists(draw):
    """Lengths and two lists, values a little out of range included."""
    q_len, kv_len = draw(lengths())
    values = st.integers(-2, kv_len + 70)
    starts = draw(st.lists(values, max_size=6))
    runs = draw(st.lists(st.integers(1, 40), min_size=len(starts), max_size=len(starts)))
    offsets = [s + i for s, n in zip(starts, runs, strict=True) for i in range(n)]
    columns = draw(st.lists(values, max_size=40))
    return q_len, kv_len, columns, draw(st.permutations(offsets))


def tensor(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device).reshape(1, 1, -1)


@given(slash_lists())
def test_cover_rule(main_place, drawn):
    """Exactly the keys of the definition, each once."""
    q_len, kv_len, columns, offsets = drawn
    lists = tensor(columns, main_place.device), tensor(offsets, main_place.device)
    case = Case(1, 1, 1, q_len, kv_len, 128)
    mask = reference.vertical_slash_mask(q_len, kv_len, columns, offsets)

    def attend(q, k, v):
        return sparseattn.vertical_slash_attention(q, k, v, *lists, return_lse=True)

    check_mask(attend, mask.to(main_place.device)[None, None], case, main_place)


@given(lengths(), st.integers(0, 200), st.integers(0, 200))
def test_a_shape_rule(main_place, drawn, sink, window):
    q_len, kv_len = drawn
    case = Case(1, 1, 1, q_len, kv_len, 128)
    mask = reference.a_shape_mask(q_len, kv_len, sink, window, main_place.device)

    def attend(q, k, v):
        return sparseattn.a_shape_attention(q, k, v, sink=sink, window=window, return_lse=True)

    check_mask(attend, mask[None, None], case, main_place)


@given(lengths(), st.sampled_from([64, 128]), st.sampled_from([64, 128]), SEEDS)
def test_block_rule(main_place, drawn, block_q, block_kv, seed):
    q_len, kv_len = drawn
    case = Case(1, 1, 1, q_len, kv_len, 128)
    shape = (1, 1, -(-q_len // block_q), -(-kv_len // block_kv))
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = block_masks(case, blocks, block_q, block_kv).to(main_place.device)
    blocks = blocks.to(main_place.device)

    def attend(q, k, v):
        return sparseattn.block_sparse_attention(
            q, k, v, blocks, block_q=block_q, block_kv=block_kv, return_lse=True
        )

    check_mask(attend, mask, case, main_place)


@given(lengths(), st.integers(0, 60), st.integers(0, 20), SEEDS)
def test_lists_are_sets(main_place, drawn, num_columns, num_offsets, seed):
    """Shuffling, repeating and padding the lists changes no bit of the result."""
    case = Case(1, 2, 1, *drawn, 64)
    q, k, v = make_qkv(case, main_place, seed)
    lists = random_lists(case, num_columns, num_offsets, seed)
    gen = torch.Generator().manual_seed(seed)
    other = []
    for x in lists:
        padded = torch.cat([x, x, torch.full_like(x, -1)], dim=-1)
        other.append(padded[..., torch.randperm(padded.shape[-1], generator=gen)])
    results = [
        sparseattn.vertical_slash_attention(
            q, k, v, *(x.to(main_place.device) for x in pair), return_lse=True
        )
        for pair in (lists, other)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(lengths(300), st.integers(0, 30), st.integers(0, 10), SEEDS)
def test_errors_stay_within_the_bound(place, drawn, num_columns, num_offsets, seed):
    case = Case(2, 2, 1, *drawn, 64)
    q, k, v = make_qkv(case, place, seed)
    lists = random_lists(case, num_columns, num_offsets, seed)
    out, lse = sparseattn.vertical_slash_attention(
        q, k, v, *(x.to(place.device) for x in lists), return_lse=True
    )
    check_attention(out, lse, q, k, v, vertical_slash_masks(case, *lists).to(place.device))


@given(lengths(300), st.integers(1, 4), SEEDS)
def test_appended_rows_see_what_the_whole_call_sees(main_place, drawn, tiles, seed):
    """The last rows alone, cut at a tile's edge, are the rows of the whole call: the cover depends
    on a tile's end only."""
    first = 64 * tiles
    q_len, kv_len = (n + first for n in drawn)
    case = Case(1, 2, 2, q_len, kv_len, 64)
    q, k, v = make_qkv(case, main_place, seed)
    lists = [x.to(main_place.device) for x in random_lists(case, 20, 8, seed)]
    whole = sparseattn.vertical_slash_attention(q, k, v, *lists, return_lse=True)
    part = sparseattn.vertical_slash_attention(q[:, :, first:], k, v, *lists, return_lse=True)
    mask = vertical_slash_masks(case, *(x.cpu() for x in lists)).to(main_place.device)
    check_attention(*part, q[:, :, first:], k, v, mask[:, :, first:])
    tolerance = 4 * torch.finfo(main_place.dtype).eps
    torch.testing.assert_close(part[0], whole[0][:, :, first:], rtol=tolerance, atol=tolerance)


@given(lengths(300), st.integers(0, 120), st.integers(0, 120), st.integers(1, 64), SEEDS)
def test_estimates_are_sorted_sets_within_the_prompt(
    main_place, drawn, num_columns, num_offsets, last_q, seed
):
    q_len, kv_len = drawn
    q, k, _v = make_qkv(Case(2, 2, 1, q_len, kv_len, 64), main_place, seed)
    found = sparseattn.estimate_vertical_slash(
        q, k, num_columns=num_columns, num_offsets=num_offsets, last_q=last_q, sink=5, local=9
    )
    for values, count, forced in zip(found, (num_columns, num_offsets), (5, 9), strict=True):
        kept = min(count, kv_len)
        assert values.shape == (2, 2, count)
        assert (values[..., kept:] == -1).all() and (values[..., :kept] < kv_len).all()
        assert (values[..., :kept].diff(dim=-1) > 0).all()
        forced = min(forced, kept)
        expected = torch.arange(forced, device=values.device).expand(2, 2, -1)
        assert torch.equal(values[..., :forced].long(), expected)


@given(lengths(300), SEEDS)
def test_dense_is_every_patterns_limit(main_place, drawn, seed):
    q_len, kv_len = drawn
    case = Case(1, 4, 2, q_len, kv_len, 64)
    q, k, v = make_qkv(case, main_place, seed)
    patterns = [
        sparseattn.Dense(),
        sparseattn.AShape(0, kv_len),
        sparseattn.VerticalSlash(0, kv_len),
        sparseattn.BlockSparse(-(-kv_len // 64)),
    ]
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True)
    mask = full_mask(reference.dense_mask(q_len, kv_len, main_place.device), case)
    check_attention(out, lse, q, k, v, mask)
