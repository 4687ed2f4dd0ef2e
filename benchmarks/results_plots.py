"""The pictures of docs/results.md: those of `plot_results.py`, and of records that it has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plot_results  # takes matplotlib's backend for files
import results_tables as tables
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from results_records import Record, model_of


def title(record: Record) -> str:
    return f"{record.card}, commit {record.commit[:12]}, {record.date[:10]}"


def prefill_bars(record: Record) -> Figure:
    """TFLOP/s of every case with pairs, a panel for each length; bars of T1 and T2 as ticks."""
    rows = [row for row in record.rows if row.get("tflops") is not None]
    lengths = sorted({row["tokens"] for row in rows})
    counts = [sum(row["tokens"] == tokens for row in rows) for tokens in lengths]
    figure, axes = plt.subplots(
        max(1, len(lengths)),
        1,
        figsize=(10, 1.5 + 0.3 * len(rows) + 0.6 * len(lengths)),
        squeeze=False,
        sharex=True,
        layout="constrained",
        height_ratios=counts or None,
    )
    for axis, tokens in zip(axes[:, 0], lengths, strict=False):
        own = [row for row in rows if row["tokens"] == tokens]
        colours = ["tab:gray" if row["case"].startswith("dense") else "tab:blue" for row in own]
        drawn = axis.barh([row["case"] for row in own], [row["tflops"] for row in own],
                          color=colours)  # fmt: skip
        axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
        for place, row in enumerate(own):
            if row.get("bar_field") == "tflops":
                limit = row["bar_limit"]
                axis.plot([limit, limit], [place - 0.45, place + 0.45], color="tab:red")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(f"{tokens:,} tokens", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.08)
    axes[-1][0].set_xlabel("TFLOP/s of selected pairs; red: the bar, gray: dense attention")
    figure.suptitle(f"Prefill attention of one layer\n{title(record)}", fontsize=10)
    return figure


def evaluation(record: Record) -> Figure:
    """Scores as a map, methods down, tasks and lengths right; perplexity has its table only."""
    cells: list[dict[str, Any]] = [
        cell
        for cell in record.data.get("cells") or []
        if "perplexity" not in str(cell.get("kind")) and cell.get("score") is not None
    ]
    methods = [method for (method,) in tables.distinct(cells, "method")]
    fields = ("kind", "task", "length")
    places = tables.distinct(cells, *fields)
    figure, axis = plt.subplots(
        figsize=(3 + 0.75 * max(1, len(places)), 2.5 + 0.4 * max(1, len(methods))),
        layout="constrained",
    )
    scores = [
        [
            tables.mean(
                [
                    100 * cell["score"]
                    for cell in cells
                    if cell.get("method") == method
                    and tuple(cell.get(field) for field in fields) == place
                ]
            )
            for place in places
        ]
        for method in methods
    ]
    if scores and places:
        values = [[float("nan") if x is None else x for x in line] for line in scores]
        image = axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        figure.colorbar(image, label="score, %")
        for y, line in enumerate(scores):
            for x, value in enumerate(line):
                if value is not None:
                    colour = "black" if value > 60 else "white"
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour,
                              fontsize=8)  # fmt: skip
    names = [f"{kind}: {task}\n{tables.text(length)}" for kind, task, length in places]
    axis.set_xticks(range(len(places)), names, fontsize=7, rotation=45)
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    axis.set_title(f"{model_of(record)}\n{title(record)}", fontsize=9)
    return figure


def draw(record: Record, path: Path) -> None:
    """Writes the picture of a record that has one."""
    own = {"prefill-bars": prefill_bars, "eval": evaluation}
    if record.kind in own:
        figure = own[record.kind](record)
    else:
        figure = plot_results.PLOTS[record.kind](record.data)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, so that drawing it again changes nothing.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
