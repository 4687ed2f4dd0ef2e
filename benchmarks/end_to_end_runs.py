"""What `end_to_end.py` measures: a prefill with its parts, and the steps that follow it."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import common
import decode_caches
import torch
from decode_runs import WARM_UP, Generation, flush_seconds, make_clock, reset_peak, synchronize
from torch import Tensor

from sparseattn import Dense, VerticalSlash, hf, ops
from sparseattn.patterns import Pattern
from sparseattn.shadow_cache import ShadowKVCache

Row = dict[str, Any]


class Span:
    """Seconds of the device (CUDA events), or of the host on the CPU, summed over calls."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_: Any) -> None:
        self._marks.append(self._mark())

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """After a synchronisation."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self.cuda:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        return sum(end - start for start, end in pairs)


class Watch:
    """Looks at the attention calls of a prefill: their time, and in some layers their density.

    Counting pairs stops the clock: ``paused`` is what it took.
    """

    def __init__(self, device: torch.device, layers: Sequence[int]) -> None:
        self.device, self.layers = device, set(layers)
        self.attention, self.update = Span(device), Span(device)
        self.paused = 0.0
        self.sparse = 0  # layers
        self.densities: dict[str, list[float]] = {}  # pattern -> of heads

    @contextmanager
    def watching(self, cache: Any) -> Iterator[None]:
        own, update = hf._attend, getattr(cache, "update", None)

        def attend(state: Any, q: Tensor, k: Tensor, v: Tensor, scale: Any) -> Tensor:
            sparse = state.patterns is not None and k.shape[2] >= state.min_length_on(q, q.shape[3])
            self.sparse += sparse
            if sparse and state.layer in self.layers:
                self._count(state.patterns, q, k)
            with self.attention:
                return own(state, q, k, v, scale)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.update:
                return update(*arguments, **options)

        hf._attend = attend
        if cache is not None:
            cache.update = timed
        try:
            yield
        finally:
            hf._attend = own
            if cache is not None:
                del cache.update

    def _count(self, patterns: Sequence[Pattern], q: Tensor, k: Tensor) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        for pattern, found in densities(patterns, q, k).items():
            self.densities.setdefault(pattern, []).extend(found)
        synchronize(self.device)
        self.paused += time.perf_counter() - start


def name_of(pattern: Pattern) -> str:
    return f"{pattern.kind} {','.join(str(x) for x in pattern.sizes() if x)}".strip()


def densities(patterns: Sequence[Pattern], q: Tensor, k: Tensor) -> dict[str, list[float]]:
    """Share of the causal pairs that each head's pattern selects on this prompt."""
    tokens = q.shape[2]
    exact = tokens % common.TILE == 0
    dense = common.dense_pairs(tokens, exact=exact)
    found: dict[str, list[float]] = {}
    for pattern in dict.fromkeys(patterns):
        own = [head for head, other in enumerate(patterns) if other == pattern]
        if isinstance(pattern, VerticalSlash):
            columns, offsets = ops.estimate_vertical_slash(
                q, k, num_columns=pattern.columns, num_offsets=pattern.offsets, share=pattern.share
            )
            pairs = common.vertical_slash_pairs(
                columns[:1, own], offsets[:1, own], tokens, exact=exact
            )
        else:
            pairs = common.pattern_pairs(q, k, [pattern], exact=exact)[pattern][own]
        found[name_of(pattern)] = (pairs.double() / dense).tolist()
    return found


def mean_density(
    patterns: Sequence[Sequence[Pattern]], found: dict[str, list[float]]
) -> float | None:
    """Over all heads of all layers, from the mean of each pattern where it was counted; None where
    a pattern was not."""
    means = {name: sum(own) / len(own) for name, own in found.items()}
    every = [means.get(name_of(pattern)) for row in patterns for pattern in row]
    return None if None in every else sum(every) / len(every)


# --- pinned memory ---------------------------------------------------------------------------


