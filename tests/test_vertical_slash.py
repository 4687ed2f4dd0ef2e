"""vertical_slash_attention against the oracle."""

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
    random_lists,
    relayout,
    vertical_slash_masks,
)
from torch import Tensor

import sparseattn
from sparseattn import reference


def attend(q, k, v, columns, offsets, **options):
    return sparseattn.vertical_slash_attention(
        q, k, v, columns, offsets, return_lse=True, **options
    )


def lists_of(case: Case, columns, offsets, device: str) -> tuple[Tensor, Tensor]:
    """The same lists for every head, stride 0."""
    shape = (case.batch, case.q_heads, -1)
    return tuple(
        torch.tensor(x, dtype=torch.int32, device=device).expand(shape) for x in (columns, offsets)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_against_oracle(case, index_dtype, place):
    for seed, sizes in enumerate([(20, 10), (150, 8), (8, 0), (0, 9), (0, 0)]):
        q, k, v = make_qkv(case, place, seed)
        columns, offsets = random_lists(case, *sizes, seed, index_dtype)
        mask = vertical_slash_masks(case, columns, offsets).to(place.device)
        k, v = poison_unseen(k, v, mask)
        out, lse = attend(q, k, v, columns.to(place.device), offsets.to(place.device))
        check_attention(out, lse, q, k, v, mask)


# Tile edges, unaligned starts, runs that merge or just do not, the clip at key 0, own rows.
EDGES = [
    ([], [0]),
    ([], [1]),
    ([], [63]),
    ([], [64]),
    ([], [0, 64, 128]),
    ([], [0, 65, 130]),
    ([], [0, 63, 127]),
    ([], [10, 11, 12, 80, 150, 151]),
    ([], [170, 199, 200, 201, 230, 262, 263, 264]),
    ([], [201]),
    ([], [240]),
    ([0], []),
    ([0, 63, 64, 127, 128, 199], []),
    (list(range(200)), []),
    ([150, 10, 10, 150, 60, 61], [40, 40, 5]),
    (list(range(0, 200, 3)), [0, 20, 90]),
    (list(range(120, 200)), [30, 100]),
    ([-1, 5, -1], [-1, -1, 7]),
]


@pytest.mark.parametrize("columns, offsets", EDGES, ids=lambda x: None)
def test_mask_to_the_key(columns, offsets, main_place):
    for case in [Case(1, 1, 1, 200, 200, 128), Case(1, 2, 1, 75, 201, 128)]:
        lists = lists_of(case, columns, offsets, main_place.device)
        mask = reference.vertical_slash_mask(case.q_len, case.kv_len, columns, offsets)
        check_mask(
            lambda q, k, v: attend(q, k, v, *lists),  # noqa: B023
            full_mask(mask, case).to(main_place.device),
            case,
            main_place,
        )


def test_every_slash_alignment(main_place):
    """One head for each start of a run within a tile, 1 .. 63 rows off."""
    case = Case(1, 64, 1, 130, 300, 128)
    columns = torch.full((1, 64, 1), -1, dtype=torch.int32)
    offsets = torch.stack([torch.arange(64), torch.arange(64) * 3 + 1], dim=-1).unsqueeze(0)
    offsets = offsets.int()
    mask = vertical_slash_masks(case, columns, offsets).to(main_place.device)
    lists = columns.to(main_place.device), offsets.to(main_place.device)
    check_mask(lambda q, k, v: attend(q, k, v, *lists), mask, case, main_place)


def test_order_and_duplicates_change_no_bit(place):
    case = Case(2, 4, 2, 150, 260, 64)
    q, k, v = make_qkv(case, place)
    columns, offsets = (x.to(place.device) for x in random_lists(case, 40, 12, seed=1))
    expected = attend(q, k, v, columns, offsets)
    for change in (lambda x: x.flip(-1), lambda x: torch.cat([x, x], -1), lambda x: x.sort(-1)[0]):
        got = attend(q, k, v, change(columns).contiguous(), change(offsets).contiguous())
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_columns_inside_the_slash_count_once(place):
    case = Case(1, 2, 1, 190, 190, 64)
    q, k, v = make_qkv(case, place)
    none, offsets = lists_of(case, [], [0, 100], place.device)
    slash_only = attend(q, k, v, none, offsets)
    columns = torch.arange(190, dtype=torch.int32, device=place.device).expand(1, 2, -1)
    both = attend(q, k, v, columns, offsets)
    mask = reference.dense_mask(190, 190, place.device)
    check_attention(*both, q, k, v, full_mask(mask, case))
    assert not torch.equal(both[0], slash_only[0])


def test_full_lists_are_dense(place):
    case = Case(1, 4, 2, 140, 210, 64)
    q, k, v = make_qkv(case, place)
    mask = full_mask(reference.dense_mask(140, 210, place.device), case)
    everything = list(range(210))
    for columns, offsets in [(everything, []), ([], everything), (everything, everything)]:
        out, lse = attend(q, k, v, *lists_of(case, columns, offsets, place.device))
        check_attention(out, lse, q, k, v, mask)


def test_whole_batch_empty(place):
    case = Case(2, 4, 2, 70, 130, 64)
    q, k, v = make_qkv(case, place)
    k.fill_(torch.nan)
    v.fill_(torch.nan)
    for columns, offsets in [([-1, -1], [-1]), ([], []), ([130, 5000], [-5, 400])]:
        out, lse = attend(q, k, v, *lists_of(case, columns, offsets, place.device))
        assert (out == 0).all() and lse.isneginf().all()


def test_leading_rows_see_nothing(place):
    """Columns late in the prompt: all rows before them are empty, tiles and parts of tiles."""
    case = Case(1, 2, 2, 200, 200, 64)
    q, k, v = make_qkv(case, place)
    lists = lists_of(case, [150, 170], [], place.device)
    mask = full_mask(reference.vertical_slash_mask(200, 200, [150, 170], [], place.device), case)
    k, v = poison_unseen(k, v, mask)
    check_attention(*attend(q, k, v, *lists), q, k, v, mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, place):
    case = Case(2, 4, 2, 100, 170, 64)
    q, k, v = make_qkv(case, place)
    columns, offsets = random_lists(case, 30, 10, seed=4)
    mask = vertical_slash_masks(case, columns, offsets).to(place.device)
    columns, offsets = columns.to(place.device), offsets.to(place.device)
    views = [relayout(x, layout) for x in poison_unseen(k, v, mask)]
    out, lse = attend(relayout(q, layout), *views, columns, offsets)
    check_attention(out, lse, q, k, v, mask)


def test_list_strides(place):
    case = Case(2, 4, 1, 100, 170, 64)
    q, k, v = make_qkv(case, place)
    columns, offsets = (x.to(place.device) for x in random_lists(case, 30, 10, seed=5))
    expected = attend(q, k, v, columns, offsets)
    wide = torch.full((4, 2, 70), 7, dtype=torch.int32, device=place.device)
    view = wide.transpose(0, 1)[..., 3:63:2].copy_(columns)
    got = attend(q, k, v, view, offsets.transpose(0, 2).contiguous().transpose(0, 2))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    shared = columns[:1, :1].expand(2, 4, -1), offsets[:1, :1].expand(2, 4, -1)
    got = attend(q, k, v, *shared)
    expected = attend(q, k, v, *(x.contiguous() for x in shared))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_broadcast_batch(place):
    """Keys shared by the batch (stride 0), lists that differ."""
    case = Case(3, 4, 2, 65, 130, 64)
    q, k, v = make_qkv(case, place)
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    columns, offsets = random_lists(case, 30, 10, seed=6)
    out, lse = attend(q, k, v, columns.to(place.device), offsets.to(place.device))
    check_attention(out, lse, q, k, v, vertical_slash_masks(case, columns, offsets).to(out.device))


def test_masked_finite_values_have_no_influence(place):
    case = Case(1, 4, 2, 200, 260, 64)
    q, k, v = make_qkv(case, place)
    for seed in range(4):
        columns, offsets = random_lists(case, 20, 9, seed)
        mask = vertical_slash_masks(case, columns, offsets).to(place.device)
        lists = columns.to(place.device), offsets.to(place.device)
        check_no_influence(
            lambda q, k, v: attend(q, k, v, *lists),  # noqa: B023
            q,
            k,
            v,
            mask,
            seed,
        )


def test_disjoint_columns_merge(place):
    case = Case(2, 4, 2, 130, 260, 128)
    q, k, v = make_qkv(case, place)
    order = torch.randperm(260, generator=torch.Generator().manual_seed(0)).tolist()
    lists = [order[:60], order[60:100], order[100:230]]
    parts = [attend(q, k, v, *lists_of(case, columns, [], place.device)) for columns in lists]
    out, lse = merge(parts)
    mask = reference.vertical_slash_mask(130, 260, order[:230], [], place.device)
    check_attention(out.to(place.dtype), lse.float(), q, k, v, full_mask(mask, case))


@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_large_scores(factor, place):
    case = Case(1, 2, 1, 150, 210, 128)
    q, k, v = make_qkv(case, place)
    q = q * factor
    columns, offsets = random_lists(case, 30, 10, seed=8)
    out, lse = attend(q, k, v, columns.to(place.device), offsets.to(place.device))
    check_attention(out, lse, q, k, v, vertical_slash_masks(case, columns, offsets).to(out.device))


def test_long_prompt(place):
    """Many tiles and long lists, as real heads have them: clustered offsets, scattered columns."""
    case = Case(1, 2, 1, 2500, 3001, 128) if place.device == "cuda" else Case(1, 2, 1, 700, 900, 64)
    q, k, v = make_qkv(case, place)
    gen = torch.Generator().manual_seed(0)
    centres = torch.randint(0, case.kv_len, (1, 2, 12, 1), generator=gen)
    near = torch.randint(-20, 20, (1, 2, 12, 25), generator=gen)
    offsets = torch.cat([torch.arange(100).expand(1, 2, -1), (centres + near).flatten(2)], -1).int()
    columns = torch.randint(0, case.kv_len, (1, 2, 300), generator=gen).int()
    mask = vertical_slash_masks(case, columns, offsets).to(place.device)
    k, v = poison_unseen(k, v, mask)
    out, lse = attend(q, k, v, columns.to(place.device), offsets.to(place.device))
    check_attention(out, lse, q, k, v, mask)
