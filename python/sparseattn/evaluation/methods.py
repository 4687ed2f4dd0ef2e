"""The methods that ``eval`` compares: a prefill, and a cache for decode.

A method is ``PREFILL``, ``shadowkv`` or ``PREFILL+shadowkv``. Prefills: dense; every head a_shape,
vertical_slash or block_sparse of about the target density; searched, the best of these for each
head at the same density; adaptive, vertical-slash sized by a share of the attention mass. Sizes
grow with the prompt. shadowkv decodes with a ShadowKVCache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sparseattn import SHADOW_DEVICES
from sparseattn.config import PatternConfig
from sparseattn.info import path as path_of
from sparseattn.patterns import AShape, BlockSparse, Pattern, VerticalSlash
from sparseattn.search import SHARES
from sparseattn.search_cost import TILE, block_sparse_cost, budget_keys

PREFILLS = {
    "dense": "all keys",
    "a_shape": "every head the first keys and the latest",
    "vertical_slash": "every head columns and offsets, or all keys where it needs them",
    "block_sparse": "every head the best key blocks of 64",
    "searched": "every head the pattern that search finds at that density",
    "adaptive": "every head columns and offsets that cover a share of its attention mass",
}
SHADOWKV = "shadowkv"
DEFAULT = (*PREFILLS, SHADOWKV, f"searched+{SHADOWKV}")
#: Columns and offsets that adaptive may take: this part of the prompt's keys.
ADAPTIVE_LIMIT = 0.5
#: Models of more heads are searched by errors: harm takes a few forwards a head and prompt.
HARM_HEADS = 256
_MOST = 0.9  # of all keys: a head's candidates
_MIN_BOXES = 4  # of 64 keys, that a search needs in a row (search_cost.default_candidates)


@dataclass(frozen=True)
class Method:
    prefill: str
    shadow: bool

    @property
    def name(self) -> str:
        if not self.shadow:
            return self.prefill
        return SHADOWKV if self.prefill == "dense" else f"{self.prefill}+{SHADOWKV}"


def parse(name: str) -> Method:
    """A method by its name; ValueError for anything else."""
    parts = name.split("+")
    shadow = parts[-1] == SHADOWKV
    prefill = (parts[:-1] or ["dense"]) if shadow else parts
    if len(prefill) != 1 or prefill[0] not in PREFILLS:
        raise ValueError(
            f"--methods: expected {', '.join(PREFILLS)}, {SHADOWKV} or one of them "
            f"+{SHADOWKV}, got {name!r}"
        )
    return Method(prefill[0], shadow)


# --- patterns ------------------------------------------------------------------------------------


def near_keys(length: int, density: float) -> float:
    """T such that rows that see min(position, T) keys see ``density`` of all causal pairs."""
    return length * (1 - math.sqrt(1 - density))


def a_shape_of(length: int, density: float) -> AShape:
    """A box of 64 sink keys (less in short prompts) and a window."""
    keys = max(2, round(near_keys(length, density)))
    sink = min(TILE, keys // 4)
    return AShape(sink, keys - sink)


def block_sparse_of(length: int, density: float) -> BlockSparse:
    """The number of blocks that comes nearest to the density."""
    wanted, guess = budget_keys(density, length), int(near_keys(length, density) / TILE)
    choices = [x for x in range(guess - 1, guess + 3) if x >= 1]
    return BlockSparse(
        min(choices, key=lambda x: abs(block_sparse_cost(x, length, length) - wanted))
    )


def vertical_slashes_of(length: int, density: float) -> list[VerticalSlash]:
    """Candidates for a head: from few columns to many, and as many offsets as four times the
    density has keys for if they lay together; the search's budget rule takes offsets away for what
    a head may cost, and where they lie apart."""
    offsets = max(TILE, round(near_keys(length, min(_MOST, SHARES[-1] * density))))
    return [VerticalSlash(max(1, length // part), offsets) for part in (128, 36, 14, 5)]


def adaptive_of(length: int, share: float) -> VerticalSlash:
    limit = max(TILE, round(ADAPTIVE_LIMIT * length))
    return VerticalSlash(limit, limit, share=share)


def scaled(pattern: Pattern, factor: float) -> Pattern:
    """The pattern with its sizes times ``factor``, at least 1 where they are not 0."""
    sizes = {
        field.name: max(1, round(getattr(pattern, field.name) * factor))
        for field in fields(pattern)
        if field.name in ("sink", "window", "columns", "offsets", "top_k")
        and getattr(pattern, field.name)
    }
    return replace(pattern, **sizes)


def shortest_search(density: float) -> int:
    """The shortest prompt, in tokens, on which patterns of this density can be searched: with
    candidates of the largest cost that a head may have."""
    density = min(_MOST, SHARES[-1] * density)
    length = int(_MIN_BOXES * TILE / (1 - math.sqrt(1 - density)))
    while int(near_keys(length, density)) // TILE < _MIN_BOXES:
        length += 1
    return length


class PatternBook:
    """Patterns of a model for prompts of any length.

    vertical_slash and searched are fitted to the model for each of ``lengths`` on a few prompts,
    with ``sparseattn.search_patterns``: one budget of the density for the whole model, shared out
    by what patterns do to its predictions; a head that needs all keys may get them. (By errors of
    outputs on the first prompt, with one budget a layer, for a model of more than HARM_HEADS heads,
    or without ``by_harm``.) They are kept in ``folder``. A prompt of another length gets the
    patterns of the nearest of them, scaled, if it is within a quarter; else those of the largest
    power of two below.
    """

    def __init__(
        self,
        model: Any,
        prompts_of: Callable[[int], Iterable[tuple[torch.Tensor, int]]],
        folder: Path,
        *,
        density: float,
        share: float,
        lengths: Sequence[int] = (),
        given: PatternConfig | None = None,
        by_harm: bool = True,
        progress: bool = False,
    ) -> None:
        """prompts_of(length): what to fit patterns on, int64 [1, length + answer], each with how
        many of its last tokens are an answer (0: text). given: what searched takes instead of a
        search, at every length as it is."""
        self.model, self.prompts_of, self.folder = model, prompts_of, folder
        self.density, self.share, self.given = density, share, given
        self.by_harm = by_harm
        self.lengths, self.progress = tuple(lengths), progress
        self._kept: dict[tuple[str, int], PatternConfig] = {}
        self._prompts: dict[int, Sequence[tuple[torch.Tensor, int]]] = {}

    def config(self, prefill: str, length: int) -> PatternConfig | None:
        """Patterns for prompts of ``length`` tokens; None for dense."""
        if prefill == "dense":
            return None
        if prefill == "searched" and self.given is not None:
            return self.given
        if prefill in ("vertical_slash", "searched"):
            base = self._base(length)
            config = self._fitted(prefill, base)
            if base == length:
                return config
            factor = length / base
            return PatternConfig.from_layers(
                [[scaled(pattern, factor) for pattern in row] for row in config.layers]
            )
        pattern = {
            "a_shape": lambda: a_shape_of(length, self.density),
            "block_sparse": lambda: block_sparse_of(length, self.density),
            "adaptive": lambda: adaptive_of(length, self.share),
        }[prefill]()
        config = self.model.config
        return PatternConfig.uniform(pattern, config.num_hidden_layers, config.num_attention_heads)

    def _base(self, length: int) -> int:
        nearest = min(self.lengths, key=lambda own: abs(own - length), default=0)
        if 4 * abs(nearest - length) <= nearest:
            return nearest
        return max(1 << (length.bit_length() - 1), shortest_search(self.density))

    def _fitted(self, prefill: str, length: int) -> PatternConfig:
        key = (prefill, length)
        if key not in self._kept:
            from sparseattn.search import search_patterns

            self.folder.mkdir(parents=True, exist_ok=True)
            candidates = None
            if prefill == "vertical_slash":
                candidates = vertical_slashes_of(length, self.density)
            model = self.model.config
            heads = model.num_hidden_layers * model.num_attention_heads
            by_harm = self.by_harm and heads <= HARM_HEADS
            if length not in self._prompts:
                made = islice(self.prompts_of(length), None if by_harm else 1)
                self._prompts[length] = list(made)
            prompts = self._prompts[length]
            # Goes on from its own journal, or reads the result from it.
            self._kept[key] = search_patterns(
                self.model,
                [ids for ids, _ in prompts],
                candidates=candidates,
                budget=self.density,
                shared="model" if by_harm else "layer",
                answers=[answer for _, answer in prompts],
                output=self.folder / f"{prefill}-{length}.json",
                progress=self.progress,
            )
        return self._kept[key]


# --- ShadowKV ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShadowSizes:
    """Options of a ShadowKVCache; None: by the model's width and the prompt's length."""

    rank: int | None = None
    budget: int | None = None
    chunk: int = 8
    outliers: int | None = None

    def options(self, config: Any, length: int) -> dict[str, int]:
        """Arguments of ShadowKVCache for prompts of ``length`` tokens.

        By default three quarters of the keys' width as rank, at most the paper's 160; a budget of a
        thirty-second of the prompt, 64 to the paper's 2048 tokens; an outlier chunk for 1024
        tokens, 4 to the paper's 48.
        """
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        width = head_dim * config.num_key_value_heads
        budget = min(2048, max(64, length // 32)) // self.chunk * self.chunk
        defaults = {
            "rank": min(160, max(16, width * 3 // 4 // 16 * 16)),
            "sparse_budget": budget,
            "outlier_chunks": min(48, max(4, length // 1024)),
        }
        given = (self.rank, self.budget, self.outliers)
        chosen = {
            key: default if own is None else own
            for (key, default), own in zip(defaults.items(), given, strict=True)
        }
        return chosen | {"chunk_size": self.chunk}


def cache_of(method: Method, config: Any, sizes: ShadowSizes, length: int) -> Any:
    """A new cache for one batch of prompts of ``length`` tokens."""
    if method.shadow:
        from sparseattn import ShadowKVCache

        return ShadowKVCache(config, **sizes.options(config, length))
    from transformers import DynamicCache

    return DynamicCache(config=config)


def decode_share(cache: Any, length: int) -> float:
    """Share of a text's ``length`` keys that the first decode step attends to."""
    options = getattr(cache, "options", None)
    if options is None or length <= options.dense_limit:
        return 1.0
    chunks = (length - options.local) // options.chunk
    exact = min(options.outliers + options.sinks, chunks)
    chosen = min(options.top_k, chunks - exact)
    tail = length - chunks * options.chunk
    return ((exact + chosen) * options.chunk + tail) / length


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache of either kind holds."""
    if hasattr(cache, "memory"):
        return sum(cache.memory().values())
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# --- checks --------------------------------------------------------------------------------------


def check(
    methods: Sequence[Method],
    model: Any,
    sizes: ShadowSizes,
    density: float,
    share: float,
    lengths: Sequence[int],
    given: PatternConfig | None,
) -> None:
    """Refuses at the start what would fail later; ValueError names the option."""
    if not 0 < density < 1:
        raise ValueError(f"--density: expected 0 < density < 1, got {density}")
    if not 1e-6 <= share <= 1:
        raise ValueError(f"--share: expected 1e-6 <= share <= 1, got {share}")
    config = model.config
    weight = next(model.parameters())
    if any(method.prefill != "dense" for method in methods):
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        path = path_of(weight.device, weight.dtype, head_dim)
        if path.startswith("refused: "):
            raise ValueError(f"--methods: sparse prefill of this model is {path}")
    if any(method.shadow for method in methods):
        if weight.device.type not in SHADOW_DEVICES:
            raise ValueError(
                f"--methods: {SHADOWKV}: ShadowKVCache: expected a model on "
                f"{' or '.join(SHADOW_DEVICES)}, got {weight.device}; leave its methods out"
            )
        for length in lengths:
            cache_of(Method("dense", True), config, sizes, length)
    prefills = {method.prefill for method in methods}
    if given is not None:
        shape = (config.num_hidden_layers, config.num_attention_heads)
        if (given.num_layers, given.num_heads) != shape:
            raise ValueError(
                f"--patterns: expected {shape[0]} layers x {shape[1]} heads, got "
                f"{given.num_layers} x {given.num_heads}"
            )
    elif "searched" in prefills:
        least = shortest_search(density)
        for length in lengths:
            if length < least:
                raise ValueError(
                    f"--lengths: expected at least {least} tokens to search patterns of density "
                    f"{density}, got {length}; or give a larger --density, or --patterns"
                )
