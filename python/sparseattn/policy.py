"""From which length on sparse prefill beats dense: ``recommended_min_length`` of a layer.

It reads a table of measurements (``min_lengths.json`` beside this file, or one of your own from
``sparseattn bench prefill --record-policy FILE``), which has, for every path (the first word of
what ``sparseattn info`` says: ``cpu``, ``sm80``, ...), classes: layers all of whose heads have one
pattern, with the ratio of their time, estimate included, to the fastest dense attention's, at every
measured length::

    {
      "format": "sparseattn-min-lengths",
      "version": 1,
      "paths": {
        "sm80": {
          "measured": {"device": "...", "date": "...", ...},
          "classes": [
            {"kind": "vertical_slash", "columns": 1000, "offsets": 6096,
             "ratios": {"16384": 1.77, "32768": 1.07, "65536": 0.62}}
          ]
        }
      }
    }

A class may say ``"from"`` where its ratios are not of layers measured with that pattern alone.
A layer's heads share one launch, whose time is about the sum of theirs, so its ratio is the mean of
its heads' classes. Sparse runs from the shortest measured length from which on that mean is at most
1. A head's class is the smallest of its kind that is at least as large in both sizes; without one,
the largest of its kind, its ratios scaled with the keys selected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from sparseattn.config import pattern_from_json, pattern_to_json, write_atomic
from sparseattn.info import path as path_of
from sparseattn.patterns import PATTERNS, Pattern

FORMAT = "sparseattn-min-lengths"
VERSION = 1
SHIPPED = Path(__file__).parent / "min_lengths.json"
#: For paths that the shipped table has no measurements of.
DEFAULT_MIN_LENGTH = 32768
#: No prompt is that long: such a layer always runs dense.
NEVER = 2**31


@dataclass(frozen=True)
class MixClass:
    """A measured layer: all heads have ``pattern``; ratios[length] is its time over dense's."""

    pattern: Pattern
    ratios: dict[int, float]

    @property
    def keys(self) -> int:
        """About how many keys a row selects, in the pattern's own unit."""
        return sum(self.pattern.sizes())

    def holds(self, pattern: Pattern) -> bool:
        """Whether ``pattern``, of the same kind, is at most as large in both sizes."""
        pairs = zip(pattern.sizes(), self.pattern.sizes(), strict=True)
        return all(size <= own for size, own in pairs)

    def ratio(self, length: int) -> float:
        """At ``length``; where that was not measured, at the next shorter one that was, else at the
        shortest (ratios fall with the length, so this errs towards dense)."""
        shorter = [x for x in self.ratios if x <= length]
        return self.ratios[max(shorter) if shorter else min(self.ratios)]


def recommended_min_length(
    patterns: Sequence[Pattern],
    device: str | torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    table: str | PathLike[str] | None = None,
) -> int:
    """The shortest kv_len, in tokens, from which on a layer should run sparse; NEVER: at none.

    Args:
        patterns: one pattern for every query head of the layer.
        device, dtype, head_dim: of q, they choose the path.
        table: a file that ``bench prefill --record-policy`` wrote; None: the shipped table, which
            also serves paths that the file does not have.

    Where the operators refuse such tensors, and for a path that no table has, DEFAULT_MIN_LENGTH.

    Raises:
        TypeError, ValueError: no patterns, something else than patterns, or a table that is not
            valid.
        OSError: no such file.
    """
    kinds = tuple(PATTERNS.values())
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError("patterns: expected one for every query head, got none")
    for head, pattern in enumerate(patterns):
        if not isinstance(pattern, kinds):
            raise TypeError(f"patterns[{head}]: expected a pattern, got {type(pattern).__name__}")
    name = path_of(device, dtype, head_dim).split()[0]  # "refused:" where they are not taken
    for file in (SHIPPED,) if table is None else (table, SHIPPED):
        paths = load(file)
        if name in paths:
            return min_length(patterns, paths[name])
    return DEFAULT_MIN_LENGTH


