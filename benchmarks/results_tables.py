"""The tables of docs/results.md, made of records by their kind. A field that is missing is "-"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import readme_table
from readme_table import number, wrapped
from results_records import Record, Row

NOTHING = "-"
Form = Callable[[Any], str]


def text(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def percent(value: Any) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}"


def scaled(unit: float) -> Form:
    return lambda value: NOTHING if value is None else f"{value / unit:.1f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; all but the first ``words`` columns are aligned to the right."""
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *rows])


def columns(rows: Sequence[Row], named: Sequence[tuple[str, str, Form]], words: int = 1) -> str:
    """A table of rows: field, title and form of each column. Columns without a value are left
    out."""
    used = [c for c in named if any(row.get(c[0]) is not None for row in rows)]
    if not used:
        return "No rows."
    lines = [[form(row.get(field)) for field, _, form in used] for row in rows]
    return markdown([title for _, title, _ in used], lines, words)


def distinct(rows: Sequence[Row], *fields: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(row.get(field) for field in fields) for row in rows))


def mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, int | float)]
    return sum(known) / len(known) if known else None


def judged(record: Record) -> str:
    """The bars of a record that has them beside its rows."""
    found = [row for row in record.data.get("judged") or [] if isinstance(row, dict)]
    if not found:
        return ""
    lines = []
    for row in found:
        value = row.get("value", row.get(row.get("bar_field") or ""))
        if value is None:
            value = row.get("ttft_s")
        met = {True: "met", False: "**missed**", None: "not judged"}[row.get("met")]
        bar = f"{row['bar']}: {met}" if "bar" in row else NOTHING
        lines.append(
            [
                *(text(row.get(field)) for field in ("case", "target", "tokens")),
                text(value),
                text(row.get("times_faster_than_dense")),
                bar,
            ]
        )
    head = ("case", "target", "tokens", "value", "times faster than dense", "bar")
    summary = record.data.get("summary") or {}
    count = (
        f"{summary.get('met')} of {summary.get('bars')} bars met.\n\n"
        if summary.get("bars")
        else ""
    )
    return count + markdown(head, lines)


# --- accuracy ----------------------------------------------------------------------------------


def evaluation(record: Record) -> str:
    """Methods down, tasks or lengths right; one table for every kind of task and length."""
    cells = [cell for cell in record.data.get("cells") or [] if isinstance(cell, dict)]
    parts = []
    for (kind,) in distinct(cells, "kind"):
        own = [cell for cell in cells if cell.get("kind") == kind]
        if "perplexity" in text(kind):
            parts.append(_perplexity(own))
            continue
        if len(distinct(own, "task")) == 1 and len(distinct(own, "length")) > 1:
            (task,) = distinct(own, "task")[0]
            parts.append(_scores(f"{text(kind)}, {text(task)}", own, "length"))
            continue
        for (length,) in distinct(own, "length"):
            some = [cell for cell in own if cell.get("length") == length]
            size = "" if length is None else f", {text(length)} tokens"
            parts.append(_scores(f"{text(kind)}{size}", some, "task"))
    return "\n\n".join(parts)


def _examples(cells: Sequence[Row]) -> str:
    counts = {len(c["examples"]) for c in cells if isinstance(c.get("examples"), list)}
    if not counts:
        return ""
    few, many = min(counts), max(counts)
    return f", {few if few == many else f'{few} to {many}'} examples a cell"


def _facts(method: Any, cells: Sequence[Row]) -> list[str]:
    """What a method read and kept, in FACTS' order."""
    density = mean([cell.get("density") for cell in cells])
    return [
        text(method),
        percent(density),
        scaled(2**20)(mean([cell.get("cache_bytes") for cell in cells])),
    ]


FACTS = ("method", "prefill keys, %", "cache, MiB")


def _perplexity(cells: Sequence[Row]) -> str:
    """Two figures of different tokens, which do not compare: all of a window's last ones in one
    forward, and the very last ones, read one by one."""
    lengths = [length for (length,) in distinct(cells, "length")]
    fields = [
        (field, name)
        for field, name in (("score", ""), ("decode_score", ", last tokens one by one"))
        if any(cell.get(field) is not None for cell in cells)
    ]
    lines = []
    for (method,) in distinct(cells, "method"):
        own = [cell for cell in cells if cell.get("method") == method]
        line = _facts(method, own)
        for field, _ in fields:
            line += [
                text(mean([c.get(field) for c in own if c.get("length") == length]))
                for length in lengths
            ]
        lines.append(line)
    heads = [f"{text(length)}{name}" for _, name in fields for length in lengths]
    return f"**Perplexity, by tokens**{_examples(cells)}.\n\n{markdown([*FACTS, *heads], lines)}"


