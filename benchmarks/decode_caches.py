"""Caches for `decode_model.py`: a dense one of fixed size, a ShadowKVCache filled with random keys
and repeated over a batch, and one of fixed addresses over its layers, for CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decode_inputs import DTYPE, HostMemory
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from sparseattn import shadow
from sparseattn.bench_tools import SDPA_BACKENDS
from sparseattn.hf import MARK
from sparseattn.shadow_cache import ShadowKVCache
from sparseattn.shadow_layer import ShadowState, StepPlace

NAME = "decode_benchmark"  # of the attention function; it has no mask function, so no mask is made

DenseCall = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


class Clock:
    """Where a generation is, on the device, so that a CUDA graph moves it on: the step, the
    position of its token, and the row that takes its key."""

    def __init__(self, tokens: Tensor, position: int, row: int) -> None:
        """tokens: int64 ``[steps, batch]``, fed one row a step."""
        self.tokens, self._start = tokens, (0, position, row)
        self.now = torch.tensor(self._start, device=tokens.device)
        self._one = torch.ones_like(self.now)
        self.exact_lens = torch.empty(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        self.reset()

    def reset(self) -> None:
        for place, value in enumerate(self._start):
            self.now[place] = value
        self.exact_lens.fill_(self._start[2] + 1)

    def advance(self) -> None:
        self.now += self._one
        self.exact_lens += 1

    @property
    def ids(self) -> Tensor:
        return self.tokens.index_select(0, self.now[0:1]).T

    @property
    def positions(self) -> Tensor:
        return self.now[None, 1:2]

    @property
    def row(self) -> Tensor:
        return self.now[2:3]


class FixedLayer(CacheLayerMixin):
    """What layers of fixed addresses have in common: they never grow."""

    is_sliding = False

    def __init__(self, length: int, clock: Clock) -> None:
        super().__init__()
        self.length, self.clock = length, clock
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length - 1

    def get_max_length(self) -> int:
        return self.length


class WindowLayer(FixedLayer):
    """Dense keys and values ``[batch, kv_heads, length, D]``; a step attends to all of them.

    Rows that are not generated yet hold noise: a step's time is that of the full length.
    """

    def __init__(self, keys: Tensor, values: Tensor, clock: Clock) -> None:
        super().__init__(keys.shape[2], clock)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        self.keys.index_copy_(2, self.clock.row, key_states)
        self.values.index_copy_(2, self.clock.row, value_states)
        return self.keys, self.values


class GraphLayer(FixedLayer):
    """The step of a ShadowKVCache's layer at the clock's place, as a GraphDecoder runs it. Chunks
    are not added."""

    def __init__(self, state: ShadowState, clock: Clock) -> None:
        super().__init__(state.length + 1, clock)
        self.state = state
        self.place = StepPlace(clock.tokens.shape[1], clock.tokens.device)
        self.place.num_chunks.fill_(state.chunks)
        self.place.row, self.place.exact_lens = clock.row, clock.exact_lens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        self.state.write(key_states, value_states, self.place)
        marked = key_states.view_as(key_states)
        setattr(marked, MARK, self)
        return marked, value_states

    def attend(self, query: Tensor, scale: float | None) -> Tensor:
        return self.state.attend(query, scale, self.place)


# --- attention of the model ------------------------------------------------------------------


def dense_calls(device: torch.device) -> dict[str, DenseCall]:
    """Dense attention of one query row, by SDPA backend, grouped heads or a group as rows."""

    def call(backend: Any, rows: bool) -> DenseCall:
        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            x = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]) if rows else q
            backends = [backend] if backend is not None else list(_BACKENDS)
            with sdpa_kernel(backends):
                out = scaled_dot_product_attention(x, k, v, scale=scale, enable_gqa=not rows)
            return out.reshape(q.shape)

        return attend

    return {
        name + (", rows" if rows else ""): call(backend, rows)
        for name, backend in SDPA_BACKENDS[device.type].items()
        for rows in (False, True)
    }


_BACKENDS = tuple(
    getattr(torch.nn.attention.SDPBackend, name) for name in ("FLASH_ATTENTION", "MATH")
)


def use_attention(model: Any, dense: DenseCall | None = None) -> None:
    """The model's attention of one token a sequence: a GraphLayer's, or ``dense``."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer = getattr(key, MARK, None)
        if layer is not None:
            out = layer.attend(query, scaling)
        else:
            assert dense is not None and query.shape[2] == 1
            out = dense(query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)


# --- building --------------------------------------------------------------------------------


def random_keys(config: Any, tokens: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Keys with a mean for each head, and values: ``[1, kv_heads, tokens, head_dim]``."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int) -> Tensor:
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        return torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=generator)

    return draw(tokens).add_(draw(1)), draw(tokens)


