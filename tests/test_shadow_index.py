"""What is made of a prompt, and selection: Gram matrix, basis, landmarks, outliers, chunks."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_at_most, generator, randn, relayout
from shadow_inputs import needs

from sparseattn import reference, shadow

KEYS = [  # batch, kv_heads, rows, dim
    (1, 1, 1, 64),
    (2, 2, 300, 64),
    (1, 3, 257, 96),
    (2, 2, 128, 128),
    (1, 1, 640, 128),
]


def sums(batch: int, width: int, device: str) -> tuple[torch.Tensor, ...]:
    return (
        torch.zeros(batch, width, width, dtype=torch.float64, device=device),
        torch.zeros(batch, width, dtype=torch.float64, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def check_gram(got, expected, terms: torch.Tensor) -> None:
    """``terms``: sum of |k_i k_j|, of which a few fp32 roundings are allowed; tensor cores truncate
    where a CPU rounds, all errors have one sign."""
    assert torch.equal(got[2], expected[2])
    least = 3e-6 if got[0].is_cuda else 1e-6
    assert_at_most((got[0] - expected[0]).abs(), least * terms + 1e-9, "error of the Gram matrix")
    assert torch.equal(got[0], got[0].mT), "a Gram matrix is symmetric"
    bound = 1e-6 * terms.diagonal(dim1=-2, dim2=-1).sqrt() * expected[2].sqrt()[:, None] + 1e-9
    assert_at_most((got[1] - expected[1]).abs(), bound, "error of the sum")


@pytest.mark.parametrize("shape", KEYS, ids=str)
def test_gram(shape, place):
    needs(place, "shadow_gram_")
    k = randn(*shape, place=place, seed=0) + 0.5
    got = sums(shape[0], shape[1] * shape[3], place.device)
    shadow.shadow_gram_(k, *got)
    check_gram(got, reference.shadow_gram(k), reference.shadow_gram(k.abs())[0])


@pytest.mark.parametrize("layout", ["blhd", "packed", "hblD", "odd"])
def test_gram_adds_pieces_of_unequal_length(layout, place):
    needs(place, "shadow_gram_")
    k = randn(3, 2, 500, 64, place=place, seed=1)
    lens = torch.tensor([500, 130, 0], device=place.device)
    poisoned = k.masked_fill(
        torch.arange(500, device=place.device)[None, None, :, None] >= lens[:, None, None, None],
        math.nan,
    )
    poisoned = relayout(poisoned, layout)
    got = sums(3, 128, place.device)
    for first, last in ((0, 7), (7, 200), (200, 200), (200, 500)):
        part = (lens - first).clamp(0, last - first).to(torch.int32)
        shadow.shadow_gram_(poisoned[:, :, first:last], *got, kv_lens=part)
    expected = reference.shadow_gram(k, lens)
    check_gram(got, expected, reference.shadow_gram(k.abs(), lens)[0])


def test_basis_is_the_best_of_its_rank(main_place):
    """The error of the factor is that of a full SVD; keys with a bias larger than all else."""
    place = main_place
    needs(place, "shadow_gram_")
    heads, rows, dim, rank = 2, 700, 64, 48
    width = heads * dim
    low = (
        randn(2, rows, 24, place=place, seed=0).float()
        @ randn(24, width, place=place, seed=1).float()
    )
    flat = low + 0.3 * randn(2, rows, width, place=place, seed=2).float() + 20.0
    k = flat.to(place.dtype).unflatten(2, (heads, dim)).transpose(1, 2)
    got = sums(2, width, place.device)
    shadow.shadow_gram_(k, *got)
    basis, mean = shadow.shadow_basis(*got, rank=rank, kv_heads=heads)
    assert basis.shape == (2, heads, rank, dim) and basis.dtype == torch.float32
    directions = basis.transpose(1, 2).flatten(2).double()
    eye = torch.eye(rank, device=place.device, dtype=torch.float64)
    torch.testing.assert_close(directions @ directions.mT, eye.expand(2, -1, -1), atol=1e-6, rtol=0)
    assert torch.equal(basis, shadow.shadow_basis(*got, rank=rank, kv_heads=heads)[0])

    factor = shadow.shadow_project(k, basis, mean)
    rebuilt = reference.lowrank_keys(factor, basis, mean)
    best = reference.lowrank_keys(*reference.shadow_factor(k, rank))
    error, least = ((k.double() - x).square().sum().sqrt() for x in (rebuilt, best))
    assert least < 0.06 * (k.double() - mean.unsqueeze(2)).norm()
    assert_at_most(error, least * (1 + 1e-4), "error of the factor")


def test_basis_of_any_rank(main_place):
    """More directions than keys, all directions, a sequence without keys."""
    place = main_place
    needs(place, "shadow_gram_")
    k = randn(2, 2, 20, 64, place=place, seed=0)
    got = sums(2, 128, place.device)
    shadow.shadow_gram_(k, *got, kv_lens=torch.tensor([20, 0], device=place.device))
    for rank in (16, 32, 128):
        basis, mean = shadow.shadow_basis(*got, rank=rank, kv_heads=2)
        assert basis.isfinite().all() and mean.isfinite().all()
        if rank > 16:
            rebuilt = reference.lowrank_keys(shadow.shadow_project(k, basis, mean), basis, mean)
            torch.testing.assert_close(rebuilt[0], k[0].double(), atol=1e-4, rtol=1e-4)
    out = torch.full((2, 30, 128), math.nan, device=place.device)
    assert (
        shadow.shadow_project(k, basis, mean, out=out[:, 5:25]).data_ptr() == out[:, 5:].data_ptr()
    )
    assert out[:, 5:25].isfinite().all() and out[:, :5].isnan().all() and out[:, 25:].isnan().all()


def test_projection_in_pieces(main_place, monkeypatch):
    """Long prompts are projected piece by piece."""
    k = randn(1, 2, 9000, 64, place=main_place, seed=0)
    basis = randn(1, 2, 16, 64, place=main_place, seed=1)
    mean = randn(1, 2, 64, place=main_place, seed=2).float()
    factor = shadow.shadow_project(k, basis, mean)
    at = slice(4000, 4200)
    assert_at_most(
        (factor[:, at] - shadow.shadow_project(k[:, :, at], basis, mean)).abs().max(),
        torch.tensor(1e-4 if main_place.device == "cpu" else 0.2),
        "difference of the pieces",
    )


# --- landmarks and outliers ---------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 8, 16, 32])
@pytest.mark.parametrize("shape", KEYS, ids=str)
def test_landmarks(shape, chunk, place):
    needs(place, "shadow_landmarks_")
    batch, heads, rows, dim = shape
    k = relayout(randn(*shape, place=place, seed=0) + 0.2, "packed")
    chunks = rows // chunk
    landmarks = k.new_full((batch, heads, chunks + 2, dim), math.nan)
    cosines = torch.full((batch, heads, chunks + 2), math.nan, device=place.device)
    shadow.shadow_landmarks_(k, landmarks, cosines, chunk=chunk)
    means, least = reference.shadow_landmarks(k, chunk)
    eps = torch.finfo(place.dtype).eps
    bound = eps * means.abs() + 1e-6
    assert_at_most((landmarks[:, :, :chunks] - means).abs(), bound, "error of a landmark")
    assert_at_most((cosines[..., :chunks] - least).abs(), torch.full_like(least, 1e-5), "cosine")
    assert landmarks[:, :, chunks:].isnan().all() and cosines[..., chunks:].isnan().all()
    only = torch.full_like(landmarks, math.nan)
    shadow.shadow_landmarks_(k, only, chunk=chunk)
    assert torch.equal(only[:, :, :chunks], landmarks[:, :, :chunks])


def test_landmarks_go_where_they_belong(place):
    """A sequence's chunks follow those it has; rows that fill no chunk or no room are left."""
    needs(place, "shadow_landmarks_")
    lens, first = [100, 39, 7, 0, 400], [0, 5, 9, 3, 8]
    k = randn(5, 2, 100, 64, place=place, seed=0)
    rows = torch.arange(100, device=place.device)
    kv_lens = torch.tensor(lens, device=place.device)
    k = k.masked_fill(rows[None, None, :, None] >= kv_lens[:, None, None, None], math.nan)
    landmarks = k.new_full((5, 2, 12, 64), 7.0)
    cosines = torch.full((5, 2, 12), 7.0, device=place.device)
    shadow.shadow_landmarks_(
        k,
        landmarks,
        cosines,
        chunk=8,
        first_chunk=torch.tensor(first, dtype=torch.int32, device=place.device),
        kv_lens=kv_lens,
    )
    for b in range(5):
        count = min(min(lens[b], 100) // 8, 12 - first[b])
        written = slice(first[b], first[b] + count)
        means, least = reference.shadow_landmarks(k[b : b + 1, :, : 8 * count], 8)
        eps = torch.finfo(place.dtype).eps
        torch.testing.assert_close(landmarks[b, :, written].double(), means[0], atol=eps, rtol=eps)
        torch.testing.assert_close(cosines[b, :, written].double(), least[0], atol=1e-5, rtol=0)
        for x in (landmarks, cosines):
            assert (x[b, :, : first[b]] == 7).all() and (x[b, :, first[b] + count :] == 7).all()


def test_cosine_of_nothing_is_zero(place):
    needs(place, "shadow_landmarks_")
    k = randn(1, 1, 24, 64, place=place, seed=0).abs()
    k[:, :, 0:8] = 0  # no mean
    k[:, :, 9] = 0  # one key without direction
    k[:, :, 16:20], k[:, :, 20:24] = 1, -1  # keys that cancel
    landmarks = k.new_empty(1, 1, 3, 64)
    cosines = torch.empty(1, 1, 3, device=place.device)
    shadow.shadow_landmarks_(k, landmarks, cosines, chunk=8)
    assert (cosines == 0).all() and (landmarks[0, 0, [0, 2]] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 7, 40, 60])