def _scores(title: str, cells: Sequence[Row], field: str) -> str:
    values = [value for (value,) in distinct(cells, field)]
    lines = []
    for (method,) in distinct(cells, "method"):
        own = [cell for cell in cells if cell.get("method") == method]
        scores = [mean([c.get("score") for c in own if c.get(field) == value]) for value in values]
        line = _facts(method, own) + [percent(score) for score in scores]
        lines.append(line + ([percent(mean(scores))] if len(values) > 1 else []))
    heads = [text(value) for value in values] + (["mean"] if len(values) > 1 else [])
    note = f"Scores in per cent{_examples(cells)}"
    return f"**{title}.** {note}.\n\n{markdown([*FACTS, *heads], lines)}"


# --- prefill -----------------------------------------------------------------------------------


def prefill_bars(record: Record) -> str:
    """The README's table with all rows; its head is said above it."""
    made = readme_table.table(record.data, record.path.name, every=True).partition("\n\n")[2]
    found = record.data["summary"]
    return f"{found['met']} of {found['bars']} bars met.\n\n{made}"


def prefill(record: Record) -> str:
    """`bench prefill`: mixes down, lengths right."""
    rows = record.rows
    lengths = sorted({row["tokens"] for row in rows if "tokens" in row})
    by_place = {(row.get("mix"), row.get("tokens")): row for row in rows}
    wins = record.data.get("wins_from") or {}
    lines = []
    for (mix,) in distinct(rows, "mix"):
        line = [text(mix)]
        for tokens in lengths:
            row = by_place.get((mix, tokens), {})
            ms, speedup = row.get("ms"), row.get("speedup")
            ratio = "" if speedup is None else f" ({speedup:.2f})"
            line.append(NOTHING if ms is None else f"{number(ms)}{ratio}")
        lines.append([*line, text(wins.get(mix))])
    head = ["mix", *(f"{tokens:,}" for tokens in lengths), "not slower from"]
    note = (
        "Milliseconds of `sparse_attention` with its estimate, by tokens; in brackets times faster "
        "than the fastest dense attention of the same run."
    )
    return f"{wrapped(note)}\n\n{markdown(head, lines)}"


CASE: tuple[tuple[str, str, Form], ...] = (
    ("case", "case", text),
    ("tokens", "tokens", text),
    ("ms", "ms", text),
    ("tflops", "TFLOP/s", text),
    ("density", "density, %", percent),
    ("times_faster_than_sdpa", "times faster than SDPA", text),
    ("note", "note", text),
)


def prefill_attention(record: Record) -> str:
    return columns(record.rows, CASE)


def min_length(record: Record) -> str:
    wins = record.data.get("wins_from") or {}
    lines = [
        [text(data), text(mix), text(tokens)]
        for data, mixes in wins.items()
        for mix, tokens in (mixes or {}).items()
    ]
    head = ("data", "mix", "not slower than SDPA from, tokens")
    advice = record.data.get("recommended_min_length")
    last = "" if advice is None else f"\n\nRecommended `min_length`: {text(advice)}."
    return markdown(head, lines, 2) + last


def cpu_attention(record: Record) -> str:
    results = record.data.get("results")
    rows = [{"case": name} | row for name, row in results.items()] if results else []
    named: tuple[tuple[str, str, Form], ...] = (
        ("case", "pattern", text),
        ("density", "density, %", percent),
        ("best_s", "best, s", text),
        ("median_s", "median, s", text),
        ("speedup_best", "times faster, best", text),
        ("speedup_median", "times faster, median", text),
    )
    return columns(rows, named)


