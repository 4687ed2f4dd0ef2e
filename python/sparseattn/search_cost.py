"""What a pattern costs, in the units the kernels work in, and candidates of equal cost.

A cost is the number of keys the kernel visits for a query row, averaged over the query tiles of
64 rows. A tile visits keys in boxes of 64: boxes of its sink and window, of its runs of offsets,
of its selected blocks, and of the packed columns that lie before its end. So a lone offset costs
64 keys and a lone column at most one (rounded up to a box for all columns together).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from sparseattn import ops
from sparseattn.patterns import (
    AShape,
    BlockSparse,
    Dense,
    Pattern,
    VerticalSlash,
    options_of,
)

TILE = 64
# A candidate may cost this much more than the budget.
TOLERANCE = 1.1


def _tile_ends(q_len: int, kv_len: int) -> torch.Tensor:
    """One past the last position of every query tile, were it full: int64 [tiles]."""
    tiles = -(-q_len // TILE)
    return kv_len - q_len + TILE * torch.arange(1, tiles + 1)


def _boxes(keys: torch.Tensor) -> torch.Tensor:
    return (keys + TILE - 1) // TILE


def _mean_keys(boxes: torch.Tensor) -> float:
    return TILE * boxes.double().mean().item()


def dense_cost(q_len: int, kv_len: int) -> float:
    """Keys per query row when every key at or before it is visited."""
    return _mean_keys(_boxes(_tile_ends(q_len, kv_len).clamp(max=kv_len)))


def a_shape_cost(sink: int, window: int, q_len: int, kv_len: int) -> float:
    """Keys per query row of ``AShape(sink, window)``; sink and window boxes do not overlap."""
    ends = _tile_ends(q_len, kv_len)
    high = ends.clamp(max=kv_len)
    low = torch.minimum((ends - (TILE - 1) - window).clamp(min=0), high) if window else high
    return _mean_keys(_boxes(low.clamp(max=sink)) + _boxes(high - low))


def block_sparse_cost(top_k: int, q_len: int, kv_len: int) -> float:
    """Keys per query row of ``BlockSparse(top_k)``: early rows have fewer blocks to choose from."""
    return _mean_keys(_boxes(_tile_ends(q_len, kv_len).clamp(max=kv_len)).clamp(max=top_k))


def vertical_slash_cost(
    columns: torch.Tensor, offsets: torch.Tensor, q_len: int, kv_len: int
) -> float:
    """Keys per query row of one head's index.

    Args:
        columns, offsets: int tensors ``[n]``, any order, values out of range select nothing.
    """
    ends = _tile_ends(q_len, kv_len)
    columns = columns[(columns >= 0) & (columns < kv_len)].long().cpu().unique()
    offsets = offsets[offsets >= 0].long().cpu().unique()
    boxes = _boxes(torch.searchsorted(columns, ends))
    if offsets.numel():
        # Covers [o, o + 64) of distances from a tile's end unite to runs; a run takes boxes from
        # its near end on, and a tile visits the boxes that start at a distance below its end.
        gap = offsets.diff() > TILE
        first = torch.cat([torch.ones(1, dtype=torch.bool), gap])
        last = torch.cat([gap, torch.ones(1, dtype=torch.bool)])
        start, per_run = offsets[first], _boxes(offsets[last] + TILE - offsets[first])
        ordinal = torch.arange(int(per_run.sum())) - (
            per_run.cumsum(0) - per_run
        ).repeat_interleave(per_run)
        near = start.repeat_interleave(per_run) + TILE * ordinal
        boxes = boxes + torch.searchsorted(near, ends)
    return _mean_keys(boxes)


def measured_cost(
    pattern: Pattern, q: torch.Tensor, k: torch.Tensor, wanted: Collection[int] | None = None
) -> list[float]:
    """Cost of ``pattern`` for every query head, with the index estimated from ``q`` and ``k``.

    Args:
        q: ``[1, Hq, q_len, D]``; k: ``[1, Hkv, kv_len, D]``.
        wanted: heads that count (default: all); the cost of others may be given as infinite.
    """
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    if isinstance(pattern, VerticalSlash):
        columns, offsets = ops.estimate_vertical_slash(
            q, k, num_columns=pattern.columns, num_offsets=pattern.offsets, share=pattern.share
        )
        columns, offsets = columns[0].cpu(), offsets[0].cpu()
        return [
            vertical_slash_cost(columns[h], offsets[h], q_len, kv_len)
            if wanted is None or h in wanted
            else math.inf
            for h in range(heads)
        ]
    if isinstance(pattern, AShape):
        cost = a_shape_cost(pattern.sink, pattern.window, q_len, kv_len)
    elif isinstance(pattern, BlockSparse) and pattern.share is not None:
        blocks = ops.estimate_block_sparse(q, k, top_k=pattern.top_k, **options_of(pattern))
        return [TILE * count for count in blocks[0].sum(-1).double().mean(-1).tolist()]
    elif isinstance(pattern, BlockSparse):
        cost = block_sparse_cost(pattern.top_k, q_len, kv_len)
    else:
        cost = dense_cost(q_len, kv_len)
    return [cost] * heads


class CostMeter:
    """Costs of patterns for the heads of one q and k, each measured once."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.q, self.k, self.heads = q, k, range(q.shape[1])
        self._known: dict[Pattern, dict[int, float]] = {}

    def __call__(self, pattern: Pattern, wanted: Collection[int]) -> dict[int, float]:
        """By head the cost, of those that are wanted at least."""
        known = self._known.setdefault(pattern, {})
        missing = {head for head in wanted if head not in known}
        if missing:
            costs = measured_cost(pattern, self.q, self.k, missing)
            known.update({head: costs[head] for head in missing})
        return known


