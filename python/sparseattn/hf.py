"""Sparse prefill inside transformers 5 models, through transformers' own attention interface.

``enable(model, patterns)`` registers one attention function and one mask function under the name
``"sparseattn"`` and makes the model use them. No forward method is replaced; what a layer needs to
know is stored on its attention module and removed by ``disable(model)``.

What runs when, for each sequence of the batch (lengths are counted without left padding):

* ``q_len == 1`` (decode): dense, or with a ``ShadowKVCache`` its own attention.
* ``kv_len >= min_length`` and ``q_len >= MIN_QUERY_ROWS``: ``sparse_attention`` with the layer's
  patterns. Appended and chunked prefill too; the index is estimated anew for every call.
  ``min_length`` is measured, for each layer's patterns apart (``sparseattn.policy``), or given.
* anything else, and layers whose heads are all dense: dense.

Whatever would need another mask than causal with left padding is refused with a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseattn import policy
from sparseattn.hf_mask import describe_mask
from sparseattn.patterns import PATTERNS, Dense, Pattern

if TYPE_CHECKING:
    from sparseattn.config import PatternConfig

#: Name under which the attention function is registered with transformers.
NAME = "sparseattn"
#: Calls with fewer query rows than one tile of 64 run dense: the estimate alone uses 64 rows.
MIN_QUERY_ROWS = 64

#: model_type -> name of the attention class. Yi checkpoints are of the Llama class.
FAMILIES = {
    "llama": "LlamaAttention",
    "glm": "GlmAttention",
    "glm4": "Glm4Attention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
    "phi3": "Phi3Attention",
}

#: Attribute of keys that a ShadowKVCache returned for a decode step: the layer that attends.
MARK = "_sparseattn_shadow"

_STATE = "_sparseattn_layer"  # attribute of an attention module
_PREVIOUS = "_sparseattn_previous"  # attribute of the model: the implementation to go back to
#: Of torch's attention for few rows. Not cuDNN, torch's first choice on some GPUs: it builds a plan
#: for every new kv_len, 40 ms each, and in decode every kv_len is new.
_ROW_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_MAX_MASK_ELEMENTS = 2**24  # of the masks that dense attention builds, a tile of rows at a time


@dataclass(frozen=True)
class _LayerState:
    layer: int
    patterns: tuple[Pattern, ...] | None  # None: all heads dense
    min_length: int | str | PathLike[str] | None  # given: a length, a table, None: the shipped one
    lengths: dict[Any, int] = field(default_factory=dict)  # those looked up

    def min_length_on(self, x: Tensor, head_dim: int) -> int:
        """The layer's min_length for tensors of x's device and dtype."""
        if isinstance(self.min_length, int):
            return self.min_length
        place = (x.device.type, x.dtype)
        if place not in self.lengths:
            self.lengths[place] = policy.recommended_min_length(
                self.patterns, x.device, dtype=x.dtype, head_dim=head_dim, table=self.min_length
            )
        return self.lengths[place]


def enable(
    model: Any,
    patterns: PatternConfig | Sequence[Sequence[Pattern]] | str | PathLike | None = None,
    min_length: int | str | PathLike[str] | None = None,
) -> Any:
    """Make a transformers model use sparse prefill; returns the same model, changed in place.

    Args:
        model: a Llama (Yi), GLM, GLM-4-0414, Qwen2, Qwen3 or Phi-3 model of transformers 5, with or
            without its language model head.
        patterns: one pattern for every query head of every layer, as a PatternConfig, nested lists
            ``[layer][head]`` or what ``PatternConfig.load`` takes; None: all heads dense.
        min_length: shortest kv_len, in tokens, that runs sparse; None: measured, for each layer's
            patterns apart (``policy.recommended_min_length``); or a file with measurements of your
            own, from ``sparseattn bench prefill --record-policy FILE``.

    Calling it again replaces the patterns. The forward pass has no backward: use no_grad.

    Raises:
        ImportError: transformers is not installed.
        TypeError: a pattern or min_length is of the wrong type.
        OSError: min_length names no file.
        ValueError: another architecture, or layer or head counts that are not the model's.

    Source: MInference (arXiv 2407.02490), section 3.
    """
    _register()
    modules = _attention_modules(model)
    if getattr(model.config, "output_attentions", False):
        raise ValueError("output_attentions: expected False, got True (weights are never formed)")
    if isinstance(min_length, bool) or not isinstance(min_length, (int, str, PathLike, type(None))):
        raise TypeError(
            f"min_length: expected int, a file or None, got {type(min_length).__name__}"
        )
    if isinstance(min_length, int) and min_length < 0:
        raise ValueError(f"min_length: expected at least 0, got {min_length}")
    heads = model.config.num_attention_heads
    layers = _resolve_patterns(patterns, len(modules), heads)
    states = [_LayerState(layer, row, min_length) for layer, row in enumerate(layers)]
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    for module, state in zip(modules, states, strict=True):
        if state.patterns is not None:  # a table is read and checked here, not in the first call
            state.min_length_on(next(module.parameters()), head_dim)

    if model.config._attn_implementation != NAME:
        previous = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(f"model: {type(model).__name__} does not let its attention be set")
        setattr(model, _PREVIOUS, previous)
    for module, state in zip(modules, states, strict=True):
        setattr(module, _STATE, state)
    return model


def disable(model: Any) -> Any:
    """Undo enable: the model's previous attention implementation is back. Returns the model.

    Raises ValueError if the model is not enabled.
    """
    previous = getattr(model, _PREVIOUS, None)
    if previous is None:
        raise ValueError(f"model: {type(model).__name__} was not enabled by sparseattn.hf.enable")
    model.set_attn_implementation(previous)
    delattr(model, _PREVIOUS)
    for module in model.modules():
        if hasattr(module, _STATE):
            delattr(module, _STATE)
    return model


def is_enabled(model: Any) -> bool:
    """Whether ``enable`` was called for the model, and ``disable`` not since."""
    states = (hasattr(module, _STATE) for module in _attention_modules(model))
    return model.config._attn_implementation == NAME and all(states)


def prefill(
    model: Any, input_ids: Tensor, past_key_values: Any = None, *, slice_tokens: int = 32768
) -> Tensor:
    """Read a prompt that is too long for the model's own forward; returns logits ``[B, 1, vocab]``.

    What ``model(input_ids, past_key_values=past_key_values, logits_to_keep=1).logits`` returns,
    and the cache is as after it, so ``model.generate`` or single steps go on from there. But
    norms, projections, RoPE and the MLP run on ``slice_tokens`` tokens at a time; the attention of
    a layer is one call over all tokens, with the layer's patterns; keys and values exist for one
    layer at a time, besides what the cache keeps of them. ``sparseattn.long_prefill`` has the sum:
    2^20 tokens of Llama-3-8B with a ``ShadowKVCache`` take 62 GiB.

    Args:
        model: one that ``enable`` takes, enabled, with its language model head, on one device.
        input_ids: int32 or int64 ``[B, N]`` on the model's device, without padding.
        past_key_values: a transformers cache, also one that holds an earlier text, after which the
            prompt is appended; None keeps nothing.
        slice_tokens: in a slice. Results do not depend on it, but for rounding.

    Raises:
        TypeError, ValueError: a model without a head, of another family, not enabled, in training
            mode or on several devices; bad input_ids or slice_tokens; a sliding window that is
            shorter than the text.
    """
    from sparseattn import long_prefill

    return long_prefill.prefill(model, input_ids, past_key_values, slice_tokens)


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "sparseattn.hf needs transformers 5: pip install 'sparseattn[hf]'"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, describe_mask)


def _attention_modules(model: Any) -> list[nn.Module]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = type(model).__name__
    if model_type not in FAMILIES:
        raise ValueError(f"model: expected one of {', '.join(FAMILIES)}, got {name} ({model_type})")
    modules = [m for m in model.modules() if type(m).__name__ == FAMILIES[model_type]]
    if len(modules) != model.config.num_hidden_layers:
        raise ValueError(
            f"model: expected {model.config.num_hidden_layers} {FAMILIES[model_type]} modules in "
            f"{name}, got {len(modules)}"
        )
    return modules


def _resolve_patterns(
    patterns: Any, num_layers: int, num_heads: int
) -> list[tuple[Pattern, ...] | None]:
    if patterns is None:
        return [None] * num_layers
    if isinstance(patterns, (str, PathLike)):
        from sparseattn.config import PatternConfig

        patterns = PatternConfig.load(patterns)
    layers = [tuple(row) for row in getattr(patterns, "layers", patterns)]
    if len(layers) != num_layers:
        raise ValueError(f"patterns: the model has {num_layers} layers, got {len(layers)}")
    for layer, row in enumerate(layers):
        if len(row) != num_heads:
            raise ValueError(
                f"patterns: the model has {num_heads} query heads, got {len(row)} in layer {layer}"
            )
        for head, pattern in enumerate(row):
            if not isinstance(pattern, tuple(PATTERNS.values())):
                raise TypeError(
                    f"patterns[{layer}][{head}]: expected a pattern, got {type(pattern).__name__}"
                )
    return [None if all(isinstance(p, Dense) for p in row) else row for row in layers]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, q_len, D], key and value [B, Hkv, >= kv_len, D].

    Returns ([B, q_len, Hq, D], None); rows of left padding are 0.
    """
    state = getattr(module, _STATE, None)
    if state is None:
        raise ValueError('model: attn_implementation "sparseattn" is set by sparseattn.hf.enable')
    _refuse_options(module, dropout, is_causal, kwargs)
    layer = getattr(key, MARK, None)
    if layer is not None:
        if attention_mask is not None and attention_mask[:, 0, 0, 0].any():
            raise ValueError("attention_mask: expected no padding with a ShadowKVCache, got some")
        return layer.attend(query, scaling).transpose(1, 2).contiguous(), None
    q_len = query.shape[2]
    starts, kv_len = _key_range(attention_mask, q_len, key.shape[2])
    _check_window(sliding_window, kv_len)
    key, value = key[:, :, :kv_len], value[:, :, :kv_len]

    if not any(starts):
        out = _attend(state, query, key, value, scaling)
    elif q_len == 1 and max(starts) < kv_len:
        positions = torch.arange(kv_len, device=key.device)
        first = torch.tensor(starts, device=key.device)
        mask = (positions >= first[:, None])[:, None, None, :]
        out = _dense_rows(query, key, value, mask, scaling)
    else:
        out = query.new_zeros(query.shape)
        for b, start in enumerate(starts):
            row = max(0, start - (kv_len - q_len))  # rows before it are padding
            if row < q_len:
                one = slice(b, b + 1)
                out[one, :, row:] = _attend(
                    state, query[one, :, row:], key[one, :, start:], value[one, :, start:], scaling
                )
    return out.transpose(1, 2).contiguous(), None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: int,
    scaling: float | None,
    sliding_window: int | None = None,
) -> Tensor:
    """The attention function for sequences without padding, and without transformers' layout.

    Keys from ``kv_len`` on are the unused end of a static cache. Returns ``[B, Hq, q_len, D]``.
    """
    layer = getattr(key, MARK, None)
    if layer is not None:
        return layer.attend(query, scaling)
    _check_window(sliding_window, kv_len)
    state = getattr(module, _STATE)
    return _attend(state, query, key[:, :, :kv_len], value[:, :, :kv_len], scaling)


