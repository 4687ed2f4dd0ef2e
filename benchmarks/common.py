"""Shared by the benchmarks: machine facts, timing, inputs, pair counts, tables and JSON records.

Counting: a (query, key) pair of one head costs ``4 * head_dim`` operations (scores and values, a
multiplication and an addition each). How pairs are counted is said at every counter below.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, Pattern, VerticalSlash
from sparseattn.patterns import options_of

RESULTS = Path(__file__).parent / "results"
TILE = 64  # rows of a query tile in the cover rule
RUN = 51  # offsets in one cluster
SINKS = 30


# --- machine ---------------------------------------------------------------------------------


def _output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout that holds this file, or "unknown"."""
    folder = str(Path(__file__).parent)
    return _output_of(["git", "-C", folder, "describe", "--always", "--dirty"]) or "unknown"


def machine(device: torch.device, commit_name: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge a number: hardware, versions, commit, date (UTC)."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparseattn": sparseattn.__version__,
        "commit": commit_name or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = "driver_version,clocks.max.sm"
        smi = _output_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        driver, max_clock = (*smi.splitlines()[:1], "unknown, unknown")[0].split(", ")
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "driver": driver,
            "sm_clock_max": max_clock,
            "torch_cuda": torch.version.cuda,
        }
    return facts


def machine_line(facts: dict[str, Any]) -> str:
    """The facts on one line, for the head of a table."""
    gpu = f"{facts['gpu']}, driver {facts['driver']}" if "gpu" in facts else facts["cpu"]
    return (
        f"{gpu}; torch {facts['torch']}; sparseattn {facts['sparseattn']} "
        f"({facts['commit']}); {facts['date']}"
    )


# --- timing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, smallest and largest of ``repeats``."""

    ms: float
    ms_min: float
    ms_max: float
    repeats: int


class Timer:
    """Times calls one by one: device events on CUDA, the wall clock on the CPU.

    On CUDA a buffer of twice the L2 cache is written before every timed call, so that no call finds
    its inputs there. That write also keeps the device busy while the host submits the call; what
    submitting takes beyond it counts, as it does for a caller.
    """

    def __init__(self, device: torch.device, *, flush_l2: bool = True) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda" and flush_l2:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(
        self,
        call: Callable[[], object],
        *,
        warm_up: int = 2,
        budget_ms: float = 1000.0,
        least: int = 3,
        most: int = 20,
    ) -> Timing:
        """``warm_up`` untimed calls, then ``least`` to ``most`` timed ones within ``budget_ms``."""
        for _ in range(max(1, warm_up)):
            guess = self._run(call, 1)[0]
        repeats = int(min(most, max(least, budget_ms / max(guess, 1e-3))))
        times = self._run(call, repeats)
        return Timing(statistics.median(times), min(times), max(times), repeats)

    def _run(self, call: Callable[[], object], repeats: int) -> list[float]:
        if self.device.type != "cuda":
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return times
        events = []
        for _ in range(repeats):
            if self._flush is not None:
                self._flush.fill_(1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def teraflops(pairs: float, head_dim: int, ms: float) -> float:
    """TFLOP/s of ``pairs`` (query, key) pairs, summed over heads, in ``ms`` milliseconds."""
    return 4 * head_dim * pairs / ms / 1e9


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every GPU benchmark has in common."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where there is no checkout")
    parser.add_argument("--output", type=Path, help="JSON file; default: one in results/")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes on the CPU; no file without --output"
    )


# --- inputs ----------------------------------------------------------------------------------


