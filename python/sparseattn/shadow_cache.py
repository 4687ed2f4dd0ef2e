"""ShadowKVCache: a transformers cache that holds long texts at low rank (arXiv 2410.21465)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.hf import MARK, NAME
from sparseattn.rope import Rope
from sparseattn.shadow_layer import ShadowOptions, ShadowState, StepPlace

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise ImportError(
        "sparseattn.ShadowKVCache needs transformers 5: pip install 'sparseattn[hf]'"
    ) from error


class ShadowKVLayer(CacheLayerMixin):
    """One layer: dense while the text is short, a ShadowState from then on."""

    is_sliding = False
    is_croppable = True

    def __init__(self, config: Any, options: ShadowOptions, layer: int):
        super().__init__()
        self.config, self.options, self.layer = config, options, layer
        self.dense_limit = options.dense_limit  # tokens
        self.state: ShadowState | None = None
        self.place: StepPlace | None = None  # of the step of a GraphDecoder that is being run

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens, keys after RoPE ``[B, Hkv, n, D]``.

        Returns all keys (rebuilt where they are compressed) and values. Only a step of one token,
        in a model enabled by ``sparseattn.hf.enable``, gets its own keys and values back, marked:
        the attention function then asks the layer.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.state is None:
            return self._grow_dense(key_states, value_states)
        if self.place is not None:
            self.state.write(key_states, value_states, self.place)
            return self._marked(key_states), value_states
        self.state.append(key_states, value_states)
        if key_states.shape[2] == 1 and self.config._attn_implementation == NAME:
            return self._marked(key_states), value_states
        keys, values = self.state.everything()
        self.state.flush()
        return keys, values

    def _marked(self, key_states: Tensor) -> Tensor:
        marked = key_states.view_as(key_states)
        setattr(marked, MARK, self)
        return marked

    def _grow_dense(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys.shape[2] == 0 and key_states.shape[2] > self.dense_limit:
            keys, values = key_states, value_states  # compressed at once: no copy of a long text
        else:
            keys = torch.cat((self.keys, key_states), dim=2)
            values = torch.cat((self.values, value_states), dim=2)
        if keys.shape[2] > self.dense_limit:
            rope = Rope.of_config(self.config, keys.shape[2])
            self.state = ShadowState(self.options, rope, keys, values)
            self.keys, self.values = keys[:, :, :0].clone(), values[:, :, :0].clone()
        else:
            self.keys, self.values = keys, values
        return keys, values

    def attend(self, query: Tensor, scale: float | None) -> Tensor:
        """Attention of the step whose token update has just added."""
        assert self.state is not None
        out = self.state.attend(query, scale, self.place)
        if self.place is None:
            self.state.flush()
        return out

    def get_seq_length(self) -> int:
        if self.state is not None:
            return self.state.length
        return self.keys.shape[2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Empties the layer and gives its memory back."""
        self.keys = self.values = self.state = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: expected 0 or a negative number, got {tokens_to_remove}"
            )
        length = self.get_seq_length()
        kept = max(0, length + tokens_to_remove)
        if kept == length:
            return
        state = self.state
        if state is None:
            self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        elif kept >= state.compressed:
            for rows in (state.keys, state.values):
                rows.length -= length - kept
        else:
            # Into the chunks: what is left is compressed anew, from keys at low rank.
            keys, values = state.everything()
            self.state = None
            self._grow_dense(keys[:, :, :kept], values[:, :, :kept])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            batch = self.keys.shape[0]
            self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        self.keys = self.keys.index_select(0, indices.to(self.keys.device))
        self.values = self.values.index_select(0, indices.to(self.values.device))
        if self.state is not None:
            self.state.select(indices)


