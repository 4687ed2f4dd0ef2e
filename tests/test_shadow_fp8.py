"""e4m3 stores and factors: the format to the bit, the operators against the oracle, the cache."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Place, assert_at_most, generator, randn
from shadow_inputs import Sizes, check_shadow, make_attention, make_low_rank, needs, pick_chunks
from torch import Tensor

from sparseattn import ShadowKVCache, reference, shadow

FP8 = torch.float8_e4m3fn
NAN = 0x7F  # its byte


def as_ids(data, place: Place) -> Tensor:
    return torch.tensor(data, dtype=torch.int32, device=place.device)


def fp8(data: Tensor) -> Tensor:
    return data.to(torch.uint8).view(FP8)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, width] by the operator."""
    store = fp8(torch.full(x.shape, 0x55)).to(x.device)[None, None]
    scale = torch.full((1, 1, len(x)), -1.0, device=x.device)
    shadow.store_rows_(x[None, None], store, scale)
    return store[0, 0], scale[0, 0]


def check_rows(rows: Tensor, scale: Tensor, x: Tensor) -> None:
    """The oracle's bytes and scales; a NaN may have any sign."""
    expected, expected_scale = reference.quantise_rows(x.cpu())
    assert torch.equal(scale.cpu(), expected_scale)
    got, expected = rows.cpu().view(torch.uint8), expected.view(torch.uint8)
    nan = (expected & NAN) == NAN
    assert torch.equal((got & NAN) == NAN, nan)
    assert torch.equal(got[~nan], expected[~nan])


# --- the format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-20, 0.0, math.nan])
def test_every_number_comes_back(scale, place):
    needs(place, "gather_values_")
    store = fp8(torch.arange(256)).to(place.device)[None, None, None]
    values = torch.full((1, 1, 2, 256), 7.0, device=place.device, dtype=place.dtype)
    scales = torch.full((1, 1, 1), scale, device=place.device)
    lists = as_ids([[[(1, 0)]]], place), as_ids([[1]], place)
    shadow.gather_values_(store, values, *lists, store_scale=scales)
    expected = (store.cpu().float() * scale).to(place.dtype)
    assert torch.equal(values[0, 0, 1].cpu().nan_to_num(9.0), expected[0, 0, 0].nan_to_num(9.0))
    assert (values[0, 0, 0] == 7).all()


def test_ties_go_to_the_even_number(place):
    """Every number, every midpoint of two, and what is next to a midpoint; the scale is 1."""
    needs(place, "store_rows_")
    numbers = fp8(torch.arange(NAN)).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = middles.to(place.dtype)
    step = torch.finfo(place.dtype).eps
    x = torch.cat([numbers, middles, near * (1 + step), near * (1 - step)])
    x = torch.cat([x, -x, torch.zeros(-2 * len(x) % 16)])
    x[-1] = 448.0
    x = x.to(place.device, place.dtype)[None]
    rows, scale = quantise(x)
    assert scale.item() == 1.0
    check_rows(rows, scale, x)
    exact = torch.cat([numbers, -numbers]).to(place.device)
    count = len(numbers)
    offset = 4 * count - 3
    assert torch.equal(rows[0, :count].float(), exact[:count])
    assert torch.equal(rows[0, offset : offset + count].float(), exact[count:])


@pytest.mark.parametrize("width", [16, 160, 1024, 4096])
def test_rows_of_all_sizes(width, place):
    needs(place, "store_rows_")
    x = torch.randn(100, width, generator=generator(width))
    x *= torch.logspace(-6, 4, 100)[:, None] * torch.rand(100, width, generator=generator(1)) ** 8
    x = x.to(place.device, place.dtype)
    rows, scale = quantise(x)
    check_rows(rows, scale, x)
    error = (reference.dequantise_rows(rows, scale) - x.float()).abs()
    bound = (x.float().abs() / 16 + 2**-10 * scale[:, None]) * (1 + 1e-6)
    assert_at_most(error, bound, "error of a number")
    assert (rows.float().abs().amax(-1) == 448).all()


