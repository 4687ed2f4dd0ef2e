"""shadow_attention and lowrank_reconstruct against the oracle, dense attention and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Place, assert_at_most, generator, randn, relayout
from shadow_inputs import (
    Sizes,
    as_dense,
    check_shadow,
    make_attention,
    make_low_rank,
    needs,
    pick_chunks,
    poison_exact,
    poison_factor,
)

from sparseattn import reference, shadow

CASES = [
    Sizes(),
    Sizes(batch=1, q_heads=1, kv_heads=1, exact=1, top_k=1, slots=1, tokens=8, rank=16),
    Sizes(q_heads=8, kv_heads=2, dim=128, rank=160, top_k=20, slots=40, exact=131),
    Sizes(q_heads=7, kv_heads=1, dim=128, chunk=4, rank=144, top_k=35, slots=35, q_len=2),
    Sizes(q_heads=32, kv_heads=2, dim=128, rope="interleaved", chunk=16, q_len=3, exact=40),
    Sizes(q_heads=3, kv_heads=3, dim=96, rank=48, chunk=32, tokens=330, q_len=5, exact=200),
    Sizes(q_heads=4, kv_heads=1, rope="none", mean=False, q_len=37, exact=64, top_k=17, slots=30),
    Sizes(
        batch=3, q_heads=16, kv_heads=1, dim=64, rope="interleaved", rank=272, q_len=4, mean=False
    ),
]


def attend(args, **more):
    return shadow.shadow_attention(**args, **more, return_lse=True)


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_attention(sizes, place):
    needs(place, "shadow_attention")
    args = make_attention(sizes, place)
    out, lse = attend(args)
    check_shadow(out, lse, args)
    assert torch.equal(shadow.shadow_attention(**args), out)


def test_the_two_oracles_agree():
    """The oracle, and dense attention in fp64 over what ``as_dense`` makes of the arguments."""
    place = Place("cpu", torch.float32)
    args = poison_exact(
        make_attention(Sizes(q_len=5, exact=30), place)
        | {
            "exact_lens": torch.tensor([22, 3]),
            "exact_starts": torch.tensor([4, 0]),
            "q_lens": torch.tensor([5, 2]),
        }
    )
    out, lse = reference.shadow_attention(**args, return_lse=True)
    keys, values, mask = as_dense(args)
    expected, expected_lse = reference.masked_attention(args["q"], keys, values, mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unequal_lengths(dtype, place):
    needs(place, "shadow_attention")
    sizes = Sizes(batch=6, q_len=4, exact=150, dim=128)
    lens = {
        "q_lens": [4, 1, 0, 3, 9, 2],
        "exact_lens": [150, 20, 7, 0, 1000, 1],
        "exact_starts": [0, 19, 3, 0, 140, -5],
    }
    lens = {name: torch.tensor(x, dtype=dtype, device=place.device) for name, x in lens.items()}
    args = poison_exact(make_attention(sizes, place) | lens)
    args["selected"][5] = -1  # rows 0 and 1 of sequence 5: nothing, then one exact row
    out, lse = attend(args)
    check_shadow(out, lse, args)
    assert (out[1, :, 1:] == 0).all() and lse[1, :, 1:].isneginf().all()
    assert lse[5, :, 0].isneginf().all() and lse[5, :, 1].isfinite().all()


def test_a_sequence_gets_what_it_gets_alone(place):
    """To the bit on the CPU; on a GPU more CTAs share the keys of a small batch, and their partial
    results are rounded once more."""
    needs(place, "shadow_attention")
    sizes = Sizes(batch=3, q_len=2, exact=90, dim=64)
    lens = {
        "q_lens": torch.tensor([1, 2, 1], device=place.device),
        "exact_lens": torch.tensor([90, 33, 2], device=place.device),
    }
    args = make_attention(sizes, place) | lens
    whole = attend(args)
    for b in range(3):
        alone = attend(
            {
                name: x[b : b + 1] if torch.is_tensor(x) and name != "inv_freq" else x
                for name, x in args.items()
            }
        )
        for a, c in zip(alone, whole, strict=True):
            if place.device == "cpu":
                assert torch.equal(a, c[b : b + 1])
            else:
                torch.testing.assert_close(a, c[b : b + 1], rtol=2**-7, atol=2**-12)


def test_entries_out_of_range_are_dropped(place):
    needs(place, "shadow_attention", "lowrank_reconstruct")
    sizes = Sizes(top_k=8, slots=8, tokens=403)  # 50 chunks and 3 tokens
    args = make_attention(sizes, place)
    args["selected"][:, :, 1] = 50
    args["selected"][:, :, 2] = 2**31 - 1
    args["selected"][:, :, 3] = -7
    args["slot_of"][:, :, 4] = 8
    args["slot_of"][:, :, 5] = -1
    args["slot_of"][:, :, 6] = 2**31 - 1
    out, lse = attend(args)
    check_shadow(out, lse, args)
    keys = shadow.lowrank_reconstruct(
        *(args[x] for x in ("selected", "factor", "basis", "mean", "inv_freq")), chunk=8
    )
    keys = keys.unflatten(2, (-1, 8))
    assert (keys[:, :, 1:4] == 0).all() and (keys[:, :, 7] == 0).all()
    assert (keys[:, :, [0, 4, 5, 6]] != 0).any(-1).all()


def test_nothing_to_see(place):
    needs(place, "shadow_attention")
    sizes = Sizes(q_len=2)
    args = make_attention(sizes, place) | {"exact_lens": torch.zeros(2, device=place.device).int()}
    none = {
        "selected": args["selected"][..., :0].contiguous(),
        "slot_of": args["slot_of"][..., :0].contiguous(),
        "values": args["values"][:, :, :0],
        "factor": args["factor"][:, :0],
    }
    for change in (none, {"selected": torch.full_like(args["selected"], -1)}):
        out, lse = attend(args | change)
        assert (out == 0).all() and lse.isneginf().all()
    out, lse = attend(args | none | {"exact_lens": None})  # exact rows alone are enough
    check_shadow(out, lse, args | none | {"exact_lens": None})


@pytest.mark.parametrize("layout", ["blhd", "packed", "hblD", "odd"])
def test_views(layout, place):
    """Any strides with the last dimension contiguous; of the values, rows of a head in a row."""
    needs(place, "shadow_attention")
    sizes = Sizes(q_len=3, dim=96, exact=70)
    args = make_attention(sizes, place)
    expected = attend(args)
    views = args | {x: relayout(args[x], layout) for x in ("q", "k", "v", "basis")}
    wide = args["factor"].new_full((*args["factor"].shape[:2], sizes.rank + 16), math.nan)
    views["factor"] = wide[..., 16:].copy_(args["factor"])
    views["values"] = args["values"].transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(attend(views), expected, strict=True):
        assert torch.equal(a, b)


def test_a_store_on_the_device_needs_no_slots(place):
    """``selected`` is the ``slot_of`` of the whole store."""
    needs(place, "shadow_attention")
    sizes = Sizes(slots=50)
    args = make_attention(sizes, place)
    values = randn(2, 2, 50, 8 * 64, place=place, seed=5)
    args |= {"values": values, "slot_of": args["selected"].clone()}
    out, lse = attend(args)
    check_shadow(out, lse, args)


def test_finite_values_of_hidden_rows_do_not_count(place):
    """Row 0 does not see the queries' later rows."""
    needs(place, "shadow_attention")
    args = make_attention(Sizes(q_len=3, exact=20), place)
    before = attend(args)
    k, v = args["k"].clone(), args["v"].clone()
    k[:, :, 18:], v[:, :, 18:] = 1e4, -1e4
    for a, b in zip(before, attend(args | {"k": k, "v": v}), strict=True):
        assert torch.equal(a[:, :, 0], b[:, :, 0])
        assert not torch.equal(a[:, :, 2], b[:, :, 2])


