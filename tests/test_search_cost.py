"""Costs of patterns against brute force, default candidates, shrinking to a budget."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from sparseattn import search_cost
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash
from sparseattn.search_cost import (
    a_shape_cost,
    block_sparse_cost,
    budget_keys,
    default_candidates,
    dense_cost,
    fit,
    frontier,
    measured_cost,
    share_out,
    shrink,
    vertical_slash_cost,
)

TILE = 64
LENGTHS = [(1, 1), (64, 64), (200, 200), (1, 77), (130, 500), (640, 640)]


# Brute force: the keys of every query tile one by one, packed into boxes of 64.
def boxes_of(keys, from_the_end=False):
    """Boxes of 64 consecutive keys that hold all of ``keys``, packed from one end of each run."""
    count, edge = 0, None
    for key in sorted(keys, reverse=from_the_end):
        position = -key if from_the_end else key
        if edge is None or position >= edge:
            count, edge = count + 1, position + TILE
    return count


def brute_cost(q_len, kv_len, boxes):
    ends = [kv_len - q_len + TILE * (m + 1) for m in range(math.ceil(q_len / TILE))]
    return TILE * sum(map(boxes, ends)) / len(ends)


def causal_rows(end, kv_len):
    return range(end - TILE, min(end, kv_len))


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (0, 0), (64, 129), (30, 100), (200, 900)])
def test_a_shape_cost_counts_the_mask(q_len, kv_len, sink, window):
    def boxes(end):
        rows = causal_rows(end, kv_len)
        near = {k for p in rows for k in range(max(p - window + 1, 0), p + 1)} if window else set()
        far = {k for p in rows for k in range(min(sink, p + 1))} - near
        return boxes_of(far) + boxes_of(near)

    assert a_shape_cost(sink, window, q_len, kv_len) == brute_cost(q_len, kv_len, boxes)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_block_sparse_cost_counts_the_mask(q_len, kv_len, top_k):
    def boxes(end):
        blocks = {k // TILE for p in causal_rows(end, kv_len) for k in range(p + 1)}
        return min(top_k, len(blocks))

    assert block_sparse_cost(top_k, q_len, kv_len) == brute_cost(q_len, kv_len, boxes)
    assert block_sparse_cost(10**6, q_len, kv_len) == dense_cost(q_len, kv_len)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("seed", range(6))
def test_vertical_slash_cost_counts_the_mask(q_len, kv_len, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(-3, kv_len + 9, (seed * 17,), generator=generator)
    offsets = torch.cat(
        [
            torch.arange(seed * 40),
            torch.randint(-3, kv_len + 99, (seed * 2,), generator=generator),
            torch.tensor([256, 320, 321, -1]) if seed % 2 else torch.tensor([-1]),
        ]
    )

    def boxes(end):
        covered = {end - 1 - o - j for o in offsets.tolist() if o >= 0 for j in range(TILE)}
        runs, run = [], set()
        for key in sorted(covered, reverse=True):
            if run and key + 1 not in run:
                runs.append(run)
                run = set()
            run.add(key)
        runs.append(run)
        # Boxes fill a run from its near end; those that hold a key at or after the first count.
        slash = sum(len({(max(run) - key) // TILE for key in run if key >= 0}) for run in runs)
        packed = {c for c in columns.tolist() if 0 <= c < min(end, kv_len)}
        return slash + math.ceil(len(packed) / TILE)

    cost = vertical_slash_cost(columns, offsets, q_len, kv_len)
    assert cost == brute_cost(q_len, kv_len, boxes)


def test_isolated_offsets_cost_a_box_each():
    q_len = kv_len = 4096
    none = torch.zeros(0, dtype=torch.int32)
    close = vertical_slash_cost(none, torch.arange(16), q_len, kv_len)
    apart = vertical_slash_cost(none, 1 + 100 * torch.arange(16), q_len, kv_len)
    assert apart > 6 * close


@pytest.mark.parametrize(("length", "budget"), [(1024, 0.5), (8192, 0.1), (32768, 0.1)])
def test_default_candidates_cost_the_budget(length, budget):
    candidates = default_candidates(length, budget)
    assert {type(c) for c in candidates} == {AShape, VerticalSlash, BlockSparse}
    assert len(set(candidates)) == len(candidates)
    for candidate in candidates:
        if isinstance(candidate, AShape):
            cost = a_shape_cost(candidate.sink, candidate.window, length, length)
        elif isinstance(candidate, BlockSparse):
            cost = block_sparse_cost(candidate.top_k, length, length)
        else:  # columns spread over the prompt, offsets in one run
            columns = torch.linspace(0, length - 1, candidate.columns).long()
            cost = vertical_slash_cost(columns, torch.arange(candidate.offsets), length, length)
        assert 0.75 < cost / budget_keys(budget, length) < 1.05


def test_budget_is_checked():
    with pytest.raises(ValueError, match="at least 4 boxes of 64 keys a row, got 0"):
        default_candidates(512, 0.1)
    with pytest.raises(ValueError, match=r"budget: expected 0 < budget < 1, got 1\.5"):
        default_candidates(512, 1.5)
    with pytest.raises(TypeError, match="budget: expected float, got str"):
        default_candidates(512, "1")


def test_shrink():
    assert shrink(VerticalSlash(9, 1000), 2) == VerticalSlash(9, 562)
    assert shrink(VerticalSlash(9, 100), 1) == VerticalSlash(9, 75)
    assert shrink(VerticalSlash(9, 100), 2) == VerticalSlash(6, 75)
    assert shrink(VerticalSlash(9, 50), 1) == VerticalSlash(6, 50)
    assert shrink(VerticalSlash(1, 50), 1) is None
    assert shrink(AShape(9, 100), 1) == AShape(9, 75)
    assert shrink(AShape(9, 80), 1) is None
    assert shrink(BlockSparse(4), 3) == BlockSparse(1)
    assert shrink(BlockSparse(1), 1) is None
    assert shrink(Dense(), 1) is None
    assert shrink(Dense(), 0) == Dense()


def test_fit_takes_the_fewest_steps_within_the_limit():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 700, 64), torch.randn(1, 1, 700, 64)
    candidate = VerticalSlash(64, 640)
    full = measured_cost(candidate, q, k)
    steps, costs, within = fit(candidate, q, k, limit=0.6 * min(full))
    for head in range(2):
        assert within[head] and steps[head] > 0 and costs[head] <= 0.6 * min(full)
        less = measured_cost(shrink(candidate, steps[head] - 1), q, k)[head]
        assert less > 0.6 * min(full)
    assert fit(candidate, q, k, limit=None) == ([0, 0], full, [True, True])
    assert fit(candidate, q, k, limit=1.0)[2] == [False, False]


def test_heads_share_a_budget():
    """By hand: (error, cost) of three heads, at most 10 a head."""
    options = [
        [(0.5, 4.0), (0.4, 8.0), (0.05, 20.0)],  # 0.025 a key to the second, 0.028 to the third
        [(0.9, 4.0), (0.2, 8.0), (0.19, 20.0)],  # 0.175, then next to nothing
        [(0.3, 4.0), (0.3, 2.0)],  # the cheaper of two equals
    ]
    assert share_out(options, 10.0) == [2, 1, 1]  # 20 + 8 + 2
    assert share_out(options, 9.9) == [1, 1, 1]  # 20 does not fit any more
    assert share_out(options, 3.4) == [0, 0, 1]  # nor 8
    assert share_out(options, 1.0) == [0, 0, 1]  # nothing is cheaper


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_best_there_are(seed):
    """Against all choices, where each step costs one and gains less than the one before."""
    draw = random.Random(seed)
    options = []
    for _ in range(4):
        error, own = 10.0, []
        gains = sorted((draw.random() for _ in range(draw.randrange(1, 5))), reverse=True)
        for cost, gain in enumerate([0.0, *gains]):
            error -= gain
            own.append((error, float(cost)))
        draw.shuffle(own)
        options.append(own)
    for limit in (0.0, 0.75, 1.5, 9.0):
        chosen = share_out(options, limit)
        picked = [own[i] for own, i in zip(options, chosen, strict=True)]
        assert sum(cost for _, cost in picked) <= 4 * limit
        best = min(
            sum(error for error, _ in choice)
            for choice in itertools.product(*options)
            if sum(cost for _, cost in choice) <= 4 * limit
        )
        assert sum(error for error, _ in picked) == pytest.approx(best)


def test_frontier():
    options = [(0.5, 4.0), (0.4, 8.0), (0.6, 9.0), (0.5, 5.0), (0.1, 9.0), (0.45, 4.0), (0.9, 1.0)]
    assert frontier(options, 9) == [6, 5, 1, 4]
    assert frontier(options, 2) == [6, 4]
    assert frontier(options, 3) == [6, 1, 4]
    assert frontier([], 3) == []
    for seed in range(10):
        draw = random.Random(seed)
        options = [(draw.randrange(9), draw.randrange(9)) for _ in range(12)]
        kept = frontier(options, 99)
        for error, cost in options:
            assert any(options[i][0] <= error and options[i][1] <= cost for i in kept)
        assert len({options[i] for i in kept}) == len(kept)


def test_a_cost_is_measured_once(monkeypatch):
    """Several limits share a meter: the same choices, and no pattern of a head measured again."""
    q, k = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64)
    candidate, limits = VerticalSlash(200, 400), (300.0, 150.0, 80.0)
    apart = [search_cost.fit(candidate, q, k, limit) for limit in limits]
    measured = []
    real = search_cost.measured_cost

    def spy(pattern, q, k, wanted):
        measured.extend((pattern, head) for head in wanted)
        return real(pattern, q, k, wanted)

    monkeypatch.setattr(search_cost, "measured_cost", spy)
    meter = search_cost.CostMeter(q, k)
    assert [search_cost.fit(candidate, q, k, limit, meter) for limit in limits] == apart
    assert len(measured) == len(set(measured)) > 4
