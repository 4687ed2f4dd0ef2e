"""Columns and offsets selected by a share of the attention mass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import ESTIMATE_CASES, Case, Place, make_qkv
from torch import Tensor

import sparseattn
from sparseattn import reference

SHARES = [0.2, 0.5, 0.8, 0.95, 1.0]


def lists(result: tuple[Tensor, Tensor]) -> list[list[tuple[list[int], list[int]]]]:
    """[batch][head] of (columns, offsets) without the pads."""
    columns, offsets = (x.tolist() for x in result)
    return [
        [
            ([c for c in cs if c >= 0], [o for o in os if o >= 0])
            for cs, os in zip(*heads, strict=True)
        ]
        for heads in zip(columns, offsets, strict=True)
    ]


def limits_of(options: dict[str, int], kv_len: int) -> tuple[list[int], list[int]]:
    """Columns and offsets allowed, and how many of them are forced."""
    limits = [min(options[name], kv_len) for name in ("num_columns", "num_offsets")]
    forced = [options.get("sink", 30), options.get("local", 100)]
    return limits, [min(pair) for pair in zip(forced, limits, strict=True)]


def masses_of(q: Tensor, k: Tensor, options: dict[str, int]) -> tuple[Tensor, Tensor]:
    """What columns and offsets hold beside the forced ones."""
    _, forced = limits_of(options, k.shape[2])
    return reference.vertical_slash_mass(q, k, options.get("last_q", 64), *forced)


def check_share(
    got: tuple[Tensor, Tensor],
    masses: tuple[Tensor, Tensor],
    rows: int,
    share: float,
    options: dict[str, int],
) -> None:
    """Fails unless the lists are a shortest prefix of the ranking that covers the share.

    fp32 masses may swap candidates of nearly equal rank, and the last candidate may be one more or
    one fewer where the share is nearly reached; both within 1e-4.
    """
    column_mass, offset_mass = masses
    kv_len = column_mass.shape[-1]
    limits, (sink, local) = limits_of(options, kv_len)
    for x in got:
        pads = (x == -1).int()
        assert (pads.diff(dim=-1) >= 0).all(), "pads follow the selected"
    run_mass = torch.nn.functional.pad(offset_mass, (0, -kv_len % 64)).unflatten(-1, (-1, 64))
    run_mass = run_mass.sum(-1)
    for b, heads in enumerate(lists(got)):
        for h, (columns, offsets) in enumerate(heads):
            for values, forced, limit in zip(
                (columns, offsets), (sink, local), limits, strict=True
            ):
                assert len(values) <= limit
                assert all(x < y for x, y in pairwise(values))
                assert values[:forced] == list(range(forced)), "the forced are kept"
                assert not values or values[-1] < kv_len
            runs = sorted({o // 64 for o in offsets[local:]})
            whole = [o for j in runs for o in range(max(64 * j, local), min(64 * j + 64, kv_len))]
            assert offsets[local:] == whole, "offsets come in whole runs"
            check_prefix(
                column_mass[b, h],
                run_mass[b, h],
                (columns[sink:], runs),
                (limits[0] - sink, (limits[1] - local) // 64),
                (1 - share) * rows,
            )


def check_prefix(
    column_mass: Tensor,
    run_mass: Tensor,
    lists: tuple[list[int], list[int]],
    limits: tuple[int, int],
    allowed: float,
) -> None:
    total = run_mass.sum().item()
    slack = 1e-4 * total + 1e-9

    def uncovered(columns: Tensor, runs: Tensor) -> float:
        left = total - column_mass[columns].sum().item()
        return left * (total - run_mass[runs].sum().item()) / max(total, 1e-30)

    def largest(x: Tensor) -> float:
        return x.max().item() if x.numel() else 0.0

    columns, runs = (torch.tensor(x, dtype=torch.int64, device=run_mass.device) for x in lists)
    rank = [16 * column_mass, run_mass]
    kept_rank = torch.cat([rank[0][columns], rank[1][runs]])
    best_left = max(
        largest(side.index_fill(0, own, 0.0)) if len(own) < limit else 0.0
        for side, own, limit in zip(rank, (columns, runs), limits, strict=True)
    )
    if uncovered(columns, runs) > allowed + slack:
        assert best_left <= 1e-7, "the share is not reached though candidates are left"
    if kept_rank.numel():
        least = kept_rank.min().item()
        assert best_left <= least * (1 + 1e-4) + 1e-7, "a better candidate was left out"
        # Without the candidates of least rank the share is not reached: the prefix is minimal.
        fewer = columns[rank[0][columns] > least * (1 + 1e-4)]
        fewer_runs = runs[run_mass[runs] > least * (1 + 1e-4)]
        assert uncovered(fewer, fewer_runs) > allowed - slack, "fewer would be enough"


@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_vertical_slash_share_against_oracle(case, place):
    settings = [
        {"num_columns": 60, "num_offsets": 300},
        {"num_columns": 5000, "num_offsets": 5000},
        {"num_columns": 40, "num_offsets": 230, "last_q": 17, "sink": 4, "local": 10},
        {"num_columns": 20, "num_offsets": 90, "sink": 0, "local": 0},
        {"num_columns": 0, "num_offsets": 200, "last_q": 1, "local": 2},
        {"num_columns": 300, "num_offsets": 0},
    ]
    for seed, options in enumerate(settings):
        q, k, _ = make_qkv(case, place, seed)
        q = q * 2
        masses, rows = masses_of(q, k, options), min(options.get("last_q", 64), case.q_len)
        for share in SHARES:
            got = sparseattn.estimate_vertical_slash(q, k, **options, share=share)
            assert got[0].shape == (*q.shape[:2], options["num_columns"])
            assert got[1].shape == (*q.shape[:2], options["num_offsets"])
            assert all(x.dtype == torch.int32 and x.device == q.device for x in got)
            check_share(got, masses, rows, share, options)


def test_select_by_share_in_closed_form():
    """Masses in binary fractions: what is kept can be counted by hand."""
    column, offset = torch.zeros(256), torch.zeros(256)
    column[[40, 41, 200]] = torch.tensor([0.25, 0.125, 0.0625])
    column[100:164] = 0.5625 / 64
    offset[70], offset[130], offset[200:216] = 0.5, 0.25, 0.25 / 16

    def kept(share: float, columns: int = 256, offsets: int = 256):
        return reference.select_by_share(column, offset, 1, columns, offsets, 2, 3, share)

    # Ranks: columns 4, 2, 1; run 1 (0.5), run 2, run 3 (0.25); the other columns 9/64.
    forced = [0, 1], [0, 1, 2]
    assert kept(0.25) == ([*forced[0], 40], forced[1])
    assert kept(0.26) == ([*forced[0], 40, 41], forced[1])
    assert kept(0.375) == ([*forced[0], 40, 41], forced[1])
    assert kept(0.4375) == ([*forced[0], 40, 41, 200], forced[1])
    # (1 - 0.4375) (1 - 0.5) = 0.28125 is left.
    assert kept(0.71875) == ([*forced[0], 40, 41, 200], [*forced[1], *range(64, 128)])
    assert kept(0.8)[1] == [*forced[1], *range(64, 192)]
    assert kept(1.0) == ([*forced[0], 40, 41, 200], [*forced[1], *range(64, 256)])
    assert kept(1.0, columns=3, offsets=70) == ([0, 1, 40], [0, 1, 2, *range(64, 128)])
    assert kept(1.0, columns=2, offsets=66) == forced


def planted(place: Place, kv_len: int = 900) -> tuple[Tensor, Tensor]:
    """Two heads: the first looks at column 300, the second at the keys 333 before its rows."""
    gen = torch.Generator().manual_seed(7)
    q = torch.zeros(1, 2, kv_len, 64)
    k = torch.zeros(1, 2, kv_len, 64)
    q[:, 0, :, 0], k[:, 0, 300, 0] = 16, 16
    signs = torch.randint(0, 2, (kv_len, 64), generator=gen) * 2.0 - 1
    k[:, 1] = 2 * signs
    q[:, 1] = 2 * signs[(torch.arange(kv_len) - 333).clamp(min=0)]
    return q.to(place.device, place.dtype), k.to(place.device, place.dtype)


def test_one_column_and_one_diagonal(place):
    q, k = planted(place)
    options = {"num_columns": 200, "num_offsets": 600, "sink": 4, "local": 10, "share": 0.95}
    (column, diagonal) = lists(sparseattn.estimate_vertical_slash(q, k, **options))[0]
    assert column == ([0, 1, 2, 3, 300], list(range(10)))
    assert diagonal == ([0, 1, 2, 3], [*range(10), *range(320, 384)])
    for got, want in zip(
        sparseattn.estimate_vertical_slash(q, k, **options),
        reference.estimate_vertical_slash(q, k, **options),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_what_is_forced_is_not_selected_again(place):
    """All mass on sinks and recent keys: their columns and offsets are no candidates."""
    q, k, _ = make_qkv(Case(1, 2, 1, 200, 800, 64), place)
    q, k = q * 0, k * 0
    q[..., 0], k[:, :, :2, 0] = 8, 12  # sinks
    (head, _) = lists(
        sparseattn.estimate_vertical_slash(q, k, num_columns=400, num_offsets=400, share=0.9)
    )[0]
    assert head == (list(range(30)), list(range(100)))
    k[:, :, :2, 0] = 0
    k[:, :, 790:, 0] = 12  # seen by the last rows at offsets below 64 only
    (head, _) = lists(
        sparseattn.estimate_vertical_slash(
            q[:, :, -10:], k, num_columns=400, num_offsets=400, share=0.9
        )
    )[0]
    assert head == (list(range(30)), list(range(100)))


def test_share_grows_and_peaked_heads_need_less(place):
    case = Case(1, 4, 4, 100, 2000, 64)
    q, k, _ = make_qkv(case, place)
    factors = torch.tensor([0.1, 1.0, 3.0, 8.0]).view(1, 4, 1, 1).to(q)
    q = q * factors
    before: list = [([], [])] * 4
    counts = []
    for share in (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        now = lists(
            sparseattn.estimate_vertical_slash(q, k, num_columns=700, num_offsets=1500, share=share)
        )[0]
        for old, new in zip(before, now, strict=True):
            assert set(old[0]) <= set(new[0]) and set(old[1]) <= set(new[1])
        before = now
        counts.append([len(c) / 64 + len(o) / 64 for c, o in now])
    at_half = counts[3]
    assert at_half[0] > at_half[2] > at_half[3]
    # Without a share the limits are used up; with 1.0 they are, or everything is covered.
    assert all(len(c) == 700 and len(o) > 1500 - 128 for c, o in before[:2])


def test_share_of_one_keeps_all_mass_within_limits(place):
    q, k, _ = make_qkv(Case(1, 2, 1, 64, 500, 64), place)
    columns, _ = sparseattn.estimate_vertical_slash(
        q, k, num_columns=500, num_offsets=228, share=1.0
    )
    # The 100 nearest offsets cover all that columns from 400 on hold.
    assert columns[0, 0].tolist() == [*range(400), *[-1] * 100]
    limited, plain = (
        sparseattn.estimate_vertical_slash(
            q, k, num_columns=20, num_offsets=100, share=share
        )  # forced ones only
        for share in (1.0, None)
    )
    assert torch.equal(limited[0], plain[0]) and torch.equal(limited[1], plain[1])


def test_equal_masses_by_index(place):
    """One row of equal scores: columns tie with columns, runs with runs; columns rank first."""
    q, k, _ = make_qkv(Case(1, 2, 1, 1, 1024, 64), place)
    options = {"num_columns": 1024, "num_offsets": 1024, "sink": 0, "local": 0}
    (head, _) = lists(sparseattn.estimate_vertical_slash(q * 0, k, **options, share=0.5))[0]
    # Runs of mass 1/16 rank before columns of 16/1024 = 1/64.
    assert head == ([], list(range(512)))
    (head, _) = lists(
        sparseattn.estimate_vertical_slash(q * 0, k, **(options | {"num_offsets": 127}), share=0.5)
    )[0]
    # One run fits: 1 - 15/16 (1 - n/1024) >= 1/2 from n = 478 on.
    assert head == (list(range(478)), list(range(64)))
