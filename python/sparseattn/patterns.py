"""The four kinds of attention pattern a query head can be given, as small frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True)
class Dense:
    """Every key at or before the query's position."""

    kind: ClassVar[str] = "dense"
    code: ClassVar[int] = 0

    def sizes(self) -> tuple[int, int]:
        return (0, 0)


@dataclass(frozen=True)
class AShape:
    """The first ``sink`` keys and the ``window`` most recent ones (the query's own included)."""

    sink: int
    window: int
    kind: ClassVar[str] = "a_shape"
    code: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_sizes(self, minimum=0)

    def sizes(self) -> tuple[int, int]:
        return (self.sink, self.window)


@dataclass(frozen=True)
class VerticalSlash:
    """``columns`` keys that all later queries see and ``offsets`` diagonals (MInference)."""

    columns: int
    offsets: int
    kind: ClassVar[str] = "vertical_slash"
    code: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_sizes(self, minimum=0)

    def sizes(self) -> tuple[int, int]:
        return (self.columns, self.offsets)


@dataclass(frozen=True)
class BlockSparse:
    """The ``top_k`` best key blocks of 64 for each query block of 64."""

    top_k: int
    kind: ClassVar[str] = "block_sparse"
    code: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check_sizes(self, minimum=1)

    def sizes(self) -> tuple[int, int]:
        return (self.top_k, 0)


Pattern = Dense | AShape | VerticalSlash | BlockSparse
PATTERNS: dict[str, type] = {p.kind: p for p in (Dense, AShape, VerticalSlash, BlockSparse)}


def _check_sizes(pattern: Pattern, minimum: int) -> None:
    for field in fields(pattern):
        value = getattr(pattern, field.name)
        name = f"{type(pattern).__name__}.{field.name}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected int, got {type(value).__name__}")
        if not minimum <= value < 2**31:
            raise ValueError(f"{name}: expected {minimum} <= {field.name} < 2**31, got {value}")
