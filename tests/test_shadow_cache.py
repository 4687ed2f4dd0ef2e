"""ShadowKVCache in small random models on the CPU: with full rank and budget it changes nothing."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from hf_models import EXACT_PATTERNS, SHAPES, fresh, spread, tokens, transformers

import sparseattn
from sparseattn import ShadowKVCache

FULL = {
    "rank": 1024,
    "chunk_size": 8,
    "sparse_budget": 4096,
    "outlier_chunks": 3,
    "local_tokens": 16,
}


def full_cache(model, **changes):
    """Rank and budget that hold everything, compressing from 100 tokens on."""
    cache = ShadowKVCache(model.config, **(FULL | changes))
    compress_from(cache, 100)
    return cache


def compress_from(cache: ShadowKVCache, tokens: int) -> None:
    for layer in cache.layers:
        layer.dense_limit = tokens


def generate(model, ids, count, cache):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # generate would take generated pad tokens for padding
        max_new_tokens=count,
        do_sample=False,
        past_key_values=cache,
    )


def dense_of(model):
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_and_budget_change_no_token(shape):
    """200 generated tokens and three appended turns, prompts of odd lengths."""
    model = sparseattn.hf.enable(fresh(shape))
    plain = fresh(shape)
    cache, dense = full_cache(model), dense_of(plain)
    ids = tokens(1, 157)
    for turn, count in enumerate([80, 40, 40, 40]):
        got, expected = generate(model, ids, count, cache), generate(plain, ids, count, dense)
        assert torch.equal(got, expected), f"turn {turn}"
        ids = torch.cat((got, tokens(1, 23 + turn, seed=turn + 1)), dim=1)
    assert cache.layers[0].state is not None
    assert cache.get_seq_length() == dense.get_seq_length()
    counters = cache.counters()
    assert counters["misses"] > 0 and counters["hits"] > counters["misses"]


@pytest.mark.parametrize("shape", ["llama", "glm-2kv", "phi3"])
@pytest.mark.parametrize("chunk", [4, 16, 32])
def test_chunk_sizes(shape, chunk):
    model, plain = sparseattn.hf.enable(fresh(shape)), fresh(shape)
    cache = full_cache(model, chunk_size=chunk)
    ids = tokens(2, 211)
    assert torch.equal(generate(model, ids, 90, cache), generate(plain, ids, 90, dense_of(plain)))


def test_without_enable_every_step_sees_everything():
    model, plain = fresh("glm-2kv"), fresh("glm-2kv")
    ids = tokens(2, 140)
    cache = ShadowKVCache(model.config, **(FULL | {"sparse_budget": 16}))
    compress_from(cache, 100)
    assert torch.equal(generate(model, ids, 20, cache), generate(plain, ids, 20, dense_of(plain)))


def test_short_texts_stay_dense_and_exact():
    model, plain = sparseattn.hf.enable(fresh("qwen3")), fresh("qwen3")
    cache = ShadowKVCache(model.config)
    ids = tokens(2, 90)
    assert torch.equal(generate(model, ids, 30, cache), generate(plain, ids, 30, dense_of(plain)))
    assert cache.layers[0].state is None and set(cache.memory()) == {"dense"}


def small_cache(model, **changes):
    options = {"rank": 64, "sparse_budget": 64, "outlier_chunks": 2, "local_tokens": 16}
    return ShadowKVCache(model.config, **(options | changes))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["llama", "glm-2kv"])
def test_what_is_not_selected_is_not_read(shape):
    """Factor, values and landmarks' chunks that a step does not select may be NaN."""
    model = sparseattn.hf.enable(fresh(shape))
    cache = small_cache(model)
    model(tokens(1, 640), past_key_values=cache)
    model(tokens(1, 1, 1), past_key_values=cache)
    state, heads = cache.layers[0].state, model.config.num_attention_heads
    query = torch.randn(1, heads, 1, 128, generator=torch.Generator().manual_seed(2))
    expected = state.attend(query, None)
    selected = torch.ops.sparseattn.shadow_select(
        query,
        state.landmarks.rows,
        top_k=state.options.top_k,
        excluded=state.excluded.rows[..., 0].contiguous(),
    )
    used = torch.zeros(state.chunks, dtype=torch.bool)
    used[selected.flatten().long()] = True
    assert 0 < used.sum() < state.chunks // 2
    chunk = state.options.chunk
    state.factor.rows.view(1, 1, state.chunks, chunk, -1)[:, :, ~used] = torch.nan
    for head in range(selected.shape[1]):
        chosen = torch.zeros(state.chunks, dtype=torch.bool)
        chosen[selected[0, head].long()] = True
        state.store.rows[0, head, ~chosen] = torch.nan
        held = state.slot_chunk[0, head].long()
        state.slots[0, head, (held < 0) | ~chosen[held.clamp(min=0)]] = torch.nan
    assert torch.equal(state.attend(query, None), expected)


