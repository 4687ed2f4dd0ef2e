"""The picture of a record of ``sparseattn bench prefill``."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def prefill(record: dict[str, Any]) -> Figure:
    """Times and speed-up against the length: one line a mix, dashed the dense alternatives."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    times, speedups = figure.subplots(1, 2)
    rows = record["results"]
    for mix in dict.fromkeys(row["mix"] for row in rows):
        for axis, key in ((times, "ms"), (speedups, "speedup")):
            points = [(row["tokens"], row[key]) for row in rows if row["mix"] == mix and key in row]
            axis.plot(*zip(*sorted(points), strict=True) if points else ([], []), "o-", label=mix)
    for name, style in zip(
        dict.fromkeys(row["name"] for row in record["dense"]), ("--", "-.", ":"), strict=False
    ):
        points = [
            (row["tokens"], row["ms"])
            for row in record["dense"]
            if row["name"] == name and "ms" in row
        ]
        if points:
            times.plot(*zip(*sorted(points), strict=True), style, color="black", label=name)
    speedups.axhline(1, color="black", linewidth=0.8)
    ticks = sorted({row["tokens"] for row in rows})
    for axis, title in (
        (times, "ms of one layer"),
        (speedups, "times as fast as the fastest dense alternative"),
    ):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{tokens / 1024:g}K" for tokens in ticks])
        axis.set_xlabel("tokens")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    times.legend(fontsize=8)
    facts = record["machine"]
    figure.suptitle(
        f"Prefill attention, estimate included: {record['heads']} query heads, "
        f"{record['kv_heads']} kv heads, D={record['head_dim']}, {record['dtype']}, path "
        f"{record['path']}\n{facts.get('gpu', facts['cpu'])}, torch {facts['torch']}, "
        f"sparseattn {facts['sparseattn']} ({facts['commit'][:14]}), {facts['date'][:10]}",
        fontsize=10,
    )
    return figure


def save(record: str | PathLike[str], path: str | PathLike[str]) -> None:
    """Draws a record's JSON file as a PNG."""
    data = json.loads(Path(record).read_text(encoding="utf-8"))
    prefill(data).savefig(path, dpi=130)
