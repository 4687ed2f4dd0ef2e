"""The picture of records of `end_to_end.py`."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from decode_plots import title
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]


def end_to_end(record: Record) -> Figure:
    """A column for each model: above the time to the first token by length and way, hollow marks
    for expected ones, below the time of a generated token."""
    rows = record["results"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = plt.subplots(
        2, max(1, len(models)), figsize=(7 * max(1, len(models)), 8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model and "tokens" in row]
        lengths = sorted({row["tokens"] for row in own})
        _first_token(grid[0][number], own, record.get("judged", []), model)
        _tokens(grid[1][number], own)
        for axis in grid[:, number]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{x / 1024:g}K" for x in lengths])
            axis.set_xlabel("tokens of the prompt")
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        grid[0][number].set_title(model, fontsize=10)
    figure.suptitle(f"Random weights, bf16, one sequence\n{title(record)}", fontsize=10)
    return figure


def _first_token(axis: Axes, rows: list[Record], judged: list[Record], model: str) -> None:
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        own = [row for row in rows if row["way"] == way]
        points = sorted((row["tokens"], row["ttft_s"]) for row in own if "ttft_s" in row)
        expected = sorted(
            (row["tokens"], row["expected_ttft_s"]) for row in own if row.get("skipped")
        )
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=way)
            for tokens, seconds in points:
                axis.annotate(f"{seconds:.3g}", (tokens, seconds), fontsize=7)
        if expected:
            style = {"mfc": "none", "color": f"C{number}", "linestyle": ":", "marker": "o"}
            last = points[-1:] + expected
            axis.plot(*zip(*last, strict=True), **style, label=f"{way}, expected")
    limits = [(row["tokens"], row["bar_limit"]) for row in judged if "bar" in row]
    limits = limits if any(model in row["case"] for row in judged if "bar" in row) else []
    if limits:
        axis.plot(*zip(*sorted(limits), strict=True), "k_", markersize=16, label="bar")
    axis.set_yscale("log")
    axis.set_ylabel("seconds to the first token")


def _tokens(axis: Axes, rows: list[Record]) -> None:
    decode = [row for row in rows if "ms_per_token" in row]
    for mode in dict.fromkeys(row["mode"] for row in decode):
        points = sorted(
            (row["tokens"], row["ms_per_token"]) for row in decode if row["mode"] == mode
        )
        axis.plot(*zip(*points, strict=True), "o-", label=f"ShadowKV, values on the host, {mode}")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("ms a generated token")
