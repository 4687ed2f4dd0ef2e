"""Draws the JSON records of the benchmarks as PNG files, one picture a record.

python plot_results.py results/*-prefill_attention.json results/*-min_length.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import decode_plots
import end_to_end_plots
import matplotlib.pyplot as plt
from decode_plots import title
from matplotlib.figure import Figure

from sparseattn import bench_plots

Record = dict[str, Any]


def prefill_attention(record: Record) -> Figure:
    """Left TFLOP/s of every attention case, right its time, one bar a length."""
    rows = [row for row in record["results"] if "ms" in row]
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(
        1, 2, figsize=(15, 1.5 + 0.22 * len(names) * len(lengths)), sharey=True
    )
    height = 0.8 / len(lengths)
    for number, tokens in enumerate(lengths):
        by_name = {row["case"]: row for row in rows if row["tokens"] == tokens}
        for axis, key, form in zip(axes, ("tflops", "ms"), ("{:.0f}", "{:.3g}"), strict=True):
            drawn = [
                (place + number * height, by_name[name][key])
                for place, name in enumerate(names)
                if by_name.get(name, {}).get(key) is not None
            ]
            if drawn:
                places, values = zip(*drawn, strict=True)
                bars = axis.barh(places, values, height, label=f"{tokens} tokens")
                axis.bar_label(bars, [form.format(x) for x in values], padding=2, fontsize=7)
    middle = height * (len(lengths) - 1) / 2
    axes[0].set_yticks([place + middle for place in range(len(names))], names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("TFLOP/s of selected pairs (estimates select, they have none)")
    axes[1].set_xlabel("ms, whole call (log scale)")
    axes[1].set_xscale("log")
    for axis in axes:
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.suptitle(
        f"Prefill attention of one layer: {record['heads']} query heads, {record['kv_heads']} kv "
        f"heads, D={record['head_dim']}\n{title(record)}",
        fontsize=10,
    )
    return figure


def min_length(record: Record) -> Figure:
    """Speed-up over dense against length, one line a mix, one panel a kind of data."""
    rows = record["results"]
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure, grid = plt.subplots(
        1, len(kinds), figsize=(6.5 * len(kinds), 5), sharey=True, squeeze=False
    )
    for axis, data in zip(grid[0], kinds, strict=True):
        for mix in dict.fromkeys(row["mix"] for row in rows):
            series = sorted(
                (row["tokens"], row["speedup"])
                for row in rows
                if row["data"] == data and row["mix"] == mix
            )
            axis.plot(*zip(*series, strict=True), marker="o", label=mix)
        axis.axhline(1, color="black", linewidth=0.8)
        recommended = record.get("recommended_min_length")
        if recommended and data == "structured":
            axis.axvline(recommended, color="gray", linestyle=":", label=f"from {recommended} on")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        ticks = sorted({row["tokens"] for row in rows})
        axis.set_xticks(ticks, [f"{x / 1024:g}K" for x in ticks])
        axis.set_xlabel(f"tokens ({data} data)")
        axis.grid(alpha=0.3)
    grid[0][0].set_ylabel("times faster than the best SDPA, estimate included")
    grid[0][0].legend(fontsize=8)
    figure.suptitle(title(record), fontsize=10)
    return figure


def cpu_attention(record: Record) -> Figure:
    """Speed-up over dense SDPA of every pattern, by best and median time."""
    rows = {name: row for name, row in record["results"].items() if name != "sdpa dense"}
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.7 * len(rows)))
    for number, kind in enumerate(("best", "median")):
        values = [row[f"speedup_{kind}"] for row in rows.values()]
        places = [place + 0.4 * number for place in range(len(rows))]
        axis.bar_label(axis.barh(places, values, 0.4, label=kind), fmt="%.1f", padding=2)
    labels = [f"{name} ({row['density']:.1%})" for name, row in rows.items()]
    axis.set_yticks([place + 0.2 for place in range(len(rows))], labels)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.12)
    axis.set_xlabel("times faster than dense SDPA (density of the pattern)")
    axis.legend()
    arguments = record["arguments"]
    axis.set_title(
        f"CPU prefill attention: {arguments['tokens']} tokens, {arguments['heads']} heads, "
        f"{arguments['threads']} threads\n{title(record)}",
        fontsize=9,
    )
    return figure


PLOTS: dict[str, Callable[[Record], Figure]] = {
    "prefill": bench_plots.prefill,
    "prefill_attention": prefill_attention,
    "min_length": min_length,
    "cpu_attention": cpu_attention,
    "decode-step": decode_plots.decode_step,
    "decode-model": decode_plots.decode_model,
    "end-to-end": end_to_end_plots.end_to_end,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+", help="JSON files of the benchmarks")
    parser.add_argument("--folder", type=Path, help="where the PNGs go; default: beside the JSON")
    arguments = parser.parse_args(argv)
    for path in arguments.records:
        record = json.loads(path.read_text())
        name = record.get("benchmark")
        if name not in PLOTS:
            parser.error(f"{path}: expected a record of {', '.join(PLOTS)}, got {name!r}")
        figure = PLOTS[name](record)
        folder = arguments.folder or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{path.stem}.png"
        if figure.get_layout_engine() is None:
            figure.tight_layout()
        figure.savefig(target, dpi=120)
        plt.close(figure)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