@torch.no_grad()
def test_a_small_budget_finds_the_needles():
    """Chunks of keys along the query hold nearly all mass: a small budget is nearly dense."""
    config = fresh("llama").config
    config._attn_implementation = "sparseattn"
    cache = ShadowKVCache(config, rank=128, sparse_budget=64, outlier_chunks=2, local_tokens=16)
    layer, gen = cache.layers[0], torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, 128, generator=gen)
    keys, values = torch.randn(2, 1, 1, 1000, 128, generator=gen)
    for head, first in enumerate([200, 416, 600, 808]):  # a whole chunk for each query head
        keys[0, 0, first : first + 8] += 1.2 * query[0, head]
    layer.update(keys, values)
    new = torch.randn(2, 1, 1, 1, 128, generator=gen)
    layer.update(*new)
    keys, values = torch.cat((keys, new[0]), 2), torch.cat((values, new[1]), 2)
    expected = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    got = layer.attend(query, None)
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert not torch.allclose(got, expected, atol=1e-5)


def test_sparse_prefill_and_shadow_decode_together():
    """Patterns that cover everything, full rank and budget: nothing changes."""
    model, plain = fresh("glm-4kv"), fresh("glm-4kv")
    sparseattn.hf.enable(model, patterns=spread(EXACT_PATTERNS, model), min_length=0)
    cache, dense = full_cache(model), dense_of(plain)
    ids = tokens(1, 300)
    for turn in range(2):
        got, expected = generate(model, ids, 30, cache), generate(plain, ids, 30, dense)
        assert torch.equal(got, expected), f"turn {turn}"
        ids = torch.cat((got, tokens(1, 100, seed=turn + 1)), dim=1)


@torch.no_grad()
def test_thousands_of_generated_tokens():
    """Memory grows by the compressed size of a token, and the tail stays short."""
    config = fresh("llama").config
    config._attn_implementation = "sparseattn"
    cache = ShadowKVCache(config, rank=32, sparse_budget=64, outlier_chunks=2, local_tokens=16)
    layer = cache.layers[0]
    gen = torch.Generator().manual_seed(0)

    def rows(count):
        return torch.randn(1, 1, count, 128, generator=gen)

    layer.update(rows(512), rows(512))
    sizes = []
    for step in range(4096):
        keys, _ = layer.update(rows(1), rows(1))
        assert keys.shape[2] == 1
        out = layer.attend(rows(4).view(1, 4, 1, 128), None)
        if step % 1024 == 1023:
            assert out.isfinite().all()
            sizes.append(sum(cache.memory().values()))
    assert layer.get_seq_length() == 512 + 4096
    assert layer.state.keys.length <= layer.state.first + 16 + 64 + 8
    growth = [b - a for a, b in itertools.pairwise(sizes)]
    per_token = (32 + 128 + 128 / 8 + 1) * 4  # factor, value, a part of a landmark
    assert max(growth) < 1.5 * 1024 * per_token


@torch.no_grad()
def test_running_out_of_memory_leaves_the_cache_usable(monkeypatch):
    model = sparseattn.hf.enable(fresh("llama"))
    cache, other = small_cache(model), small_cache(model)
    ids = tokens(1, 400)
    model(ids, past_key_values=cache), model(ids, past_key_values=other)
    state = cache.layers[0].state
    before = state.length, state.chunks

    def refuse(*shape, **options):
        raise RuntimeError("out of memory")

    more = tokens(1, 300, 1)
    keys = torch.randn(1, 1, 3000, 128)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(MemoryError, match=r"exact keys needs [0-9.]+ MiB of memory of cpu"):
            state.append(keys, keys)
    assert (state.length, state.chunks) == before
    got = model(more, past_key_values=cache).logits
    assert torch.equal(got, model(more, past_key_values=other).logits)


