"""The four kinds of attention pattern a query head can be given, as small frozen dataclasses.

``sizes()`` and ``options()`` are what a pattern travels with as integers (see ``ops.flatten``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

METHODS = ("mean", "antidiagonal")
STRIDES = (4, 8, 16, 32)
SIZES = ("sink", "window", "columns", "offsets", "top_k")


@dataclass(frozen=True)
class Dense:
    """Every key at or before the query's position."""

    kind: ClassVar[str] = "dense"
    code: ClassVar[int] = 0

    def sizes(self) -> tuple[int, int]:
        return (0, 0)

    def options(self) -> int:
        return 0


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

    def options(self) -> int:
        return 0


@dataclass(frozen=True)
class VerticalSlash:
    """``columns`` keys that all later queries see and ``offsets`` diagonals (MInference).

    With a ``share`` in (0, 1] these two are limits: of the columns and offsets allowed, the
    cheapest are kept that cover the share of the attention mass (``estimate_vertical_slash``).
    """

    columns: int
    offsets: int
    share: float | None = None
    kind: ClassVar[str] = "vertical_slash"
    code: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_sizes(self, minimum=0)
        _check_share(self)

    def sizes(self) -> tuple[int, int]:
        return (self.columns, self.offsets)

    def options(self) -> int:
        return _millionths(self.share) << 16


@dataclass(frozen=True)
class BlockSparse:
    """The ``top_k`` best key blocks of 64 for each query block of 64.

    With a ``share`` in (0, 1], ``top_k`` is a limit and a row keeps the fewest blocks that reach
    the share. ``method`` is how blocks are scored, "mean" or "antidiagonal"; ``stride`` (4, 8, 16
    or 32) belongs to the latter (``estimate_block_sparse``).
    """

    top_k: int
    share: float | None = None
    method: str = "mean"
    stride: int = 16
    kind: ClassVar[str] = "block_sparse"
    code: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check_sizes(self, minimum=1)
        _check_share(self)
        if not isinstance(self.method, str):
            raise TypeError(f"BlockSparse.method: expected str, got {type(self.method).__name__}")
        if self.method not in METHODS:
            expected = " or ".join(f'"{method}"' for method in METHODS)
            raise ValueError(f'BlockSparse.method: expected {expected}, got "{self.method}"')
        if not isinstance(self.stride, int) or isinstance(self.stride, bool):
            raise TypeError(f"BlockSparse.stride: expected int, got {type(self.stride).__name__}")
        if self.stride not in STRIDES:
            raise ValueError(f"BlockSparse.stride: expected 4, 8, 16 or 32, got {self.stride}")

    def sizes(self) -> tuple[int, int]:
        return (self.top_k, 0)

    def options(self) -> int:
        stride = self.stride if self.method == "antidiagonal" else 0
        return stride << 8 | _millionths(self.share) << 16


Pattern = Dense | AShape | VerticalSlash | BlockSparse
PATTERNS: dict[str, type] = {p.kind: p for p in (Dense, AShape, VerticalSlash, BlockSparse)}


def _check_sizes(pattern: Pattern, minimum: int) -> None:
    for size in SIZES:
        if not hasattr(pattern, size):
            continue
        value = getattr(pattern, size)
        name = f"{type(pattern).__name__}.{size}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected int, got {type(value).__name__}")
        if not minimum <= value < 2**31:
            raise ValueError(f"{name}: expected {minimum} <= {size} < 2**31, got {value}")


def _check_share(pattern: Pattern) -> None:
    value, name = pattern.share, f"{type(pattern).__name__}.share"
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected float or None, got {type(value).__name__}")
    if not 1e-6 <= value <= 1:
        raise ValueError(f"{name}: expected 1e-6 <= share <= 1 or None, got {value}")


def _millionths(share: float | None) -> int:
    return 0 if share is None else round(share * 1_000_000)


def options_of(pattern: Pattern) -> dict[str, Any]:
    """The keyword arguments beyond sizes that an estimate of this pattern takes."""
    if isinstance(pattern, VerticalSlash):
        return {"share": pattern.share}
    if isinstance(pattern, BlockSparse):
        return {"share": pattern.share, "method": pattern.method, "stride": pattern.stride}
    return {}
