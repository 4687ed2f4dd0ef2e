"""Makes the README's table of prefill speed from records of `prefill_bars.py`.

    python readme_table.py                     # prints the newest complete record of results/
    python readme_table.py A.json B.json       # these
    python readme_table.py --write             # into README.md, between the markers

Rows are those with a bar; `--all` prints the others too. Nothing in the table is written by hand.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bars import FA3
from common import RESULTS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- prefill-table -->", "<!-- /prefill-table -->"
NOTHING = (
    "There is no record of `benchmarks/prefill_bars.py` yet; `python benchmarks/readme_table.py "
    "--write` puts the table of the newest one here."
)
HEAD = ("case", "tokens", "ms", "TFLOP/s", "FlashAttention-3, ms", "bar")

Record = dict[str, Any]


def newest(folder: Path) -> list[Path]:
    """The newest complete record on a GPU in ``folder`` by the date in it; none: empty."""
    found = []
    for path in folder.glob("*prefill-bars*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("complete") and "gpu" in record["machine"]:
            found.append((record["machine"]["date"], path))
    return [max(found)[1]] if found else []


def number(value: float | None) -> str:
    """Four significant digits, no exponent; below 1 three decimals."""
    if value is None:
        return "-"
    return f"{value:.{max(0, 4 - len(str(int(value))))}f}"


def wrapped(*sentences: str) -> str:
    return textwrap.fill(
        " ".join(sentences), width=120, break_long_words=False, break_on_hyphens=False
    )


def cells(row: Record) -> list[str]:
    """One row of the table, in HEAD's order."""
    words = {True: "met", False: "**missed**", None: "not judged"}
    parts = []
    if "bar" in row:
        limit = row["bar"].replace(">=", "at least").replace("<=", "at most")
        parts.append(f"{limit}: {words[row['met']]}")
        value = row.get(row["bar_field"])
        if value is not None and row["bar_field"] not in ("ms", "tflops", "sound"):
            parts[0] += f" ({number(value)})"
    if "error" in row:
        parts.append(row["error"])
    elif "ms" not in row and "note" in row:
        parts.append(row["note"])
    tflops = row.get("tflops")
    return [
        row["case"],
        f"{row['tokens']:,}",
        number(row.get("ms")),
        "-" if tflops is None else f"{tflops:.1f}",
        number(row.get("fa3_ms")),
        "; ".join(parts) or "-",
    ]


def table(record: Record, name: str, every: bool = False) -> str:
    """What was measured where, the table, and what a reader must know of it."""
    facts, found, rows = record["machine"], record["summary"], record["results"]
    shown = [cells(row) for row in rows if every or "bar" in row]
    head = wrapped(
        f"`{name}`: one {facts.get('gpu', facts['cpu'])}, {facts['date'][:10]}, commit "
        f"{facts['commit']}, torch {facts['torch']}; one layer, {record['dtype']}, batch 1, "
        f"{record['heads']} query heads, {record['kv_heads']} KV heads, D={record['head_dim']}.",
        f"{found['met']} of {found['bars']} bars met.",
    )
    lines = [
        "| " + " | ".join(HEAD) + " |",
        "|---|" + "---:|" * (len(HEAD) - 2) + "---|",
        *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in shown),
    ]
    ran = any(row["case"] == FA3 and "ms" in row for row in rows)
    notes = [
        "Times are medians of whole operator calls; FlashAttention-3 "
        + ("is dense on as many tokens, in the same run." if ran else "did not run.")
    ]
    traced = {row["ms_is"] for row in rows if "ms_is" in row}
    notes += [f"Estimate and plan: {text}." for text in sorted(traced)]
    if any(row["target"] == "T3" and "bar" in row for row in rows):
        notes.append(f"Vertical-slash: {record['peers']['note']}.")
    if not record["complete"]:
        notes.append("The run was cut short: rows are missing.")
    return "\n".join([head, "", *lines, "", wrapped(*notes)])


def render(paths: Sequence[Path], every: bool = False) -> str:
    """The tables of records, or the line that says that there is none."""
    tables = []
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("benchmark") != "prefill-bars":
            raise ValueError(
                f"{path}: expected a record of prefill_bars.py, got {record.get('benchmark')!r}"
            )
        inside = path.resolve().is_relative_to(ROOT)
        name = path.resolve().relative_to(ROOT).as_posix() if inside else path.name
        tables.append(table(record, name, every))
    return "\n\n".join(tables) or wrapped(NOTHING)


def replaced(text: str, content: str) -> str:
    """``text`` with ``content`` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END} once each")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{content}\n{END}{text.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    parser.add_argument("--all", action="store_true", help="rows without a bar too")
    parser.add_argument("--write", action="store_true", help="replace the table in the README")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file to write")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where records are looked for"
    )
    arguments = parser.parse_args(argv)
    try:
        content = render(arguments.records or newest(arguments.results), arguments.all)
        if arguments.write:
            text = arguments.readme.read_text(encoding="utf-8")
            arguments.readme.write_text(replaced(text, content), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