def test_zeros_subnormal_numbers_nan_and_infinity(place):
    needs(place, "store_rows_")
    x = torch.zeros(7, 32)
    x[1] = torch.linspace(-1, 1, 32) * (6e-7 if place.dtype == torch.float16 else 1e-39)
    x[2, 3], x[2, 4] = math.nan, 5.0
    x[3] = math.nan
    x[4, 7], x[4, 8] = -math.inf, 1.0
    x[5, 0] = torch.finfo(place.dtype).max
    x[5, 1] = -0.0
    x[6] = torch.finfo(place.dtype).max
    x = x.to(place.device, place.dtype)
    rows, scale = quantise(x)
    check_rows(rows, scale, x)
    back = reference.dequantise_rows(rows, scale)
    assert (back[0] == 0).all() and scale[0] == 0
    assert back[2].isnan().sum() == 1 and back[2, 4] == 5 and back[2, 3].isnan()
    assert back[3].isnan().all() and back[4].isnan().all()
    torch.testing.assert_close(back[5, 0], x[5, 0].float(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(back[6], x[6].float(), rtol=1e-6, atol=0.0)


# --- rows in and out ----------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dim, group", [(64, 8), (128, 4), (96, 32), (160, 1)])
def test_store_rows(dim, group, quantised, place):
    """Strided rows into the middle of a strided store; all else stays."""
    needs(place, "store_rows_")
    x = randn(3, 5 * group, 2, dim, place=place, seed=0).transpose(1, 2)
    wide = torch.full((3, 2, 11, group * dim), 7.0, device=place.device)
    wide = wide.to(FP8 if quantised else place.dtype)
    store = wide[:, :, 2:]
    scale = torch.full((2, 3, 9), 7.0, device=place.device).transpose(0, 1) if quantised else None
    shadow.store_rows_(x, store, scale, first=3)
    expected = x.unflatten(2, (5, group)).flatten(3)
    if quantised:
        assert scale is not None
        numbers, scales = reference.quantise_rows(expected)
        assert torch.equal(scale[:, :, 3:8], scales)
        assert torch.equal(store[:, :, 3:8].float(), numbers.float())
        scale[:, :, 3:8] = 7.0
        assert (scale == 7).all()
    else:
        assert torch.equal(store[:, :, 3:8], expected)
    kept = torch.ones(11, dtype=torch.bool)
    kept[5:10] = False
    assert (wide.float()[:, :, kept] == 7).all()
    before = wide.clone()
    shadow.store_rows_(x[:, :, :0], store, scale, first=9)
    assert torch.equal(wide.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dim, chunk", [(64, 4), (96, 8), (128, 32)])
def test_gather(dim, chunk, place):
    """What is not in the list is not read: bytes and scales may be NaN."""
    needs(place, "gather_values_")
    x = randn(2, 3, 40, chunk * dim, place=place, seed=0)
    store, scale = reference.quantise_rows(x)
    expected = reference.dequantise_rows(store, scale).to(place.dtype)
    pairs = [(3, 39), (0, 0), (11, 17), (-1, 5), (12, 5), (5, 40)]
    used = torch.zeros(40, dtype=torch.bool, device=place.device)
    used[[39, 0, 17]] = True
    store.view(torch.uint8)[:, :, ~used] = NAN
    scale[:, :, ~used] = math.nan
    store = store.transpose(0, 1).contiguous().transpose(0, 1)
    scale = torch.stack([scale, scale], 2)[:, :, 0]
    values = torch.full((2, 3, 12, chunk * dim), 7.0, device=place.device, dtype=place.dtype)
    lists = as_ids([[pairs] * 3] * 2, place), as_ids([[6, 0, 2], [6, 100, -1]], place)
    shadow.gather_values_(store, values, *lists, store_scale=scale)
    for b, h, n in ((0, 0, 3), (0, 1, 0), (0, 2, 2), (1, 0, 3), (1, 1, 3), (1, 2, 0)):
        for slot, chunk_id in pairs[:n]:
            assert torch.equal(values[b, h, slot], expected[b, h, chunk_id])
        others = sorted(set(range(12)) - {s for s, _ in pairs[:n]})
        assert (values[b, h, others] == 7).all()


@pytest.mark.cuda
def test_a_store_in_pinned_memory():
    """Written and read by kernels, in a graph, too."""
    place = Place("cuda", torch.bfloat16)
    needs(place, "store_rows_", "gather_values_")
    x = randn(1, 2, 30 * 8, 128, place=place, seed=0)
    store = torch.zeros(1, 2, 30, 8 * 128, dtype=torch.uint8).pin_memory().view(FP8)
    scale = torch.zeros(1, 2, 30, device="cuda")
    values = torch.zeros(1, 2, 6, 8 * 128, device="cuda", dtype=place.dtype)
    lists = as_ids([[[(5, 29), (0, 3)]] * 2], place), as_ids([[2, 2]], place)

    def both() -> None:
        shadow.store_rows_(x, store, scale)
        shadow.gather_values_(store, values, *lists, store_scale=scale)

    graph = torch.cuda.CUDAGraph()
    both()
    with torch.cuda.graph(graph):
        both()
    x.copy_(randn(1, 2, 30 * 8, 128, place=place, seed=1))
    graph.replay()
    torch.cuda.synchronize()
    numbers, scales = reference.quantise_rows(x.unflatten(2, (30, 8)).flatten(3))
    assert torch.equal(store.float(), numbers.float().cpu()) and torch.equal(scale, scales)
    expected = reference.dequantise_rows(numbers, scales).to(place.dtype)
    assert torch.equal(values[:, :, [5, 0]], expected[:, :, [29, 3]])


# --- keys and attention -------------------------------------------------------------------------

CASES = [
    Sizes(),
    Sizes(q_heads=8, kv_heads=2, dim=128, rank=160, top_k=20, slots=40, exact=131),
    Sizes(q_heads=7, kv_heads=1, dim=128, chunk=4, rank=144, top_k=35, slots=35, q_len=2),
    Sizes(q_heads=32, kv_heads=2, dim=128, rope="interleaved", chunk=16, q_len=3, exact=40),
    Sizes(q_heads=3, kv_heads=3, dim=96, rank=48, chunk=32, tokens=330, q_len=5, exact=200),
    Sizes(q_heads=4, kv_heads=1, rope="none", mean=False, rank=16, q_len=37, exact=64),
    Sizes(batch=3, q_heads=16, kv_heads=1, rope="interleaved", rank=528, q_len=4, mean=False),
]


def with_fp8_factor(args: dict) -> dict:
    """The factor quantised; scales of rows that are NaN are NaN as well."""
    factor, scale = reference.quantise_rows(args["factor"])
    scale = scale.masked_fill(factor.float().isnan().any(-1), math.nan)
    return args | {"factor": factor, "factor_scale": scale}


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_attention(sizes, place):
    needs(place, "shadow_attention")
    args = with_fp8_factor(make_attention(sizes, place))
    out, lse = shadow.shadow_attention(**args, return_lse=True)
    check_shadow(out, lse, args)
    again = shadow.shadow_attention(**args)
    assert torch.equal(again, out)


def test_attention_of_views(place):
    needs(place, "shadow_attention")
    args = with_fp8_factor(make_attention(Sizes(rank=48, dim=128), place))
    expected = shadow.shadow_attention(**args)
    for pad in (16, 13):
        wide = fp8(torch.full((*args["factor"].shape[:2], 48 + pad), NAN)).to(place.device)
        wide[..., pad:].copy_(args["factor"])
        scale = torch.stack([args["factor_scale"]] * 3, 1)[:, 1]
        views = args | {"factor": wide[..., pad:], "factor_scale": scale}
        assert torch.equal(shadow.shadow_attention(**views), expected)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(dim=128, rank=160, rope="interleaved", chunk=4, top_k=13),
        Sizes(dim=96, rank=16, rope="none", chunk=32, top_k=3),
        Sizes(dim=128, rank=528, kv_heads=1, chunk=16, mean=False),
        Sizes(dim=64, rank=1024, kv_heads=1, top_k=13),
    ],
    ids=str,
)
def test_reconstruct(sizes, place):
    needs(place, "lowrank_reconstruct")
    selected = pick_chunks(sizes).to(place.device)
    args = make_low_rank(sizes, place) | {"selected": selected, "chunk": sizes.chunk}
    args = with_fp8_factor(args)
    keys = shadow.lowrank_reconstruct(**args)
    expected = reference.lowrank_reconstruct(**args)
    eps = torch.finfo(place.dtype).eps
    bound = 2 * eps * expected.abs() + 1e-5 + (4 * eps if place.device == "cuda" else 0)
    assert_at_most((keys - expected).abs(), bound, "error of a key")


def test_every_number_of_the_factor(place):
    """A basis of units lays the factor's numbers open; NaN makes its own key NaN, no other."""
    needs(place, "lowrank_reconstruct")
    numbers = fp8(torch.arange(256)).to(place.device).view(1, 4, 64).repeat(1, 2, 1)
    basis = torch.eye(64, device=place.device, dtype=place.dtype)[None, None]
    scale = torch.tensor([[1.0, 0.5, 2.0, 0.25, 1.0, 0.0, 1.0, 2.0]], device=place.device)
    keys = shadow.lowrank_reconstruct(
        as_ids([[[0, 1]]], place), numbers, basis, chunk=4, factor_scale=scale
    )[0, 0]
    nan = numbers.float().isnan().any(-1)[0]
    assert nan.sum() == 4 and torch.equal(keys.isnan().all(-1), nan)
    expected = numbers.float()[0] * scale[0, :, None]
    assert torch.equal(keys[~nan], expected[~nan].to(place.dtype))


# --- torch --------------------------------------------------------------------------------------


def calls(place: Place) -> dict[str, tuple[tuple, dict]]:
    args = with_fp8_factor(make_attention(Sizes(), place))
    store, scale = reference.quantise_rows(randn(2, 2, 50, 8 * 64, place=place, seed=2))
    x = randn(2, 2, 80, 64, place=place, seed=3)
    misses = torch.zeros(2, 2, 6, 2, dtype=torch.int32, device=place.device)
    counts = torch.ones(2, 2, dtype=torch.int32, device=place.device)
    low_rank = {n: args[n] for n in ("selected", "factor", "basis", "mean", "inv_freq")}
    return {
        "store_rows_": ((x, store, scale), {"first": 3}),
        "gather_values_": (
            (store, torch.zeros_like(args["values"]), misses, counts),
            {"store_scale": scale},
        ),
        "lowrank_reconstruct": (
            tuple(low_rank.values()),
            {"chunk": 8, "factor_scale": args["factor_scale"]},
        ),
        "shadow_attention": ((), args),
    }


@pytest.mark.parametrize("op", ["store_rows_", "gather_values_", "lowrank_reconstruct"])
def test_opcheck(op, main_place):
    needs(main_place, op)
    args, options = calls(main_place)[op]
    # The other checks compute with the arguments, which torch cannot do in fp8.
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        getattr(torch.ops.sparseattn, op).default, args, options, test_utils=tests
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, main_place):
    needs(main_place, "store_rows_", "gather_values_", "shadow_attention")

    def step(x, store, scale, values, misses, counts, attention):
        shadow.store_rows_(x, store, scale, first=3)
        shadow.gather_values_(store, values, misses, counts, store_scale=scale)
        return shadow.shadow_attention(**attention) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for call in (step, compiled):
        inputs = calls(main_place)
        x, store, scale = inputs["store_rows_"][0]
        _, values, misses, counts = inputs["gather_values_"][0]
        out = call(x, store, scale, values, misses, counts, inputs["shadow_attention"][1])
        results.append((out, store.view(torch.uint8), scale, values))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- the cache ----------------------------------------------------------------------------------