def shrink(pattern: Pattern, steps: int) -> Pattern | None:
    """A cheaper pattern of the same kind: every step takes a quarter off one size.

    That size is the number of offsets as long as 64 remain and then the number of columns (at least
    1), the window (at least 64 keys), or the number of blocks (at least 1). None where no step is
    left; ``Dense`` has none.
    """
    if steps == 0:
        return pattern
    if isinstance(pattern, VerticalSlash):
        offsets, columns = pattern.offsets, pattern.columns
        offset_steps = max((s for s in range(steps + 1) if _less(offsets, s) >= TILE), default=0)
        columns = _less(columns, steps - offset_steps)
        offsets = _less(offsets, offset_steps)
        return replace(pattern, columns=columns, offsets=offsets) if columns >= 1 else None
    if isinstance(pattern, AShape):
        window = _less(pattern.window, steps)
        return AShape(pattern.sink, window) if window >= TILE else None
    if isinstance(pattern, BlockSparse):
        top_k = _less(pattern.top_k, steps)
        return replace(pattern, top_k=top_k) if top_k >= 1 else None
    return None


def _less(size: int, steps: int) -> int:
    return int(size * 0.75**steps)


def fit(
    candidate: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    limit: float | None,
    meter: CostMeter | None = None,
) -> tuple[list[int], list[float], list[bool]]:
    """The fewest shrinking steps after which ``candidate`` costs each head at most ``limit``.

    Args:
        meter: of this q and k, for several calls.

    Returns:
        Per query head the steps, the cost after them, and whether the cost is within ``limit``.
        A head that no step brings within the limit has its cheapest step.
    """
    meter = meter or CostMeter(q, k)
    first = meter(candidate, meter.heads)
    best_cost = [first[head] for head in meter.heads]
    best_step = [0] * len(best_cost)
    if limit is None:
        return best_step, best_cost, [True] * len(best_cost)
    for steps in itertools.count(1):
        smaller = shrink(candidate, steps)
        above = [head for head, cost in enumerate(best_cost) if cost > limit]
        if smaller is None or not above:
            break
        costs = meter(smaller, above)
        for head in above:
            if costs[head] < best_cost[head]:
                best_cost[head], best_step[head] = costs[head], steps
    return best_step, best_cost, [cost <= limit for cost in best_cost]


def budget_keys(budget: float, length: int) -> float:
    """The share ``budget`` of what dense attention visits, in keys per query row."""
    if not isinstance(budget, (int, float)) or isinstance(budget, bool):
        raise TypeError(f"budget: expected float, got {type(budget).__name__}")
    if not 0 < budget < 1:
        raise ValueError(f"budget: expected 0 < budget < 1, got {budget}")
    return budget * dense_cost(length, length)


