"""Decode steps of a model with a ShadowKVCache as one CUDA graph.

Launching the kernels of a step one by one takes the host longer than they run, at least at small
batches. A graph is captured once; what changes from step to step lies on the device: the row that
takes the new token's key and value, how many exact rows and chunks there are, the position. When
the tail is long its oldest tokens become chunks between two replays, in buffers that were reserved
beforehand, so addresses stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.hf import NAME
from sparseattn.hf_arguments import with_cache
from sparseattn.shadow_cache import ShadowKVCache
from sparseattn.shadow_layer import ShadowState, StepPlace


class GraphDecoder:
    """Steps of one token a sequence, replayed from a CUDA graph.

    ::

        cache = ShadowKVCache(model.config)
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        decoder = GraphDecoder(model, cache, max_new_tokens=512)
        new_ids = decoder.generate(logits[:, -1].argmax(-1, keepdim=True), 512)

    Args:
        model: enabled by :func:`sparseattn.hf.enable`.
        cache: the model's, after a prompt that is long enough to be compressed.
        max_new_tokens: steps that room is reserved for.

    The cache is as after eager steps at any time, and can be used with the model as before; growing
    or changing it otherwise (``crop``, ``reset``, appended turns, beams) ends the decoder's use.

    Without a GPU the steps run one by one, with the same results.

    Raises:
        TypeError: cache is no ShadowKVCache.
        ValueError: the model is not enabled, or the cache holds no compressed text.
        MemoryError: there is no room for max_new_tokens; the cache stays as it was.
    """

    def __init__(self, model: Any, cache: ShadowKVCache, max_new_tokens: int):
        if not isinstance(cache, ShadowKVCache):
            raise TypeError(f"cache: expected a ShadowKVCache, got {type(cache).__name__}")
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"model: {type(model).__name__} was not enabled by sparseattn.hf.enable"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        states = [layer.state for layer in cache.layers]
        if any(state is None for state in states):
            raise ValueError(
                f"cache: expected a compressed text, got {cache.get_seq_length()} tokens (texts up "
                f"to {cache.layers[0].dense_limit} stay dense)"
            )
        self.model, self.cache = model, cache
        self.states: list[ShadowState] = states
        for state in states:
            state.reserve(max_new_tokens)
        self.left = max_new_tokens
        first = states[0]
        device = first.keys.data.device
        self.batch = first.keys.data.shape[0]
        self.ids = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
        self.place = StepPlace(self.batch, device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._expected = first.length
        self._buffer = first.keys.data  # where the graph's steps write
        if device.type == "cuda":
            self._capture()

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Feeds one token a sequence, ``ids [batch, 1]``; returns logits ``[batch, vocab]``, which
        the next step overwrites."""
        if ids.shape != self.ids.shape:
            raise ValueError(f"ids: expected shape {list(self.ids.shape)}, got {list(ids.shape)}")
        if self.left < 1:
            raise ValueError("ids: expected at most max_new_tokens steps, got one more")
        state = self.cache.layers[0].state
        if (
            state is not self.states[0]
            or state.length != self._expected
            or state.keys.data is not self._buffer
        ):
            raise ValueError("cache: expected no change but by this decoder's steps, got another")
        self.ids.copy_(ids)
        self.place.go_to(self.states[0])
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()
        self.left -= 1
        self._expected += 1
        for state in self.states:
            state.stepped()
        assert self.logits is not None
        return self.logits

    @torch.inference_mode()
    def generate(self, ids: Tensor, tokens: int, *, eos_token_id: int | None = None) -> Tensor:
        """Greedy: feeds ``ids [batch, 1]`` and then each most likely token; int64 ``[batch, n]``.

        ``n`` is ``tokens``, or less where every sequence has had ``eos_token_id``; what follows it
        in a sequence is ``eos_token_id``. Looking for it waits for the device, every 16 tokens.
        """
        if tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        out: list[Tensor] = []
        for count in range(tokens):
            ids = self.step(ids).argmax(-1, keepdim=True)
            out.append(ids)
            if eos_token_id is not None and count % 16 == 15:
                ended = (torch.cat(out, dim=1) == eos_token_id).any(dim=1).all()
                if bool(ended):
                    break
        result = torch.cat(out, dim=1)
        if eos_token_id is None:
            return result
        after = (result == eos_token_id).long().cumsum(dim=1) > 0
        result = result.masked_fill(after, eos_token_id)
        longest = int((~after).sum(dim=1).max()) + 1
        return result[:, : min(longest, result.shape[1])]

    def _run(self) -> None:
        for layer in self.cache.layers:
            layer.place = self.place
        try:
            out = self.model(
                self.ids,
                position_ids=self.place.position.expand(self.batch, 1),
                use_cache=True,
                logits_to_keep=1,
                **with_cache(self.model, self.cache),
            ).logits[:, -1]
        finally:
            for layer in self.cache.layers:
                layer.place = None
        if self.logits is None:
            self.logits = torch.empty_like(out)
        self.logits.copy_(out)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Two steps to warm up, whose rows the first real one overwrites; then the graph. Chunks
        that they fetch stay at hand."""
        counters = [(state.hits.clone(), state.misses.clone()) for state in self.states]
        self.place.go_to(self.states[0])
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run()
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        for state, (hits, misses) in zip(self.states, counters, strict=True):
            state.hits.copy_(hits)
            state.misses.copy_(misses)
