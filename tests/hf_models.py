"""Small random transformers models with each family's own attention shape, for the hf tests."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash

transformers = pytest.importorskip("transformers", minversion="5.0")

VOCAB, LAYERS = 320, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "initializer_range": 0.2,  # logits and attention far from flat
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 4096,
}
# name: (class, query heads, kv heads, head dim, more of the config). Phi-3 has no head_dim field.
SHAPES = {
    "llama": ("Llama", 4, 1, 128, {}),
    "yi": ("Llama", 8, 1, 128, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "glm-2kv": ("Glm", 8, 2, 128, {}),
    "glm-4kv": ("Glm", 8, 4, 128, {}),
    "glm4": ("Glm4", 4, 2, 128, {"attention_bias": True}),
    "qwen2": ("Qwen2", 7, 1, 128, {"use_sliding_window": False}),
    "qwen3": ("Qwen3", 4, 2, 128, {}),
    "phi3": ("Phi3", 4, 4, 96, {"hidden_size": 384, "sliding_window": 262144}),
}
EXACT_PATTERNS = [  # cover everything in the lengths tested here
    AShape(0, 2**30),
    VerticalSlash(1024, 1024),
    Dense(),
    BlockSparse(64),
    VerticalSlash(1024, 0),
]
SPARSE_PATTERNS = [AShape(3, 40), VerticalSlash(60, 110), BlockSparse(2), Dense(), AShape(0, 9)]


def config_of(shape: str, **changes):
    family, heads, kv_heads, dim, more = SHAPES[shape]
    values = COMMON | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more
    if family != "Phi3":
        values["head_dim"] = dim
    return getattr(transformers, f"{family}Config")(**(values | changes))


@functools.cache
def cached_model(shape: str, attention: str):
    config = config_of(shape)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{SHAPES[shape][0]}ForCausalLM")(config).eval()
    with torch.no_grad():  # transformers starts every bias at zero, which would hide it
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
    assert model.config._attn_implementation == attention
    return model


def fresh(shape: str, device: str = "cpu", attention: str = "sdpa"):
    model = copy.deepcopy(cached_model(shape, attention))
    return model if device == "cpu" else model.to(device, torch.bfloat16)


def spread(patterns, model) -> list:
    """Patterns dealt out over all heads of all layers, in another order in every layer."""
    heads = model.config.num_attention_heads
    return [
        [patterns[(h + layer) % len(patterns)] for h in range(heads)] for layer in range(LAYERS)
    ]


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=gen)


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, total = tokens(len(lengths), max(lengths)), max(lengths)
    mask = torch.stack([(torch.arange(total) >= total - n).long() for n in lengths])
    return ids * mask, mask