def filled(
    config: Any, options: dict[str, Any], tokens: int, device: torch.device, seed: int
) -> ShadowKVCache:
    """One sequence, each layer compressed from random keys as a prefill would."""
    cache = ShadowKVCache(config, **options)
    for number, layer in enumerate(cache.layers):
        layer.update(*random_keys(config, tokens, device, seed + number))
        if layer.state is None:
            raise ValueError(f"tokens: expected more than {layer.dense_limit}, got {tokens}")
        empty_cache(device)
    return cache


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def empty_host_cache() -> None:
    """Gives back the pinned memory that torch's allocator keeps, where this torch can."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        empty()


class Stores:
    """Host stores of a cache whose sequences are copies of one: a pinned tensor for each layer
    ("own"), or one for all of them ("shared"), where host memory does not hold the model's."""

    def __init__(self, cache: ShadowKVCache, mode: str, device: torch.device, limit: float) -> None:
        """limit: bytes that all of them may take."""
        self.layers, self.limit = len(cache.layers), limit
        count = self.layers if mode == "own" else 1
        self.memories = [HostMemory(device) for _ in range(count)]
        self.filled = [0] * count  # sequences
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # stores are written by kernels
        first = cache.layers[0].state.store.data  # of one sequence, for all layers
        self.first = first.view(torch.uint8).clone().view(first.dtype)
        for layer in cache.layers:
            layer.state.store.data = self.first
            if layer.state.store.host is not None:
                layer.state.store.host.free()
        empty_host_cache()

    def bytes_of(self, batch: int) -> int:
        """What the stores of all layers take for a batch."""
        return self.first.nbytes * batch * self.layers

    def reserved(self, batch: int) -> bool:
        """Takes the memory for a batch; False, and takes none, if it cannot be had."""
        if batch > 0 and self.bytes_of(batch) / self.layers * len(self.memories) > self.limit:
            return False
        try:
            for memory in self.memories:
                memory.tensor((batch, *self.first.shape[1:]), self.first.dtype)
        except (MemoryError, RuntimeError):
            self.free()
            return False
        return True

    def lend(self, number: int, batch: int) -> Tensor:
        place = number % len(self.memories)
        shape = (batch, *self.first.shape[1:])
        data = self.memories[place].tensor(shape, self.first.dtype)
        missing = data[self.filled[place] :].view(torch.uint8)  # torch does not copy all of fp8
        missing.copy_(self.first.view(torch.uint8).expand(missing.shape))
        self.filled[place] = max(batch, self.filled[place])
        return data

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self.memories)

    def free(self) -> None:
        for memory in self.memories:
            memory.free()


class _Lent:
    """Stands in for a store while the rest of a layer is repeated."""

    def select(self, index: Tensor) -> None:
        pass


def repeat(cache: ShadowKVCache, batch: int, stores: Stores | None, device: torch.device) -> None:
    """Makes all sequences of the batch copies of the first, layer by layer.

    Running out of memory leaves some layers as they were; another batch may be asked for then.
    """
    index = torch.zeros(batch, dtype=torch.int64, device=device)
    for number, layer in enumerate(cache.layers):
        state = layer.state
        if stores is None:
            layer.batch_select_indices(index)
        else:
            store, state.store = state.store, _Lent()
            try:
                layer.batch_select_indices(index)
            finally:
                state.store = store
            store.data = stores.lend(number, batch)
            if store.scales is not None:
                store.scales = store.scales[:1].repeat(batch, 1, 1)
        empty_cache(device)


def graph_cache(cache: ShadowKVCache, clock: Clock, steps: int) -> Cache:
    """GraphLayers over the cache's layers, with room for ``steps`` tokens."""
    for layer in cache.layers:
        state = layer.state
        for rows in (state.keys, state.values):
            rows.reserve(rows.length + steps, rows.data)
    return Cache(layers=[GraphLayer(layer.state, clock) for layer in cache.layers])


# --- hit rates -------------------------------------------------------------------------------


def selections(
    shape: tuple[int, int, int], chunks: int, hits: float, steps: int, device: torch.device
) -> Tensor:
    """int32 ``[steps, batch, kv_heads, top_k]``: lists of which successive ones share ``hits``."""
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, top_k = shape
    kept = round(hits * top_k)

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    last = draw(batch, heads, chunks).topk(top_k).indices
    lists = [last]
    for _ in range(steps - 1):
        stay = last.gather(-1, draw(*last.shape).argsort(-1)[..., :kept])
        scores = draw(batch, heads, chunks).scatter_(-1, last, -1.0)
        last = torch.cat((stay, scores.topk(top_k - kept).indices), dim=-1)
        lists.append(last)
    return torch.stack(lists).sort(-1).values.int()


@contextmanager
def controlled(lists: Tensor | None, clock: Clock) -> Iterator[None]:
    """`shadow_select` runs, and what it selects is replaced by the clock's list."""
    own = shadow.shadow_select
    if lists is None:
        yield
        return

    def select(*arguments: Any, **options: Any) -> Tensor:
        own(*arguments, **options)
        return lists.index_select(0, clock.now[0:1])[0]

    shadow.shadow_select = select
    try:
        yield
    finally:
        shadow.shadow_select = own