@pytest.mark.parametrize("sinks", [0, 2, 9])
def test_outliers(count, sinks, main_place):
    """Few different values, so that ties decide; what lies past a sequence's chunks is NaN."""
    place = main_place
    needs(place, "shadow_outliers")
    cosines = torch.randint(-3, 4, (4, 2, 50), generator=generator(0)) / 4
    num = torch.tensor([50, 33, 1, 0])
    cosines[torch.arange(50).expand(4, 2, 50) >= num[:, None, None]] = math.nan
    cosines, num = cosines.to(place.device), num.to(place.device)
    got = shadow.shadow_outliers(cosines, count=count, sink_chunks=sinks, num_chunks=num)
    options = {"count": count, "sink_chunks": sinks, "num_chunks": num}
    assert torch.equal(got, reference.shadow_outliers(cosines, **options))
    assert ((got >= 0).sum(-1) == num.clamp(max=count)[:, None]).all()


def test_chunk_helpers(main_place):
    ids = torch.tensor([[[0, 3, -1], [2, -1, -1]]], dtype=torch.int32, device=main_place.device)
    mask = shadow.chunk_mask(ids, 5)
    assert mask.tolist() == [
        [[True, False, False, True, False], [False, False, True, False, False]]
    ]
    assert mask.is_contiguous()
    x = randn(1, 2, 43, 64, place=main_place, seed=0)
    rows = shadow.chunk_rows(x, ids, chunk=8)
    assert torch.equal(rows[0, 0], torch.cat([x[0, 0, :8], x[0, 0, 24:32], 0 * x[0, 0, :8]]))
    assert torch.equal(rows[0, 1], torch.cat([x[0, 1, 16:24], 0 * x[0, 1, :16]]))


