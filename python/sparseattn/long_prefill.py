"""Prefill of prompts whose activations do not fit at once: ``sparseattn.hf.prefill``.

transformers' forward holds, of a whole prompt, every tensor that a layer makes: at 2^20 tokens of
Llama-3-8B the MLP's alone take 112 GiB. Here a layer is computed in slices of tokens, but for its
attention, which sees all of them in one call; so patterns, estimates and results are those of the
model's own forward. The hidden states are one buffer, changed in place.

Held at the same time, GiB, Llama-3-8B (32 layers, 8 key/value heads) and GLM-4-9B (40, 4), bf16,
batch 1, 2^20 tokens, ShadowKVCache with values on the host, in the last layer's attention:

    ================================================  ===========  =========
    what                                              Llama-3-8B   GLM-4-9B
    ================================================  ===========  =========
    weights                                                 15.0       17.7
    hidden states ``[N, hidden]``                            8.0        8.0
    queries ``[N, Hq, D]``                                   8.0        8.0
    attention's output, the same                             8.0        8.0
    keys and values of the layer                             4.0        2.0
    cache: factor 0.32, landmarks 0.26 or 0.13 a layer      18.7       18.1
    attention's own (packed columns, plan), at most          0.2        0.2
    ------------------------------------------------  -----------  ---------
    sum                                                     61.9       62.0
    ================================================  ===========  =========

62 GiB are 66.5 GB. Compressing the keys comes before the attention, when there is no output yet,
and takes at most 4 (the factor twice and the landmarks once more, a contiguous copy of the values,
slices of 8192 tokens in fp32); the MLP of a slice of 32768 tokens takes 3.5, when output, keys and
values are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseattn import hf

_Projections = tuple[Tensor, Tensor, Tensor]


# --- families: what transformers' modules of a layer compute, for a slice of tokens ------------


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm as all these families have it: rounded to x's dtype, then times the weight."""
    return module.weight * F.rms_norm(x, (x.shape[-1],), eps=module.variance_epsilon)


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    return x.unflatten(-1, (-1, attention.head_dim))


def _split_qkv(attention: nn.Module, x: Tensor) -> _Projections:
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    return _heads(q, attention), _heads(k, attention), _heads(v, attention)


def _normed_qkv(attention: nn.Module, x: Tensor) -> _Projections:
    q, k, v = _split_qkv(attention, x)
    return _norm(attention.q_norm, q), _norm(attention.k_norm, k), v


def _packed_qkv(attention: nn.Module, x: Tensor) -> _Projections:
    kv = attention.config.num_key_value_heads
    heads = (attention.config.num_attention_heads, kv, kv)
    return _heads(attention.qkv_proj(x), attention).split(heads, dim=-2)


def _split_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)))


def _packed_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return mlp.down_proj(mlp.activation_fn(gate).mul_(up))


@dataclass(frozen=True)
class _Family:
    qkv: Callable[[nn.Module, Tensor], _Projections]  # [B, n, heads, D] each, before RoPE
    mlp: Callable[[nn.Module, Tensor], Tensor]
    interleaved: bool = False  # pairs of RoPE are neighbours
    norms_after: tuple[str, str] | None = None  # of the attention's and the MLP's output
    window: Callable[[nn.Module], int | None] = lambda attention: None


def _own_window(attention: nn.Module) -> int | None:
    return attention.sliding_window


