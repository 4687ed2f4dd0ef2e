"""ShadowKVCache in small random models on the CPU: with full rank and budget it changes nothing."""

from __future__ import annotations

import pytest
import torch
from hf_models import SHAPES, fresh, tokens, transformers

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


@torch.no_grad()
def test_a_small_budget_reads_only_what_it_selects():
    """Values and factor rows of chunks that are not selected may be NaN."""
    model = sparseattn.hf.enable(fresh("llama"))
    cache = ShadowKVCache(
        model.config, rank=32, sparse_budget=64, outlier_chunks=2, local_tokens=16
    )
    ids = tokens(1, 640)
    model(ids, past_key_values=cache)
    state = cache.layers[0].state
    seen = []
    attention = torch.ops.sparseattn.shadow_attention

    def step(seed):
        return model(tokens(1, 1, seed), past_key_values=cache).logits

    step(1)
    held = state.slot_chunk[0, 0]
    kept = held[held >= 0].unique()
    assert 0 < len(kept) <= 12  # three halves of eight chunks
    assert attention is not None and not seen
    free = torch.ones(state.chunks, dtype=torch.bool)
    free[kept.long()] = False
    before = state.store.data.clone()
    state.store.data[0, :, : state.chunks][:, free] = torch.nan
    out = state.attend(torch.zeros(1, 4, 1, 128), None)
    chosen = state.slot_chunk[0, 0]
    if not bool(free[chosen[chosen >= 0].long()].any()):
        assert out.isfinite().all()
    state.store.data = before


@torch.no_grad()
def test_memory_and_growth():
    """Compressed, a text takes a part of the dense bytes, and generated tokens become chunks."""
    model = sparseattn.hf.enable(fresh("glm-4kv"))
    cache = ShadowKVCache(
        model.config, rank=64, sparse_budget=64, outlier_chunks=2, local_tokens=16
    )
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
