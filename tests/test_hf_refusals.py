"""What hf.enable and an enabled model refuse, by name."""

from __future__ import annotations

import pytest
import torch
from hf_models import EXACT_PATTERNS, LAYERS, SHAPES, config_of, fresh, spread, tokens, transformers

from sparseattn import hf
from sparseattn.config import PatternConfig
from sparseattn.patterns import AShape, Dense


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda m: [[AShape(1, 8)] * 4], "patterns: the model has 2 layers, got 1"),
        (
            lambda m: [[AShape(1, 8)] * 4, [AShape(1, 8)] * 3],
            "patterns: the model has 4 query heads, got 3 in layer 1",
        ),
        (lambda m: PatternConfig.uniform(Dense(), 3, 4), "the model has 2 layers, got 3"),
    ],
)
def test_counts_must_be_the_models(make, message):
    model = fresh("llama")
    with pytest.raises(ValueError, match=message):
        hf.enable(model, make(model))
    assert model.config._attn_implementation == "sdpa"


def test_types_are_checked():
    model = fresh("llama")
    with pytest.raises(TypeError, match=r"patterns\[0\]\[0\]: expected a pattern, got str"):
        hf.enable(model, [["dense"] * 4] * LAYERS)
    with pytest.raises(TypeError, match="min_length: expected int, a file or None, got float"):
        hf.enable(model, None, min_length=1e4)
    with pytest.raises(ValueError, match="min_length: expected at least 0, got -1"):
        hf.enable(model, None, min_length=-1)


def test_other_architectures():
    config = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"model: expected one of llama, .*GPT2LMHeadModel \(gpt2"):
        hf.enable(transformers.GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match=r"model: expected one of llama, .*got Linear"):
        hf.enable(torch.nn.Linear(2, 2))


def arbitrary_mask(length):
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[..., 40:, 3] = False
    return mask


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.tensor([[1] * 90 + [0] * 10])},
        {"attention_mask": torch.tensor([[0] * 10 + [1] * 40 + [0] * 10 + [1] * 40])},
        {"attention_mask": arbitrary_mask(100)},
        {"position_ids": torch.cat([torch.arange(60), torch.arange(40)])[None], "use_cache": False},
        {"is_causal": False},
        {"output_attentions": True},
    ],
    ids=["right padding", "gap", "4d", "packed", "bidirectional", "weights"],
)
@pytest.mark.parametrize("patterns", [None, [AShape(1, 8)]], ids=["dense", "sparse"])
def test_refuses(arguments, patterns):
    model = fresh("llama")
    hf.enable(model, patterns and spread(patterns, model), min_length=0)
    name = {
        "position_ids": "attention_mask",  # what transformers makes of them
        "is_causal": "(is_causal|attention_mask)",
    }
    (name,) = (name.get(key, key) for key in arguments if key != "use_cache")
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        model(tokens(1, 100), **arguments)


def test_refuses_dropout_and_gradients():
    model = fresh("llama")
    hf.enable(model, spread([AShape(1, 8)], model), min_length=0)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"requires_grad: .*no backward"):
        model(tokens(1, 100))
    config = config_of("llama", attention_dropout=0.1)
    model = hf.enable(transformers.LlamaForCausalLM(config).train())
    with pytest.raises(ValueError, match="dropout: expected 0"):
        model(tokens(1, 100))


@pytest.mark.parametrize(
    "family,changes",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 0}),
        ("phi3", {"sliding_window": 80}),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_sliding_window(family, changes, use_cache):
    """Harmless while it holds all keys, refused by name beyond."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{SHAPES[family][0]}ForCausalLM")(
        config_of(family, **changes)
    ).eval()
    own = model(tokens(1, 80), use_cache=use_cache)
    own_next = use_cache and model(tokens(1, 1), past_key_values=own.past_key_values)
    hf.enable(model, spread(EXACT_PATTERNS, model), min_length=0)
    got = model(tokens(1, 80), use_cache=use_cache)
    scale = float(own.logits.abs().max())
    torch.testing.assert_close(got.logits, own.logits, rtol=0, atol=2e-5 * scale)
    with pytest.raises(ValueError, match="sliding_window: expected at least kv_len = 81"):
        model(tokens(1, 81), use_cache=use_cache)
    if use_cache:
        assert own_next.logits.isfinite().all()
        with pytest.raises(ValueError, match="sliding_window: expected at least kv_len = 81"):
            model(tokens(1, 1), past_key_values=got.past_key_values)


def test_name_without_enable():
    hf.enable(fresh("llama"))  # registers the name
    model = fresh("llama")
    model.set_attn_implementation(hf.NAME)
    with pytest.raises(ValueError, match=r"is set by sparseattn\.hf\.enable"):
        model(tokens(1, 100))
