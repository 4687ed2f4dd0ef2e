"""What `decode_model.py` measures: generation with a dense cache and with a ShadowKVCache at
growing batches, and the time to the first token. Each function yields rows of the record.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import decode_caches as caches
import torch
from decode_caches import Clock
from decode_inputs import DTYPE, free_memory
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache

from sparseattn import hf
from sparseattn.hf_arguments import with_cache
from sparseattn.shadow_cache import ShadowKVCache

SPARE = 3 * 2**30  # bytes of device memory left for activations and graphs
WARM_UP = 3

Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Generation:
    """Steps of a model along a clock."""

    def __init__(self, model: Any, cache: Cache, clock: Clock, *, positions: bool) -> None:
        """positions: given to the model, from the clock, for a cache that does not count."""
        self.model, self.cache, self.clock, self.positions = model, cache, clock, positions
        self.device = clock.tokens.device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.picked = torch.zeros(clock.tokens.shape[1], dtype=torch.int64, device=self.device)

    def step(self) -> None:
        given = with_cache(self.model, self.cache)
        if self.positions:
            given["position_ids"] = self.clock.positions
        out = self.model(self.clock.ids, logits_to_keep=1, **given)
        self.picked.copy_(out.logits[:, -1].argmax(-1))
        self.clock.advance()

    def capture(self) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        current.wait_stream(side)
        self.clock.reset()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        self.clock.reset()

    def seconds(self, steps: int, *, again: bool) -> float:
        """Of ``steps`` steps, after WARM_UP others. again: those are taken back."""
        call = self.step if self.graph is None else self.graph.replay
        for _ in range(WARM_UP):
            call()
        if again:
            self.clock.reset()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize(self.device)
        return time.perf_counter() - start


def make_clock(
    model: Any, arguments: argparse.Namespace, batch: int, position: int, row: int
) -> Clock:
    device = model.device
    generator = torch.Generator(device).manual_seed(arguments.seed)
    shape = (arguments.steps + WARM_UP + 1, batch)
    high = model.config.vocab_size
    return Clock(torch.randint(high, shape, generator=generator, device=device), position, row)


def speed(batch: int, steps: int, seconds: float) -> Row:
    return {
        "batch": batch,
        "ms_per_step": round(1e3 * seconds / steps, 4),
        "tokens_per_s": batch * steps / seconds,
    }


def device_memory(device: torch.device) -> Row:
    if device.type != "cuda":
        return {}
    return {"device_bytes": torch.cuda.max_memory_allocated(device)}


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def largest_batch(device: torch.device, per_sequence: float, most: int) -> int:
    if device.type != "cuda":
        return most
    free = torch.cuda.mem_get_info(device)[0] - SPARE
    return max(0, min(most, int(free // per_sequence)))


def batches_up_to(arguments: argparse.Namespace, largest: int) -> list[int]:
    """Those asked for that fit, and the largest, ascending."""
    return sorted({batch for batch in arguments.batches if batch < largest} | {largest})


# --- dense -----------------------------------------------------------------------------------


def dense_rows(model: Any, arguments: argparse.Namespace) -> Iterator[Row]:
    config, device, tokens = model.config, model.device, arguments.tokens
    heads, dim = config.num_key_value_heads, config.head_dim
    layers = config.num_hidden_layers
    per_sequence = 2 * layers * tokens * heads * dim * DTYPE.itemsize
    largest = largest_batch(device, per_sequence, arguments.most)
    pairs: list[list[torch.Tensor]] = []
    while largest > 0 and len(pairs) < layers:
        try:
            shape = (largest, heads, tokens, dim)
            empty = [torch.empty(shape, dtype=DTYPE, device=device) for _ in range(2)]
            pairs.append([x.normal_() for x in empty])
        except torch.OutOfMemoryError:
            pairs.clear()
            free_memory(device)
            largest -= 1
    if largest == 0:
        yield {"way": "dense", "batch": 1, "note": "not one sequence fits in device memory"}
        return
    name, call = fastest(model, pairs[0])
    caches.use_attention(model, call)
    row = tokens - arguments.steps - WARM_UP - 1
    for batch in batches_up_to(arguments, largest):
        reset_peak(device)
        clock = make_clock(model, arguments, batch, row, row)
        cache = Cache(layers=[caches.WindowLayer(k[:batch], v[:batch], clock) for k, v in pairs])
        facts = {"way": "dense", "attention": name, "largest": batch == largest}
        facts["cache_bytes"] = per_sequence * batch
        generation = Generation(model, cache, clock, positions=True)
        yield from timed(generation, arguments, batch, facts)
        free_memory(device)


def fastest(model: Any, pair: list[torch.Tensor]) -> tuple[str, caches.DenseCall]:
    """The dense attention that takes least time for the largest batch; refusals are left out."""
    k, v = pair
    shape = (k.shape[0], model.config.num_attention_heads, 1, k.shape[3])
    q = torch.ones(shape, dtype=k.dtype, device=k.device)
    timer = common.Timer(k.device)
    times: dict[str, float] = {}
    calls = caches.dense_calls(k.device)
    for name, call in calls.items():
        try:
            times[name] = timer(lambda call=call: call(q, k, v, None), most=5).ms
        except RuntimeError as error:
            tqdm.write(f"{name}: refused: {(str(error).splitlines() or [''])[0][:90]}")
    if not times:
        raise RuntimeError("no dense attention runs on these shapes")
    best = min(times, key=times.__getitem__)
    return best, calls[best]


def timed(
    generation: Generation, arguments: argparse.Namespace, batch: int, facts: Row
) -> Iterator[Row]:
    """Eager, then as a graph, where rows can be written again."""
    device = generation.device
    seconds = generation.seconds(arguments.steps, again=True)
    yield facts | {"mode": "eager"} | speed(batch, arguments.steps, seconds) | device_memory(device)
    generation.clock.reset()
    if device.type != "cuda":
        return
    row = facts | {"mode": "graph"}
    try:
        generation.capture()
    except torch.OutOfMemoryError:
        yield row | {"batch": batch, "note": "no memory for the graph"}
        return
    except RuntimeError as error:
        text = (str(error).splitlines() or [""])[0][:100]
        yield row | {"batch": batch, "note": f"not captured: {text}"}
        return
    seconds = generation.seconds(arguments.steps, again=True)
    yield row | speed(batch, arguments.steps, seconds) | device_memory(device)


# --- ShadowKV --------------------------------------------------------------------------------


def shadow_rows(model: Any, arguments: argparse.Namespace, store: str) -> Iterator[Row]:
    device = model.device
    options = dict(arguments.cache, value_store=store)
    hf.enable(model)
    cache = caches.filled(model.config, options, arguments.tokens, device, arguments.seed)
    stores = None
    per_sequence = sum(size for part, size in cache.memory().items() if part != "host_values")
    if store == "host":
        stores = caches.Stores(cache, arguments.host_values, device, arguments.host_gib * 2**30)
    # What one sequence takes already is part of what the batch will take.
    largest = largest_batch(device, 1.02 * per_sequence, arguments.most)
    try:
        while stores is not None and largest > 1 and not stores.reserved(largest):
            largest -= 1
        for batch in batches_up_to(arguments, max(1, largest)):
            facts: Row = {"way": "shadow", "store": store, "largest": batch == largest}
            try:
                caches.repeat(cache, batch, stores, device)
                yield from shadow_batch(model, cache, arguments, batch, facts, stores)
            except (torch.OutOfMemoryError, MemoryError) as error:
                text = (str(error).splitlines() or ["out of memory"])[0][:100]
                yield facts | {"mode": "eager", "batch": batch, "note": f"skipped: {text}"}
            free_memory(device)
    finally:
        cache.reset()
        if stores is not None:
            stores.free()
        hf.disable(model)


def shadow_batch(
    model: Any,
    cache: Any,
    arguments: argparse.Namespace,
    batch: int,
    facts: Row,
    stores: caches.Stores | None,
) -> Iterator[Row]:
    device, steps = model.device, arguments.steps
    states = [layer.state for layer in cache.layers]
    first = states[0]
    memory = cache.memory()
    facts |= {"cache_bytes": memory}
    if stores is not None:
        facts |= {"host_bytes": stores.nbytes, "host_bytes_needed": stores.bytes_of(batch)}
    lists = None
    if arguments.hits is not None:
        shape = (batch, model.config.num_key_value_heads, min(first.options.top_k, first.chunks))
        more = (arguments.hits, steps + WARM_UP + 1, device)
        lists = caches.selections(shape, first.chunks, *more)

    def counted(run: Callable[[], float]) -> Row:
        before = cache.counters()
        seconds = run()
        after = cache.counters()
        hits, misses, read = (after[x] - before[x] for x in ("hits", "misses", "bytes_read"))
        every = steps + WARM_UP
        return speed(batch, steps, seconds) | {
            "hit_rate": hits / max(1, hits + misses),
            "bytes_from_store_per_step": read / every,
            "pcie_bytes_per_step": read / every if stores is not None else 0,
        }

    reset_peak(device)
    model.set_attn_implementation(hf.NAME)
    clock = make_clock(model, arguments, batch, 0, 0)
    generation = Generation(model, cache, clock, positions=False)
    with caches.controlled(lists, clock):
        row = counted(lambda: generation.seconds(steps, again=False))
    yield facts | {"mode": "eager"} | row | device_memory(device)

    reset_peak(device)
    clock = make_clock(model, arguments, batch, first.length, first.keys.length)
    fixed = caches.graph_cache(cache, clock, steps + WARM_UP + 1)
    caches.use_attention(model)
    generation = Generation(model, fixed, clock, positions=True)
    mode = "graph" if device.type == "cuda" else "fixed, eager"
    with caches.controlled(lists, clock):
        try:
            if device.type == "cuda":
                generation.capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = (str(error).splitlines() or [""])[0][:100]
            yield facts | {"mode": mode, "batch": batch, "note": f"not captured: {text}"}
            return
        row = counted(lambda: generation.seconds(steps, again=True))
    seconds = flush_seconds(states, steps, device)
    whole = row["ms_per_step"] * steps / 1e3 + seconds
    row |= speed(batch, steps, whole) | {
        "ms_per_step_without_flush": row["ms_per_step"],
        "flush_ms": round(1e3 * seconds, 3),
    }
    yield facts | {"mode": mode} | row | device_memory(device)


def flush_seconds(states: list[Any], steps: int, device: torch.device) -> float:
    """The rows that the steps wrote become part of the tail, and its oldest ones chunks."""
    for state in states:
        state.keys.length += steps
        state.values.length += steps
    synchronize(device)
    start = time.perf_counter()
    for state in states:
        state.flush()
    synchronize(device)
    return time.perf_counter() - start


# --- time to the first token -----------------------------------------------------------------


@torch.no_grad()
def ttft_rows(model: Any, arguments: argparse.Namespace) -> Iterator[Row]:
    """One prompt, no repetition; a prompt of 2K tokens goes before it."""
    device, tokens = model.device, arguments.ttft_tokens
    generator = torch.Generator(device).manual_seed(arguments.seed)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator, device=device)

    def run(make: Callable[[], Any]) -> Row:
        for length in (min(2048, tokens), tokens):
            cache = make()
            reset_peak(device)
            synchronize(device)
            start = time.perf_counter()
            model(ids[:, :length], logits_to_keep=1, **with_cache(model, cache)).logits.argmax()
            synchronize(device)
            seconds = time.perf_counter() - start
            cache.reset()
            del cache
            free_memory(device)
        row: Row = {"mode": "eager", "batch": 1, "ttft_tokens": tokens, "ttft_s": seconds}
        return row | device_memory(device)

    model.set_attn_implementation("sdpa")
    yield {"way": "TTFT, dense"} | run(lambda: DynamicCache(config=model.config))
    hf.enable(model)
    for store in arguments.stores:
        options = dict(arguments.cache, value_store=store)
        facts = {"way": "TTFT, shadow", "store": store}
        yield facts | run(lambda options=options: ShadowKVCache(model.config, **options))
    hf.disable(model)
