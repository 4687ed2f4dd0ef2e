"""Real transformers models, small and random but with each family's own attention shape."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from helpers import cuda_reason
from hf_models import (
    EXACT_PATTERNS,
    LAYERS,
    SHAPES,
    SPARSE_PATTERNS,
    cached_model,
    fresh,
    left_padded,
    spread,
    tokens,
    transformers,
)

from sparseattn import hf, ops, reference
from sparseattn.config import PatternConfig
from sparseattn.hf_arguments import with_cache
from sparseattn.patterns import AShape, Dense


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and cuda_reason():
        pytest.skip(cuda_reason())
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def sparse_calls(monkeypatch):
    """The (q_len, kv_len, patterns) of every call of sparse_attention."""
    calls = []
    real = ops.sparse_attention

    def spy(q, k, v, patterns, **kwargs):
        calls.append((q.shape[2], k.shape[2], tuple(patterns)))
        return real(q, k, v, patterns, **kwargs)

    monkeypatch.setattr(ops, "sparse_attention", spy)
    return calls


def check_logits(got, own, exact, where=None) -> None:
    """As close to ``exact`` (fp32) as ``own`` is: within fp32 rounding on the CPU; on the GPU,
    where both are bf16, within twice its root mean square error and four times its largest."""
    where = slice(None) if where is None else where
    got, own, exact = (x.float().cpu()[where] for x in (got, own, exact))
    assert got.isfinite().all()
    floor = 2e-5 * float(exact.abs().max())
    error, own_error = (got - exact).abs(), (own - exact).abs()
    assert float(error.max()) <= floor + 4 * float(own_error.max())
    assert float(error.square().mean().sqrt()) <= floor + 2 * float(
        own_error.square().mean().sqrt()
    )


def own_logits(shape: str, device: str, ids, attention="sdpa", **kwargs):
    kwargs = {k: v.to(device) for k, v in kwargs.items()}
    return fresh(shape, device, attention)(ids.to(device), **kwargs).logits


def exact_logits(shape: str, ids, **kwargs):
    return cached_model(shape, "eager")(ids, **kwargs).logits


# --- patterns that cover everything: the model's own logits ---------------------------------------


def test_prefill(shape, device, sparse_calls):
    ids = tokens(2, 203)
    model = fresh(shape, device)
    hf.enable(model, spread(EXACT_PATTERNS, model), min_length=0)
    got = model(ids.to(device)).logits
    assert [call[:2] for call in sparse_calls] == [(203, 203)] * LAYERS
    check_logits(got, own_logits(shape, device, ids), exact_logits(shape, ids))


@pytest.mark.parametrize("patterns", [None, EXACT_PATTERNS], ids=["dense", "sparse"])
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_chunked_prefill_and_decode(shape, device, cache, patterns, sparse_calls):
    ids = tokens(2, 250)
    model = fresh(shape, device)
    hf.enable(model, patterns and spread(patterns, model), min_length=0)
    past = getattr(transformers, cache)(
        config=model.config, **({"max_cache_len": 300} if cache == "StaticCache" else {})
    )
    pieces = [
        model(part.to(device), past_key_values=past).logits
        for part in ids.split([70, 130, 48, 1, 1], dim=1)
    ]
    wanted = [(70, 70), (130, 200)] if patterns else []  # 48 rows are fewer than a tile
    assert [call[:2] for call in sparse_calls] == [c for c in wanted for _ in range(LAYERS)]
    check_logits(torch.cat(pieces, dim=1), own_logits(shape, device, ids), exact_logits(shape, ids))


@pytest.mark.parametrize("patterns", [None, EXACT_PATTERNS], ids=["dense", "sparse"])
def test_left_padding(shape, device, patterns):
    ids, mask = left_padded([230, 96, 17, 230])
    model = fresh(shape, device)
    hf.enable(model, patterns and spread(patterns, model), min_length=0)
    got = model(ids.to(device), attention_mask=mask.to(device)).logits
    check_logits(
        got,
        own_logits(shape, device, ids, attention_mask=mask),
        exact_logits(shape, ids, attention_mask=mask),
        mask.bool(),
    )


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_left_padding_in_chunks(shape, device, cache):
    """One sequence is all padding in the first chunk, another's text starts in the second."""
    ids, mask = left_padded([230, 120, 17])
    model = fresh(shape, device)
    hf.enable(model, spread(EXACT_PATTERNS, model), min_length=0)
    past = getattr(transformers, cache)(
        config=model.config, **({"max_cache_len": 256} if cache == "StaticCache" else {})
    )
    pieces, end = [], 0
    for part in ids.split([90, 75, 63, 1, 1], dim=1):
        end += part.shape[1]
        pieces.append(
            model(
                part.to(device),
                attention_mask=mask[:, :end].to(device),
                position_ids=torch.arange(end - part.shape[1], end)[None].to(device),
                past_key_values=past,
            ).logits
        )
    check_logits(
        torch.cat(pieces, dim=1),
        own_logits(shape, device, ids, attention_mask=mask),
        exact_logits(shape, ids, attention_mask=mask),
        mask.bool(),
    )


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_token_for_token(shape, cache):
    ids, mask = left_padded([150, 90])
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": mask,
        "cache_implementation": cache,
        "eos_token_id": None,
        "disable_compile": True,
    }
    wanted = fresh(shape).generate(ids, **options)
    model = fresh(shape)
    hf.enable(model, spread(EXACT_PATTERNS, model), min_length=64)
    assert torch.equal(model.generate(ids, **options), wanted)
    assert wanted.shape == (2, 156)