hf_models = pytest.importorskip("hf_models")
KINDS = {
    "values": {"value_dtype": "fp8"},
    "factor": {"factor_dtype": "fp8"},
    "both": {"value_dtype": "fp8", "factor_dtype": "fp8"},
}


def make_cache(model, **changes) -> ShadowKVCache:
    options = {"rank": 64, "sparse_budget": 64, "outlier_chunks": 2, "local_tokens": 16}
    return ShadowKVCache(model.config, **(options | changes))


def enabled(shape: str):
    from sparseattn import hf

    return hf.enable(hf_models.fresh(shape))


def relative(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_a_layer(kind, place):
    """Numbers are off by 2.3 % of themselves, root mean square, and so is what is made of them:
    stored keys and values as a whole, and attention with scores of standard deviation one."""
    needs(place, "store_rows_", "gather_values_", "lowrank_reconstruct", "shadow_attention")
    config = hf_models.fresh("llama").config
    config._attn_implementation = "sparseattn"
    gen = generator(0)
    heads, dim = config.num_key_value_heads, 128
    mixed = torch.randn(heads * dim, heads * dim, generator=gen) / (heads * dim) ** 0.5
    falloff = torch.arange(1, heads * dim + 1).float().rsqrt()
    keys = torch.randn(2, 2000, heads * dim, generator=gen) * falloff @ mixed
    keys = keys / keys.std()
    keys = keys.unflatten(2, (heads, dim)).transpose(1, 2).to(place.device, place.dtype)
    values = randn(2, heads, 2000, dim, place=place, seed=1)
    query = randn(2, config.num_attention_heads, 1, dim, place=place, seed=2)
    new = randn(2, heads, 1, dim, place=place, seed=3)
    states, outs = [], []
    for options in ({}, KINDS[kind]):
        cache = ShadowKVCache(
            config, rank=64, sparse_budget=512, outlier_chunks=2, value_store="host", **options
        )
        layer = cache.layers[0]
        layer.update(keys, values)
        layer.update(new, new)
        states.append(layer.state)
        outs.append(layer.attend(query, None))
    found = [
        relative(x, y) for x, y in zip(states[1].everything(), states[0].everything(), strict=True)
    ]
    found.append(relative(outs[1], outs[0]))
    for error, wrong in zip(found, (kind != "values", kind != "factor", True), strict=True):
        assert (0.01 if wrong else 0.0) <= error <= (0.045 if wrong else 0.0), found


@torch.no_grad()
@pytest.mark.parametrize("shape", ["llama", "glm-2kv"])
@pytest.mark.parametrize("store", ["device", "host"])
def test_the_cache_with_fp8(shape, store):
    """A prompt, steps, an appended turn, steps: near what an unquantised cache gives."""
    model = enabled(shape)
    caches = {"none": make_cache(model, value_store=store)}
    caches |= {n: make_cache(model, value_store=store, **x) for n, x in KINDS.items()}
    turns = [(2, 500, 0), *[(2, 1, i) for i in range(1, 5)], (2, 90, 5), (2, 1, 6)]
    for turn in turns:
        ids = hf_models.tokens(*turn)
        logits = {n: model(ids, past_key_values=x).logits for n, x in caches.items()}
        if turn[1] == 500:  # a prompt is attended to before it is compressed
            assert all(torch.equal(logits[n], logits["none"]) for n in KINDS)
        # This model's attention is far from flat: scores of several tens.
        assert relative(logits["values"], logits["none"]) < 0.15
        assert all(x.isfinite().all() for x in logits.values())
    assert len({x.get_seq_length() for x in caches.values()}) == 1

    memory = {n: x.memory() for n, x in caches.items()}
    part = "host_values" if store == "host" else "store_values"
    plain = memory["none"]
    width = 8 * 128  # of a chunk
    rows = plain[part] // (4 * width)
    assert memory["values"][part] == memory["both"][part] == rows * (width + 4)
    assert memory["both"]["factor"] < 0.6 * plain["factor"]
    assert memory["values"]["factor"] == plain["factor"]
    assert memory["factor"][part] == plain[part]
    counters = {n: x.counters() for n, x in caches.items()}
    assert counters["none"]["bytes_read"] == counters["none"]["misses"] * width * 4
    assert counters["values"]["bytes_read"] == counters["values"]["misses"] * width


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_steps_at_fixed_addresses(kind):
    """A GraphDecoder's steps, chunks added on the way, are those of the model."""
    from sparseattn.decode_graph import GraphDecoder

    model = enabled("llama")
    caches = [make_cache(model, **KINDS[kind]) for _ in range(2)]
    for cache in caches:
        model(hf_models.tokens(1, 400), past_key_values=cache)
    decoder = GraphDecoder(model, caches[0], max_new_tokens=80)
    for step in range(80):
        ids = hf_models.tokens(1, 1, step)
        got, expected = decoder.step(ids), model(ids, past_key_values=caches[1]).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert caches[0].layers[0].state.chunks == caches[1].layers[0].state.chunks


@torch.no_grad()
def test_beams_and_crop_with_fp8():
    model = enabled("llama")
    cache, alone = (make_cache(model, **KINDS["both"]) for _ in range(2))
    ids = hf_models.tokens(2, 400)
    model(ids, past_key_values=cache), model(ids[1:], past_key_values=alone)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    for _ in range(2):
        more = hf_models.tokens(1, 1, 3)
        got = model(more.repeat(3, 1), past_key_values=cache).logits
        expected = model(more, past_key_values=alone).logits
        torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-3, atol=1e-3)
        cache.crop(-150), alone.crop(-150)


