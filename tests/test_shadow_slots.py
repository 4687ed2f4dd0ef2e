"""The slots of values: plans against a model, and the copies."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Place, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow_inputs import needs

from sparseattn import reference, shadow


def new_table(place: Place, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.full(shape, -1, dtype=torch.int32, device=place.device)
    return table, torch.zeros_like(table)


def as_ids(lists, place: Place) -> torch.Tensor:
    return torch.tensor(lists, dtype=torch.int32, device=place.device)


def check_step(selected, table, used) -> torch.Tensor:
    """Runs one step in place and compares it with the model; returns the number of misses."""
    before = table.tolist(), used.tolist()
    slot_of, misses, counts = shadow.shadow_plan_(selected, table, used)
    top_k = selected.shape[2]
    for b in range(selected.shape[0]):
        for h in range(selected.shape[1]):
            ids = selected[b, h].tolist()
            model = reference.shadow_plan(ids, before[0][b][h], before[1][b][h])
            slots, missed, chunks, stamps = model
            assert slot_of[b, h].tolist() == slots
            assert counts[b, h] == len(missed)
            pads = [[-1, -1]] * (top_k - len(missed))
            assert misses[b, h].tolist() == [list(x) for x in missed] + pads
            assert table[b, h].tolist() == chunks and used[b, h].tolist() == stamps
            # What any plan must do, whatever the order of eviction.
            held = [c for c in chunks if c >= 0]
            assert len(held) == len(set(held)), "a chunk has one slot"
            old = {c: s for s, c in enumerate(before[0][b][h]) if c >= 0}
            for c, s in zip(ids, slots, strict=True):
                assert s == -1 if c < 0 else chunks[s] == c
                assert c not in old or old[c] == s, "who has a slot keeps it"
    return counts


steps = st.lists(  # a list of steps, each a set of chunks for each of two heads
    st.tuples(*[st.sets(st.integers(0, 30), max_size=6)] * 2), min_size=1, max_size=12
)


@given(steps=steps, slots=st.integers(6, 24))
@settings(max_examples=100)
def test_plans_are_those_of_the_model(steps, slots):
    place = Place("cpu", torch.float32)
    table, used = new_table(place, 1, 2, slots)
    for step in steps:
        ids = [sorted(x) + [-1] * (6 - len(x)) for x in step]
        check_step(as_ids([ids], place), table, used)


@pytest.mark.parametrize("top_k, slots, chunks", [(1, 1, 5), (64, 64, 700), (100, 300, 420)])
def test_long_runs(top_k, slots, chunks, main_place):
    """Half of a selection stays from step to step, as it does in decoding."""
    place = main_place
    needs(place, "shadow_plan_")
    gen = torch.Generator().manual_seed(0)
    table, used = new_table(place, 2, 3, slots)
    ids = torch.rand(2, 3, chunks, generator=gen).argsort(-1)
    for _ in range(12):
        selected = ids[..., :top_k].sort(-1).values.int()
        check_step(selected.to(place.device), table, used)
        keep = top_k // 2
        rest = ids[..., keep:]
        order = torch.rand(rest.shape, generator=gen).argsort(-1)
        ids = torch.cat([ids[..., :keep], rest.gather(-1, order)], -1)
        ids = torch.cat([ids[..., 1:top_k], ids[..., :1], ids[..., top_k:]], -1)


def test_all_hits_and_all_misses(main_place):
    place = main_place
    needs(place, "shadow_plan_")
    table, used = new_table(place, 2, 2, 10)
    first = as_ids([[[1, 4, 6, 9]] * 2] * 2, place)
    assert (check_step(first, table, used) == 4).all()
    assert table[0, 0].tolist() == [1, 4, 6, 9] + [-1] * 6, "empty slots first, the lower before"
    assert (check_step(first, table, used) == 0).all()
    assert used[0, 0].tolist() == [2] * 4 + [0] * 6
    other = as_ids([[[0, 2, 3, 5]] * 2] * 2, place)
    assert (check_step(other, table, used) == 4).all()
    assert table[0, 0].tolist() == [1, 4, 6, 9, 0, 2, 3, 5, -1, -1]
    assert (check_step(as_ids([[[1, 7, 8, 20]] * 2] * 2, place), table, used) == 3).all()
    assert table[0, 0].tolist() == [1, 20, 6, 9, 0, 2, 3, 5, 7, 8], "two empty, then the oldest"
    assert (check_step(as_ids([[[-1] * 4] * 2] * 2, place), table, used) == 0).all()


def test_no_more_slots_than_asked_for(main_place):
    place = main_place
    needs(place, "shadow_plan_")
    table, used = new_table(place, 1, 1, 3)
    for ids in ([0, 1, 2], [3, 4, 5], [4, 5, 6], [-1, -1, -1], [2, 4, 6]):
        check_step(as_ids([[ids]], place), table, used)


def test_an_empty_selection(main_place):
    place = main_place
    needs(place, "shadow_plan_")
    table, used = new_table(place, 2, 1, 4)
    slot_of, misses, counts = shadow.shadow_plan_(
        torch.empty(2, 1, 0, dtype=torch.int32, device=place.device), table, used
    )
    assert slot_of.shape == (2, 1, 0) and misses.shape == (2, 1, 0, 2) and (counts == 0).all()
    assert (table == -1).all()


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, chunk", [(64, 4), (96, 8), (128, 8), (128, 32)])
def test_gather(dim, chunk, place):
    """Slots take the missed chunks, other slots keep what they have, other chunks are not read."""
    needs(place, "gather_values_")
    store = randn(2, 3, 40, chunk * dim, place=place, seed=0)
    values = torch.full((2, 3, 12, chunk * dim), 7.0, device=place.device, dtype=place.dtype)
    pairs = [(3, 39), (0, 0), (11, 17), (5, 5)]
    counts = as_ids([[4, 0, 1], [2, 3, 4]], place)
    misses = as_ids([[[*pairs, (-1, -1)]] * 3] * 2, place)
    used = torch.zeros(40, dtype=torch.bool, device=place.device)
    used[[c for _, c in pairs]] = True
    store[:, :, ~used] = math.nan
    shadow.gather_values_(store, values, misses, counts)
    for b in range(2):
        for h in range(3):
            n = int(counts[b, h])
            for slot, chunk_id in pairs[:n]:
                assert torch.equal(values[b, h, slot], store[b, h, chunk_id])
            others = sorted(set(range(12)) - {s for s, _ in pairs[:n]})
            assert (values[b, h, others] == 7).all()


def test_gather_drops_what_is_out_of_range(place):
    needs(place, "gather_values_")
    store = randn(1, 1, 5, 8 * 64, place=place, seed=0)
    values = torch.zeros(1, 1, 4, 8 * 64, device=place.device, dtype=place.dtype)
    large = 2**31 - 1
    pairs = [(4, 0), (-1, 0), (0, 5), (1, -1), (large, 0), (2, large), (-large, 1), (3, 4)]
    misses = as_ids([[pairs]], place)
    for count in (8, 1000, large):
        shadow.gather_values_(store, values.zero_(), misses, as_ids([[count]], place))
        assert (values[0, 0, :3] == 0).all() and torch.equal(values[0, 0, 3], store[0, 0, 4])
    shadow.gather_values_(store, values.zero_(), misses, as_ids([[-3]], place))
    assert (values == 0).all()


def test_gather_takes_views(place):
    """Batch and heads may lie in any order, the rows of a head one after the other."""
    needs(place, "gather_values_")
    store = randn(3, 2, 9, 4 * 64, place=place, seed=0)
    plain = torch.zeros(2, 3, 5, 4 * 64, device=place.device, dtype=place.dtype)
    spread = torch.zeros(3, 2, 8, 4 * 64, device=place.device, dtype=place.dtype)
    view = spread.transpose(0, 1)[:, :, 2:7]
    misses = as_ids([[[(1, 8), (4, 2)]] * 3] * 2, place)
    counts = as_ids([[2, 1, 2]] * 2, place)
    shadow.gather_values_(store.transpose(0, 1), plain, misses, counts)
    shadow.gather_values_(store.transpose(0, 1), view, misses, counts)
    assert torch.equal(plain, view) and (plain[:, 0, 1] == store.transpose(0, 1)[:, 0, 8]).all()
    assert (spread[:, :, :2] == 0).all() and (spread[:, :, 7:] == 0).all()


@pytest.mark.cuda
def test_gather_from_pinned_memory():
    place = Place("cuda", torch.bfloat16)
    needs(place, "gather_values_")
    store = randn(1, 2, 30, 8 * 128, place=Place("cpu", torch.bfloat16), seed=0).pin_memory()
    values = torch.zeros(1, 2, 6, 8 * 128, device="cuda", dtype=torch.bfloat16)
    misses = as_ids([[[(5, 29), (0, 3)]] * 2], place)
    shadow.gather_values_(store, values, misses, as_ids([[2, 2]], place))
    assert torch.equal(values[:, :, [5, 0]].cpu(), store[:, :, [29, 3]])
