"""Generation with whole models of random weights: dense attention against ShadowKVCache (T10).

bf16, the configs of Llama-3.1-8B and GLM-4-9B-1M, built on the device; nothing is downloaded. Every
cache is filled with random keys and values of `--tokens` tokens instead of by a prefill, compressed
layer by layer as after one; all sequences of a batch are copies of one. Tokens fed are random, the
same for all ways, and the next token is computed (argmax) in every step.

dense   a cache of fixed size, SDPA over all of it without a mask, by the backend that is fastest
        on these shapes; eager and as one CUDA graph a step
shadow  ShadowKVCache in a model enabled by `sparseattn.hf.enable`, eager; and the same operators
        on the same layers at fixed addresses, one CUDA graph a step ("graph"). There, making
        chunks of the tail is timed on its own and charged once to the `--steps` steps

Both at the batches asked for and at the largest that fits. Random weights select at random, so
`--hits` replaces the selected chunks (after `shadow_select` has run) by lists of which successive
ones share that many; `--hits own` leaves them. Values in pinned host memory take 8 GiB a sequence
of 122K tokens (Llama): `--host-values shared` lets all layers use one layer's memory, so that a
batch can run for which the host is too small. PCIe traffic is then what it would be; the record
says how much memory a real run needs.

TTFT (`--ttft`): one prompt of random tokens through the model, SDPA and ShadowKVCache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bars
import common
import decode_caches as caches
import torch
from bars import Bar
from decode_caches import Clock
from decode_inputs import DTYPE, free_memory
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, GlmConfig, LlamaConfig
from transformers.cache_utils import Cache

from sparseattn import hf
from sparseattn.bench_tools import available_memory

BENCHMARK = "decode-model"
T10 = 3.04
BATCHES = (1, 4, 8, 16, 24, 32, 48)
SPARE = 3 * 2**30  # bytes of device memory left for activations and graphs
WARM_UP = 3

Row = dict[str, Any]

CONFIGS: dict[str, Callable[..., Any]] = {"Llama-3.1-8B": LlamaConfig, "GLM-4-9B-1M": GlmConfig}
SIZES: dict[str, Row] = {
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "GLM-4-9B-1M": {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "attention_bias": True,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e8,
            "partial_rotary_factor": 0.5,
        },
    },
}
SMOKE: Row = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SMOKE_CACHE: Row = {"rank": 32, "sparse_budget": 64, "outlier_chunks": 3}


def build_model(name: str, arguments: argparse.Namespace, device: torch.device) -> Any:
    sizes = SIZES[name] | (SMOKE if arguments.smoke else {})
    if arguments.layers:
        sizes["num_hidden_layers"] = arguments.layers
    config = CONFIGS[name](max_position_embeddings=max(131072, 2 * arguments.tokens), **sizes)
    torch.manual_seed(arguments.seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


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
        given = {"position_ids": self.clock.positions} if self.positions else {}
        out = self.model(self.clock.ids, past_key_values=self.cache, logits_to_keep=1, **given)
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
    while stores is not None and largest > 1 and not stores.fits(largest):
        largest -= 1
    try:
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
        if hasattr(model, "_sparseattn_previous"):
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
    from sparseattn.shadow_cache import ShadowKVCache

    device, tokens = model.device, arguments.ttft_tokens
    generator = torch.Generator(device).manual_seed(arguments.seed)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator, device=device)

    def run(make: Callable[[], Any]) -> Row:
        for length in (min(2048, tokens), tokens):
            cache = make()
            reset_peak(device)
            synchronize(device)
            start = time.perf_counter()
            model(ids[:, :length], past_key_values=cache, logits_to_keep=1).logits.argmax()
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


# --- all of it -------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    arguments: argparse.Namespace, device: torch.device, save: Callable[[list[Row]], None]
) -> list[Row]:
    rows: list[Row] = []
    total = len(arguments.models) * (1 + len(arguments.stores) + arguments.ttft)
    with tqdm(total=total, unit="part", disable=None) as bar:
        for name in arguments.models:
            bar.set_description(name)
            model = build_model(name, arguments, device)
            parts = [ttft_rows(model, arguments)] if arguments.ttft else []
            parts.append(dense_rows(model, arguments))
            parts += [shadow_rows(model, arguments, store) for store in arguments.stores]
            for part in parts:
                try:
                    for row in part:
                        rows.append({"model": name, "tokens": arguments.tokens} | row)
                        save(rows)
                except torch.OutOfMemoryError:
                    rows.append({"model": name, "batch": 0, "note": "out of memory"})
                part.close()
                free_memory(device)
                bar.update()
            del model, parts, part
            free_memory(device)
    return rows


def judge(rows: list[Row]) -> list[Row]:
    """Throughput of ShadowKV at its best batch over that of dense decode at its largest; T10's
    bar on Llama's shapes at 122K."""
    judged = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name and "tokens_per_s" in row]
        dense = [row for row in own if row["way"] == "dense" and row["largest"]]
        if not dense:
            continue
        base = max(dense, key=lambda row: row["tokens_per_s"])
        for store, mode in dict.fromkeys(
            (row["store"], row["mode"]) for row in own if row["way"] == "shadow"
        ):
            best = max(
                (row for row in own if row.get("store") == store and row["mode"] == mode),
                key=lambda row: row["tokens_per_s"],
            )
            row = {
                "target": "T10",
                "tokens": best["tokens"],
                "case": f"{name}, values on the {store}, {mode}, batch {best['batch']}, against "
                f"dense {base['mode']}, batch {base['batch']}",
                "times_faster_than_dense": best["tokens_per_s"] / base["tokens_per_s"],
            }
            if name == "Llama-3.1-8B" and best["tokens"] == 124928:
                row |= Bar("times_faster_than_dense", T10, "x dense").fields(row)
            judged.append(row)
    return judged