# --- selection ----------------------------------------------------------------------------------

SELECTIONS = [  # batch, q_heads, kv_heads, q_len, chunks, dim, top_k
    (1, 1, 1, 1, 1, 64, 1),
    (2, 4, 2, 1, 200, 64, 16),
    (1, 7, 1, 1, 333, 96, 100),
    (2, 32, 2, 1, 129, 128, 128),
    (1, 8, 8, 3, 128, 128, 20),
    (2, 6, 2, 30, 77, 64, 90),
]


def check_selected(got, q, landmarks, top_k, **options) -> None:
    """The chunks of highest score, but for scores that fp32 cannot tell apart."""
    scores = reference.shadow_scores(q, landmarks, **options)
    assert got.dtype == torch.int32 and got.shape == (*scores.shape[:2], top_k)
    tolerance = 2e-5 if got.device.type == "cpu" else 1e-3
    for b in range(got.shape[0]):
        for h in range(got.shape[1]):
            row, ids = scores[b, h], got[b, h].tolist()
            candidates = int((row > -math.inf).sum())
            kept = [i for i in ids if i >= 0]
            assert len(kept) == min(top_k, candidates) and ids == kept + [-1] * (top_k - len(kept))
            assert kept == sorted(set(kept)) and (row[kept] > -math.inf).all()
            if not kept:
                continue
            edge = row.sort(descending=True).values[len(kept) - 1]
            assert (row[kept] >= edge - tolerance).all()
            sure = (row > edge + tolerance).nonzero().flatten().tolist()
            assert set(sure) <= set(kept)


