"""The file that a search keeps its scores in, and goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sparseattn.config import write_atomic


class Journal:
    """All scores of a search: a header line, then one line for each layer of each prompt, of errors
    (``records``) or of harms (``harms``).

    Lines are only appended; a half-written last line is dropped on the next start.
    """

    def __init__(self, output: Path | None, header: dict[str, Any], resume: bool) -> None:
        self.records: dict[tuple[int, int], dict[str, Any]] = {}
        self.harms: dict[tuple[int, int], list[list[float]]] = {}
        self.path = None if output is None else output.with_name(output.name + ".search.jsonl")
        if self.path is None:
            return
        lines = [json.dumps(header)]
        if resume and self.path.is_file():
            lines += self._read(self.path.read_text(encoding="utf-8"), header)
        write_atomic(self.path, "\n".join(lines) + "\n")

    def _read(self, text: str, header: dict[str, Any]) -> list[str]:
        complete = text.split("\n")[:-1]
        try:
            found, *records = [json.loads(line) for line in complete]
        except ValueError as error:
            raise ValueError(f"{self.path}: expected lines of a search, got: {error}") from error
        # A model's name is where it was loaded from; its weights tell whether it is the same.
        differing = [
            key
            for key in header
            if not isinstance(found, dict) or (key != "model" and found.get(key) != header[key])
        ]
        if differing:
            raise ValueError(
                f"{self.path}: expected a search with the same settings, got other "
                f"{', '.join(differing)}; choose another output, or resume=False to start anew"
            )
        for record in records:
            self._keep(record)
        return complete[1:]

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        key = record["prompt"], record["layer"]
        if "harms" in record:
            self.harms[key] = record["harms"]
        else:
            self.records[key] = record