def min_length(patterns: Iterable[Pattern], classes: Sequence[MixClass]) -> int:
    """recommended_min_length for the classes of one path."""
    heads = [_class_of(pattern, classes) for pattern in patterns]
    lengths = sorted({length for one in classes for length in one.ratios})

    def ratio(length: int) -> float:
        return sum(scale * found.ratio(length) for found, scale in heads) / len(heads)

    best = None
    for length in reversed(lengths):
        if ratio(length) > 1:
            break
        best = length
    if best is not None:
        return best
    # Beyond the last length: what dense heads take stays, all else falls as 1 / length.
    fixed = sum(found.ratio(lengths[-1]) for found, _ in heads if found.pattern.kind == "dense")
    fixed /= len(heads)
    falling = ratio(lengths[-1]) - fixed
    if fixed >= 1:
        return NEVER
    needed = lengths[-1] * falling / (1 - fixed)
    return next((2**bit for bit in range(31) if 2**bit >= needed), NEVER)


def _class_of(pattern: Pattern, classes: Sequence[MixClass]) -> tuple[MixClass, float]:
    """The class of a head, and what its ratios are multiplied by."""
    same = [one for one in classes if one.pattern.kind == pattern.kind]
    holding = [one for one in same if one.holds(pattern)]
    if holding:
        return min(holding, key=lambda one: one.keys), 1.0
    largest = max(same, key=lambda one: one.keys)
    return largest, max(1.0, sum(pattern.sizes()) / largest.keys)


def load(file: str | PathLike[str]) -> dict[str, tuple[MixClass, ...]]:
    """The classes of every path of a table; ValueError, TypeError or OSError if it is not valid."""
    return _load(str(file))


@lru_cache(maxsize=4)
def _load(file: str) -> dict[str, tuple[MixClass, ...]]:
    return {name: _classes(file, name, entry) for name, entry in _read(file)["paths"].items()}


def _read(file: str | PathLike[str]) -> dict[str, Any]:
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'{file}: expected an object with "format": "{FORMAT}"')
    if data.get("version") != VERSION or not isinstance(data.get("paths"), dict):
        raise ValueError(f'{file}: expected version {VERSION} with "paths"')
    return data


def _classes(file: str, path: str, entry: Any) -> tuple[MixClass, ...]:
    classes = []
    try:
        for given in entry["classes"]:
            pattern = pattern_from_json(
                {key: x for key, x in given.items() if key not in ("ratios", "from")}
            )
            ratios = {int(length): float(ratio) for length, ratio in given["ratios"].items()}
            if not ratios or min(ratios) < 1 or not all(ratio > 0 for ratio in ratios.values()):
                raise ValueError(f"ratios of {pattern}: expected positive ones, got {ratios}")
            classes.append(MixClass(pattern, ratios))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: path {path}: {error}") from error
    missing = set(PATTERNS) - {one.pattern.kind for one in classes}
    if missing:
        raise ValueError(f"{file}: path {path}: no class of kind {', '.join(sorted(missing))}")
    return tuple(classes)


def save(
    file: str | PathLike[str],
    path: str,
    classes: Iterable[MixClass],
    measured: dict[str, Any],
) -> None:
    """Writes a table; one that is there keeps its other paths. ``measured`` says how and where."""
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "paths": {}}
    if Path(file).exists():
        data = _read(file)
    entries = [
        {**pattern_to_json(one.pattern), "ratios": {str(x): one.ratios[x] for x in one.ratios}}
        for one in classes
    ]
    data["paths"][path] = {"measured": measured, "classes": entries}
    write_atomic(file, dumps(data))
    _load.cache_clear()


def dumps(data: dict[str, Any]) -> str:
    """A table as text, one line a class."""
    paths = []
    for name, entry in data["paths"].items():
        lines = ",\n".join(f"        {json.dumps(one)}" for one in entry["classes"])
        measured = json.dumps(entry["measured"], indent=2).replace("\n", "\n      ")
        paths.append(
            f'    {json.dumps(name)}: {{\n      "measured": {measured},\n'
            f'      "classes": [\n{lines}\n      ]\n    }}'
        )
    return (
        f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n  "paths": {{\n'
        + ",\n".join(paths)
        + "\n  }\n}\n"
    )
