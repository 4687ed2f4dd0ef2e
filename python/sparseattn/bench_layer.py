"""Measures one layer for ``sparseattn bench prefill``: dense alternatives and mixes, by length."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseattn import bench_inputs, bench_tools, ops
from sparseattn.bench_mixes import Mix
from sparseattn.bench_tools import SDPA_BACKENDS, Timer, sdpa
from sparseattn.info import path as path_of
from sparseattn.patterns import Dense

DENSE_LIST = "dense list"
_MEMORY_MARGIN = 1.25  # of what q, k, v and out take, for what building and counting them takes
_ONCE_MS = 2000  # a dense call that takes longer is timed once, without a warm-up

_OutOfMemory = torch.OutOfMemoryError


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long it may take."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    mixes: tuple[Mix, ...]
    budget_ms: float
    dense_limit_s: float
    seed: int

    @property
    def dense_names(self) -> tuple[str, ...]:
        """The dense alternatives on this device."""
        return (DENSE_LIST, *SDPA_BACKENDS[self.device.type])

    def facts(self) -> dict[str, Any]:
        return {
            "path": path_of(self.device, self.dtype, self.head_dim),
            "dtype": str(self.dtype).removeprefix("torch."),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "data": "structured",
            "seed": self.seed,
            "budget_ms": self.budget_ms,
            "dense_limit_s": self.dense_limit_s,
        }


def lack_of_memory(setting: Setting, tokens: int) -> str | None:
    """Why the inputs and the output of a length do not fit, or None."""
    rows = 2 * (setting.heads + setting.kv_heads) * tokens
    needed = _MEMORY_MARGIN * rows * setting.head_dim * setting.dtype.itemsize
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(setting.device)[0]
    else:
        free = bench_tools.available_memory()
    if needed <= free:
        return None
    return f"q, k, v and the output take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def extra_memory(device: torch.device, call: Callable[[], Tensor]) -> int | None:
    """Runs a call once: bytes it takes at its peak beside its output. None on the CPU, where nobody
    counts."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - out.nbytes