@pytest.mark.parametrize("q_len", [1, 6])
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_full_rank_and_full_budget_are_dense_attention(q_len, rope, main_place):
    """Gram to attention, as a cache calls them, in fp32: nothing is lost on the way."""
    place = main_place
    needs(place, *(f"shadow_{x}" for x in ("gram_", "landmarks_", "outliers", "select", "plan_")))
    needs(place, "gather_values_", "shadow_attention")
    heads, kv_heads, dim, chunk, tokens, tail = 6, 2, 64, 8, 300, 300 % 8 + q_len
    width, chunks, count = kv_heads * dim, tokens // chunk, 5
    whole = chunks * chunk
    new = tokens + q_len
    raw = randn(2, kv_heads, new, dim, place=place, seed=1) + 3.0  # a bias, as of QKV
    v = randn(2, kv_heads, new, dim, place=place, seed=2)
    q = randn(2, heads, q_len, dim, place=place, seed=3)
    freq = (1e4 ** (-torch.arange(dim // 4) / (dim // 4))).to(place.device)
    options = {"interleaved": rope == "interleaved", "rope_scale": 1.2}
    at = torch.arange(new, device=place.device)
    k = reference.rope(raw, at, freq, **options).to(place.dtype)

    gram = torch.zeros(2, width, width, dtype=torch.float64, device=place.device)
    total, number = gram[:, 0].clone(), torch.zeros(2, dtype=torch.int64, device=place.device)
    for piece in raw[:, :, :whole].split(100, dim=2):
        shadow.shadow_gram_(piece, gram, total, number)
    basis, mean = shadow.shadow_basis(
        gram, total, number, rank=width, kv_heads=kv_heads, dtype=place.dtype
    )
    factor = shadow.shadow_project(raw[:, :, :whole], basis, mean)
    landmarks = k.new_empty(2, kv_heads, chunks, dim)
    cosines = torch.empty(2, kv_heads, chunks, device=place.device)
    shadow.shadow_landmarks_(k, landmarks, cosines, chunk=chunk)
    outliers = shadow.shadow_outliers(cosines, count=count, sink_chunks=1)
    excluded = shadow.chunk_mask(outliers, chunks)
    store = v[:, :, :whole].contiguous().unflatten(2, (chunks, chunk)).flatten(3)
    exact_k, exact_v = (
        torch.cat([shadow.chunk_rows(x, outliers, chunk=chunk), x[:, :, whole:]], 2) for x in (k, v)
    )
    assert exact_k.shape[2] == count * chunk + tail

    slots = chunks + 3
    values = store.new_full((2, kv_heads, slots, chunk * dim), math.nan)
    table = torch.full((2, kv_heads, slots), -1, dtype=torch.int32, device=place.device)
    used = torch.zeros_like(table)
    selected = shadow.shadow_select(q, landmarks, top_k=chunks - count, excluded=excluded)
    assert (selected >= 0).all()
    slot_of, misses, miss_count = shadow.shadow_plan_(selected, table, used)
    assert (miss_count == chunks - count).all()
    shadow.gather_values_(store, values, misses, miss_count)
    out, lse = shadow.shadow_attention(
        q, exact_k, exact_v, selected, slot_of, values, factor, basis, mean, freq,
        return_lse=True, **options,
    )  # fmt: skip

    mask = reference.dense_mask(q_len, new, place.device)
    expected, expected_lse = reference.masked_attention(q, k, v, mask)
    bound = 2e-5 if place.dtype == torch.float32 else 0.1
    assert_at_most((out - expected).abs().max(), torch.tensor(bound), "error of the output")
    assert_at_most((lse - expected_lse).abs().max(), torch.tensor(5 * bound), "error of the LSE")


# --- rebuilt keys -------------------------------------------------------------------------------

RECONSTRUCTIONS = [
    Sizes(),
    Sizes(dim=128, rank=160, rope="interleaved", chunk=4, top_k=13),
    Sizes(dim=96, rank=16, rope="none", chunk=32, top_k=3),
    Sizes(dim=128, rank=528, kv_heads=1, chunk=16, mean=False),
]


@pytest.mark.parametrize("sizes", RECONSTRUCTIONS, ids=str)
def test_reconstruct(sizes, place):
    needs(place, "lowrank_reconstruct")
    selected = pick_chunks(sizes).to(place.device)
    args = make_low_rank(sizes, place) | {"selected": selected, "chunk": sizes.chunk}
    args["factor"] = poison_factor(args["factor"], selected, sizes.chunk)
    keys = shadow.lowrank_reconstruct(**args)
    expected = reference.lowrank_reconstruct(**args)
    assert keys.dtype == place.dtype and keys.is_contiguous()
    assert (keys[:, :, -sizes.chunk :] == 0).all()
    eps = torch.finfo(place.dtype).eps
    bound = 2 * eps * expected.abs() + 1e-5 + (4 * eps if place.device == "cuda" else 0)
    assert_at_most((keys - expected).abs(), bound, "error of a key")


def test_positions_of_a_million(place):
    """The last of 2^20 tokens, turned by large angles, at no more error than the first."""
    needs(place, "lowrank_reconstruct")
    sizes = Sizes(batch=1, rank=16, tokens=2**20)
    args = make_low_rank(sizes._replace(tokens=1), place)
    args["factor"] = args["factor"].expand(1, 2**20, 16)
    ids = torch.tensor([0, 1000, 2**17 - 1], dtype=torch.int32, device=place.device)
    args["selected"] = ids.expand(1, 2, 3).contiguous()
    keys = shadow.lowrank_reconstruct(**args, chunk=8)
    k = randn(1, 2, 1, 64, place=place, seed=0)  # the key before it is turned
    k = args["factor"][:, :1].double().unsqueeze(1) @ args["basis"].double()
    k = k + args["mean"].double().unsqueeze(2)
    at = (ids.long().unsqueeze(-1) * 8 + torch.arange(8, device=place.device)).flatten()
    expected = reference.rope(
        k.expand(1, 2, 24, 64), at, args["inv_freq"], rope_scale=args["rope_scale"]
    )
    bound = 2 * torch.finfo(place.dtype).eps * expected.abs() + 2e-5
    assert_at_most((keys - expected).abs(), bound, "error of a key")


def rope_models():
    """name, config changes: each layout, and each way to scale frequencies."""
    scaled = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0}
    long = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
    return [
        ("llama", {}),
        ("llama", {"rope_parameters": scaled | llama3}),
        ("yi", {}),
        ("qwen2", {"rope_parameters": scaled | yarn}),
        ("qwen3", {}),
        ("glm-2kv", {}),
        ("glm4", {}),
        ("phi3", {}),
        ("phi3", {"rope_parameters": scaled | long, "original_max_position_embeddings": 64}),
    ]


@pytest.mark.parametrize(
    "family, changes",
    rope_models(),
    ids=lambda x: x if isinstance(x, str) else x.get("rope_parameters", {}).get("rope_type", ""),
)
def test_rope_is_that_of_transformers(family, changes, main_place):
    place = main_place
    needs(place, "lowrank_reconstruct")
    hf_models = pytest.importorskip("hf_models")
    import importlib

    config = hf_models.config_of(family, **changes)
    module = importlib.import_module(
        f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    )
    name = next(x for x in dir(module) if x.endswith("RotaryEmbedding"))
    rotary = getattr(module, name)(config).to(place.device)

    heads, dim = config.num_key_value_heads, hf_models.SHAPES[family][3]
    tokens, rank = 400, 32
    factor = randn(1, tokens, rank, place=place, seed=0)
    basis = (randn(1, heads, rank, dim, place=place, seed=1) / 6).to(place.dtype)
    keys = factor.float().unsqueeze(1) @ basis.float()
    at = torch.arange(tokens, device=place.device).unsqueeze(0)
    cos, sin = rotary(keys, at)  # LongRoPE changes its frequencies here
    _, expected = module.apply_rotary_pos_emb(keys, keys, cos, sin)

    chunks = torch.randperm(tokens // 8, generator=generator(2))[:20].to(place.device).int()
    got = shadow.lowrank_reconstruct(
        chunks.expand(1, heads, -1).contiguous(),
        factor,
        basis,
        inv_freq=rotary.inv_freq,
        chunk=8,
        interleaved=family.startswith("glm"),
        rope_scale=rotary.attention_scaling,
    )
    expected = shadow.chunk_rows(expected, chunks.expand(1, heads, -1), chunk=8)
    bound = 1e-5 if place.dtype == torch.float32 else 0.03
    torch.testing.assert_close(got.float(), expected, atol=bound, rtol=bound)