COLUMNS = (
    ("model", "model", ""),
    ("way", "way", ""),
    ("store", "store", ""),
    ("mode", "mode", ""),
    ("batch", "batch", "d"),
    ("ms_per_step", "ms/step", ".3f"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("hit_rate", "hits", ".3f"),
    ("pcie_mb", "PCIe MB/step", ".1f"),
    ("flush_ms", "flush ms", ".1f"),
    ("ttft_s", "TTFT s", ".2f"),
    ("device_gib", "device GiB", ".1f"),
    ("host_gib", "host GiB", ".1f"),
    ("needed_gib", "needed", ".1f"),
    ("note", "note", ""),
)


def render(rows: list[Row]) -> str:
    scaled = (
        ("pcie_mb", "pcie_bytes_per_step", 1e6),
        ("device_gib", "device_bytes", 2**30),
        ("host_gib", "host_bytes", 2**30),
        ("needed_gib", "host_bytes_needed", 2**30),
    )
    shown = [
        row | {key: row[source] / unit for key, source, unit in scaled if source in row}
        for row in rows
    ]
    return common.format_table(shown, COLUMNS)


def share(text: str) -> float | None:
    if text == "own":
        return None
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, help="in the cache (default: 124928)")
    parser.add_argument("--batches", type=int, nargs="+", help=f"default: {BATCHES}")
    parser.add_argument("--most", type=int, default=48, help="the largest batch that is tried")
    parser.add_argument("--steps", type=int, default=64, help="timed (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a try")
    parser.add_argument("--hits", type=share, default=0.35, help="a share, or own")
    stores = ["device", "host"]
    parser.add_argument("--stores", nargs="*", choices=stores, default=stores)
    parser.add_argument("--host-values", choices=("own", "shared"), default="own")
    parser.add_argument(
        "--host-gib",
        type=float,
        default=0.75 * available_memory() / 2**30,
        help="host memory that the values may take (default: three quarters of what is free)",
    )
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--budget", type=int, default=2048, help="tokens selected in a step")
    parser.add_argument("--ttft", action="store_true", help="measure the time to the first token")
    parser.add_argument("--ttft-tokens", type=int, help="of the prompt (default: --tokens)")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.tokens = arguments.tokens or (1024 if arguments.smoke else 124928)
    arguments.ttft_tokens = arguments.ttft_tokens or arguments.tokens
    for name in ("tokens", "steps", "most", "ttft_tokens"):
        value = getattr(arguments, name)
        if value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    arguments.cache = {"rank": arguments.rank, "sparse_budget": arguments.budget}
    if arguments.smoke:
        arguments.cache = SMOKE_CACHE
        arguments.steps, arguments.most = min(arguments.steps, 64), min(arguments.most, 2)
    elif not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none (--smoke runs on the CPU)")
    arguments.batches = arguments.batches or list(BATCHES)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = torch.device("cpu" if arguments.smoke else "cuda", None if arguments.smoke else 0)
    facts = common.machine(device, arguments.commit)
    path: Path | None = None
    complete = False

    def save(rows: list[Row]) -> None:
        nonlocal path
        if arguments.output or not (arguments.smoke or arguments.layers):
            judged = judge(rows)
            path = common.write_result(
                BENCHMARK,
                facts,
                vars(arguments),
                rows,
                arguments.output,
                dtype="bfloat16",
                weights="random",
                cache_filled_with="random keys and values, compressed layer by layer; the "
                "sequences of a batch are copies of one",
                complete=complete,
                summary=bars.summary(judged),
                judged=judged,
            )

    rows = measure(arguments, device, save)
    complete = True
    save(rows)
    print(common.machine_line(facts))
    print(f"random weights, bf16, {arguments.tokens} tokens in the cache")
    print(render(rows))
    for row in judge(rows):
        met = f": {row['bar']}, {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
        print(f"{row['case']}: {row['times_faster_than_dense']:.2f} x{met}")
    if path is not None:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
