"""Shared by the benchmarks: machine facts, timing, tables and JSON records.

Counting: a (query, key) pair of one head costs ``4 * head_dim`` operations (scores and values, a
multiplication and an addition each). ``bench_inputs`` counts the pairs.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparseattn import _C
from sparseattn.config import write_atomic
from sparseattn.info import cpu_name


def _output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def checkout_commit(folder: Path) -> str:
    """The commit of the checkout that holds ``folder``, or "unknown"."""
    return _output_of(["git", "-C", str(folder), "describe", "--always", "--dirty"]) or "unknown"


def machine(device: torch.device, commit: str = "unknown") -> dict[str, Any]:
    """What a reader needs to judge a number: hardware, versions, commit, date (UTC)."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparseattn": _C.build_info()["version"],
        "commit": commit,
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


def available_memory() -> float:
    """Bytes of host memory to be had; inf where the system does not say."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


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
        before: Callable[[], object] | None = None,
    ) -> Timing:
        """``warm_up`` untimed calls, then ``least`` to ``most`` timed ones within ``budget_ms``;
        exactly ``least`` where ``warm_up`` is 0. ``before`` runs before every call, untimed."""
        repeats = least
        for _ in range(warm_up):
            guess = self._run(call, 1, before)[0]
            repeats = int(min(most, max(least, budget_ms / max(guess, 1e-3))))
        times = self._run(call, repeats, before)
        return Timing(statistics.median(times), min(times), max(times), repeats)

    def in_turn(
        self,
        calls: Sequence[Callable[[], object]],
        *,
        budget_ms: float = 1000.0,
        least: int = 3,
        most: int = 20,
    ) -> list[Timing]:
        """Of calls that take turns, one after the other, ``least`` to ``most`` rounds within
        ``budget_ms`` for each: what a warmer card does to its clocks, it does to all of them."""
        guess = max(self(call, warm_up=1, least=1, most=1).ms for call in calls)
        rounds = int(min(most, max(least, budget_ms / max(guess, 1e-3))))
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, own in zip(calls, times, strict=True):
                own += self._run(call, 1, None)
        return [Timing(statistics.median(own), min(own), max(own), rounds) for own in times]

    def _run(
        self, call: Callable[[], object], repeats: int, before: Callable[[], object] | None
    ) -> list[float]:
        if self.device.type != "cuda":
            times = []
            for _ in range(repeats):
                if before is not None:
                    before()
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return times
        events = []
        for _ in range(repeats):
            if before is not None:
                before()
            if self._flush is not None:
                self._flush.fill_(1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


#: device type -> name -> backend of torch's dense attention; None: torch's own choice.
SDPA_BACKENDS: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"SDPA": None},
    "cuda": {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    },
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    """Dense causal attention by one of SDPA_BACKENDS; RuntimeError where it refuses the call."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def teraflops(pairs: float, head_dim: int, ms: float) -> float:
    """TFLOP/s of ``pairs`` (query, key) pairs, summed over heads, in ``ms`` milliseconds."""
    return 4 * head_dim * pairs / ms / 1e9


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    """A text table; ``columns``: (key, title, format). Missing and None print as "-", text in a
    column of numbers as it is."""

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, "" if isinstance(value, str) else form)

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


def timing_row(timing: Timing) -> dict[str, float]:
    """The fields of a timing for a result row, to a tenth of a microsecond."""
    return {name: round(value, 4) for name, value in asdict(timing).items()}


def write_record(path: Path, benchmark: str, facts: dict[str, Any], /, **fields: Any) -> None:
    """Writes a JSON record: benchmark, machine, then ``fields`` in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": benchmark, "machine": facts, **fields}
    write_atomic(path, json.dumps(record, indent=2) + "\n")
