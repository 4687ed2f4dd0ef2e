"""What the demo runs on: a long text, byte tokens, and a GLM-4 model built on the spot."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from sparseattn.patterns import AShape, BlockSparse, Pattern, VerticalSlash

VOCAB_SIZE = 258  # the bytes, then the two tokens that open a GLM-4 prompt
_PREFIX = (256, 257)  # [gMASK], <sop>
HEAD_DIM = 128
KV_HEADS = 2

#: device type -> sizes; on a GPU those of GLM-4-9B, but for the number of layers
SIZES: dict[str, dict[str, int]] = {
    "cpu": {"tokens": 8192, "layers": 2, "heads": 8, "hidden_size": 512, "intermediate_size": 1024},
    "cuda": {
        "tokens": 65536,
        "layers": 4,
        "heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 13696,
    },
}

WEIGHTS_NOTE = """\
The weights are random: no model was downloaded. The biases of queries and keys are drawn so that
heads look near, far or at some tokens only, as trained heads do; the rest is noise. What is real:
the architecture, the text, the operators, their exactness, times, densities. What is not: the
model's predictions mean nothing, and how much attention mass a pattern keeps in a trained model is
another matter (usually more: real heads are sharper, and their patterns are searched, not guessed).
"""


def read_text(path: str | None, length: int) -> tuple[bytes, str]:
    """(at least ``length`` bytes if there are as many, where they come from).

    Raises OSError if the file cannot be read.
    """
    if path is not None:
        return Path(path).read_bytes(), path
    return _python_text(length)


def _python_text(length: int) -> tuple[bytes, str]:
    """Python's help topics and the standard library's sources: every CPython has them."""
    pieces, source = [], "Python's help topics"
    try:
        from pydoc_data.topics import topics

        pieces = [topics[name].encode() for name in sorted(topics)]
    except ImportError:
        source = "Python's standard library"
    total = sum(map(len, pieces))
    for name in sorted(sys.stdlib_module_names):
        if total >= length:
            break
        code = _module_source(name)
        if code:
            pieces.append(code)
            total += len(code)
            source = "Python's help topics and standard library"
    return b"\n".join(pieces), source


def _module_source(name: str) -> bytes | None:
    try:
        spec = importlib.util.find_spec(name)
        code = spec.loader.get_source(name)  # type: ignore[union-attr]
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError):
        return None  # built in, an extension, or not on this platform
    return code.encode() if code else None


def byte_tokens(text: bytes, length: int, device: torch.device) -> torch.Tensor:
    """int64 [1, length]: GLM-4's two opening tokens, then one token per byte."""
    ids = torch.frombuffer(bytearray(text[: length - len(_PREFIX)]), dtype=torch.uint8).long()
    return torch.cat((torch.tensor(_PREFIX), ids))[None].to(device)


def build_model(
    layers: int,
    heads: int,
    hidden_size: int,
    intermediate_size: int,
    tokens: int,
    device: torch.device,
    seed: int,
) -> Any:
    """A GlmForCausalLM with random weights: head_dim 128, 2 kv heads, half-rotary interleaved RoPE,
    biases on q, k and v. fp32 on the CPU, bf16 on a GPU."""
    from transformers import AutoModelForCausalLM, GlmConfig

    if heads % KV_HEADS:
        raise ValueError(f"heads: expected a multiple of {KV_HEADS}, got {heads}")
    config = GlmConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=max(tokens, 131072),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * 500,
            "partial_rotary_factor": 0.5,
        },
        pad_token_id=None,
        eos_token_id=_PREFIX[0],
        attention_bias=True,
    )
    torch.manual_seed(seed)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    inv_freq = model.model.rotary_emb.inv_freq.float().cpu()
    for layer in model.model.layers:
        _shape_heads(layer.self_attn, inv_freq, tokens)
    return model


@torch.no_grad()
def _shape_heads(attention: Any, inv_freq: torch.Tensor, tokens: int) -> None:
    """Random q and k weights, and biases that give head ``h`` one of four characters, ``h % 4``.

    A pair of rotary dims is a complex number, which RoPE turns by ``p * inv_freq``. With a key bias
    ``b`` and a query bias ``s * b * exp(-i * o * inv_freq)``, scores peak where ``p - k == o``: a
    diagonal at offset ``o`` that decays on both sides. A bias in the dims without RoPE makes a head
    look at keys of some tokens, from everywhere: columns.
    """
    rotary = 2 * len(inv_freq)
    heads = attention.config.num_attention_heads
    hidden = attention.q_proj.in_features
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.normal_(0, 0.5 / hidden**0.5)
    key_bias = torch.zeros(KV_HEADS, HEAD_DIM)
    turn = torch.polar(
        torch.ones(KV_HEADS, len(inv_freq)), 2 * torch.pi * torch.rand(KV_HEADS, len(inv_freq))
    )
    key_bias[:, :rotary] = torch.view_as_real(turn).flatten(1)
    query_bias = torch.zeros(heads, HEAD_DIM)
    for h in range(heads):
        far = [int(x) for x in torch.randint(tokens // 64, tokens // 3, (2,))]
        diagonals, columns = [
            ({0: 9.0}, 0.0),  # near
            ({0: 5.0} | dict.fromkeys(far, 7.0), 0.0),  # near and far diagonals
            ({0: 3.0}, 9.0),  # some tokens, wherever they are
            ({0: 6.0}, 4.0),  # both
        ][h % 4]
        bias = sum(
            s * turn[h * KV_HEADS // heads] * torch.polar(torch.ones(len(inv_freq)), -o * inv_freq)
            for o, s in diagonals.items()
        )
        query_bias[h, :rotary] = torch.view_as_real(bias).flatten()
        query_bias[h, rotary:].normal_(0, columns)
    attention.q_proj.bias.copy_(query_bias.flatten())
    attention.k_proj.bias.copy_(key_bias.flatten())


def default_patterns(layers: int, heads: int, tokens: int) -> list[list[Pattern]]:
    """A pattern for each of the four characters of ``_shape_heads``, a tenth to a third of the
    causal pairs each; sizes grow with the prompt."""
    unit = max(16, tokens // 64)
    kinds: list[Pattern] = [
        AShape(sink=64, window=4 * unit),
        VerticalSlash(columns=64, offsets=2 * unit),
        VerticalSlash(columns=8 * unit, offsets=unit),
        BlockSparse(top_k=max(2, tokens // 64 // 16)),
    ]
    return [[kinds[h % len(kinds)] for h in range(heads)] for _ in range(layers)]
