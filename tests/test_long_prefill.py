"""hf.prefill, in slices of tokens, against the models' own forward."""

from __future__ import annotations

import pytest
import torch
from helpers import cuda_reason
from hf_models import (
    EXACT_PATTERNS,
    SHAPES,
    SPARSE_PATTERNS,
    cached_model,
    fresh,
    spread,
    tokens,
    transformers,
)

from sparseattn import ShadowKVCache, hf, ops

LENGTH = 230
SLICES = [46, 64, 1000]  # one divides the length, one does not, one is longer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and cuda_reason():
        pytest.skip(cuda_reason())
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


def shadow(model):
    return ShadowKVCache(model.config, rank=64, sparse_budget=64, outlier_chunks=2, local_tokens=16)


def continued(model, cache, logits, count=12):
    """Greedy tokens after a prefill, by generate."""
    first = logits[:, -1:].argmax(-1)
    length = int(cache.get_seq_length())
    ids = torch.cat((first.new_full((first.shape[0], length), 2), first), dim=1)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        past_key_values=cache,
    )


def check(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype == torch.float32:
        floor = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=floor)
    else:
        error = (got.float() - expected.float()).square().mean().sqrt()
        assert float(error) <= 0.03 * float(expected.float().square().mean().sqrt())


@pytest.mark.parametrize("patterns", [None, SPARSE_PATTERNS], ids=["dense", "sparse"])
def test_is_the_models_own_forward(shape, device, patterns):
    """Logits, the cache's contents, and the greedy tokens that follow."""
    model = fresh(shape, device)
    hf.enable(model, patterns and spread(patterns, model), min_length=0)
    ids = tokens(2, LENGTH).to(device)
    own = dynamic(model)
    expected = model(ids, past_key_values=own, logits_to_keep=1).logits
    kept = [(layer.keys, layer.values) for layer in own.layers]
    following = continued(model, own, expected)
    for slice_tokens in SLICES:
        cache = dynamic(model)
        got = hf.prefill(model, ids, cache, slice_tokens=slice_tokens)
        check(got, expected)
        assert cache.get_seq_length() == LENGTH
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            check(layer.keys, keys)
            check(layer.values, values)
        if device == "cpu":
            assert torch.equal(continued(model, cache, got), following)


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("patterns", [None, SPARSE_PATTERNS], ids=["dense", "sparse"])
def test_with_a_shadow_cache(shape, patterns, store):
    model = fresh(shape)
    hf.enable(model, patterns and spread(patterns, model), min_length=0)
    ids = tokens(2, 611)
    own, cache = shadow(model), shadow(model)
    for one in (own, cache):
        for layer in one.layers:
            layer.dense_limit = 100
            layer.options = one.options = type(one.options)(
                **(vars(one.options) | {"store": store})
            )
    expected = model(ids, past_key_values=own, logits_to_keep=1).logits
    got = hf.prefill(model, ids, cache, slice_tokens=200)
    check(got, expected)
    assert cache.get_seq_length() == 611 and cache.layers[0].state is not None
    assert cache.memory() == own.memory()
    assert torch.equal(continued(model, cache, got), continued(model, own, expected))


def test_patterns_see_the_whole_prompt(device, monkeypatch):
    """One call a layer, whatever the slices are, and min_length counts all tokens."""
    calls = []
    real = ops.sparse_attention

    def spy(q, k, v, patterns, **kwargs):
        calls.append((q.shape[2], k.shape[2]))
        return real(q, k, v, patterns, **kwargs)

    monkeypatch.setattr(ops, "sparse_attention", spy)
    model = fresh("llama", device)
    ids = tokens(1, 300).to(device)
    for min_length, expected in ((300, [(300, 300)] * 2), (301, [])):
        calls.clear()
        hf.enable(model, spread(SPARSE_PATTERNS, model), min_length=min_length)
        hf.prefill(model, ids, dynamic(model), slice_tokens=70)
        assert calls == expected


