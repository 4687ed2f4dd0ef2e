"""Keys before RoPE from keys after it, against the fp64 oracle."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LAYOUTS, PLACES, Place, assert_at_most, generator, randn, relayout
from shadow_inputs import needs

from sparseattn import reference, shadow, shadow_layer
from sparseattn.rope import Rope

SHAPES = [  # batch, kv_heads, rows, dim
    (1, 1, 1, 64),
    (2, 3, 100, 64),
    (1, 8, 33, 128),
    (2, 1, 257, 96),
    (1, 4, 16, 128),
]
# Of head_dim / 2 pairs, those that turn: all, a half, a number that is no multiple of 8, one, none.
PAIRS = {
    "all": lambda dim: dim // 2,
    "half": lambda dim: dim // 4,
    "odd": lambda dim: dim // 4 + 3,
    "one": lambda dim: 1,
    "none": lambda dim: 0,
}


def frequencies(pairs: int, place: Place) -> torch.Tensor:
    return (1e4 ** (-torch.arange(pairs) / max(pairs, 1))).to(place.device)


def undo(k, inv_freq, mean=None, **options) -> torch.Tensor:
    """Of the operator; what surrounds the result stays NaN."""
    batch, heads, rows, dim = k.shape
    room = k.new_full((batch, rows + 2, heads + 1, dim + 16), math.nan)
    out = room[:, 1:-1, 1:, 8:-8]
    shadow.shadow_undo_rope_(k, out, inv_freq, mean, **options)
    assert room.isnan().sum() == room.numel() - out.numel() + out.isnan().sum()
    return out


def check(got, k, inv_freq, mean=None, *, angle_error: float = 4e-7, **options) -> None:
    """One rounding of the result, a few of fp32 before it, and those of sines and cosines."""
    expected = reference.shadow_undo_rope(k, inv_freq, mean, **options)
    assert got.shape == expected.shape and got.dtype == k.dtype
    pairs, dim = inv_freq.shape[0], k.shape[3]
    scale = abs(options.get("rope_scale", 1.0))
    sizes = k.double().abs().transpose(1, 2)  # the sum of a pair's sizes bounds both of its numbers
    if options.get("interleaved"):
        other = sizes[..., : 2 * pairs].unflatten(-1, (pairs, 2)).flip(-1).flatten(-2)
    else:
        other = sizes[..., : 2 * pairs].roll(pairs, -1)
    terms = torch.cat([(sizes[..., : 2 * pairs] + other) / scale, sizes[..., 2 * pairs :]], -1)
    offset = 0.0 if mean is None else mean.double().abs().unsqueeze(1)
    turned = torch.arange(dim, device=k.device) < 2 * pairs
    bound = torch.finfo(k.dtype).eps / 2 * expected.abs() * 1.01 + 1e-7 * offset
    bound = bound + torch.where(turned, angle_error, 1e-7) * terms
    if k.dtype == torch.float16:
        bound = bound + 2.0**-25  # subnormal numbers
    assert_at_most((got.double() - expected).abs(), bound, "error of a key")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_undo(shape, pairs, interleaved, place):
    needs(place, "shadow_undo_rope_")
    k = randn(*shape, place=place, seed=0)
    mean = randn(shape[0], shape[1], shape[3], place=place, seed=1).float()
    inv_freq = frequencies(PAIRS[pairs](shape[3]), place)
    options = {"interleaved": interleaved, "first": 1234}
    check(undo(k, inv_freq, **options), k, inv_freq, **options)
    options["rope_scale"] = 1.19
    got = undo(k, inv_freq, mean, **options)
    check(got, k, inv_freq, mean, **options)
    assert torch.equal(undo(k, inv_freq, mean, **options), got)


@pytest.mark.parametrize("dim", [16, 32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_small_heads(dim, interleaved):
    place = PLACES[0]
    k = randn(2, 2, 50, dim, place=place, seed=0)
    inv_freq = frequencies(dim // 4, place)
    check(undo(k, inv_freq, interleaved=interleaved), k, inv_freq, interleaved=interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(layout, interleaved, place):
    needs(place, "shadow_undo_rope_")
    k = randn(2, 2, 70, 64, place=place, seed=0)
    mean = randn(2, 2, 64, place=place, seed=1).float()
    inv_freq = frequencies(32, place)
    got = undo(relayout(k, layout), inv_freq, mean, interleaved=interleaved)
    assert torch.equal(got, undo(k, inv_freq, mean, interleaved=interleaved))
    # A mean that starts at any element, and results side by side.
    moved = torch.cat([mean.new_zeros(1), mean.flatten()])[1:].view_as(mean)
    out = k.new_empty(2, 70, 2, 64)
    shadow.shadow_undo_rope_(k, out, inv_freq, moved, interleaved=interleaved)
    assert torch.equal(out, got)


@pytest.mark.parametrize("first", [131_072, 999_950, 1_048_576, 2**24 - 60, 2**24 + 1])
@pytest.mark.parametrize("interleaved", [False, True])
def test_far_positions(first, interleaved, place):
    """The angle of the first pair is the position itself."""
    needs(place, "shadow_undo_rope_")
    k = randn(1, 2, 55, 64, place=place, seed=0)
    for pairs in (32, 20):
        inv_freq = frequencies(pairs, place)
        options = {"first": first, "interleaved": interleaved}
        check(undo(k, inv_freq, **options), k, inv_freq, **options)


def test_the_farthest_positions(main_place):
    needs(main_place, "shadow_undo_rope_")
    k = randn(1, 2, 55, 64, place=main_place, seed=0)
    inv_freq = frequencies(32, main_place)
    for first in (2**29, 2**31 - 1000):
        check(undo(k, inv_freq, first=first), k, inv_freq, first=first, angle_error=3e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_the_inverse_of_the_embedding(interleaved, place):
    needs(place, "shadow_undo_rope_")
    before = randn(2, 2, 200, 128, place=place, seed=0)
    inv_freq = frequencies(48, place)
    options = {"interleaved": interleaved, "rope_scale": 1.3}
    positions = torch.arange(5000, 5200, device=place.device)
    after = reference.rope(before, positions, inv_freq, **options).to(place.dtype)
    got = undo(after, inv_freq, first=5000, **options)
    tolerance = {"atol": 4 * torch.finfo(place.dtype).eps, "rtol": torch.finfo(place.dtype).eps}
    torch.testing.assert_close(got.transpose(1, 2), before, **tolerance)


@pytest.mark.parametrize("pairs", [32, 20])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pieces_are_the_whole(pairs, interleaved, place):
    """Whatever the row, head and sequence that a key is in, its bits are the same."""
    needs(place, "shadow_undo_rope_")
    k = randn(2, 3, 150, 64, place=place, seed=0)
    mean = randn(2, 3, 64, place=place, seed=1).float()
    inv_freq = frequencies(pairs, place)
    whole = undo(k, inv_freq, mean, first=7, interleaved=interleaved)
    for a, b in ((0, 1), (1, 40), (40, 40), (40, 150)):
        part = undo(k[:, :, a:b], inv_freq, mean, first=7 + a, interleaved=interleaved)
        assert torch.equal(part, whole[:, a:b])
    for h in range(3):
        one = slice(h, h + 1)
        own = undo(k[1:, one], inv_freq, mean[1:, one], first=7, interleaved=interleaved)
        assert torch.equal(own, whole[1:, :, one])


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_does_not_turn_is_copied(interleaved, place):
    """To the bit, also beside infinities; and a NaN stays in its pair."""
    needs(place, "shadow_undo_rope_")
    k = randn(1, 2, 40, 64, place=place, seed=0)
    k[0, 0, 3, 45], k[0, 0, 3, 46], k[0, 1, 5, 63] = math.inf, -math.inf, -0.0
    for pairs in (0, 16, 20, 3):
        if pairs:
            k[0, 0, 7, 0] = math.nan
        got = undo(k, frequencies(pairs, place), interleaved=interleaved).transpose(1, 2)
        rest = slice(2 * pairs, None)
        assert torch.equal(got[..., rest], k[..., rest])
        assert torch.equal(got[..., rest].signbit(), k[..., rest].signbit())
        if pairs:
            both = [0, 1 if interleaved else pairs]
            assert got[0, 0, 7, both].isnan().all() and got.isnan().sum() == 2


def test_no_rows_and_no_sequences(main_place):
    place = main_place
    needs(place, "shadow_undo_rope_")
    for shape in ((2, 2, 0, 64), (0, 2, 5, 64)):
        k = randn(*shape, place=place, seed=0)
        out = k.new_empty(shape[0], shape[2], shape[1], 64)
        shadow.shadow_undo_rope_(k, out, frequencies(32, place), first=2**31 - 1000)


def test_the_other_steps_take_what_it_writes(main_place):
    """Its view is what the Gram matrix is made of, its memory what the basis multiplies."""
    place = main_place
    needs(place, "shadow_undo_rope_", "shadow_gram_")
    before = randn(2, 2, 300, 64, place=place, seed=0) + 0.5
    inv_freq = frequencies(32, place)
    positions = torch.arange(300, device=place.device)
    k = reference.rope(before, positions, inv_freq).to(place.dtype)
    flat = k.new_empty(2, 300, 2, 64)
    results = []
    shadow.shadow_undo_rope_(k, flat, inv_freq)
    for keys in (flat.transpose(1, 2), flat.transpose(1, 2).contiguous()):
        sums = [torch.zeros(2, *x, device=place.device).double() for x in ((128, 128), (128,))]
        sums.append(torch.zeros(2, dtype=torch.int64, device=place.device))
        shadow.shadow_gram_(keys, *sums)
        results.append(sums)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    basis, mean = shadow.shadow_basis(*results[0], rank=32, kv_heads=2, dtype=place.dtype)
    expected = shadow.shadow_project(flat.transpose(1, 2), basis, mean)
    shadow.shadow_undo_rope_(k, flat, inv_freq, mean)
    got = flat.flatten(2) @ basis.transpose(1, 2).flatten(2).mT
    eps = torch.finfo(place.dtype).eps
    torch.testing.assert_close(got, expected, atol=32 * eps, rtol=4 * eps)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_layer_compresses_in_slices(interleaved, quantised, main_place, monkeypatch):
    """Of two sequences, some of whose tokens come later: the factor is nearly the best."""
    place = main_place
    needs(place, "shadow_undo_rope_", "shadow_gram_", "store_rows_", "lowrank_reconstruct")
    monkeypatch.setattr(shadow_layer, "_SLICE", 1000)  # 256 of each
    heads, dim, rank, tokens, more = 2, 64, 48, 1100, 300
    width = heads * dim
    low = randn(2, tokens + more, 24, place=PLACES[0], seed=0)
    before = low @ randn(24, width, place=PLACES[0], seed=1) + 5
    before = before + randn(*before.shape, place=PLACES[0], seed=2)
    before = before.unflatten(2, (heads, dim)).transpose(1, 2)
    rope = Rope(frequencies(24, PLACES[0]), interleaved, 1.1)
    how = {"interleaved": interleaved, "rope_scale": 1.1}
    positions = torch.arange(tokens + more)
    keys = reference.rope(before, positions, rope.inv_freq, **how).to(place.device, place.dtype)
    values = randn(*keys.shape, place=place, seed=3)
    options = shadow_layer.ShadowOptions(
        rank=rank, chunk=8, top_k=4, outliers=2, sinks=1, local=16, flush=64, slots=8,
        store="device", quantise_factor=quantised,
    )  # fmt: skip
    state = shadow_layer.ShadowState(options, rope, keys[:, :, :tokens], values[:, :, :tokens])
    best = reference.lowrank_keys(*reference.shadow_factor(before, rank)) - before
    for length in (tokens, tokens + more):
        if length > tokens:
            state.append(keys[:, :, tokens:], values[:, :, tokens:])
            state.flush()
        count = state.compressed
        assert state.length == length and count == (length - 16) // 8 * 8
        factor, scale = state.factor.rows[:, 0], state.factor.scale_rows
        assert factor.shape == (2, count, rank) and (scale is not None) == quantised
        scale = None if scale is None else scale[:, 0]
        rebuilt = reference.lowrank_keys(
            factor, state.basis, state.mean, state.inv_freq, factor_scale=scale, **how
        )
        error = (rebuilt - keys[:, :, :count]).norm() / 1.1
        assert_at_most(error, 1.1 * best[:, :, :count].norm(), "error of the factor")
        means, _ = reference.shadow_landmarks(keys[:, :, :count], 8)
        bound = torch.finfo(place.dtype).eps * means.abs() + 1e-6
        assert_at_most((state.landmarks.rows - means).abs(), bound, "error of a landmark")
        assert state.excluded.rows.sum() == 2 * heads * 3
        stored = values[:, :, :count].unflatten(2, (-1, 8)).flatten(3)
        assert torch.equal(state.store.rows, stored)
    got_keys, got_values = state.everything()
    assert torch.equal(got_values, values) and got_keys.shape == keys.shape
    assert torch.equal(got_keys[:, :, state.compressed :], keys[:, :, state.compressed :])


@pytest.mark.cuda
def test_results_must_be_aligned():
    place = PLACES[2]
    k = randn(1, 2, 20, 64, place=place, seed=0)
    room = k.new_zeros(1, 20, 2, 65)
    for out in (room[..., 1:], room[..., :-1]):
        with pytest.raises(ValueError, match="out: expected rows that start on 16-byte boundaries"):
            shadow.shadow_undo_rope_(k, out, frequencies(32, place))
    assert (room == 0).all()


@pytest.mark.large(14)
def test_offsets_beyond_two_to_the_31():
    """Heads of k, and rows of the result, lie that many elements apart."""
    place = PLACES[2]
    far = 2**31 + 64
    memory = torch.empty(far + 1024, dtype=place.dtype, device="cuda")
    k = memory.as_strided((1, 2, 16, 64), (0, far, 64, 1))
    k.copy_(torch.randn(1, 2, 16, 64, generator=generator(0)))
    inv_freq = frequencies(32, place)
    near = k.contiguous()
    expected = undo(near, inv_freq)
    assert torch.equal(undo(k, inv_freq), expected)
    out = memory.as_strided((1, 2, 2, 64), (0, far, 64, 1))
    shadow.shadow_undo_rope_(near[:, :, :2], out, inv_freq)
    assert torch.equal(out, expected[:, :2])
