"""The pictures of records of `decode_step.py` and `decode_model.py`."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

#: bar -> the parts it is made of, and the whole step it stands beside
STACKS = {
    "host": (("select", "plan", "gather, host", "attention"), "step, host"),
    "device": (("select", "plan", "gather, device", "attention"), "step, device"),
    "direct": (("select", "attention"), "step, direct"),
}
COLOURS = {
    "select": "tab:blue",
    "plan": "tab:orange",
    "gather": "tab:red",
    "attention": "tab:green",
}


def title(record: Record) -> str:
    facts = record["machine"]
    device = facts.get("gpu", facts["cpu"])
    return f"{device}, torch {facts['torch']}, commit {facts['commit'][:14]}, {facts['date'][:10]}"


def decode_step(record: Record) -> Figure:
    """A panel for each shape and length: parts of a step as stacked bars, the step and the fastest
    dense attention as marks; times over the batch. Of CUDA graphs where the record has any."""
    rows = [row for row in record["results"] if "ms" in row]
    rows = [row for row in rows if not row["case"].startswith("compress")]
    mode = "graph" if any(row["mode"] == "graph" for row in rows) else "eager"
    rows = [row for row in rows if row["mode"] == mode]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lengths = sorted({row["tokens"] for row in rows})
    figure, grid = plt.subplots(
        max(1, len(shapes)),
        max(1, len(lengths)),
        figsize=(5.5 * max(1, len(lengths)), 4.2 * max(1, len(shapes))),
        squeeze=False,
        layout="constrained",
    )
    for line, shape in zip(grid, shapes, strict=False):
        for axis, tokens in zip(line, lengths, strict=True):
            own = [row for row in rows if row["shape"] == shape and row["tokens"] == tokens]
            _steps(axis, own)
            axis.set_title(f"{shape}, {tokens} tokens", fontsize=9)
        line[0].set_ylabel(f"ms of one layer a sequence ({mode})")
    handles = {
        label: handle
        for axis in grid.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    grid[0][0].legend(handles.values(), handles.keys(), fontsize=7)
    hits = record["arguments"]["hits"]
    figure.suptitle(
        f"ShadowKV decode step, {hits:.0%} hits, rank {record['rank']}: bars from left to right "
        f"host, device, direct\n{title(record)}",
        fontsize=10,
    )
    return figure


def _steps(axis: Axes, rows: list[Record]) -> None:
    batches = sorted({row["batch"] for row in rows})
    width = 0.8 / len(STACKS)
    for place, batch in enumerate(batches):
        times = {row["case"]: row["ms"] / batch for row in rows if row["batch"] == batch}
        for number, (parts, whole) in enumerate(STACKS.values()):
            left, height = place + (number - 1) * width, 0.0
            for part in parts:
                if part in times:
                    name = part.split(",")[0]
                    axis.bar(
                        left, times[part], width, bottom=height, color=COLOURS[name], label=name
                    )
                    height += times[part]
            if whole in times:
                axis.plot(left, times[whole], "k_", markersize=12, label="whole step")
        dense = [ms for case, ms in times.items() if case.startswith("dense")]
        if dense:
            ends = [place - 0.45, place + 0.45]
            axis.plot(ends, [min(dense)] * 2, "k--", linewidth=1, label="dense, the fastest")
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_xlabel("batch")
    axis.grid(axis="y", alpha=0.3)


def decode_model(record: Record) -> Figure:
    """A panel for each model: tokens a second against the batch, a line for each way and mode."""
    rows = [row for row in record["results"] if "tokens_per_s" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = plt.subplots(
        1, max(1, len(models)), figsize=(7 * max(1, len(models)), 5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, model in zip(grid[0], models, strict=False):
        own = [row for row in rows if row["model"] == model]
        for key in dict.fromkeys((row["way"], row.get("store"), row["mode"]) for row in own):
            way, store, mode = key
            points = sorted(
                (row["batch"], row["tokens_per_s"])
                for row in own
                if (row["way"], row.get("store"), row["mode"]) == key
            )
            name = way if store is None else f"{way}, values on the {store}"
            style = "o--" if mode == "eager" else "o-"
            axis.plot(*zip(*points, strict=True), style, label=f"{name}, {mode}")
        axis.set_xlabel("batch")
        axis.set_ylabel("tokens a second")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{model}, {own[0]['tokens']} tokens", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Generation, random weights\n{title(record)}", fontsize=10)
    return figure