@pytest.mark.parametrize("make", [dynamic, shadow])
def test_appended_prompt(shape, make):
    """After a text that the cache holds, at its positions; also a single token."""
    model = fresh(shape)
    hf.enable(model, spread(EXACT_PATTERNS, model), min_length=0)
    own, cache = make(model), make(model)
    for one in (own, cache):
        for layer in one.layers:
            layer.dense_limit = 100
    for turn, length in enumerate((200, 90, 1, 130)):
        ids = tokens(1, length, seed=turn)
        expected = model(ids, past_key_values=own, logits_to_keep=1).logits
        check(hf.prefill(model, ids, cache, slice_tokens=64), expected)
        assert cache.get_seq_length() == own.get_seq_length()


def test_static_cache_and_no_cache():
    model = fresh("glm-2kv")
    hf.enable(model, spread(SPARSE_PATTERNS, model), min_length=0)
    ids = tokens(1, 150)
    expected = model(ids, logits_to_keep=1).logits
    check(hf.prefill(model, ids), expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=400)
    check(hf.prefill(model, ids, cache, slice_tokens=64), expected)


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
     "original_max_position_embeddings": 128},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_frequencies_are_those_of_the_whole_text(rope):
    from hf_models import config_of

    changes = {"rope_parameters": rope, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config_of("llama", **changes)).eval()
    hf.enable(model)
    ids = tokens(1, 300)
    expected = model(ids, logits_to_keep=1).logits
    check(hf.prefill(model, ids, slice_tokens=64), expected)


def test_long_rope():
    from hf_models import config_of

    factors = {"short_factor": [1.0] * 48, "long_factor": [1.5 + 0.1 * i for i in range(48)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    rope["original_max_position_embeddings"] = 128
    config = config_of("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    hf.enable(model)
    for length in (100, 300):
        ids = tokens(1, length)
        expected = model(ids, logits_to_keep=1).logits
        check(hf.prefill(model, ids, slice_tokens=64), expected)


def enabled(shape="llama"):
    return hf.enable(fresh(shape))


@pytest.mark.parametrize("make, change, error, message", [
    (lambda: fresh("llama"), {}, ValueError, "LlamaForCausalLM was not enabled"),
    (lambda: enabled().model, {}, TypeError, "expected one with a language model head, got Llama"),
    (lambda: enabled().train(), {}, ValueError, "model: expected evaluation mode"),
    (lambda: torch.nn.Linear(2, 2), {}, ValueError, "model: expected one of llama, .* got Linear"),
    (enabled, {"input_ids": [1, 2]}, TypeError, "input_ids: expected an int32 or int64 tensor"),
    (enabled, {"input_ids": torch.ones(1, 4)}, TypeError, "got torch.float32"),
    (enabled, {"input_ids": tokens(1, 4)[0]}, ValueError, r"\[batch, tokens\].*got \[4\]"),
    (enabled, {"input_ids": tokens(1, 4)[:, :0]}, ValueError, r"got \[1, 0\]"),
    (enabled, {"slice_tokens": 0}, ValueError, "slice_tokens: expected at least 1, got 0"),
    (enabled, {"slice_tokens": 1.5}, TypeError, "slice_tokens: expected int, got float"),
    (lambda: windowed(), {}, ValueError, "sliding_window: expected at least kv_len = 80, got 64"),
])  # fmt: skip
def test_refusals(make, change, error, message):
    options = {"input_ids": tokens(1, 80)} | change
    with pytest.raises(error, match=message):
        hf.prefill(make(), **options)


def windowed():
    from hf_models import config_of

    model = transformers.Phi3ForCausalLM(config_of("phi3", sliding_window=64)).eval()
    return hf.enable(model)


def test_disabled_again():
    model = hf.disable(hf.enable(fresh("glm4")))
    with pytest.raises(ValueError, match="was not enabled"):
        hf.prefill(model, tokens(1, 8))
    assert cached_model("glm4", "sdpa").config._attn_implementation == "sdpa"
