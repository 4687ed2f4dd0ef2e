"""The models of `end_to_end.py`: random weights, heads whose estimates select as real ones' do.

With plain random weights every head looks at noise: the offsets of highest mass then lie all over
the prompt and their cover is nearly dense, unlike any trained head. So queries and keys get biases
(GLM-4 has them anyway; the Llama model is built with them, which costs no time), as in
`bench_inputs.structured_qk`, which shapes single layers. A score is the sum of three parts:

* Offsets: in the rotary pairs with periods of 256 to 8 M tokens, key and query bias of a head agree
  up to weights and phases of its own: after RoPE that is a function of `p - k`, at most about PEAK,
  falling about with log distance, with ripples.
* Columns: in the dimensions that RoPE hardly turns (periods beyond 16 M tokens, or none), a query
  bias, different for every head, looks at random projections of the tokens' keys: normal,
  standard deviation COLUMN. The same tokens stand out for all rows.
* Content: the product of queries and keys without their biases, standard deviation about SCALE^2.

Heads whose pattern has more columns than offsets get the second pair of PEAK and COLUMN. Per cent
of the causal pairs that the estimates then select, and, in brackets, that the lists of
`common.clustered_indexes` do, with which the kernels are measured:

    tokens    (1000, 6096)   (30, 800)    (3500, 100)
    32768     45 (45)        12 (7.5)     7 (12)
    131072    17 (14)        2.9 (2.0)    2.4 (2.9)
    1048576   2.8 (2.0)      0.6 (0.25)   0.3 (0.36)

So attention takes somewhat longer here than the kernels' tables say, most at 1M. Embeddings have
standard deviation 1 and what is added to them is scaled by 1 / sqrt(2 * layers), so that tokens
stay distinct in all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import decode_model
import torch
from decode_inputs import DTYPE
from torch import Tensor
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig

from sparseattn import PatternConfig, VerticalSlash
from sparseattn.patterns import Pattern

SCALE = 0.5
NEAR, COLUMNS = (14.0, 2.5), (6.0, 3.0)  # PEAK and COLUMN
PERIODS = (2**8, 2**23)  # tokens, of the pairs that make offsets
STILL = 2**24  # pairs of longer periods count as not turned

WEIGHTS = (
    "random; query and key biases that make estimates select about as many pairs as those of "
    "trained heads (long_models.py), embeddings of standard deviation 1, outputs of attention and "
    "MLP scaled by 1 / sqrt(2 * layers)"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class LongModel:
    config: Callable[..., Any]
    sizes: Row
    preset: str


MODELS = {
    "Llama-3-8B-1M": LongModel(
        LlamaConfig,
        decode_model.SIZES["Llama-3.1-8B"]
        | {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3580165449.0},
        },
        "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    ),
    "GLM-4-9B-1M": LongModel(
        GlmConfig, decode_model.SIZES["GLM-4-9B-1M"], "zai-org/glm-4-9b-chat-1m"
    ),
}
SMOKE_PART = 64  # of a preset's columns and offsets


def build(
    name: str, device: torch.device, tokens: int, *, layers: int | None, smoke: bool, seed: int
) -> tuple[Any, list[list[Pattern]]]:
    """The model, bf16, and the patterns of its heads: the shipped preset's."""
    chosen = MODELS[name]
    sizes = chosen.sizes | (decode_model.SMOKE if smoke else {})
    if layers:
        sizes = sizes | {"num_hidden_layers": layers}
    config = chosen.config(max_position_embeddings=max(1048576, 2 * tokens), **sizes)
    patterns = patterns_of(chosen.preset, config, smoke)
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    shape(model, patterns)
    return model, patterns


def patterns_of(preset: str, config: Any, smoke: bool) -> list[list[Pattern]]:
    """Of the first layers and heads, as many as there are; smaller ones for ``smoke``."""
    heads = config.num_attention_heads
    rows = [list(row[:heads]) for row in PatternConfig.load(preset).layers]
    rows = rows[: config.num_hidden_layers]
    if smoke:
        rows = [
            [VerticalSlash(x.columns // SMOKE_PART + 8, x.offsets // SMOKE_PART + 8) for x in row]
            for row in rows
        ]
    return rows


@torch.no_grad()
def shape(model: Any, patterns: Sequence[Sequence[Pattern]]) -> None:
    """Gives all heads of a Llama or GLM model their biases, on random queries and keys."""
    config, layers = model.config, model.model.layers
    model.model.embed_tokens.weight.normal_(0, 1)
    inv_freq = model.model.rotary_emb.inv_freq.double().cpu()
    for layer, row in zip(layers, patterns, strict=True):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.normal_(0, SCALE / math.sqrt(config.hidden_size))
        for projection in (attention.o_proj, layer.mlp.down_proj):
            projection.weight.mul_(1 / math.sqrt(2 * len(layers)))
        query, key = _biases(inv_freq, row, config)
        attention.q_proj.bias.copy_(query.flatten())
        attention.k_proj.bias.copy_(key.flatten())


def _biases(inv_freq: Tensor, patterns: Sequence[Pattern], config: Any) -> tuple[Tensor, Tensor]:
    """``[heads, D]`` and ``[kv_heads, D]``."""
    dim, half = config.head_dim, inv_freq.numel()
    period = 2 * math.pi / inv_freq
    turning = ((period >= PERIODS[0]) & (period <= PERIODS[1])).double()
    pairs, root = max(1.0, float(turning.sum())), math.sqrt(dim)  # root undoes the softmax scale
    still = torch.zeros(dim, dtype=torch.float64)
    still[2 * half :] = 1.0
    _pairs(still, half, config)[:] = (period > STILL).double()[:, None]
    amplitude = math.sqrt(NEAR[0] * root / pairs)
    query = torch.zeros(len(patterns), dim, dtype=torch.float64)
    for head, pattern in enumerate(patterns):
        many_columns = isinstance(pattern, VerticalSlash) and pattern.columns > pattern.offsets
        peak, column = COLUMNS if many_columns else NEAR
        weights = (0.5 * torch.randn(half, dtype=torch.float64)).exp() * turning
        weights *= amplitude * peak / NEAR[0] * pairs / max(float(weights.sum()), 1e-9)
        phases = 0.3 * torch.randn(half, dtype=torch.float64)
        looked_at = torch.randn(dim, dtype=torch.float64) * still
        query[head] = looked_at * (column * root / SCALE / max(float(looked_at.norm()), 1e-9))
        turned = torch.stack((weights * phases.cos(), weights * phases.sin()), dim=-1)
        _pairs(query[head], half, config)[:] += turned
    key = torch.zeros(config.num_key_value_heads, dim, dtype=torch.float64)
    for row in key:
        _pairs(row, half, config)[:, 0] = amplitude * turning
    return query, key


def _pairs(row: Tensor, half: int, config: Any) -> Tensor:
    """The rotary pairs of a head ``[half, 2]``, a view."""
    turned = row[: 2 * half]
    return turned.view(half, 2) if config.model_type == "glm" else turned.view(2, half).T