def test_eager_is_the_same_baseline(shape):
    ids = tokens(1, 100)
    torch.testing.assert_close(
        own_logits(shape, "cpu", ids), exact_logits(shape, ids), rtol=1e-4, atol=1e-4
    )


# --- patterns that are sparse: what the reference computes, not the dense result ------------------


def reference_attention(layers):
    """An attention function of transformers that computes the oracle over the oracle's masks."""

    def attention(module, query, key, value, mask, scaling=None, **_):
        patterns = layers[module.layer_idx]
        out = reference.sparse_attention(query, key, value, patterns, scale=scaling)
        return out.to(query.dtype).transpose(1, 2), None

    return attention


@pytest.mark.parametrize("patterns", [SPARSE_PATTERNS, [AShape(3, 40)]], ids=["mixed", "a_shape"])
def test_sparse_prefill_is_the_oracle(shape, patterns, sparse_calls):
    ids = tokens(1, 300)
    model = fresh(shape)
    layers = spread(patterns, model)
    hf.enable(model, layers, min_length=300)
    got = model(ids).logits
    assert [call[2] for call in sparse_calls] == [tuple(row) for row in layers]

    transformers.AttentionInterface.register("oracle", reference_attention(layers))
    oracle = fresh(shape)
    oracle.set_attn_implementation("oracle")
    wanted = oracle(ids).logits
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * scale)
    dense = own_logits(shape, "cpu", ids)
    assert float((got - dense)[:, 64:].abs().amax(-1).min()) > 1e-3 * scale


def test_sparse_on_the_gpu_changes_logits_as_on_the_cpu():
    if cuda_reason():
        pytest.skip(cuda_reason())
    ids, shape = tokens(1, 300), "glm-2kv"
    logits = {}
    for device in ("cpu", "cuda"):
        model = fresh(shape, device)
        hf.enable(model, spread([AShape(3, 40), AShape(20, 64)], model), min_length=0)
        logits[device] = model(ids.to(device)).logits.float().cpu()
    dense = own_logits(shape, "cpu", ids)
    changed = float((logits["cpu"] - dense).norm())
    assert float((logits["cuda"] - logits["cpu"]).norm()) < 0.1 * changed