def _check_window(sliding_window: int | None, kv_len: int) -> None:
    if sliding_window is not None and kv_len > sliding_window:
        raise ValueError(
            f"sliding_window: expected at least kv_len = {kv_len}, got {sliding_window}"
        )


def _refuse_options(
    module: nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    if dropout:
        raise ValueError(f"dropout: expected 0 (call model.eval()), got {dropout}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError("is_causal: expected True, got False")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError("output_attentions: expected False, got True (weights are never formed)")
    for name in ("softcap", "s_aux", "position_bias", "head_mask", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None, this attention has no {name}")


def _key_range(attention_mask: Tensor | None, q_len: int, key_length: int) -> tuple[list[int], int]:
    """The first real key of each sequence, and kv_len, from what describe_mask returned."""
    if attention_mask is None:
        return [0], key_length
    if attention_mask.dtype != torch.int32 or attention_mask.shape[1:] != (1, 1, 2):
        raise ValueError(
            "attention_mask: expected None or a padding mask [batch, kv_len], got "
            f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
        )
    ranges = attention_mask[:, 0, 0].tolist()
    kv_len = ranges[0][1]
    if not q_len <= kv_len <= key_length:
        raise ValueError(
            f"attention_mask: expected {q_len} to {key_length} keys (q_len to the cache's length), "
            f"got {kv_len}"
        )
    return [start for start, _ in ranges], kv_len


def _attend(state: _LayerState, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention, bottom-right aligned, of sequences without padding: [B, Hq, q_len, D]."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if (
        state.patterns is not None
        and q_len >= MIN_QUERY_ROWS
        and kv_len >= state.min_length_on(q, q.shape[3])
    ):
        return _sparse(state, q, k, v, scale)
    if q_len == kv_len:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if q_len > 1 and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.bias import causal_lower_right

        return F.scaled_dot_product_attention(  # flash attention's own bottom-right alignment
            q,
            k,
            v,
            attn_mask=causal_lower_right(q_len, kv_len),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return _dense_rows(q, k, v, None, scale)


def _sparse(state: _LayerState, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from sparseattn.ops import sparse_attention

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "requires_grad: sparse attention has no backward; call the model under torch.no_grad()"
        )
    if q.shape[1] != len(state.patterns):
        raise ValueError(
            f"patterns: layer {state.layer} has patterns for {len(state.patterns)} query heads, "
            f"the query has {q.shape[1]}"
        )
    return sparse_attention(q, k, v, state.patterns, scale=scale)


def _dense_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Dense attention of the last q_len positions, tiles of rows that keep the mask small.

    The query heads of one kv head become rows of one head: nothing of K or V is repeated, whatever
    backend torch chooses. mask: bool [B, 1, 1, kv_len], keys that all rows see, or None.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = heads // kv_heads
    step = max(1, _MAX_MASK_ELEMENTS // (group * kv_len))
    positions = torch.arange(kv_len, device=q.device)
    tiles = []
    for begin in range(0, q_len, step):
        tile = q[:, :, begin : begin + step]
        rows = tile.shape[2]
        seen = mask
        if q_len > 1:
            last = kv_len - q_len + begin + torch.arange(rows, device=q.device)
            causal = (positions <= last[:, None]).repeat(group, 1)
            seen = causal if mask is None else mask & causal
        packed = tile.reshape(batch, kv_heads, group * rows, head_dim)
        with sdpa_kernel(_ROW_BACKENDS):
            out = F.scaled_dot_product_attention(packed, k, v, attn_mask=seen, scale=scale)
        tiles.append(out.reshape(batch, heads, rows, head_dim))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)