_FAMILIES = {
    "llama": _Family(_split_qkv, _split_mlp),
    "glm": _Family(_split_qkv, _packed_mlp, interleaved=True),
    "glm4": _Family(
        _split_qkv,
        _packed_mlp,
        interleaved=True,
        norms_after=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "qwen2": _Family(_split_qkv, _split_mlp, window=_own_window),
    "qwen3": _Family(_normed_qkv, _split_mlp, window=_own_window),
    "phi3": _Family(
        _packed_qkv,
        _packed_mlp,
        window=lambda attention: getattr(attention.config, "sliding_window", None),
    ),
}


# --- rotary embedding --------------------------------------------------------------------------


class _Rotary:
    """A model's rotary embedding at any positions of a text of ``length`` tokens."""

    def __init__(self, module: nn.Module, like: Tensor, length: int, interleaved: bool):
        # Frequencies of some types depend on the length of the text: those for the last position.
        module(like, torch.tensor([[length - 1]], device=like.device))
        self.inv_freq = module.inv_freq.to(like.device, torch.float32)
        self.scaling, self.dtype = module.attention_scaling, like.dtype
        self.interleaved = interleaved

    def angles(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[last - first, 1, rotary_dim / 2]``."""
        positions = torch.arange(first, last, device=self.inv_freq.device).float()
        turns = positions[:, None, None] * self.inv_freq
        cos, sin = turns.cos() * self.scaling, turns.sin() * self.scaling
        return cos.to(self.dtype), sin.to(self.dtype)

    def write(self, target: Tensor, x: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """target = x after RoPE, both ``[B, n, heads, D]``; rounds where transformers does."""
        cos, sin = angles
        half = cos.shape[-1]
        if self.interleaved:
            places = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            places = slice(0, half), slice(half, 2 * half)
        a, b = (x[..., place] for place in places)
        torch.sub(a * cos, b * sin, out=target[..., places[0]])
        torch.add(b * cos, a * sin, out=target[..., places[1]])
        if 2 * half < x.shape[-1]:
            target[..., 2 * half :] = x[..., 2 * half :]


# --- the layers --------------------------------------------------------------------------------


@torch.no_grad()
def prefill(model: Any, input_ids: Tensor, past_key_values: Any, slice_tokens: int) -> Tensor:
    """``hf.prefill``, which see."""
    family, head = _checked(model, input_ids, slice_tokens)
    base = model.model
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    hidden = base.embed_tokens(input_ids)
    length = hidden.shape[1]
    rotary = _Rotary(base.rotary_emb, hidden[:, :1], past + length, family.interleaved)
    config = model.config
    shape = (hidden.shape[0], length, config.num_attention_heads, base.layers[0].self_attn.head_dim)
    queries = hidden.new_empty(shape)  # serves all layers
    for layer in base.layers[: config.num_hidden_layers]:
        _attention(family, layer, hidden, queries, rotary, past, past_key_values, slice_tokens)
        for part in _slices(length, slice_tokens):
            x = family.mlp(layer.mlp, _norm(layer.post_attention_layernorm, hidden[:, part]))
            if family.norms_after:
                x = _norm(getattr(layer, family.norms_after[1]), x)
            hidden[:, part] += x
    return head(base.norm(hidden[:, -1:]))


def _attention(
    family: _Family,
    layer: nn.Module,
    hidden: Tensor,
    queries: Tensor,
    rotary: _Rotary,
    past: int,
    cache: Any,
    slice_tokens: int,
) -> None:
    """hidden += the layer's attention. Keys and values are the cache's before the attention, as in
    the model's forward, and gone after it."""
    attention = layer.self_attn
    batch, length, _, dim = queries.shape
    # A head's rows lie one after the other: so the cache takes its chunks without a copy.
    shape = (batch, attention.config.num_key_value_heads, length, dim)
    keys, values = hidden.new_empty(shape), hidden.new_empty(shape)
    for part in _slices(length, slice_tokens):
        q, k, v = family.qkv(attention, _norm(layer.input_layernorm, hidden[:, part]))
        angles = rotary.angles(past + part.start, past + part.stop)
        rotary.write(queries[:, part], q, angles)
        rotary.write(keys[:, :, part].transpose(1, 2), k, angles)
        values[:, :, part] = v.transpose(1, 2)
    del q, k, v
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    out = hf.attend(
        attention,
        queries.transpose(1, 2),
        keys,
        values,
        past + length,
        attention.scaling,
        family.window(attention),
    )
    del keys, values
    out = out.transpose(1, 2)
    for part in _slices(length, slice_tokens):
        x = attention.o_proj(out[:, part].reshape(batch, part.stop - part.start, -1))
        if family.norms_after:
            x = _norm(getattr(layer, family.norms_after[0]), x)
        hidden[:, part] += x


def _slices(length: int, step: int) -> Iterator[slice]:
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def _checked(model: Any, input_ids: Tensor, slice_tokens: int) -> tuple[_Family, nn.Module]:
    """The model's family and its language model head."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = type(model).__name__
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model: expected one of {', '.join(_FAMILIES)}, got {name} ({model_type})"
        )
    head = model.get_output_embeddings()
    if head is None or not hasattr(model, "model"):
        raise TypeError(f"model: expected one with a language model head, got {name}")
    if not hf.is_enabled(model):
        raise ValueError(f"model: {name} was not enabled by sparseattn.hf.enable")
    if model.training:
        raise ValueError("model: expected evaluation mode (call model.eval()), got training mode")
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids: expected an int32 or int64 tensor, got {got}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids: expected shape [batch, tokens], at least 1 each, got "
            f"{list(input_ids.shape)}"
        )
    if isinstance(slice_tokens, bool) or not isinstance(slice_tokens, int):
        raise TypeError(f"slice_tokens: expected int, got {type(slice_tokens).__name__}")
    if slice_tokens < 1:
        raise ValueError(f"slice_tokens: expected at least 1, got {slice_tokens}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"model: expected all weights on one device, got {sorted(map(str, devices))}"
        )
    if input_ids.device not in devices:
        raise ValueError(f"input_ids: expected device {devices.pop()}, got {input_ids.device}")
    return _FAMILIES[model_type], head