def peers(record: Record) -> str:
    """Cases down, who computed them right."""
    rows = record.rows
    names = [name for (name,) in distinct([row for row in rows if "ms" in row], "peer")]
    lines = []
    for tokens, case in distinct(rows, "tokens", "case"):
        own = {
            row.get("peer"): row
            for row in rows
            if (row.get("tokens"), row.get("case")) == (tokens, case)
        }
        line = [text(case), text(tokens)]
        for name in names:
            row = own.get(name, {})
            if "ms" not in row:
                line.append(NOTHING)
                continue
            ratio = f" ({row['ratio']:.2f})" if "ratio" in row else ""
            more = row.get("prepare_ms")
            line.append(number(row["ms"]) + ratio + ("" if more is None else f" + {number(more)}"))
        lines.append(line)
    missing = [
        f"{name}: {peer.get('detail')}"
        for name, peer in (record.data.get("peers") or {}).items()
        if not peer.get("available")
    ]
    notes = [
        "Milliseconds; in brackets a peer's time over ours; after the plus its preparation (index "
        "conversion, plan), which is not in the ratio. Ours has plan and packing in it."
    ]
    if missing:
        notes.append(f"Missing: {'; '.join(missing)}.")
    for row in rows:
        if "note" in row:
            case = f"{row.get('peer')}, {row.get('case')}, {text(row.get('tokens'))}"
            notes.append(f"{case}: {row['note']}.")
    for (why,) in distinct([row for row in rows if "differs" in row], "differs"):
        by = ", ".join(n for (n,) in distinct([r for r in rows if r.get("differs") == why], "peer"))
        notes.append(f"{by}: {why}.")
    return f"{markdown(['case', 'tokens', *names], lines)}\n\n{wrapped(*notes)}"


# --- decode and whole models -------------------------------------------------------------------

STEP = (
    *("select", "plan", "gather, host", "gather, device", "attention"),
    *("step, host", "step, device", "step, direct"),
)


def decode_step(record: Record) -> str:
    """A line for each shape, length and batch, of CUDA graphs where the record has any."""
    rows = [row for row in record.rows if "ms" in row]
    steps = [row for row in rows if not str(row.get("case")).startswith("compress")]
    mode = "graph" if any(row.get("mode") == "graph" for row in steps) else "eager"
    lines = []
    for place in distinct(steps, "shape", "tokens", "batch"):
        own = {
            row["case"]: row
            for row in steps
            if (row.get("shape"), row.get("tokens"), row.get("batch")) == place
            and row.get("mode") == mode
        }
        dense = [row["ms"] for case, row in own.items() if case.startswith("dense")]
        line = [*map(text, place), *(text(own.get(case, {}).get("ms")) for case in STEP)]
        lines.append([*line, text(min(dense, default=None))])
    parts = [judged(record)]
    parts.append(wrapped(f"Milliseconds of one layer ({mode}); dense: the fastest one."))
    parts.append(markdown(["shape", "tokens", "batch", *STEP, "dense"], lines))
    compression = [row for row in rows if str(row.get("case")).startswith("compress")]
    if compression:
        named = (("shape", "shape", text), ("tokens", "tokens", text), ("case", "part", text))
        parts.append(columns(compression, (*named, ("ms", "ms", text)), 1))
    return "\n\n".join(part for part in parts if part)


MODEL: tuple[tuple[str, str, Form], ...] = (
    ("model", "model", text),
    ("way", "way", text),
    ("store", "values on", text),
    ("mode", "mode", text),
    ("batch", "batch", text),
    ("ms_per_step", "ms a step", text),
    ("tokens_per_s", "tokens/s", text),
    ("hit_rate", "hits, %", percent),
    ("ttft_s", "TTFT, s", text),
    ("device_bytes", "device, GiB", scaled(2**30)),
    ("host_bytes", "host, GiB", scaled(2**30)),
    ("note", "note", text),
)


def decode_model(record: Record) -> str:
    return "\n\n".join(part for part in (judged(record), columns(record.rows, MODEL, 4)) if part)


FP8: tuple[tuple[str, str, Form], ...] = (
    ("kind", "in fp8", text),
    ("case", "case", text),
    ("mode", "mode", text),
    ("shape", "shape", text),
    ("tokens", "tokens", text),
    ("batch", "batch", text),
    ("ms", "ms", text),
    ("error", "error", text),
    ("store_bytes", "store, MiB", scaled(2**20)),
    ("factor_bytes", "factor, MiB", scaled(2**20)),
    ("gather_bytes", "read in a step, MiB", scaled(2**20)),
    ("note", "note", text),
)


def decode_fp8(record: Record) -> str:
    note = "Error: norm of the difference from the step without fp8 over the norm of that."
    return f"{note}\n\n{columns(record.rows, FP8, 4)}"


