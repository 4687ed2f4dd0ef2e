"""Reads the records of results/: what kind each is, where and when it was made, which is shown.

Of a kind the newest complete record is shown, or the newest one where none is complete. Evaluations
are told apart by their model, too, and whole models' decode by what is kept in fp8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    path: Path
    name: str  # below the folder of records
    kind: str
    data: Row

    @property
    def machine(self) -> Row:
        """The facts of the machine; of an evaluation on several, the last one's."""
        found = self.data.get("machine", self.data)
        machines = self.data.get("machines")
        if isinstance(machines, list) and machines:
            found = machines[-1]
        return found if isinstance(found, dict) else {"gpu": found} | self._top("date", "torch")

    def _top(self, *names: str) -> Row:
        return {name: self.data[name] for name in names if name in self.data}

    @property
    def card(self) -> str:
        return str(self.machine.get("gpu") or self.machine.get("cpu") or "machine not recorded")

    @property
    def date(self) -> str:
        return str(self.machine.get("date") or self.data.get("date") or "")

    @property
    def commit(self) -> str:
        arguments = self.data.get("arguments")
        given = arguments.get("commit") if isinstance(arguments, dict) else None
        return str(self.machine.get("commit") or self.data.get("commit") or given or "not recorded")

    @property
    def complete(self) -> bool:
        return self.data.get("complete") is not False

    @property
    def rows(self) -> list[Row]:
        rows = self.data.get("results")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def where(self) -> str:
        """Card, date, commit and torch, for the head of a section."""
        torch = self.machine.get("torch")
        parts = [f"one {self.card}", self.date[:10], f"commit {self.commit[:12]}"]
        return ", ".join(part for part in [*parts, f"torch {torch}" if torch else ""] if part)


def kind_of(data: Row) -> str:
    """The benchmark's name; "eval" and "tests" have none in their records. Else nothing."""
    if str(data.get("format", "")).startswith("sparseattn-eval") or (
        "benchmark" not in data and isinstance(data.get("cells"), list)
    ):
        return "eval"
    if "benchmark" in data:
        return str(data["benchmark"])
    return "tests" if "suite" in data or "passed" in data else ""


def read(folder: Path) -> list[Record]:
    """Every record in the folder and the folders in it, by name; other JSON files are left out."""
    records = []
    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected a JSON record ({error})") from error
        kind = kind_of(data) if isinstance(data, dict) else ""
        if kind:
            records.append(Record(path, path.relative_to(folder).as_posix(), kind, data))
    return records


def model_of(record: Record) -> str:
    """The model of an evaluation, without its folder."""
    settings = record.data.get("settings")
    name = settings.get("model") if isinstance(settings, dict) else None
    return Path(str(name)).name if name else "model not recorded"


def variant(record: Record) -> str:
    """What sets a record apart from others of its kind."""
    if record.kind == "eval":
        return model_of(record)
    arguments = record.data.get("arguments")
    if record.kind == "decode-model" and isinstance(arguments, dict):
        parts = [name for name in ("values", "factor") if arguments.get(name) == "fp8"]
        return f"{' and '.join(parts)} in fp8" if parts else ""
    return ""


def newest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """kind -> the records that are shown."""
    best: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.kind, variant(record))
        other = best.get(key)
        if other is None or _rank(record) > _rank(other):
            best[key] = record
    shown: dict[str, list[Record]] = {}
    for kind, name in sorted(best):
        shown.setdefault(kind, []).append(best[kind, name])
    return shown


def _rank(record: Record) -> tuple[bool, str, str]:
    return record.complete, record.date, record.name
