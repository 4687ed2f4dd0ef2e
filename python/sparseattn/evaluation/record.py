"""The record of an evaluation, eval.json: written after every cell, read by a rerun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseattn.config import write_atomic

FORMAT = "sparseattn-eval"
VERSION = 1
#: What a cell is found by.
KEY = ("kind", "method", "task", "length", "source")


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(name) for name in KEY)


class Record:
    """Settings, machines and cells. A cell is one method on one task at one length, with the raw
    result of every example; cells of other methods, tasks and lengths may join it later."""

    def __init__(self, path: Path, settings: dict[str, Any], machine: dict[str, Any]) -> None:
        """Goes on from the file at ``path`` if there is one.

        Raises ValueError if that is no such record, or of other settings.
        """
        self.path, self.settings = path, settings
        self.machines: list[dict[str, Any]] = []
        self._cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._texts: dict[tuple[Any, ...], str] = {}  # of cells, as they are written
        if path.is_file():
            self._read()
        if machine not in self.machines:
            self.machines.append(machine)

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            good = data["format"] == FORMAT and data["version"] == VERSION
            found, machines, cells = data["settings"], data["machines"], data["cells"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: expected the record of an evaluation ({error})"
            ) from error
        if not good:
            raise ValueError(
                f"{self.path}: expected format {FORMAT}, version {VERSION}, got "
                f"{data['format']}, {data['version']}"
            )
        differing = [
            f"{name} {found.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in sorted({*found, *self.settings})
            if found.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.path}: holds an evaluation with other settings ({'; '.join(differing)}); "
                "choose another --output"
            )
        self.machines = machines
        self._cells = {key_of(cell): cell for cell in cells}

    @property
    def cells(self) -> list[dict[str, Any]]:
        return list(self._cells.values())

    def has(self, **key: Any) -> bool:
        return key_of(key) in self._cells

    def add(self, cell: dict[str, Any]) -> None:
        """Adds a finished cell and writes the file, which is whole at any time."""
        self._cells[key_of(cell)] = cell
        self._texts.pop(key_of(cell), None)
        self.write()

    def data(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "machines": self.machines,
            "cells": self.cells,
        }

    def write(self) -> None:
        """One line for every cell's facts and one for every example."""
        for key, cell in self._cells.items():
            if key not in self._texts:
                self._texts[key] = _text_of(cell)
        head = {key: value for key, value in self.data().items() if key != "cells"}
        cells = ",\n".join(self._texts[key] for key in self._cells)
        write_atomic(
            self.path, json.dumps(head, indent=1)[:-2] + f',\n "cells": [\n{cells}\n ]\n}}\n'
        )


def _text_of(cell: dict[str, Any]) -> str:
    facts = {key: value for key, value in cell.items() if key != "examples"}
    rows = ",\n   ".join(json.dumps(row, ensure_ascii=False) for row in cell["examples"])
    return f'  {json.dumps(facts, ensure_ascii=False)[:-1]}, "examples": [\n   {rows}\n  ]}}'
