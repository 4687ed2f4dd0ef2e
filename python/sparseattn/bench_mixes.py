"""The layers that ``sparseattn bench prefill`` times, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparseattn.config import PatternConfig
from sparseattn.patterns import PATTERNS, AShape, BlockSparse, Pattern, VerticalSlash

LLAMA = "gradientai/Llama-3-8B-Instruct-262k"
NAMED: dict[str, Pattern] = {
    "vertical_slash (1000, 6096)": VerticalSlash(1000, 6096),
    "vertical_slash (512, 2048)": VerticalSlash(512, 2048),
    "vertical_slash (30, 800)": VerticalSlash(30, 800),
    "vertical_slash (3500, 100)": VerticalSlash(3500, 100),
    "block_sparse 100": BlockSparse(100),
    "a_shape (1024, 4096)": AShape(1024, 4096),
}
DEFAULT = (*NAMED, LLAMA)
SMOKE = ("vertical_slash (60, 200)", "block_sparse 2", "a_shape (64, 128)", LLAMA)

_PATTERN = re.compile(r"(?:(?P<kind>[a-z_]+)\s*)?\(?\s*(?P<sizes>\d+(?:\s*,\s*\d+)?)\s*\)?")


@dataclass(frozen=True)
class Mix:
    """Layers of a model: distinct ones, and how often each occurs; results are their mean."""

    name: str
    layers: tuple[tuple[Pattern, ...], ...]  # [layer][query head]
    times: tuple[int, ...]

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of all heads, if there is but one."""
        distinct = {pattern for layer in self.layers for pattern in layer}
        return distinct.pop() if len(distinct) == 1 else None


def resolve(names: Sequence[str], heads: int) -> list[Mix]:
    """Mixes by name: "vertical_slash (1000, 6096)", also just "(1000, 6096)", "block_sparse 100",
    "a_shape (1024, 4096)", the name of a preset (its layers; with another number of heads spread
    over ``heads``), a file of patterns, or "all" for the named ones and every preset once.

    Raises ValueError for anything else.
    """
    mixes: dict[str, Mix] = {}
    for name in names:
        for mix in _all(heads) if name == "all" else [_resolve(name, heads)]:
            mixes[mix.name] = mix
    return list(mixes.values())


def _all(heads: int) -> list[Mix]:
    found = [_resolve(name, heads) for name in NAMED]
    seen = set()
    for name in PatternConfig.presets():
        mix = _resolve(name, heads)
        if mix.layers not in seen:  # models share files
            seen.add(mix.layers)
            found.append(mix)
    return found


def _resolve(name: str, heads: int) -> Mix:
    match = _PATTERN.fullmatch(name.strip())
    kind = match and (match["kind"] or VerticalSlash.kind)
    if match is None or kind not in PATTERNS:
        try:
            return _of_config(name, PatternConfig.load(name), heads)
        except ValueError as error:
            raise ValueError(
                f'--mixes: expected a pattern with sizes ("vertical_slash (1000, 6096)"), "all", a '
                f"file or a preset, got {name!r} ({error})"
            ) from error
    sizes = [int(size) for size in match["sizes"].split(",")]
    wanted = 1 if kind == BlockSparse.kind else 2
    if kind == "dense" or len(sizes) != wanted:
        raise ValueError(f"--mixes: {kind} expects {wanted} sizes, got {name!r}")
    shown = f"({sizes[0]}, {sizes[1]})" if wanted == 2 else sizes[0]
    return Mix(f"{kind} {shown}", ((PATTERNS[kind](*sizes),) * heads,), (1,))


def _of_config(name: str, config: PatternConfig, heads: int) -> Mix:
    count = config.num_heads
    spread = [
        tuple(layer[head * count // heads] for head in range(heads)) for layer in config.layers
    ]
    layers = Counter(spread)
    return Mix(name, tuple(layers), tuple(layers.values()))