class ShadowKVCache(Cache):
    """Keys at low rank, values in a store, exact attention over the chunks that matter.

    ``model.generate(ids, past_key_values=ShadowKVCache(model.config))`` after
    ``sparseattn.hf.enable(model)``: a prompt is attended to in full and then compressed; each
    generated token attends to the sinks, outliers and the latest tokens as they are, and to the
    ``sparse_budget`` tokens whose chunks score highest, with keys rebuilt from the factor. Appended
    turns of more than one token attend to everything, rebuilt. Texts that would not shrink stay as
    they are. Without ``enable`` every step does, with the same memory and no speed.

    Args:
        config: of the model.
        rank: of the factor, a multiple of 16; at most the width ``Hkv * D`` is used.
        chunk_size: tokens a chunk: 4, 8, 16 or 32.
        sparse_budget: tokens selected in a step, a multiple of chunk_size.
        outlier_chunks: chunks kept exactly because a key lies far from their mean.
        sink_chunks: first chunks, kept exactly.
        local_tokens: latest tokens kept exactly, at least.
        value_slots: chunks of values at hand for each key/value head (default: three halves of the
            budget); only chunks that are not are read from the store.
        value_store: "device", "host", or "auto": on the device if they take at most a quarter of
            its free memory. "host" memory is pinned, exactly as large as the values and room for
            more, and given back by ``reset`` or with the cache.
        value_dtype: None, that of the model, or "fp8": e4m3 in the store with an fp32 scale for
            each chunk and head, of which half the bytes are kept and fetched. A value is off by up
            to 1/16 of itself. Outliers, sinks, the tail and generated tokens stay as they are.
        factor_dtype: None, or "fp8": the same for the factor, with a scale for each token.

    All sequences of a batch have the same length; left padding is refused by the decode step.

    Raises:
        ValueError: a size is out of range.
        MemoryError: while in use, with the size that was needed; the cache stays as it was.
    """

    def __init__(
        self,
        config: Any,
        *,
        rank: int = 160,
        chunk_size: int = 8,
        sparse_budget: int = 2048,
        outlier_chunks: int = 48,
        sink_chunks: int = 1,
        local_tokens: int = 32,
        value_slots: int | None = None,
        value_store: str = "auto",
        value_dtype: str | None = None,
        factor_dtype: str | None = None,
    ):
        config = config.get_text_config(decoder=True)
        if rank < 16 or rank % 16:
            raise ValueError(f"rank: expected a positive multiple of 16, got {rank}")
        if chunk_size not in (4, 8, 16, 32):
            raise ValueError(f"chunk_size: expected 4, 8, 16 or 32, got {chunk_size}")
        if sparse_budget < chunk_size or sparse_budget % chunk_size:
            raise ValueError(
                f"sparse_budget: expected a positive multiple of chunk_size = {chunk_size}, got "
                f"{sparse_budget}"
            )
        for name, value in (
            ("outlier_chunks", outlier_chunks),
            ("sink_chunks", sink_chunks),
            ("local_tokens", local_tokens),
        ):
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        top_k = sparse_budget // chunk_size
        slots = top_k + (top_k + 1) // 2 if value_slots is None else value_slots
        if slots < top_k:
            raise ValueError(
                f"value_slots: expected at least sparse_budget / chunk_size = {top_k}, got {slots}"
            )
        if value_store not in ("device", "host", "auto"):
            raise ValueError(f"value_store: expected device, host or auto, got {value_store!r}")
        for name, kind in (("value_dtype", value_dtype), ("factor_dtype", factor_dtype)):
            if kind not in (None, "fp8"):
                raise ValueError(f"{name}: expected None or 'fp8', got {kind!r}")
        self.options = ShadowOptions(
            rank=rank,
            chunk=chunk_size,
            top_k=top_k,
            outliers=outlier_chunks,
            sinks=sink_chunks,
            local=max(local_tokens, 1),
            flush=max(64, 2 * chunk_size),
            slots=slots,
            store=value_store,
            quantise_values=value_dtype == "fp8",
            quantise_factor=factor_dtype == "fp8",
        )
        layers = [
            ShadowKVLayer(config, self.options, layer) for layer in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)

    def memory(self) -> dict[str, int]:
        """Bytes by part, over all layers: ``dense``, ``factor``, ``landmarks``, ``exact``,
        ``store_values`` or ``host_values``, ``value_slots``."""
        total: dict[str, int] = {}
        for layer in self.layers:
            if layer.state is not None:
                parts = layer.state.memory()
            elif layer.is_initialized:
                parts = {"dense": layer.keys.nbytes + layer.values.nbytes}
            else:
                continue
            for name, count in parts.items():
                total[name] = total.get(name, 0) + count
        return total

    def counters(self) -> dict[str, int]:
        """Selected chunks whose values were at hand (``hits``) or were read from the store
        (``misses``), and the bytes read, since the text was compressed. Waits for the device."""
        hits = misses = read = 0
        for layer in self.layers:
            if layer.state is not None:
                hits += int(layer.state.hits)
                missed = int(layer.state.misses)
                misses += missed
                read += missed * layer.state.bytes_of_a_miss
        return {"hits": hits, "misses": misses, "bytes_read": read}