class DenseTimes:
    """Times of the dense alternatives; the last length's says what the next will take."""

    def __init__(self, setting: Setting, timer: Timer) -> None:
        self.setting, self.timer = setting, timer
        self._last: dict[str, tuple[int, float]] = {}

    def calls(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
        patterns = [Dense()] * self.setting.heads
        return {
            DENSE_LIST: partial(ops.sparse_attention, q, k, v, patterns),
            **{
                name: partial(sdpa, q, k, v, backend)
                for name, backend in SDPA_BACKENDS[q.device.type].items()
            },
        }

    def measure(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """{"ms", ...} of one alternative, or {"note"} with the reason why there is none."""
        tokens, call = q.shape[2], self.calls(q, k, v)[name]
        try:
            guess = self._guess(name, q, k, v)
            if guess > 1e3 * self.setting.dense_limit_s:
                return {"note": f"skipped: about {guess / 1e3:.0f} s"}
            if guess > _ONCE_MS:
                extras: list[int | None] = []
                timing = self.timer(
                    lambda: extras.append(extra_memory(self.setting.device, call)),
                    warm_up=0,
                    least=1,
                )
                extra = extras[0]
            else:
                extra = extra_memory(self.setting.device, call)
                timing = self.timer(call, budget_ms=self.setting.budget_ms)
        except _OutOfMemory:
            return {"note": "out of memory"}
        except RuntimeError as error:
            if name == DENSE_LIST:
                raise
            return {"note": f"refused: {str(error).splitlines()[0][:100]}"}
        self._last[name] = tokens, timing.ms
        return {**bench_tools.timing_row(timing), "extra_bytes": extra}

    def _guess(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> float:
        """Milliseconds that one call will take: the time of a shorter one, times the square."""
        tokens = q.shape[2]
        if name not in self._last:
            part = max(64, tokens // 8)
            call = self.calls(*(x[:, :, :part] for x in (q, k, v)))[name]
            self._last[name] = part, self.timer(call, warm_up=1, least=3, most=3).ms_min
        shorter, ms = self._last[name]
        return ms * (tokens / shorter) ** 2


def measure_mix(
    setting: Setting, timer: Timer, mix: Mix, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Any]:
    """Density, time, TFLOP/s and memory of a mix: the mean over its layers, memory the largest."""
    tokens, single = q.shape[2], len(mix.layers) == 1
    row: dict[str, Any] = {"layers": sum(mix.times)}
    used = {pattern for layer in mix.layers for pattern in layer}
    seen = bench_inputs.pattern_pairs(q, k, used, exact=True)
    worked = bench_inputs.pattern_pairs(q, k, used)
    totals = {"ms": 0.0, "ms_min": 0.0, "ms_max": 0.0, "seen": 0.0, "worked": 0.0}
    extras, layer_ms = [], []
    for number, (layer, times) in enumerate(zip(mix.layers, mix.times, strict=True)):
        call = partial(ops.sparse_attention, q, k, v, layer)
        extras.append(extra_memory(setting.device, call))
        warm_up = 1 if single else int(number == 0 or layer_ms[-1] < 100)
        budget = setting.budget_ms if single else setting.budget_ms / len(mix.layers)
        timing = timer(call, warm_up=warm_up, budget_ms=budget, least=3 if single else 1)
        layer_ms.append(timing.ms)
        row["repeats"] = min(row.get("repeats", timing.repeats), timing.repeats)
        share = times / row["layers"]
        for name in ("ms", "ms_min", "ms_max"):
            totals[name] += share * getattr(timing, name)
        for name, counts in (("seen", seen), ("worked", worked)):
            totals[name] += share * sum(counts[p][head].item() for head, p in enumerate(layer))
    causal = setting.heads * bench_inputs.dense_pairs(tokens, exact=True)
    row |= {name: round(totals[name], 4) for name in ("ms", "ms_min", "ms_max")}
    row["density"] = totals["seen"] / causal
    row["pairs"] = totals["worked"]
    row["tflops"] = bench_tools.teraflops(totals["worked"], setting.head_dim, totals["ms"])
    row["extra_bytes"] = None if extras[0] is None else max(extras)
    return row


@dataclass
class Length:
    """What was measured at one length; ``stopped`` says why this and longer ones were not."""

    tokens: int
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: ms, ... or a note
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the mixes
    stopped: str | None = None


def measure(setting: Setting) -> Iterator[Length]:
    """Measures length by length, ascending."""
    from tqdm import tqdm

    timer = Timer(setting.device)
    dense_times = DenseTimes(setting, timer)
    steps = len(setting.lengths) * (len(setting.dense_names) + len(setting.mixes))
    with tqdm(total=steps, unit="case", disable=None) as bar:
        for tokens in setting.lengths:
            reason = lack_of_memory(setting, tokens)
            if reason is None:
                try:
                    yield _measure_length(setting, timer, dense_times, tokens, bar)
                    continue
                except _OutOfMemory as error:
                    reason = str(error).splitlines()[0]
            yield Length(tokens, stopped=f"{tokens} tokens and more: {reason}")
            return


def _measure_length(
    setting: Setting, timer: Timer, dense_times: DenseTimes, tokens: int, bar: Any
) -> Length:
    more = (setting.head_dim, setting.device, setting.seed, setting.dtype)
    _, _, v = bench_inputs.random_qkv(tokens, 1, setting.kv_heads, *more)
    q, k = bench_inputs.structured_qk(tokens, setting.heads, setting.kv_heads, *more)
    length = Length(tokens)
    for name in setting.dense_names:
        bar.set_description(f"{tokens} {name}")
        length.dense[name] = dense_times.measure(name, q, k, v)
        bar.update()
    dense_ms = {name: one["ms"] for name, one in length.dense.items() if "ms" in one}
    for mix in setting.mixes:
        bar.set_description(f"{tokens} {mix.name}")
        row: dict[str, Any] = {"tokens": tokens, "mix": mix.name}
        try:
            row |= measure_mix(setting, timer, mix, q, k, v)
        except _OutOfMemory:
            row["note"] = "out of memory"
        row["dense_ms"] = dense_ms
        if dense_ms:
            row["fastest_dense"] = min(dense_ms, key=dense_ms.__getitem__)
            if "ms" in row:
                row["speedup"] = dense_ms[row["fastest_dense"]] / row["ms"]
        length.rows.append(row)
        gc.collect()
        bar.update()
    return length
