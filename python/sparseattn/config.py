"""Pattern configs: the patterns of all heads of all layers of a model, and their files.

Own format, one line a layer and one letter a head, so that a file can be read and diffed::

    {
      "format": "sparseattn-patterns",
      "version": 1,
      "model": "org/name",
      "patterns": {
        "a": {"kind": "vertical_slash", "columns": 1000, "offsets": 6096},
        "b": {"kind": "a_shape", "sink": 128, "window": 3968}
      },
      "layers": [
        "aababaaa",
        "abbbaaaa"
      ]
    }

Patterns that choose their sizes by a share of the mass have ``"share"`` too, block-sparse ones may
have ``"method"`` and ``"stride"``; what is left out has its default.

With more than 52 distinct patterns the codes take several letters and spaces part them. ``model``
may be null; keys other than these five are refused.
"""

from __future__ import annotations

import json
import os
import secrets
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparseattn.patterns import PATTERNS, AShape, BlockSparse, Pattern, VerticalSlash

FORMAT = "sparseattn-patterns"
VERSION = 1
_KEYS = ("format", "version", "model", "patterns", "layers")
_PRESETS = Path(__file__).parent / "presets"

# What MInference runs for a head that its file leaves out, and its fixed number of blocks.
_MINFERENCE_MISSING = VerticalSlash(1000, 6096)
_MINFERENCE_TOP_K = 100
_MINFERENCE_KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")