@torch.no_grad()
def test_a_store_in_host_memory_changes_nothing():
    """Steps, growth, an appended turn and a selection of sequences; then the memory is gone."""
    model = sparseattn.hf.enable(fresh("llama"))
    caches = [small_cache(model, value_store=x) for x in ("device", "host")]
    for more in (tokens(2, 400), tokens(2, 1, 1), tokens(2, 200, 2), tokens(2, 1, 3)):
        a, b = (model(more, past_key_values=x).logits for x in caches)
        assert torch.equal(a, b)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
    a, b = (model(tokens(3, 1, 4), past_key_values=x).logits for x in caches)
    assert torch.equal(a, b)
    assert caches[1].memory()["host_values"] == caches[0].memory()["store_values"]
    memory = weakref.ref(caches[1].layers[0].state.store.host)
    caches[1].reset()
    assert memory() is None


@torch.no_grad()
def test_memory_and_growth():
    """Compressed, a text takes a part of the dense bytes, and generated tokens become chunks."""
    model = sparseattn.hf.enable(fresh("glm-4kv"))
    cache = small_cache(model)
    ids = tokens(1, 1024)
    out = generate(model, ids, 300, cache)
    assert out.shape[1] == 1324
    state = cache.layers[0].state
    assert state.compressed >= 1324 - 16 - 64 - 8
    assert cache.get_seq_length() == 1323
    assert state.keys.length <= state.first + 16 + 64 + 8
    memory = cache.memory()
    dense = 2 * 2 * 1323 * 4 * 128 * 4  # layers, keys and values
    keys = memory["factor"] + memory["landmarks"] + memory["exact"]
    assert keys < dense / 2 and memory["store_values"] >= dense / 2 * 0.9
    cache.reset()
    assert cache.memory() == {} and cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("removed", [5, 40, 300])
def test_crop(removed):
    """Within the tail, into the chunks, and back to a short text."""
    model, plain = sparseattn.hf.enable(fresh("glm-2kv")), fresh("glm-2kv")
    cache, dense = full_cache(model), dense_of(plain)
    ids = tokens(1, 390)
    model(ids, past_key_values=cache), plain(ids, past_key_values=dense)
    cache.crop(-removed), dense.crop(-removed)
    assert cache.get_seq_length() == 390 - removed
    more = tokens(1, 7, seed=3)
    got = model(more, past_key_values=cache).logits
    expected = plain(more, past_key_values=dense).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    got = model(tokens(1, 1, 4), past_key_values=cache).logits
    expected = plain(tokens(1, 1, 4), past_key_values=dense).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_beams():
    model, plain = sparseattn.hf.enable(fresh("llama")), fresh("llama")
    cache = full_cache(model)
    ids = tokens(1, 150)
    options = {"max_new_tokens": 24, "num_beams": 3, "do_sample": False}
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, plain.generate(ids, past_key_values=dense_of(plain), **options))


@torch.no_grad()
def test_left_padding_is_refused_in_decode():
    model = sparseattn.hf.enable(fresh("llama"))
    cache = full_cache(model)
    ids = tokens(2, 200)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    with pytest.raises(ValueError, match="attention_mask: expected no padding"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 20}, "rank: expected a positive multiple of 16, got 20"),
        ({"chunk_size": 5}, "chunk_size: expected 4, 8, 16 or 32, got 5"),
        ({"sparse_budget": 100}, "sparse_budget: expected a positive multiple of chunk_size"),
        ({"outlier_chunks": -1}, "outlier_chunks: expected 0 or more, got -1"),
        ({"value_slots": 3}, "value_slots: expected at least"),
        ({"value_store": "disk"}, "value_store: expected device, host or auto, got 'disk'"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        ShadowKVCache(fresh("llama").config, **changes)
