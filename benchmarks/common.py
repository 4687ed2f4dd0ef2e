"""Shared by the benchmarks: records, given indexes, and what the package's own benchmarks share.

Timing, inputs, pair counts and tables are those of ``sparseattn bench``: ``sparseattn.bench_tools``
and ``sparseattn.bench_inputs``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseattn import bench_tools
from sparseattn.bench_inputs import (
    TILE,
    a_shape_pairs,
    block_pairs,
    dense_pairs,
    pattern_pairs,
    random_qkv,
    structured_qk,
    vertical_slash_pairs,
)
from sparseattn.bench_tools import Timer, format_table, machine_line, teraflops, timing_row

__all__ = [
    "RESULTS",
    "RUN",
    "SINKS",
    "TILE",
    "GrowingRecord",
    "Timer",
    "a_shape_pairs",
    "add_record_arguments",
    "block_pairs",
    "clustered_indexes",
    "dense_pairs",
    "format_table",
    "machine",
    "machine_line",
    "pattern_pairs",
    "random_block_mask",
    "random_qkv",
    "structured_qk",
    "teraflops",
    "timing_row",
    "vertical_slash_pairs",
    "write_result",
]

RESULTS = Path(__file__).parent / "results"
RUN = 51  # offsets in one cluster
SINKS = 30


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """bench_tools.machine with the commit given, or that of the checkout that holds this file."""
    return bench_tools.machine(device, commit or bench_tools.checkout_commit(Path(__file__).parent))


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every GPU benchmark has in common."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where there is no checkout")
    parser.add_argument("--output", type=Path, help="JSON file; default: one in results/")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes on the CPU; no file without --output"
    )


def require_device(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with the parser's error where there is no GPU and no smoke run."""
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none (--smoke runs on the CPU)")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The CPU for a smoke run, else the first GPU."""
    return torch.device("cpu") if arguments.smoke else torch.device("cuda", 0)


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
    bench_tools.write_record(path, benchmark, facts, arguments=kept, **more, results=results)
    return path


class GrowingRecord:
    """A record that is written anew after every row, so that a run cut short leaves what it has.

    ``complete`` in it is false until :meth:`finish`. ``judge`` gives what the record says of its
    rows beside them.
    """

    def __init__(
        self,
        benchmark: str,
        facts: dict[str, Any],
        arguments: argparse.Namespace,
        judge: Callable[[list[dict[str, Any]]], dict[str, Any]],
        *,
        partial: bool,
        **more: Any,
    ):
        """``partial``: not all of the benchmark runs; then a file is written only to ``--output``,
        as with ``--smoke``."""
        self.benchmark, self.facts, self.arguments = benchmark, facts, arguments
        self.judge, self.more = judge, more
        self.written = bool(arguments.output) or not (arguments.smoke or partial)
        self.path: Path | None = arguments.output

    def save(self, rows: list[dict[str, Any]], complete: bool = False) -> None:
        if self.written:
            self.path = write_result(
                self.benchmark,
                self.facts,
                vars(self.arguments),
                rows,
                self.path,
                complete=complete,
                **self.judge(rows),
                **self.more,
            )

    def finish(self, rows: list[dict[str, Any]]) -> None:
        self.save(rows, complete=True)

    def say_where(self) -> None:
        if self.written:
            print(f"wrote {self.path}")
