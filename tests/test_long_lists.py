"""Vertical-slash selection from lists so long that a GPU looks for candidates first."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, Place, make_qkv
from test_estimate import check_selection

import sparseattn
from sparseattn import reference

PLACES = [
    Place("cpu", torch.float32),
    pytest.param(Place("cuda", torch.bfloat16), marks=pytest.mark.cuda),
]


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    return request.param


@pytest.mark.parametrize("counts", [(500, 900), (1, 3000), (20_000, 130)], ids=str)
def test_against_oracle(counts, place):
    """The last count of columns is more than candidates are looked for."""
    length = 70_003
    q, k, _ = make_qkv(Case(1, 4, 2, 64, length, 64), place, seed=counts[0])
    q = q * 2
    options = {"num_columns": counts[0], "num_offsets": counts[1], "sink": 5, "local": 40}
    columns, offsets = sparseattn.estimate_vertical_slash(q, k, **options)
    expected = reference.vertical_slash_mass(q, k, 64)
    check_selection(columns, expected[0], 5, counts[0])
    check_selection(offsets, expected[1], 40, counts[1])


def test_lengths_on_both_sides(place):
    """A sequence gets what it gets alone, whether its list is long or not."""
    lens = torch.tensor([70_003, 65_536, 65_535, 3000], device=place.device)
    q, k, _ = make_qkv(Case(4, 2, 1, 64, 70_003, 64), place)
    options = {"num_columns": 300, "num_offsets": 700}
    columns, offsets = sparseattn.estimate_vertical_slash(q, k, kv_lens=lens, **options)
    for b, length in enumerate(lens.tolist()):
        mass = reference.vertical_slash_mass(q[b : b + 1], k[b : b + 1, :, :length], 64)
        check_selection(columns[b : b + 1], mass[0], 30, 300)
        check_selection(offsets[b : b + 1], mass[1], 100, 700)


@pytest.mark.parametrize("length", [65_536, 70_003])
def test_equal_masses_rank_by_index(length, place):
    """All keys are candidates: as many as there may be, and more."""
    q, k, _ = make_qkv(Case(1, 2, 1, 1, length, 64), place)
    columns, offsets = sparseattn.estimate_vertical_slash(
        q * 0, k, num_columns=400, num_offsets=300, sink=3, local=2
    )
    for found, count in ((columns, 400), (offsets, 300)):
        expected = torch.arange(count, device=place.device, dtype=torch.int32)
        assert torch.equal(found, expected.expand(1, 2, -1))