@pytest.mark.parametrize("padding", [0, 30])
def test_appended_prefill_sees_the_pattern_of_the_whole_length(padding, sparse_calls):
    """A-shape needs no estimate, so chunks must give exactly what one call gives."""
    ids, mask = left_padded([260, 260 - padding])
    model = fresh("llama")
    hf.enable(model, spread([AShape(3, 40), AShape(8, 16)], model), min_length=0)
    whole = model(ids, attention_mask=mask).logits
    past = transformers.DynamicCache(config=model.config)
    pieces = [
        model(
            ids[:, a:b],
            attention_mask=mask[:, :b],
            past_key_values=past,
            position_ids=torch.arange(a, b)[None],
        ).logits
        for a, b in ((0, 130), (130, 260))
    ]
    assert sparse_calls
    torch.testing.assert_close(
        torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("min_length,runs_sparse", [(129, False), (128, True), (None, False)])
def test_min_length(min_length, runs_sparse, sparse_calls):
    ids = tokens(1, 128)
    model = fresh("glm-2kv")
    hf.enable(model, spread([AShape(3, 40)], model), min_length=min_length)
    got = model(ids).logits
    assert len(sparse_calls) == (LAYERS if runs_sparse else 0)
    same = torch.equal(got, own_logits("glm-2kv", "cpu", ids))
    assert same != runs_sparse


def test_min_length_counts_each_sequence_without_padding(sparse_calls):
    ids, mask = left_padded([200, 100])
    model = fresh("llama")
    hf.enable(model, spread([AShape(3, 40)], model), min_length=150)
    model(ids, attention_mask=mask)
    assert [call[:2] for call in sparse_calls] == [(200, 200)] * LAYERS


def test_layers_of_dense_heads_run_dense(sparse_calls):
    model = fresh("llama")
    heads = model.config.num_attention_heads
    hf.enable(model, [[Dense()] * heads, [AShape(0, 8)] * heads], min_length=0)
    model(tokens(1, 100))
    assert [call[2][0] for call in sparse_calls] == [AShape(0, 8)]


# --- enable and disable ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_disable_restores(attention):
    ids = tokens(1, 100)
    model = fresh("qwen3", attention=attention)
    before = model(ids).logits
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    for patterns in (None, spread([AShape(1, 8)], model)):  # the second call replaces the first
        assert hf.enable(model, patterns, min_length=0) is model
    assert not torch.equal(model(ids).logits, before)
    assert hf.disable(model) is model
    assert model.config._attn_implementation == attention
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="model: LlamaForCausalLM was not enabled"):
        hf.disable(cached_model("llama", "sdpa"))


def test_patterns_as_config_and_file(tmp_path):
    ids = tokens(1, 100)
    model = fresh("llama")
    heads = model.config.num_attention_heads
    config = PatternConfig.uniform(AShape(2, 8), LAYERS, heads)
    config.save(tmp_path / "patterns.json")
    forms = [
        config,
        tmp_path / "patterns.json",
        str(tmp_path / "patterns.json"),
        [[AShape(2, 8)] * heads] * LAYERS,
    ]
    logits = [hf.enable(model, form, min_length=0)(ids).logits for form in forms]
    assert all(torch.equal(x, logits[0]) for x in logits)


def test_backbone_without_head():
    model = fresh("glm-2kv").model
    ids = tokens(1, 100)
    before = model(ids).last_hidden_state
    hf.enable(model, spread([AShape(0, 2**30)], model), min_length=0)
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-4, atol=1e-4)


def test_import_does_not_import_transformers():
    code = "import sys, sparseattn.hf; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_cache_goes_by_the_name_that_the_model_has_for_it():
    class Old:
        def forward(self, input_ids, past_key_values=None): ...

    class New:
        def forward(self, input_ids, cache=None): ...

    assert with_cache(Old(), 1) == {"past_key_values": 1} and with_cache(New(), 1) == {"cache": 1}
    model, ids = fresh("glm-2kv"), tokens(1, 8)
    cache = transformers.DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model(ids, **with_cache(model, cache))
    assert cache.get_seq_length() == 8
