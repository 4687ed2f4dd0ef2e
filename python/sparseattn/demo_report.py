"""What both kinds of the demo print: the tables of layers and heads."""

from __future__ import annotations

import statistics
from typing import Any

HEADS_SHOWN = 40


def device_line(report: dict[str, Any]) -> str:
    threads = f", {report['threads']} threads" if report["device"] == "cpu" else ""
    return f"device   {report['device']}, {report['dtype']}{threads}"


def layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Attention, layer by layer (means over heads):",
        f"{'layer':>8} {'density':>8} {'mass kept':>10} {'error':>7} {'dense':>10} {'sparse':>10} "
        f"{'speed-up':>9}",
    ]
    for layer in layers:
        lines.append(
            f"{layer['layer']:8} {layer['density']:8.1%} {layer['mass_kept']:10.1%} "
            f"{layer['output_error']:7.3f} {duration(layer['dense_s']):>10} "
            f"{duration(layer['sparse_s']):>10} {layer['speedup']:8.2f}x"
        )
    lines += ["", *_pattern_lines(layers), ""]
    return [
        *lines,
        "density: share of the causal query-key pairs that are visited. mass kept: of dense",
        "attention, on sampled rows. error: norm of the output's difference over the dense norm.",
        "Times are of attention alone; the sparse one has the estimate of the index in it.",
    ]


def exactness_line(report: dict[str, Any]) -> str:
    return (
        f"Patterns that cover everything differ from dense attention by "
        f"{report['covering_patterns_error']:.1e} (rounding in {report['dtype']})"
    )


def _pattern_lines(layers: list[dict[str, Any]]) -> list[str]:
    """Every head if they fit on a screen, else a line per pattern."""
    heads = [(layer["layer"], head) for layer in layers for head in layer["heads"]]
    columns = f"{'density':>8} {'mass kept':>10} {'error':>7}"
    if len(heads) <= HEADS_SHOWN:
        return [f"{'layer':>8} {'head':>4}  {'pattern':26} {columns}"] + [
            f"{layer:8} {head['head']:4}  {head['pattern']:26} {head['density']:8.1%} "
            f"{head['mass_kept']:10.1%} {head['output_error']:7.3f}"
            for layer, head in heads
        ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for _, head in heads:
        groups.setdefault(head["pattern"], []).append(head)
    lines = [f"{'heads':>8}  {'pattern (means)':26} {columns}"]
    for pattern, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        density, kept, error = (
            statistics.fmean(head[key] for head in members)
            for key in ("density", "mass_kept", "output_error")
        )
        lines.append(f"{len(members):8}  {pattern:26} {density:8.1%} {kept:10.1%} {error:7.3f}")
    return lines


def duration(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
