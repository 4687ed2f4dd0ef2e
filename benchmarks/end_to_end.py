"""A whole model, from the prompt to 64 generated tokens: sparse prefill, ShadowKV decode (T13).

bf16, random weights in the shapes of Llama-3-8B-1M and GLM-4-9B-1M, built on the device; nothing is
downloaded. Heads are shaped by biases so that estimates select as trained heads' do
(`long_models.py`); every record has the density that was counted, by pattern. The prompt is random
tokens; it is read by `sparseattn.hf.prefill`.

sparse       the patterns of the shipped preset, the measured `min_length`, into a ShadowKVCache
dense, own   all heads dense in this library's kernel
dense, SDPA  torch's attention, cuDNN's backend

Dense prefills keep keys and values in a DynamicCache where that fits, else nothing. They are
skipped where they would take longer than `--dense-limit-s`, by the length before (attention by the
square, the rest in proportion), and their row says what was expected. TTFT: the prompt's logits and
the filled cache, in seconds; `attention_s` and `cache_s` (compression, values to the host) are
parts of it. Pairs are counted in a few layers, with the clock stopped.

After each sparse prefill tokens are generated, one sequence, eager and as one CUDA graph a step,
with values in pinned host memory and what the model itself selects. Pinned memory is taken before,
once for all lengths, and timed apart (`pin_s`), where the package allocates its own; else by the
first prefill of a length, within its time.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bars
import common
import decode_model
import end_to_end_runs as runs
import long_models
import torch
from bars import T13, Bar
from decode_inputs import free_memory
from tqdm import tqdm
from transformers import DynamicCache

from sparseattn import hf
from sparseattn.bench_tools import SDPA_BACKENDS, sdpa_kernel
from sparseattn.shadow_cache import ShadowKVCache

BENCHMARK = "end-to-end"
LENGTHS = (32768, 131072, 524288, 1048576)
WAYS = ("sparse", "dense, own", "dense, SDPA")
SPARE = 6 * 2**30  # bytes that a dense prefill needs beside weights, activations and cache

Row = dict[str, Any]


class Models:
    """Runs all ways at all lengths with one model."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.name, self.arguments, self.device = name, arguments, device
        self.model, self.patterns = long_models.build(
            name,
            device,
            max(arguments.lengths),
            layers=arguments.layers,
            smoke=arguments.smoke,
            seed=arguments.seed,
        )
        last = len(self.patterns) - 1
        count = min(arguments.density_layers, last + 1)
        self.counted = {round(i * last / max(1, count - 1)) for i in range(count)}
        self.last_dense: dict[str, Row] = {}

    def cache(self) -> ShadowKVCache:
        return ShadowKVCache(self.model.config, value_store="host", **self.arguments.cache)

    def reserve(self, pool: runs.HostPool) -> Row | None:
        """Pinned memory for the longest prompt; None where the caches take their own."""
        if pool.module is None or "sparse" not in self.arguments.ways:
            return None
        config = self.model.config
        nbytes = pool.bytes_of(self.cache(), config, max(self.arguments.lengths))
        seconds = pool.reserve(config.num_hidden_layers, nbytes)
        return {"way": "pinned memory", "pin_s": seconds, "host_bytes": pool.nbytes}

    def warm_up(self) -> None:
        tokens = min(self.arguments.warm_up_tokens, min(self.arguments.lengths))
        for way in self.arguments.ways:
            with self.using(way):
                ids = runs.prompt(self.model, tokens, 1)
                hf.prefill(self.model, ids, self.cache() if way == "sparse" else None)
        free_memory(self.device)

    @contextlib.contextmanager
    def using(self, way: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if way == "sparse":
                hf.enable(self.model, self.patterns, min_length=self.arguments.min_length)
            elif way == "dense, own":
                runs.use_own_dense(self.model)
            else:
                hf.enable(self.model)
                if self.device.type == "cuda":
                    backend = SDPA_BACKENDS["cuda"][f"SDPA {self.arguments.sdpa}"]
                    stack.enter_context(sdpa_kernel(backend))
            try:
                yield
            finally:
                hf.disable(self.model)

    def rows(self, way: str, tokens: int) -> Iterator[Row]:
        facts: Row = {"way": way, "tokens": tokens}
        with self.using(way):
            if way == "sparse":
                yield from (facts | row for row in self.sparse_rows(tokens))
                return
            expected = runs.expected_seconds(self.model, tokens, self.last_dense.get(way))
            facts["expected_ttft_s"] = expected
            if expected > self.arguments.dense_limit_s:
                yield facts | {"skipped": True, "note": f"skipped, about {expected:.0f} s"}
                return
            cache = self.dense_cache(tokens)
            facts["cache"] = "none" if cache is None else "DynamicCache"
            ids = runs.prompt(self.model, tokens, self.arguments.seed)
            watch = runs.Watch(self.device, ())
            row = facts | runs.prefill(self.model, ids, cache, watch, self.arguments.slice_tokens)
            self.last_dense[way] = row
            yield row

    def dense_cache(self, tokens: int) -> Any:
        config = self.model.config
        kv = 2 * config.num_key_value_heads * config.head_dim
        row = kv * (config.num_hidden_layers + 2)  # the cache; a layer's own, and their copy
        row += 3 * config.hidden_size  # hidden states, queries, output
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            if 2 * row * tokens + SPARE > free:
                return None
        return DynamicCache(config=config)

    def sparse_rows(self, tokens: int) -> Iterator[Row]:
        model, cache = self.model, self.cache()
        ids = runs.prompt(model, tokens, self.arguments.seed)
        watch = runs.Watch(self.device, self.counted)
        row = runs.prefill(model, ids, cache, watch, self.arguments.slice_tokens)
        row["cache"] = "ShadowKVCache"
        row["cache_bytes"] = cache.memory()
        if watch.densities:
            row["density"] = runs.mean_density(self.patterns, watch.densities)
            row["density_by_pattern"] = {
                name: sum(found) / len(found) for name, found in watch.densities.items()
            }
            row["density_counted_in_layers"] = sorted(self.counted)
        yield row
        try:
            if cache.layers[0].state is None:
                yield {"phase": "decode", "note": "not compressed: the prompt is too short"}
                return
            for step in runs.decode_rows(model, cache, self.arguments):
                yield {"phase": "decode"} | step
        finally:
            runs.synchronize(self.device)
            cache.reset()


def measure(
    arguments: argparse.Namespace, device: torch.device, save: Callable[[list[Row]], None]
) -> list[Row]:
    rows: list[Row] = []
    pool = runs.HostPool(device)
    total = len(arguments.models) * len(arguments.lengths) * len(arguments.ways)

    def add(name: str, row: Row) -> None:
        rows.append({"model": name} | row)
        save(rows)
        tqdm.write(line(rows[-1]))

    with tqdm(total=total, unit="run", disable=None) as bar, torch.no_grad(), pool.lending():
        for name in arguments.models:
            bar.set_description(name)
            models = Models(name, arguments, device)
            pinned = models.reserve(pool)
            if pinned:
                add(name, pinned)
            models.warm_up()
            for tokens in arguments.lengths:
                for way in arguments.ways:
                    facts: Row = {"way": way, "tokens": tokens}
                    part = models.rows(way, tokens)
                    try:
                        for row in part:
                            add(name, row)
                    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                        text = (str(error).splitlines() or ["out of memory"])[0][:100]
                        add(name, facts | {"note": f"{type(error).__name__}: {text}"})
                    part.close()
                    free_memory(device)
                    bar.update()
            del models, part
            free_memory(device)
        pool.free()
    return rows


def judge(rows: list[Row]) -> list[Row]:
    """Every sparse prefill beside the fastest dense one, measured or expected; T13's bars."""
    judged = []
    for row in rows:
        if row["way"] != "sparse" or "ttft_s" not in row:
            continue
        tokens, name = row["tokens"], row["model"]
        same = [x for x in rows if x["model"] == name and x.get("tokens") == tokens]
        dense = [x for x in same if x["way"].startswith("dense")]
        times = [(x["ttft_s"], x["way"]) for x in dense if "ttft_s" in x]
        kind = "measured" if times else "expected"
        times = times or [(x["expected_ttft_s"], x["way"]) for x in dense if x.get("skipped")]
        found = {
            "target": "T13",
            "tokens": tokens,
            "case": f"{name}, sparse prefill",
            "ttft_s": row["ttft_s"],
        }
        if times:
            best, way = min(times)
            found |= {
                "times_faster_than_dense": best / row["ttft_s"],
                "dense": f"{way}, {kind}: {best:.4g} s",
            }
        if name == "Llama-3-8B-1M" and tokens in T13:
            found |= Bar("ttft_s", T13[tokens], "s", at_least=False).fields(found)
        judged.append(found)
    return judged


COLUMNS = (
    ("model", "model", ""),
    ("tokens", "tokens", "d"),
    ("way", "way", ""),
    ("mode", "mode", ""),
    ("ttft_s", "TTFT s", ".2f"),
    ("attention_s", "attention", ".2f"),
    ("cache_s", "cache", ".2f"),
    ("other_s", "other", ".2f"),
    ("density_percent", "density %", ".2f"),
    ("ms_per_token", "ms/token", ".2f"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("hit_rate", "hits", ".3f"),
    ("pcie_mb", "PCIe MB/token", ".1f"),
    ("device_gib", "peak GiB", ".1f"),
    ("host_gib", "host GiB", ".1f"),
    ("pin_s", "pin s", ".1f"),
    ("note", "note", ""),
)


def line(row: Row) -> str:
    """A row while the others run: what the table would have of it."""
    titles, values = (re.split(r"  +", text) for text in render([row]).splitlines())
    pairs = zip(titles, values, strict=True)
    return ", ".join(f"{title} {value}" for title, value in pairs if value != "-")


def render(rows: list[Row]) -> str:
    shown = []
    for row in rows:
        more = {"host_bytes": row.get("cache_bytes", {}).get("host_values")}
        scaled = more | row | {"density": row.get("density")}
        units = (
            ("density_percent", "density", 0.01),
            ("pcie_mb", "pcie_bytes_per_token", 1e6),
            ("device_gib", "device_bytes", 2**30),
            ("host_gib", "host_bytes", 2**30),
        )
        shown.append(
            row | {key: scaled[x] / unit for key, x, unit in units if scaled.get(x) is not None}
        )
    return common.format_table(shown, COLUMNS)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = list(long_models.MODELS)
    parser.add_argument("--models", nargs="+", choices=every, default=every)
    parser.add_argument("--lengths", type=int, nargs="+", help=f"default: {LENGTHS}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dense-limit-s", type=float, default=30.0, help="(default: %(default)s)")
    parser.add_argument("--sdpa", choices=("cuDNN", "flash"), default="cuDNN")
    parser.add_argument("--steps", type=int, default=64, help="generated, as CUDA graphs")
    parser.add_argument("--eager-steps", type=int, default=16, help="generated before, eager")
    parser.add_argument("--slice-tokens", type=int, default=32768, help="of hf.prefill")
    parser.add_argument("--min-length", type=int, help="default: the measured one of each layer")
    parser.add_argument("--density-layers", type=int, default=3, help="in which pairs are counted")
    parser.add_argument("--warm-up-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a try")
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--budget", type=int, default=2048, help="tokens selected in a step")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.lengths = arguments.lengths or ([1024, 2048] if arguments.smoke else list(LENGTHS))
    for name in ("steps", "eager_steps", "slice_tokens", "warm_up_tokens", *["lengths"]):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    arguments.cache = {"rank": arguments.rank, "sparse_budget": arguments.budget}
    if arguments.smoke:
        arguments.cache = decode_model.SMOKE_CACHE
        arguments.steps = min(arguments.steps, 4)
        arguments.eager_steps = min(arguments.eager_steps, 2)
        if arguments.min_length is None:
            arguments.min_length = 0
    common.require_device(parser, arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = common.device_of(arguments)
    facts = common.machine(device, arguments.commit)
    record = common.GrowingRecord(
        BENCHMARK,
        facts,
        arguments,
        lambda rows: {"summary": bars.summary(judge(rows)), "judged": judge(rows)},
        partial=bool(arguments.layers),
        dtype="bfloat16",
        weights=long_models.WEIGHTS,
        prompt="random tokens",
        patterns={name: long_models.MODELS[name].preset for name in arguments.models},
        bars_for=f"T13 is for one {bars.PEERS_CARD}",
    )
    rows = measure(arguments, device, record.save)
    record.finish(rows)
    print(common.machine_line(facts))
    print(f"bf16; weights: {long_models.WEIGHTS}")
    print(render(rows))
    for row in judge(rows):
        met = f"; {row['bar']}, {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
        ratio = row.get("times_faster_than_dense")
        beside = f", {ratio:.2f} x faster than {row['dense']}" if ratio else ""
        print(f"{row['case']}, {row['tokens']} tokens: {row['ttft_s']:.2f} s{beside}{met}")
    record.say_where()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