def default_candidates(length: int, budget: float) -> list[Pattern]:
    """Patterns that each cost about ``budget`` of dense attention on a prompt of ``length`` tokens.

    A row far from the start visits T boxes of 64 keys, T such that the mean over all rows is the
    budget. T is shared out between sink and window (one box or a quarter to the sink), between
    offsets and columns (7/8, 2/3, 1/3 of T or three boxes to the offsets), or goes to blocks.
    Offsets are counted as if they were one run and columns as if they were spread evenly, so that
    a row sees half of them on average; ``fit`` shrinks the sizes for heads where that is wrong.

    Raises:
        ValueError: fewer than four boxes: the prompt is too short for the budget.
    """
    budget_keys(budget, length)
    # min(position, T) averaged over all positions below length is budget * length / 2.
    boxes = int(length * (1 - math.sqrt(1 - budget))) // TILE
    if boxes < 4:
        raise ValueError(
            f"budget: expected at least 4 boxes of {TILE} keys a row, got {boxes} (budget {budget} "
            f"of a prompt of {length} tokens); give a longer prompt or a larger budget"
        )
    candidates: list[Pattern] = []
    for sink in (1, boxes // 4):
        candidates.append(AShape(TILE * sink, TILE * (boxes - sink - 1) + 1))
    for share in (7 * boxes // 8, 2 * boxes // 3, boxes // 3, 3):
        offsets = TILE * (max(share, 3) - 1) + 1
        rest = budget_keys(budget, length) - a_shape_cost(0, offsets, length, length)
        # Rounding up to whole boxes adds half a box to a row's columns.
        candidates.append(VerticalSlash(TILE * max(int(2 * rest / TILE - 1), 1), offsets))
    candidates.append(BlockSparse(boxes))
    return list(dict.fromkeys(candidates))


def share_out(options: Sequence[Sequence[tuple[float, float]]], limit: float) -> list[int]:
    """One option for every head of those that share a budget (of a layer, or of the whole model),
    so that they cost at most ``limit`` a head on average.

    ``options[head]`` are (error, cost); any measure of harm does for an error. All heads begin with
    their cheapest (equal costs: the smaller error); then whatever lowers an error by most for what
    it costs more is taken, as long as the budget has room for it (equal gains: the first head, its
    first option). Where the cheapest cost more than the limit, they are the choice.
    """
    chosen = [
        min(range(len(own)), key=lambda i, own=own: (own[i][1], own[i][0])) for own in options
    ]
    left = limit * len(options) - sum(own[i][1] for own, i in zip(options, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for head, own in enumerate(options):
            error, cost = own[chosen[head]]
            for i, (other, more) in enumerate(own):
                if other >= error or more - cost > left:
                    continue
                gain = (error - other) / max(more - cost, 1e-9)
                if best is None or gain > best[0]:
                    best = (gain, head, i)
        if best is None:
            return chosen
        _, head, i = best
        left -= options[head][i][1] - options[head][chosen[head]][1]
        chosen[head] = i


def frontier(options: Sequence[tuple[float, float]], most: int) -> list[int]:
    """Options (error, cost) that no other is better than in both, in the order of costs; of more
    than ``most`` some of every cost, with the cheapest and the best."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0], i)):
        if not kept or options[i][0] < options[kept[-1]][0]:
            kept.append(i)
    if len(kept) <= most:
        return kept
    return [kept[round(n * (len(kept) - 1) / max(1, most - 1))] for n in range(most)]


def check_candidates(candidates: Sequence[Pattern]) -> list[Pattern]:
    """The distinct candidates, in order; refuses an empty list and what is no pattern."""
    if isinstance(candidates, (str, bytes)) or not isinstance(candidates, Sequence):
        raise TypeError(f"candidates: expected a list of patterns, got {candidates!r}")
    for number, pattern in enumerate(candidates):
        if not isinstance(pattern, (Dense, AShape, VerticalSlash, BlockSparse)):
            raise TypeError(f"candidates[{number}]: expected a pattern, got {pattern!r}")
    if not candidates:
        raise ValueError("candidates: expected at least one pattern, got none")
    return list(dict.fromkeys(candidates))
