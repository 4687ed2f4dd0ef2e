"""What a device trace tells of one call: the time from its first kernel to its longest."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sparseattn.bench_tools import Timing


def before_longest(spans: list[tuple[str, float, float]], writes: int) -> float | None:
    """From the first to the start of the longest of the device's (name, start, end) after
    ``writes`` events of one name; None where the trace is not like that."""
    spans = sorted(spans, key=lambda span: span[1])
    own = spans[writes:]
    if len(own) < 2 or len({name for name, _, _ in spans[:writes]}) != 1:
        return None
    return max(own, key=lambda span: span[2] - span[1])[1] - own[0][1]


def trace_before_attention(
    call: Callable[[], object], device: torch.device, repeats: int
) -> Timing | str:
    """From a call's first kernel to the start of its longest, the attention kernel; or why not.

    Some milliseconds of writes go before the call, so that the host has submitted all of it before
    its first kernel starts: gaps are then the device's. These writes also flush the L2 cache.
    """
    if device.type != "cuda":
        return "no device trace on the CPU"
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    filler = torch.empty(size, dtype=torch.uint8, device=device)
    fills, times = 64, []
    for turn in range(1 + repeats):  # the first starts the tracer
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(fills):
                filler.fill_(1)
            call()
            torch.cuda.synchronize(device)
        events = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
        found = before_longest(spans, fills)
        if found is None:
            return f"device trace has {len(spans)} events, not {fills} writes and then the call's"
        if turn:
            times.append(found / 1e3)
    return Timing(statistics.median(times), min(times), max(times), len(times))
