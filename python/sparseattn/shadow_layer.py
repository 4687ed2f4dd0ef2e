"""One layer of a ShadowKVCache: what of the keys and values is kept where, and how it grows.

Tokens ``[0, compressed)`` are chunks: a low-rank factor of their keys before RoPE, a landmark
each, and their values in the store. A few of them, the outliers and sinks, are also kept exactly,
in the first rows of the exact buffer; landmarks of these are never selected. Tokens from
``compressed`` on, the tail, are the rest of that buffer. Generated and appended tokens join the
tail, and its oldest tokens become chunks when it is long: so memory grows by the compressed size,
without a limit.

All sequences of a batch have the same length. Short texts are kept as they are ("dense").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn import shadow
from sparseattn.rope import Rope
from sparseattn.shadow_rows import Rows, StoredRows, allocate

#: Types of devices that have all operators of a compressed layer.
DEVICES = ("cpu", "cuda")

_SLICE = 32768  # tokens, of all sequences together, whose keys before RoPE exist at a time
_SLICE_STEP = 256  # slices are multiples of it: shadow_gram_ sums as many products at a time


@dataclass(frozen=True)
class ShadowOptions:
    """What the layers of a cache share."""

    rank: int
    chunk: int  # tokens
    top_k: int  # chunks
    outliers: int  # chunks
    sinks: int  # chunks
    local: int  # tokens of the tail that are never compressed
    flush: int  # tokens that become chunks at a time
    slots: int  # chunks whose values are at hand
    store: str  # "device", "host" or "auto"
    quantise_values: bool = False  # in the store, to e4m3
    quantise_factor: bool = False

    @property
    def dense_limit(self) -> int:
        """Texts up to this length are kept as they are: compressed they would need no less."""
        return self.chunk * (self.top_k + self.outliers + self.sinks) + self.local + self.flush


class StepPlace:
    """Where a step of one token is, on the device, so that a CUDA graph can be told. The layers of
    a cache are all at the same place."""

    def __init__(self, batch: int, device: torch.device):
        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.row = numbers(1)  # of the exact buffers: takes the token's key and value
        self.position = numbers(1, 1)  # of the token
        self.exact_lens = numbers(batch)  # the token's row included
        self.num_chunks = numbers(batch)

    def go_to(self, state: ShadowState) -> None:
        """The step after the tokens that the state has."""
        self.row.fill_(state.keys.length)
        self.position.fill_(state.length)
        self.exact_lens.fill_(state.keys.length + 1)
        self.num_chunks.fill_(state.chunks)


class ShadowState:
    """The compressed form of one layer."""

    def __init__(self, options: ShadowOptions, rope: Rope, keys: Tensor, values: Tensor):
        """keys (after RoPE) and values ``[B, Hkv, N, D]`` of a whole text."""
        if keys.device.type not in DEVICES:
            raise ValueError(
                f"ShadowKVCache: expected a model on {' or '.join(DEVICES)}, got {keys.device}: "
                "not all of its operators are there yet"
            )
        self.options, self.rope = options, rope
        self.inv_freq = rope.inv_freq.to(keys.device)
        batch, heads, tokens, dim = keys.shape
        chunk = options.chunk
        chunks = (tokens - options.local) // chunk
        count = chunks * chunk
        self._find_basis(keys[:, :, :count])
        self.chunks = 0
        self.hits = torch.zeros((), dtype=torch.int64, device=keys.device)
        self.misses = torch.zeros((), dtype=torch.int64, device=keys.device)
        self.host = options.store == "host" or (
            options.store == "auto"
            and not _fits(values[:, :, :count], 1 if options.quantise_values else None)
        )
        rank = self.basis.shape[2]
        self.factor = StoredRows(
            "the keys' factor",
            keys.new_empty(batch, 1, 0, rank),
            group=1,
            quantised=options.quantise_factor,
        )
        self.landmarks = Rows("landmarks", keys[:, :, :0])
        excluded = torch.empty(batch, heads, 0, 1, dtype=torch.bool, device=keys.device)
        self.excluded = Rows("the list of exact chunks", excluded)
        self.store = StoredRows(
            "values",
            values[:, :, :0],
            group=chunk,
            quantised=options.quantise_values,
            host=self.host,
        )
        cosine = self._add_chunks(keys[:, :, :count], values[:, :, :count])
        self._keep_exact(keys, values, cosine, count)
        slots = (batch, heads, options.slots)
        self.slots = allocate("values at hand", (*slots, chunk * dim), values)
        self.slot_chunk = torch.full(slots, -1, dtype=torch.int32, device=keys.device)
        self.last_used = torch.zeros(slots, dtype=torch.int32, device=keys.device)

    # --- compression ---------------------------------------------------------------------------

    def _find_basis(self, keys: Tensor) -> None:
        """basis [B, Hkv, rank, D] and mean [B, Hkv, D] of the keys before RoPE."""
        batch, heads, _, dim = keys.shape
        width = heads * dim
        rank = min(self.options.rank, width)
        place = {"dtype": torch.float64, "device": keys.device}
        gram, total = torch.zeros(batch, width, width, **place), torch.zeros(batch, width, **place)
        counted = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        for _, part in self._before_rope(keys, 0):
            shadow.shadow_gram_(part.transpose(1, 2), gram, total, counted)
        self.basis, self.mean = shadow.shadow_basis(
            gram, total, counted, rank=rank, kv_heads=heads, dtype=keys.dtype
        )

    def _before_rope(
        self, keys: Tensor, first: int, mean: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Keys after RoPE, of tokens from ``first`` on, before it and less the mean, in slices: the
        row that one starts at and its ``[B, n, Hkv, D]``, in memory that the next one takes."""
        batch, heads, tokens, dim = keys.shape
        size = max(_SLICE // batch // _SLICE_STEP * _SLICE_STEP, _SLICE_STEP)
        shape = (batch, min(tokens, size), heads, dim)
        buffer = allocate("a slice of keys before RoPE", shape, keys)
        for at in range(0, tokens, size):
            part = keys[:, :, at : at + size]
            out = buffer[:, : part.shape[2]]
            shadow.shadow_undo_rope_(
                part,
                out,
                self.inv_freq,
                mean,
                first=first + at,
                interleaved=self.rope.interleaved,
                rope_scale=self.rope.scale,
            )
            yield at, out

    def _write_factor(self, keys: Tensor, first: int) -> None:
        """Writes the rows of keys after RoPE behind those that the factor has."""
        basis = self.basis.transpose(1, 2).flatten(2).mT  # [B, width, rank]
        room = self.factor.spare(keys.shape[2])
        for at, part in self._before_rope(keys, first, self.mean):
            part = part.flatten(2)
            if self.options.quantise_factor:
                self.factor.write(torch.bmm(part, basis)[:, None], at)
            else:
                torch.bmm(part, basis, out=room[:, 0, at : at + part.shape[1]])

    def _add_chunks(self, keys: Tensor, values: Tensor) -> Tensor:
        """Appends whole chunks of tokens, the next ones; returns their smallest cosines."""
        batch, heads, tokens, _ = keys.shape
        chunk = self.options.chunk
        first, count = self.chunks * chunk, tokens // chunk
        cosine = torch.empty(batch, heads, count, dtype=torch.float32, device=keys.device)
        # Reserved before any of them is written, and counted when all are: running out of memory
        # changes nothing.
        self.factor.reserve(first + tokens, self.factor.data)
        for rows in (self.landmarks, self.excluded, self.store):
            rows.reserve(self.chunks + count, rows.data)
        self._write_factor(keys, first)
        shadow.shadow_landmarks_(keys, self.landmarks.spare(count), cosine, chunk=chunk)
        self.excluded.spare(count).zero_()
        self.store.write(values, 0)
        self.factor.extend(tokens)
        for rows in (self.landmarks, self.excluded, self.store):
            rows.extend(count)
        self.chunks += count
        return cosine

    def _keep_exact(self, keys: Tensor, values: Tensor, cosine: Tensor, compressed: int) -> None:
        """The exact buffer: rows of outliers and sinks, then the tail."""
        options = self.options
        count = min(options.outliers + options.sinks, self.chunks)
        sinks = min(options.sinks, self.chunks)
        self.outliers = shadow.shadow_outliers(cosine, count=count, sink_chunks=sinks)
        self.excluded.rows[..., 0] = shadow.chunk_mask(self.outliers, self.chunks)
        self.first = count * options.chunk  # row of the tail's first token

        def exact(what: str, x: Tensor) -> Rows:
            kept = shadow.chunk_rows(x, self.outliers, chunk=options.chunk)
            tail = x[:, :, compressed:]
            rows = Rows(what, x[:, :, :0])
            rows.reserve(kept.shape[2] + tail.shape[2], x)
            rows.append(kept)
            rows.append(tail)
            return rows

        self.keys = exact("exact keys", keys)
        self.values = exact("exact values", values)

    # --- growth --------------------------------------------------------------------------------

    @property
    def compressed(self) -> int:
        return self.chunks * self.options.chunk

    @property
    def length(self) -> int:
        return self.compressed + self.keys.length - self.first

    def append(self, keys: Tensor, values: Tensor) -> None:
        """New tokens, after RoPE. The oldest of the tail become chunks when it has grown by
        ``flush`` tokens."""
        total = self.keys.length + keys.shape[2]
        self.keys.reserve(total, keys)
        self.values.reserve(total, values)
        self.keys.append(keys)
        self.values.append(values)

    def flush(self) -> None:
        options = self.options
        spare = self.keys.length - self.first - options.local
        if spare < options.flush:
            return
        count = spare // options.chunk * options.chunk
        moved = slice(self.first, self.first + count)
        self._add_chunks(self.keys.data[:, :, moved], self.values.data[:, :, moved])
        self.keys.drop(self.first, count)
        self.values.drop(self.first, count)

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more: until then buffers keep their addresses."""
        options = self.options
        chunks = (self.length + tokens) // options.chunk
        self.factor.reserve(chunks * options.chunk, self.factor.data)
        for rows in (self.landmarks, self.excluded, self.store):
            rows.reserve(chunks, rows.data)
        tail = options.local + options.flush + options.chunk
        for rows in (self.keys, self.values):
            rows.reserve(max(rows.length, self.first + tail), rows.data)

    def write(self, keys: Tensor, values: Tensor, place: StepPlace) -> None:
        """The token of a step whose place is on the device; :meth:`stepped` counts it."""
        self.keys.data.index_copy_(2, place.row, keys)
        self.values.data.index_copy_(2, place.row, values)

    def stepped(self) -> None:
        """A step at a place has been run."""
        self.keys.length += 1
        self.values.length += 1
        self.flush()

    # --- use -----------------------------------------------------------------------------------

    def everything(self) -> tuple[Tensor, Tensor]:
        """Keys, rebuilt where they are not exact, and values of all tokens ``[B, Hkv, N, D]``."""
        options = self.options
        batch, heads, _, dim = self.keys.data.shape
        place = self.keys.data.device
        ids = torch.arange(self.chunks, dtype=torch.int32, device=place)
        keys = shadow.lowrank_reconstruct(
            ids.expand(batch, heads, -1).contiguous(),
            self.factor.rows[:, 0],
            self.basis,
            self.mean,
            self.inv_freq,
            chunk=options.chunk,
            interleaved=self.rope.interleaved,
            rope_scale=self.rope.scale,
            factor_scale=_of_one_head(self.factor.scale_rows),
        )
        chunked = keys.view(batch, heads, self.chunks, options.chunk * dim)
        exact = self.keys.data[:, :, : self.first].reshape(batch, heads, -1, options.chunk * dim)
        index = self.outliers.long()[..., None].expand_as(exact)
        keys = chunked.scatter(2, index, exact).view_as(keys)
        values = self.store.numbers().reshape(batch, heads, self.compressed, dim)
        tail = slice(self.first, self.keys.length)
        return (
            torch.cat((keys, self.keys.data[:, :, tail]), dim=2),
            torch.cat((values, self.values.data[:, :, tail]), dim=2),
        )

    def attend(self, query: Tensor, scale: float | None, place: StepPlace | None = None) -> Tensor:
        """Decode attention of the last tokens ``query [B, Hq, q_len, D]``; same shape.

        With ``place``, of a token that :meth:`write` has put there: whole buffers are handed over,
        and the device knows what of them is filled.
        """
        options = self.options
        top_k = min(options.top_k, self.chunks)
        if place is None:
            keys, values, lens = self.keys.rows, self.values.rows, None
            landmarks, excluded = self.landmarks.rows, self.excluded.rows[..., 0].contiguous()
            store, factor, chunks = self.store.rows, self.factor.rows, None
            scales = self.store.scale_rows, self.factor.scale_rows
        else:
            keys, values, lens = self.keys.data, self.values.data, place.exact_lens
            landmarks, excluded = self.landmarks.data, self.excluded.data[..., 0]
            store, factor, chunks = self.store.data, self.factor.data, place.num_chunks
            scales = self.store.scales, self.factor.scales
            top_k = options.top_k  # also while there are fewer chunks: entries are -1 then
        selected = shadow.shadow_select(
            query, landmarks, top_k=top_k, excluded=excluded, num_chunks=chunks, scale=scale
        )
        slot_of, misses, miss_count = shadow.shadow_plan_(selected, self.slot_chunk, self.last_used)
        shadow.gather_values_(store, self.slots, misses, miss_count, store_scale=scales[0])
        missed = miss_count.sum()
        self.misses += missed
        self.hits += (selected >= 0).sum() - missed
        return shadow.shadow_attention(
            query,
            keys,
            values,
            selected,
            slot_of,
            self.slots,
            factor[:, 0],
            self.basis,
            self.mean,
            self.inv_freq,
            interleaved=self.rope.interleaved,
            rope_scale=self.rope.scale,
            scale=scale,
            exact_lens=lens,
            factor_scale=_of_one_head(scales[1]),
        )

    def select(self, index: Tensor) -> None:
        """Keeps, repeats or reorders sequences of the batch."""
        for rows in (
            self.factor,
            self.landmarks,
            self.excluded,
            self.store,
            self.keys,
            self.values,
        ):
            rows.select(index)
        for name in (
            "mean",
            "basis",
            "outliers",
            "slots",
            "slot_chunk",
            "last_used",
        ):
            x = getattr(self, name)
            setattr(self, name, x.index_select(0, index.to(x.device)))

    def memory(self) -> dict[str, int]:
        """Bytes by part; ``host_values`` are in (pinned) host memory, but for the scales of fp8."""
        store = "host_values" if self.host else "store_values"
        parts: dict[str, Any] = {
            "factor": (self.factor, self.basis, self.mean),
            "landmarks": (self.landmarks.data, self.excluded.data),
            "exact": (self.keys.data, self.values.data),
            store: (self.store,),
            "value_slots": (self.slots, self.slot_chunk, self.last_used),
        }
        return {name: sum(x.nbytes for x in tensors) for name, tensors in parts.items()}

    @property
    def bytes_of_a_miss(self) -> int:
        """A chunk's row of the store."""
        return self.store.data.shape[3] * self.store.data.element_size()


def _of_one_head(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales[:, 0]


def _fits(values: Tensor, size: int | None) -> bool:
    """Whether the values, of ``size`` bytes each or their own, may stay on the device: they take at
    most a quarter of what is free."""
    if not values.is_cuda:
        return True
    free, _ = torch.cuda.mem_get_info(values.device)
    return values.numel() * (size or values.element_size()) * 4 <= free