@pytest.mark.parametrize("shape", SELECTIONS, ids=str)
def test_select(shape, place):
    needs(place, "shadow_select")
    batch, q_heads, kv_heads, q_len, chunks, dim, top_k = shape
    q = randn(batch, q_heads, q_len, dim, place=place, seed=0)
    landmarks = randn(batch, kv_heads, chunks, dim, place=place, seed=1)
    got = shadow.shadow_select(q, landmarks, top_k=top_k)
    check_selected(got, q, landmarks, top_k)
    views = relayout(q, "packed"), relayout(landmarks, "blhd")
    assert torch.equal(shadow.shadow_select(*views, top_k=top_k), got)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_select_among_candidates(dtype, place):
    """Excluded chunks and those past a sequence's number do not even enter the softmax."""
    needs(place, "shadow_select")
    q = randn(5, 6, 3, 64, place=place, seed=0) * 4
    landmarks = randn(5, 2, 150, 64, place=place, seed=1)
    excluded = torch.rand(5, 2, 150, generator=generator(2)) < 0.3
    excluded[4, 1] = True
    options = {
        "excluded": excluded.to(place.device),
        "num_chunks": torch.tensor([150, 40, 0, 99, 1000], dtype=dtype, device=place.device),
        "q_lens": torch.tensor([3, 1, 2, 0, 1], dtype=dtype, device=place.device),
        "scale": 0.3,
    }
    gone = options["excluded"] | (
        torch.arange(150, device=place.device) >= options["num_chunks"][:, None, None]
    )
    q[1, :, 1:] = math.nan
    poisoned = landmarks.masked_fill(gone.unsqueeze(-1), math.nan)
    got = shadow.shadow_select(q, poisoned, top_k=30, **options)
    check_selected(got, q, landmarks, 30, **options)
    assert (got[2:4] == -1).all() and (got[4, 1] == -1).all()


def test_equal_scores_go_by_the_smaller_id(place):
    """Every landmark comes four times, the copies far apart."""
    needs(place, "shadow_select")
    few = randn(1, 2, 60, 64, place=place, seed=0)
    landmarks = few.repeat(1, 1, 4, 1)
    q = randn(1, 8, 1, 64, place=place, seed=1)
    for top_k in (1, 5, 42, 163):
        got = shadow.shadow_select(q, landmarks, top_k=top_k)
        for h in range(2):
            kept = got[0, h].tolist()
            for copy in range(1, 4):
                held = {i % 60 for i in kept if i // 60 == copy}
                assert held <= {i % 60 for i in kept if i // 60 == copy - 1}
    same = landmarks[:, :, :1].expand(-1, -1, 240, -1)
    got = shadow.shadow_select(q, same, top_k=77)
    assert torch.equal(got, torch.arange(77, device=place.device).int().expand(1, 2, 77))


def test_small_probabilities_are_told_apart(place):
    """Scores hundreds below the largest: probabilities would all be zero in fp32."""
    needs(place, "shadow_select")
    order = torch.randperm(100, generator=generator(0))
    landmarks = torch.zeros(1, 1, 100, 64)
    landmarks[0, 0, :, 0] = -order.float()
    landmarks[0, 0, order == 0, 0] = 100.0
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 64.0
    q, landmarks = (x.to(place.device, place.dtype) for x in (q, landmarks))
    got = shadow.shadow_select(q, landmarks, top_k=10)
    assert got[0, 0].tolist() == sorted((order < 10).nonzero().flatten().tolist())