CPP_DECODE: tuple[tuple[str, str, Form], ...] = (
    ("part", "part", text),
    ("mode", "mode", text),
    ("tokens", "tokens", text),
    ("batch", "batch", text),
    ("us", "us", text),
    ("floor_us", "floor, us", text),
    ("device_mb", "device, MB", text),
    ("pcie_mb", "PCIe, MB", text),
    ("gb_per_s", "GB/s", text),
    ("pcie_gb_per_s", "PCIe, GB/s", text),
    ("note", "note", text),
)


def cpp_decode(record: Record) -> str:
    return columns(record.rows, CPP_DECODE, 2)


END_TO_END: tuple[tuple[str, str, Form], ...] = (
    ("model", "model", text),
    ("tokens", "tokens", text),
    ("way", "way", text),
    ("mode", "decode", text),
    ("ttft_s", "TTFT, s", text),
    ("attention_s", "attention, s", text),
    ("cache_s", "cache, s", text),
    ("other_s", "other, s", text),
    ("expected_ttft_s", "expected, s", text),
    ("density", "density, %", percent),
    ("ms_per_token", "ms a token", text),
    ("tokens_per_s", "tokens/s", text),
    ("hit_rate", "hits, %", percent),
    ("device_bytes", "peak, GiB", scaled(2**30)),
    ("host_bytes", "host, GiB", scaled(2**30)),
    ("pin_s", "pinning, s", text),
    ("note", "note", text),
)


def cache_parts(rows: Sequence[Row]) -> str:
    """What the caches of prompts hold, part by part."""
    kept = [row for row in rows if isinstance(row.get("cache_bytes"), dict)]
    if not kept:
        return ""
    names = list(dict.fromkeys(name for row in kept for name in row["cache_bytes"]))
    lines = [
        [text(row.get("model")), text(row.get("way")), text(row.get("tokens"))]
        + [scaled(2**20)(row["cache_bytes"].get(name)) for name in names]
        for row in kept
    ]
    head = ["model", "way", "tokens", *(name.replace("_", " ") for name in names)]
    return f"The caches by part, MiB:\n\n{markdown(head, lines, 2)}"


def end_to_end(record: Record) -> str:
    parts = [judged(record), columns(record.rows, END_TO_END, 4), cache_parts(record.rows)]
    weights = record.data.get("weights")
    if weights:
        parts.append(wrapped(f"Weights: {weights}."))
    return "\n\n".join(part for part in parts if part)


GENERATION: tuple[tuple[str, str, Form], ...] = (
    ("generated", "generated", text),
    ("length", "length", text),
    ("ms_per_token", "ms a token", text),
    ("cache_bytes", "cache, MiB", scaled(2**20)),
    ("used_bytes", "in use, MiB", scaled(2**20)),
    ("held_bytes", "held, MiB", scaled(2**20)),
)


def long_generation(record: Record) -> str:
    """About a dozen of the rows, the first and the last among them."""
    rows = record.rows
    step = max(1, (len(rows) - 1) // 11)
    kept = [row for place, row in enumerate(rows) if place % step == 0 or place == len(rows) - 1]
    return columns(kept, GENERATION, 0)


# --- tests -------------------------------------------------------------------------------------


def _sanitizer(found: Any) -> str:
    """What a tool said last; of one process for each part of sanitize.py, what they all said."""
    if not isinstance(found, dict):
        return str(found)
    runs = found.get("runs") or [found]
    said = Counter(
        "; ".join(str(line).strip("= ") for line in run.get("last_lines") or []) or NOTHING
        for run in runs
    )
    if not found.get("runs"):
        return next(iter(said))
    build = f", build {found['build']}" if "build" in found else ""
    return "; ".join(f"{count} of {len(runs)} runs: {text}" for text, count in said.items()) + build


def tests(record: Record) -> str:
    """Counts of the suite, and what the sanitizer said last."""
    data = record.data
    suite = data.get("suite") or data
    lines = [[f"suite, {name}", text(suite.get(name))] for name in ("passed", "failed", "skipped")]
    for tool, found in (data.get("sanitizer") or {}).items():
        lines.append([tool, _sanitizer(found)])
    for name, found in (data.get("compute_sanitizer") or {}).items():
        lines.append([name, text(found)])
    command = suite.get("command")
    before = f"`{command}`\n\n" if command else ""
    return before + markdown(("what", "outcome"), lines, 2)