class HostPool:
    """Pinned memory that is taken once, before anything is timed, and lent to the layers' stores,
    as a server would. Where the package has no host memory of its own, there is no pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pieces: list[Any] = []  # those not lent
        self.nbytes = 0
        try:
            self.module = importlib.import_module("sparseattn.shadow_rows")
            self.allocate = self.module.HostMemory  # its own, also while it lends
        except ModuleNotFoundError:
            self.module = None

    def bytes_of(self, cache: ShadowKVCache, config: Any, tokens: int) -> int:
        """Of one layer's store."""
        options = cache.options
        rows = self.module.room_for((tokens - options.local) // options.chunk) * options.chunk
        return rows * config.num_key_value_heads * config.head_dim * 2

    def reserve(self, count: int, nbytes: int) -> float:
        """At least ``count`` pieces of ``nbytes``; returns the seconds that it took."""
        start = time.perf_counter()
        missing = count - sum(piece.nbytes >= nbytes for piece in self.pieces)
        if missing > 0:
            small = sorted((x for x in self.pieces if x.nbytes < nbytes), key=lambda x: x.nbytes)
            for piece in small[:missing]:
                self.pieces.remove(piece)
                self.nbytes -= piece.nbytes
                piece.free()
        for _ in range(missing):
            self.pieces.append(self.allocate(nbytes, self.device))
            self.nbytes += nbytes
        return time.perf_counter() - start

    @contextmanager
    def lending(self) -> Iterator[None]:
        if self.module is None:
            yield
            return

        def lend(nbytes: int, device: torch.device) -> Any:
            fitting = [piece for piece in self.pieces if piece.nbytes >= nbytes > 0]
            if not fitting:
                return self.allocate(nbytes, device)
            piece = min(fitting, key=lambda x: x.nbytes)
            self.pieces.remove(piece)
            return _Lent(self.pieces, piece)

        self.module.HostMemory = lend
        try:
            yield
        finally:
            self.module.HostMemory = self.allocate

    def free(self) -> None:
        for piece in self.pieces:
            piece.free()
        self.pieces.clear()


class _Lent:
    """A piece of the pool in the place of a HostMemory; back in the pool when nobody has it."""

    def __init__(self, pieces: list[Any], piece: Any) -> None:
        self._pieces, self._piece = pieces, piece
        self.nbytes, self.tensor = piece.nbytes, piece.tensor

    def free(self) -> None:
        if self._piece is not None:
            self._pieces.append(self._piece)
            self._piece = None

    __del__ = free


# --- prefill ---------------------------------------------------------------------------------


def prompt(model: Any, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (1, tokens)
    return torch.randint(model.config.vocab_size, shape, generator=generator, device=model.device)


def use_own_dense(model: Any) -> None:
    """All heads dense in this library's kernel; ``enable`` would leave them to torch."""
    hf.enable(model)
    for module in hf._attention_modules(model):
        state = getattr(module, hf._STATE)
        heads = (Dense(),) * model.config.num_attention_heads
        setattr(module, hf._STATE, hf._LayerState(state.layer, heads, 0))


def prefill(model: Any, ids: Tensor, cache: Any, watch: Watch, slice_tokens: int) -> Row:
    """One prefill; its time is without what counting pairs took."""
    device = model.device
    reset_peak(device)
    synchronize(device)
    start = time.perf_counter()
    with watch.watching(cache):
        hf.prefill(model, ids, cache, slice_tokens=slice_tokens).argmax(-1)
    synchronize(device)
    seconds = time.perf_counter() - start - watch.paused
    row: Row = {
        "ttft_s": seconds,
        "attention_s": watch.attention.seconds,
        "cache_s": watch.update.seconds,
        "other_s": seconds - watch.attention.seconds - watch.update.seconds,
        "counting_s": watch.paused,
        "sparse_layers": watch.sparse,
        "weights_bytes": sum(x.nbytes for x in model.parameters()),
    }
    if device.type == "cuda":
        row["device_bytes"] = torch.cuda.max_memory_allocated(device)
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return row


def expected_seconds(model: Any, tokens: int, last: Row | None) -> float:
    """Of a dense prefill: from a shorter one, its attention by the square of the length; without
    one, at 350 TFLOP/s in the attention and 550 in the rest."""
    if last is not None:
        ratio = tokens / last["tokens"]
        return last["attention_s"] * ratio**2 + (last["ttft_s"] - last["attention_s"]) * ratio
    config = model.config
    pairs = tokens**2 / 2 * config.num_attention_heads * config.num_hidden_layers
    weights = (
        sum(x.numel() for x in model.parameters()) - 2 * config.vocab_size * config.hidden_size
    )
    return 4 * config.head_dim * pairs / 350e12 + 2 * weights * tokens / 550e12


# --- decode ----------------------------------------------------------------------------------


def decode_rows(model: Any, cache: ShadowKVCache, arguments: argparse.Namespace) -> Iterator[Row]:
    """Steps after a prefill of one sequence, eager and then as one CUDA graph a step (on the CPU
    the same without one). Selections are those of the model."""
    device, states = model.device, [layer.state for layer in cache.layers]
    eager = argparse.Namespace(steps=arguments.eager_steps, seed=arguments.seed)

    def counted(run: Callable[[], float], steps: int, every: int) -> Row:
        before = cache.counters()
        seconds = run()
        after = cache.counters()
        hits, misses, read = (after[x] - before[x] for x in ("hits", "misses", "bytes_read"))
        row = {
            "ms_per_token": 1e3 * seconds / steps,
            "tokens_per_s": steps / seconds,
            "steps": steps,
            "hit_rate": hits / max(1, hits + misses),
            "pcie_bytes_per_token": read / every if states[0].host else 0,
        }
        if device.type == "cuda":
            row["device_bytes"] = torch.cuda.max_memory_allocated(device)
        return row

    reset_peak(device)
    clock = make_clock(model, eager, 1, 0, 0)
    generation = Generation(model, cache, clock, positions=False)
    steps = eager.steps
    run = lambda: generation.seconds(steps, again=False)  # noqa: E731
    yield {"mode": "eager"} | counted(run, steps, steps + WARM_UP)

    steps = arguments.steps
    reset_peak(device)
    clock = make_clock(model, arguments, 1, states[0].length, states[0].keys.length)
    fixed = decode_caches.graph_cache(cache, clock, steps + WARM_UP + 1)
    decode_caches.use_attention(model)
    try:
        generation = Generation(model, fixed, clock, positions=True)
        mode = "graph" if device.type == "cuda" else "fixed, eager"
        try:
            if device.type == "cuda":
                generation.capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = (str(error).splitlines() or [""])[0][:100]
            yield {"mode": mode, "note": f"not captured: {text}"}
            return
        run = lambda: generation.seconds(steps, again=True)  # noqa: E731
        row = counted(run, steps, steps + WARM_UP)
    finally:
        model.set_attn_implementation(hf.NAME)
    seconds = flush_seconds(states, steps, device)
    whole = row["ms_per_token"] * steps / 1e3 + seconds
    row |= {"ms_per_token_without_flush": row["ms_per_token"], "flush_ms": 1e3 * seconds}
    yield {"mode": mode} | row | {
        "ms_per_token": 1e3 * whole / steps, "tokens_per_s": steps / whole
    }  # fmt: skip