def random_qkv(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal bf16 ``q [1, heads, tokens, head_dim]`` and ``k, v [1, kv_heads, ...]``."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(count: int) -> Tensor:
        shape = (1, count, tokens, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def structured_qk(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """bf16 q and k whose attention mass lies on clustered offsets and a few columns.

    An estimate on normal noise picks offsets all over the prompt, and their cover is nearly dense:
    the worst case, unlike any real head. Here a score is the sum of three parts.

    * Offsets: three quarters of the dimensions rotate with the position, as RoPE does, with periods
      log-spaced from 256 to 8 M tokens. The part depends on ``p - k`` alone: 14 at most, largest
      near 0, falling about with log distance, with ripples whose tops make runs of offsets. Every
      query head weights and shifts the frequencies in its own way.
    * Columns: one dimension. Keys 0 to 3 add 8, and one key in 20 adds 5.5 (standard deviation
      0.5), the same for all rows.
    * Content: the other dimensions are normal noise, standard deviation about 0.5 in the score.

    At 128K tokens, D = 128, the estimates of (1000, 6096), (30, 800) and (3500, 100) then choose
    about 19, 2.7 and 1.6 % of the pairs; lists of ``clustered_indexes`` choose 16, 2.1 and 3.0 %.
    """
    host = torch.Generator().manual_seed(seed)
    device_generator = torch.Generator(device).manual_seed(seed)
    pairs = 3 * head_dim // 8
    root = math.sqrt(head_dim)  # undoes the softmax scale
    periods = torch.logspace(math.log2(256), 23, pairs, base=2, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64, device=device)[:, None]
    angle = angle * (2 * math.pi / periods).to(device)
    peak = 14.0
    amplitude = math.sqrt(peak * root / pairs)

    def build(count: int, phases: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty(1, count, tokens, head_dim, dtype=torch.bfloat16, device=device)
        for head in range(count):
            turned = angle - phases[head].to(device)
            weight = (amplitude * weights[head]).to(device)
            out[0, head, :, :pairs] = turned.cos() * weight
            out[0, head, :, pairs : 2 * pairs] = turned.sin() * weight
            out[0, head, :, 2 * pairs] = columns[head]
            rest = (tokens, head_dim - 2 * pairs - 1)
            out[0, head, :, 2 * pairs + 1 :] = torch.randn(
                rest, generator=device_generator, device=device
            )
        return out

    spread = torch.randn(heads, pairs, generator=host, dtype=torch.float64)
    weights = (0.5 * spread).exp()
    weights *= pairs / weights.sum(1, keepdim=True)
    phases = 0.3 * torch.randn(heads, pairs, generator=host, dtype=torch.float64)
    strength = 5.5 + 0.5 * torch.randn(kv_heads, tokens, generator=host)
    strength *= torch.rand(kv_heads, tokens, generator=host) < 0.05
    strength[:, :4] = 8.0
    strength = strength.to(device)
    flat = torch.zeros(kv_heads, pairs, dtype=torch.float64)
    q = build(heads, phases, weights, torch.full((heads, 1), root, device=device))
    return q, build(kv_heads, flat, torch.ones_like(flat), strength)


def clustered_indexes(
    tokens: int, num_columns: int, num_offsets: int, heads: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """int32 columns ``[1, heads, num_columns]``, offsets ``[1, heads, num_offsets]``, on the CPU.

    Offsets: the nearest 1000 (if more than 1000 are asked for, else half of them, at least 100),
    then runs of 51 from log-uniform distances until enough are drawn, as offsets of real heads
    cluster; uniform ones would cover nearly everything. Columns: 30 sinks, the rest uniform. One
    generator serves all heads in turn, the columns of a head before its offsets.
    """
    if not 0 <= num_columns <= tokens or not 0 <= num_offsets <= tokens - 2 * TILE:
        raise ValueError(
            f"num_columns, num_offsets: expected at most {tokens} and {tokens - 2 * TILE}, "
            f"got {num_columns} and {num_offsets}"
        )
    generator = torch.Generator().manual_seed(seed)
    local = 1000 if num_offsets > 1000 else max(100, num_offsets // 2)
    near, far = math.log(local), math.log(tokens - TILE)
    all_columns, all_offsets = [], []
    for _ in range(heads):
        columns = torch.arange(min(num_columns, SINKS))
        if num_columns > SINKS:
            drawn = torch.randperm(tokens - SINKS, generator=generator)[: num_columns - SINKS]
            columns = torch.cat([columns, (drawn + SINKS).sort().values])
        chosen = set(range(min(num_offsets, local)))
        while len(chosen) < num_offsets:
            start = int(math.exp(near + torch.rand(1, generator=generator).item() * (far - near)))
            chosen |= set(range(start, min(start + RUN, tokens)))
        all_columns.append(columns)
        all_offsets.append(torch.tensor(sorted(chosen)[:num_offsets], dtype=torch.int64))
    return torch.stack(all_columns)[None].int(), torch.stack(all_offsets)[None].int()


def random_block_mask(
    tokens: int,
    heads: int,
    block: int,
    device: torch.device,
    *,
    density: float = 1.0,
    per_row: int | None = None,
    seed: int = 0,
) -> Tensor:
    """bool ``[1, heads, n, n]``: in every row the diagonal block and uniform earlier ones.

    A row keeps ``per_row`` blocks or all it has, or with ``density`` that share of them (rounded,
    at least one).
    """
    n = tokens // block
    generator = torch.Generator(device).manual_seed(seed)
    row = torch.arange(n, device=device)
    if per_row is not None:
        kept = (row + 1).clamp(max=per_row)
    else:
        kept = (density * (row + 1)).round().long().clamp(min=1)
    causal = row[:, None] >= row
    mask = torch.empty(1, heads, n, n, dtype=torch.bool, device=device)
    for head in range(heads):
        scores = torch.rand(n, n, generator=generator, device=device).masked_fill(~causal, -1.0)
        scores.fill_diagonal_(2.0)
        threshold = scores.sort(-1, descending=True).values.gather(1, kept[:, None] - 1)
        mask[0, head] = (scores >= threshold) & causal
    return mask


# --- pair counts -----------------------------------------------------------------------------


def dense_pairs(tokens: int) -> float:
    """Pairs of one causal head, counted as half the square."""
    return tokens * tokens / 2


def block_pairs(mask: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Pairs of each head ``[heads]`` of a mask ``[1, heads, nq, nk]``: whole selected blocks."""
    return mask[0].sum((1, 2)) * (block_q * block_kv)


def a_shape_pairs(tokens: int, sink: int, window: int) -> int:
    """Visible pairs of one head."""
    position = torch.arange(tokens)
    recent = (position + 1).clamp(max=window)
    return int((recent + (position + 1 - window).clamp(0, sink)).sum())


def vertical_slash_pairs(columns: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    """Pairs of each head ``[heads]`` for lists ``[1, heads, n]``, ``q_len == kv_len == tokens``.

    In each tile of 64 rows every maximal run of covered keys counts as whole 64-wide tiles, and
    every column at or before the tile's last row that the cover does not hold counts once.
    """
    device = offsets.device
    ends = torch.arange(TILE, tokens + TILE, TILE, device=device)[:, None]
    counts = []
    for head_columns, head_offsets in zip(columns[0].long(), offsets[0].long(), strict=True):
        # A key is at distance e - 1 - k from the end e of a tile; offset o covers o .. o + 63.
        chosen = head_offsets[(head_offsets >= 0) & (head_offsets < tokens)]
        steps = torch.zeros(tokens + TILE + 1, dtype=torch.int64, device=device)
        steps.index_add_(0, chosen, torch.ones_like(chosen))
        steps.index_add_(0, chosen + TILE, -torch.ones_like(chosen))
        cover = steps.cumsum(0) > 0  # the last entry is never covered
        change = cover.int().diff(prepend=cover.new_zeros(1).int())
        starts, stops = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
        widths = (torch.minimum(stops, ends) - starts).clamp(min=0)
        keys = (widths + TILE - 1).div(TILE, rounding_mode="floor").sum() * TILE
        listed = head_columns[(head_columns >= 0) & (head_columns < tokens)].unique()
        distance = ends - 1 - listed
        alone = (distance >= 0) & ~cover[distance.clamp(min=0)]
        counts.append(TILE * (keys + alone.sum()))
    return torch.stack(counts)


def pattern_pairs(q: Tensor, k: Tensor, patterns: Iterable[Pattern]) -> dict[Pattern, Tensor]:
    """Pairs of each head ``[heads]``, for every pattern, as ``sparse_attention`` would choose."""
    heads, tokens = q.shape[1:3]
    counts = {}
    for pattern in set(patterns):
        if isinstance(pattern, VerticalSlash):
            lists = sparseattn.estimate_vertical_slash(
                q, k, num_columns=pattern.columns, num_offsets=pattern.offsets, share=pattern.share
            )
            counted = vertical_slash_pairs(*lists, tokens).cpu()
        elif isinstance(pattern, BlockSparse):
            how = options_of(pattern)
            mask = sparseattn.estimate_block_sparse(q, k, top_k=pattern.top_k, **how)
            counted = block_pairs(mask, 64, 64).cpu()
        elif isinstance(pattern, AShape):
            counted = torch.full((heads,), a_shape_pairs(tokens, pattern.sink, pattern.window))
        else:
            assert isinstance(pattern, Dense)
            counted = torch.full((heads,), dense_pairs(tokens))
        counts[pattern] = counted.double()
    return counts


# --- output ----------------------------------------------------------------------------------


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    """A text table; ``columns``: (key, title, format). Missing and None print as "-"."""

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, form)

    texts = [[title for _, title, _ in columns]]
    texts += [[cell(row, key, form) for key, _, form in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    left = [
        all(not isinstance(row.get(key), (int, float)) for row in rows) for key, _, _ in columns
    ]
    lines = []
    for line in texts:
        cells = zip(line, widths, left, strict=True)
        lines.append("  ".join(t.ljust(w) if at_left else t.rjust(w) for t, w, at_left in cells))
    return "\n".join(line.rstrip() for line in lines)


def write_result(
    benchmark: str,
    facts: dict[str, Any],
    arguments: dict[str, Any],
    results: Any,
    path: Path | None = None,
    **more: Any,
) -> Path:
    """Writes the JSON record; without ``path`` to ``results/DATE-DEVICE-BENCHMARK.json``."""
    if path is None:
        device = re.sub(r"[^a-z0-9]+", "-", facts.get("gpu", facts["cpu"]).lower()).strip("-")
        path = RESULTS / f"{facts['date'][:10]}-{device}-{benchmark}.json"
    kept = {name: x for name, x in arguments.items() if name not in ("output", "json", "commit")}
    record = {"benchmark": benchmark, "machine": facts, "arguments": kept, **more}
    record["results"] = results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def timing_row(timing: Timing) -> dict[str, float]:
    """The fields of a timing for a result row, to a tenth of a microsecond."""
    return {name: round(value, 4) for name, value in asdict(timing).items()}