@torch.no_grad()
def test_poison_in_an_fp8_cache():
    """Chunks that a step does not select may be NaN in the store and in the factor."""
    model = enabled("llama")
    cache = make_cache(model, **KINDS["both"])
    model(hf_models.tokens(1, 640), past_key_values=cache)
    model(hf_models.tokens(1, 1, 1), past_key_values=cache)
    state, heads = cache.layers[0].state, model.config.num_attention_heads
    query = torch.randn(1, heads, 1, 128, generator=generator(2))
    expected = state.attend(query, None)
    selected = shadow.shadow_select(
        query,
        state.landmarks.rows,
        top_k=state.options.top_k,
        excluded=state.excluded.rows[..., 0].contiguous(),
    )
    used = torch.zeros(state.chunks, dtype=torch.bool)
    used[selected.flatten().long()] = True
    factor = state.factor.rows.view(torch.uint8).view(1, 1, state.chunks, 8, -1)
    factor[:, :, ~used] = NAN
    state.factor.scale_rows.view(1, 1, state.chunks, 8)[:, :, ~used] = math.nan
    for head in range(selected.shape[1]):
        chosen = torch.zeros(state.chunks, dtype=torch.bool)
        chosen[selected[0, head].long()] = True
        state.store.rows.view(torch.uint8)[0, head, ~chosen] = NAN
        state.store.scale_rows[0, head, ~chosen] = math.nan
        held = state.slot_chunk[0, head].long()
        state.slots[0, head, (held < 0) | ~chosen[held.clamp(min=0)]] = torch.nan
    assert torch.equal(state.attend(query, None), expected)
    state.last_used.zero_(), state.slot_chunk.fill_(-1)  # all from the store
    assert torch.equal(state.attend(query, None), expected)


@pytest.mark.parametrize("name", ["value_dtype", "factor_dtype"])
def test_bad_dtypes(name):
    with pytest.raises(ValueError, match=f"{name}: expected None or 'fp8', got 'fp4'"):
        ShadowKVCache(hf_models.fresh("llama").config, **{name: "fp4"})