@dataclass(frozen=True, repr=False)
class PatternConfig:
    """Patterns of all heads of all layers of a model.

    ``layers[layer][head]`` is the pattern of a query head; every layer has the same number of
    heads. ``model`` is the model's name, or None. Nested lists become tuples.

    Raises:
        TypeError, ValueError: ``layers`` is not a rectangle of patterns; the text names the layer
            and head, what was expected and what came.
    """

    layers: tuple[tuple[Pattern, ...], ...]
    model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        if self.model is not None and not isinstance(self.model, str):
            raise TypeError(f"model: expected str or None, got {type(self.model).__name__}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return len(self.layers[0])

    def __repr__(self) -> str:
        distinct = len({pattern for layer in self.layers for pattern in layer})
        return (
            f"PatternConfig(model={self.model!r}, {self.num_layers} layers x {self.num_heads} "
            f"heads, {distinct} distinct patterns)"
        )

    @classmethod
    def from_layers(
        cls, layers: Iterable[Iterable[Pattern]], model: str | None = None
    ) -> PatternConfig:
        """A config from nested sequences ``layers[layer][head]``."""
        return cls(layers, model)  # type: ignore[arg-type]

    @classmethod
    def uniform(
        cls, pattern: Pattern, num_layers: int, num_heads: int, model: str | None = None
    ) -> PatternConfig:
        """The same pattern for every head of every layer."""
        for name, value in (("num_layers", num_layers), ("num_heads", num_heads)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        return cls(((pattern,) * num_heads,) * num_layers, model)

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str]) -> PatternConfig:
        """Reads a file (own format or MInference's JSON), or a shipped preset by model name.

        A string that names an existing file is read as that file; any other string is a preset
        name, matched without regard to case, with or without the organisation ("org/name" or
        "name"). ``presets()`` lists them.

        MInference's JSON is a list of layers; each maps a query head's number to
        ``[type, a, b, score]``. ``vertical_and_slash`` becomes ``VerticalSlash(a, b)``,
        ``stream_llm`` ``AShape(a, b)`` and ``block_sparse`` ``BlockSparse(100)``, whatever its
        sizes, as MInference runs it. Scores may be missing and are dropped. The number of heads is
        the highest head number plus one, and at least one layer has to list all of them; a head
        that another layer leaves out gets ``VerticalSlash(1000, 6096)``, as MInference gives it.

        Raises:
            FileNotFoundError: a path, or a string that ends in ".json", is no file.
            ValueError: no such preset (with close matches and all names), or the file is not
                valid; the text names file, layer and head.
        """
        if isinstance(path_or_name, str) and not os.path.isfile(path_or_name):
            if not path_or_name.lower().endswith(".json"):
                return _load_preset(path_or_name)
        elif not isinstance(path_or_name, (str, os.PathLike)):
            raise TypeError(
                f"path_or_name: expected str or path, got {type(path_or_name).__name__}"
            )
        return _load_file(Path(path_or_name))

    @staticmethod
    def presets() -> list[str]:
        """Names of the shipped presets, sorted."""
        return sorted(_preset_index(), key=str.lower)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the own format; the file is replaced at once or left as it was."""
        write_atomic(path, self.dumps())

    def dumps(self) -> str:
        """The own format as text."""
        counts = Counter(pattern for layer in self.layers for pattern in layer)
        ranked = sorted(counts, key=lambda p: (-counts[p], p.code, p.sizes(), p.options()))
        codes = dict(zip(ranked, _codes(len(ranked)), strict=True))
        gap = "" if len(ranked) <= len(string.ascii_letters) else " "
        palette = ",\n".join(
            f"    {json.dumps(code)}: {json.dumps(pattern_to_json(pattern))}"
            for pattern, code in codes.items()
        )
        layers = ",\n".join(
            "    " + json.dumps(gap.join(codes[pattern] for pattern in layer))
            for layer in self.layers
        )
        return (
            f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n'
            f'  "model": {json.dumps(self.model)},\n'
            f'  "patterns": {{\n{palette}\n  }},\n  "layers": [\n{layers}\n  ]\n}}\n'
        )


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """``{"kind": ..., size: ...}``, the form a pattern has in files; defaults are left out."""
    defaults = {field.name: field.default for field in fields(pattern)}
    sizes = {name: value for name, value in asdict(pattern).items() if value != defaults[name]}
    return {"kind": pattern.kind, **sizes}


def pattern_from_json(data: Any) -> Pattern:
    """Inverse of ``pattern_to_json``; raises ValueError or TypeError on anything else."""
    if not isinstance(data, dict):
        raise TypeError(f"expected an object with a kind and sizes, got {_short(data)}")
    sizes = dict(data)
    kind = sizes.pop("kind", None)
    if not isinstance(kind, str) or kind not in PATTERNS:
        raise ValueError(f"kind: expected one of {', '.join(PATTERNS)}, got {_short(kind)}")
    names = [field.name for field in fields(PATTERNS[kind]) if field.default is MISSING]
    known = {field.name for field in fields(PATTERNS[kind])}
    if not set(names) <= set(sizes) <= known:
        raise ValueError(
            f"{kind}: expected the sizes {', '.join(names) or '(none)'}, "
            f"got {', '.join(map(str, sizes)) or '(none)'}"
        )
    return PATTERNS[kind](**sizes)


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes text beside ``path`` and renames it into place, so no reader sees half a file."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(scratch, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _checked_layers(layers: Any) -> tuple[tuple[Pattern, ...], ...]:
    expected = "expected nested sequences of patterns [layer][head]"
    if isinstance(layers, (str, bytes, dict)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: {expected}, got {_short(layers)}")
    kinds = tuple(PATTERNS.values())
    checked = []
    for number, layer in enumerate(layers):
        if isinstance(layer, (str, bytes, dict)) or not isinstance(layer, Iterable):
            raise TypeError(f"layer {number}: {expected}, got {_short(layer)}")
        heads = tuple(layer)
        for head, pattern in enumerate(heads):
            if not isinstance(pattern, kinds):
                raise TypeError(
                    f"layer {number}, head {head}: expected one of "
                    f"{', '.join(kind.__name__ for kind in kinds)}, got {_short(pattern)}"
                )
        if not heads:
            raise ValueError(f"layer {number}: expected at least one head, got none")
        if checked and len(heads) != len(checked[0]):
            raise ValueError(
                f"layer {number}: expected {len(checked[0])} heads as in layer 0, got {len(heads)}"
            )
        checked.append(heads)
    if not checked:
        raise ValueError("layers: expected at least one layer, got none")
    return tuple(checked)


def _codes(count: int) -> list[str]:
    """``count`` distinct codes of letters, all of the smallest length that is enough."""
    letters = string.ascii_lowercase + string.ascii_uppercase
    width, total = 1, len(letters)
    while total < count:
        width, total = width + 1, total * len(letters)
    codes = []
    for number in range(count):
        code = ""
        for _ in range(width):
            number, digit = divmod(number, len(letters))
            code = letters[digit] + code
        codes.append(code)
    return codes


def _load_file(path: Path) -> PatternConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct_keys)
    except ValueError as error:  # not UTF-8, not JSON, or a key given twice
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    try:
        if isinstance(data, list):
            return _from_minference(data)
        if isinstance(data, dict) and data.get("format") == FORMAT:
            return _from_own(data)
        got = f"format {_short(data.get('format'))}" if isinstance(data, dict) else _short(data)
        raise ValueError(
            f'expected an object with "format": "{FORMAT}", or the list of layers that MInference '
            f"writes; got {got}"
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        raise ValueError(f"the key {twice[0]!r} twice in one object")
    return data


def _from_own(data: dict[str, Any]) -> PatternConfig:
    if set(data) != set(_KEYS):
        raise ValueError(f"expected the keys {', '.join(_KEYS)}, got {', '.join(data)}")
    if data["version"] != VERSION:
        raise ValueError(f"version: expected {VERSION}, got {_short(data['version'])}")
    if not isinstance(data["patterns"], dict) or not isinstance(data["layers"], list):
        raise TypeError('expected "patterns" to be an object and "layers" a list')
    palette = {}
    for code, entry in data["patterns"].items():
        if not code or not code.isascii() or not code.isalpha():
            raise ValueError(f"patterns: expected codes of letters a-z and A-Z, got {code!r}")
        try:
            palette[code] = pattern_from_json(entry)
        except (TypeError, ValueError) as error:
            raise ValueError(f"pattern {code!r}: {error}") from error
    spaced = any(len(code) > 1 for code in palette)
    layers = []
    for number, line in enumerate(data["layers"]):
        if not isinstance(line, str):
            raise TypeError(f"layer {number}: expected a string of codes, got {_short(line)}")
        codes = line.split() if spaced else list(line)
        for head, code in enumerate(codes):
            if code not in palette:
                raise ValueError(
                    f"layer {number}, head {head}: expected one of the codes "
                    f"{_short(' '.join(palette))}, got {code!r}"
                )
        layers.append([palette[code] for code in codes])
    return PatternConfig.from_layers(layers, data["model"])


def _from_minference(data: list[Any]) -> PatternConfig:
    layers: list[dict[int, Pattern]] = []
    for number, layer in enumerate(data):
        if not isinstance(layer, dict):
            raise TypeError(f"layer {number}: expected an object of heads, got {_short(layer)}")
        heads: dict[int, Pattern] = {}
        for key, entry in layer.items():
            where = f"layer {number}, head {key!r}"
            if not key.isascii() or not key.isdigit() or key != str(int(key)):
                raise ValueError(f"{where}: expected a head number, got {key!r}")
            try:
                heads[int(key)] = _minference_pattern(entry)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error
        layers.append(heads)
    if not layers:
        raise ValueError("expected at least one layer, got none")
    count = 1 + max((head for heads in layers for head in heads), default=-1)
    if not any(heads and len(heads) == count for heads in layers):
        raise ValueError(
            f"expected at least one layer that lists all heads, got none (highest head number "
            f"{count - 1}, longest layer {max(map(len, layers))} heads)"
        )
    return PatternConfig.from_layers(
        [[heads.get(head, _MINFERENCE_MISSING) for head in range(count)] for heads in layers]
    )


def _minference_pattern(entry: Any) -> Pattern:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) not in (3, 4):
        raise ValueError(f"expected [type, a, b, score], got {_short(entry)}")
    kind, a, b = entry[:3]
    if kind == "vertical_and_slash":
        return VerticalSlash(a, b)
    if kind == "stream_llm":
        return AShape(a, b)
    if kind == "block_sparse":
        return BlockSparse(_MINFERENCE_TOP_K)
    raise ValueError(f"type: expected one of {', '.join(_MINFERENCE_KINDS)}, got {_short(kind)}")


@lru_cache(maxsize=1)
def _preset_index() -> dict[str, str]:
    return json.loads((_PRESETS / "index.json").read_text(encoding="utf-8"))


def _load_preset(name: str) -> PatternConfig:
    index = _preset_index()
    wanted = name.lower()
    full = [known for known in index if known.lower() == wanted]
    bare = [known for known in index if known.lower().split("/", 1)[-1] == wanted]
    # Two organisations may publish one model; then both names lead to the same file.
    if full or len({index[known] for known in bare}) == 1:
        known = (full or bare)[0]
        return replace(_load_file(_PRESETS / index[known]), model=known)
    lowered = {known.lower(): known for known in index}
    close = [lowered[match] for match in get_close_matches(wanted, lowered, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"path_or_name: expected a file or the name of a preset, got {name!r}.{hint} "
        f"Presets: {', '.join(PatternConfig.presets())}"
    )


__all__ = ["PatternConfig", "pattern_from_json", "pattern_to_json", "write_atomic"]
