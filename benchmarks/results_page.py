"""Makes docs/results.md, and its pictures, from the JSON records of results/.

    python results_page.py --write      # the page, and docs/results/*.png (matplotlib)
    python results_page.py --check      # exit status 1 if the page is not what the records give
    python results_page.py              # prints it

Of a kind of record the newest complete one is shown; no number is written by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import results_records
import results_tables as tables
from common import RESULTS
from readme_table import ROOT, wrapped
from results_records import Record

PAGE = ROOT / "docs" / "results.md"
ABSENT = "Not recorded yet."
MADE = "<!-- Made by benchmarks/results_page.py from the records; changes by hand are lost. -->"
ABOUT = (
    "Every number here comes from a JSON record in [benchmarks/results]({records}), made by the "
    "script that is named; of several records of a kind the newest complete one is shown. How "
    "times are taken and what is counted: [benchmarks/README.md]({readme}). What was expected, and "
    "what came of it: [benchmarks/notes.md]({notes}). T1 to T13 are the project's targets."
)


@dataclass(frozen=True)
class Part:
    """Part of a section: the kind of record, its title, who makes it, its table, if it is drawn."""

    kind: str
    title: str
    script: str
    table: Callable[[Record], str]
    drawn: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    parts: tuple[Part, ...]


SECTIONS = (
    Section(
        "Accuracy",
        (Part("eval", "Evaluation", "sparseattn eval", tables.evaluation, True),),
    ),
    Section(
        "Prefill",
        (
            Part("prefill-bars", "Targets", "prefill_bars.py", tables.prefill_bars, True),
            Part("peers", "Other libraries", "peers/run.py", tables.peers),
            Part(
                "prefill",
                "By length and mix of patterns",
                "sparseattn bench prefill",
                tables.prefill,
                True,
            ),
            Part(
                "prefill_attention",
                "Operator by operator",
                "prefill_attention.py",
                tables.prefill_attention,
            ),
            Part("min_length", "From which length", "min_length.py", tables.min_length),
            Part("cpu_attention", "On a CPU", "cpu_attention.py", tables.cpu_attention),
        ),
    ),
    Section(
        "Decode",
        (
            Part("decode-step", "One layer", "decode_step.py", tables.decode_step, True),
            Part("decode-fp8", "Values and factors in fp8", "decode_fp8.py", tables.decode_fp8),
            Part("cpp_decode", "The kernels alone", "cpp/bench_decode", tables.cpp_decode),
            Part("decode-model", "Whole models", "decode_model.py", tables.decode_model, True),
            Part(
                "long-generation",
                "Long generation",
                "long_generation.py",
                tables.long_generation,
            ),
        ),
    ),
    Section(
        "End to end",
        (
            Part(
                "end-to-end",
                "Prompt and generation",
                "end_to_end.py",
                tables.end_to_end,
                True,
            ),
        ),
    ),
    Section("Tests", (Part("tests", "On a GPU", "tests/gpu_record.py", tables.tests),)),
)


def picture(record: Record, page: Path) -> Path:
    name = record.name.removesuffix(".json").replace("/", "-")
    return page.parent / page.stem / f"{name}.png"


def link(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target.resolve(), page.parent.resolve())).as_posix()


def part_text(part: Part, records: Sequence[Record], page: Path) -> str:
    lines = [f"### {part.title}"]
    if not records:
        lines.append(f"{ABSENT} (`{part.script}`)")
    for record in records:
        name = f"[{record.name}]({link(record.path, page)})"
        what = results_records.variant(record)
        what = f", {what}" if what else ""
        cut = "" if record.complete else " The run was cut short: rows are missing."
        lines.append(f"`{part.script}`: {name}, {record.where}{what}.{cut}")
        lines.append(part.table(record))
        if part.drawn:
            lines.append(f"![{part.title}]({link(picture(record, page), page)})")
    return "\n\n".join(lines)


def every_record(records: Sequence[Record], shown: set[Path], page: Path) -> str:
    lines = [
        [
            f"[{record.name}]({link(record.path, page)})",
            record.kind,
            record.card,
            record.date[:10] or tables.NOTHING,
            record.commit[:12],
            "yes" if record.path in shown else "no",
        ]
        for record in records
    ]
    head = ("record", "kind", "machine", "date", "commit", "shown above")
    return f"## All records\n\n{tables.markdown(head, lines, len(head))}"


def render(folder: Path, page: Path) -> tuple[str, list[tuple[Record, Path]]]:
    """The page, and the records that it shows pictures of with the pictures' files."""
    records = results_records.read(folder)
    newest = results_records.newest(records)
    about = ABOUT.format(
        records=link(folder, page),
        readme=link(RESULTS.parent / "README.md", page),
        notes=link(RESULTS.parent / "notes.md", page),
    )
    parts = [MADE, "# Results", wrapped(about)]
    pictures, shown = [], set()
    for section in SECTIONS:
        parts.append(f"## {section.title}")
        for part in section.parts:
            own = newest.get(part.kind, [])
            parts.append(part_text(part, own, page))
            shown |= {record.path for record in own}
            if part.drawn:
                pictures += [(record, picture(record, page)) for record in own]
    parts.append(every_record(records, shown, page))
    return "\n\n".join(parts) + "\n", pictures


def problems(text: str, pictures: Sequence[tuple[Record, Path]], page: Path) -> list[str]:
    """What of the page is not as the records give it."""
    found = page.read_text(encoding="utf-8") if page.is_file() else ""
    wrong = []
    if found != text:
        pairs = enumerate(zip_longest(found.splitlines(), text.splitlines()), start=1)
        line, (old, new) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        wrong.append(f"{page.name}, line {line}: {old!r}, the records give {new!r}")
    wrong += [f"{path.name}: missing" for _, path in pictures if not path.is_file()]
    return wrong


def write(text: str, pictures: Sequence[tuple[Record, Path]], page: Path, redraw: bool) -> None:
    """The page and its pictures; those of records that are no longer shown go."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    folder = page.parent / page.stem
    wanted = {path for _, path in pictures}
    for path in folder.glob("*.png") if folder.is_dir() else ():
        if path not in wanted:
            path.unlink()
    missing = [(record, path) for record, path in pictures if redraw or not path.is_file()]
    if missing:
        import results_plots  # takes matplotlib

        for record, path in missing:
            results_plots.draw(record, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write the page, draw new pictures")
    action.add_argument("--check", action="store_true", help="compare the page with the records")
    parser.add_argument("--redraw", action="store_true", help="with --write: all pictures")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where records are looked for"
    )
    arguments = parser.parse_args(argv)
    try:
        text, pictures = render(arguments.results, arguments.page)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.check:
        wrong = problems(text, pictures, arguments.page)
        for line in wrong:
            print(line, file=sys.stderr)
        if wrong:
            print("python benchmarks/results_page.py --write makes it anew", file=sys.stderr)
        return int(bool(wrong))
    if arguments.write:
        write(text, pictures, arguments.page, arguments.redraw)
        print(f"wrote {arguments.page}")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
