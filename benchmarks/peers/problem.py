"""What is asked of every peer, what a peer offers for it, and checks that need no peer."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

TILE = 64
DENSE, VERTICAL_SLASH, BLOCK_SPARSE = "dense", "vertical_slash", "block_sparse"


@dataclass
class Problem:
    """Causal attention of one layer over the keys that ``kind`` selects."""

    kind: str
    q: Tensor  # [1, heads, tokens, head_dim]
    k: Tensor  # [1, kv_heads, tokens, head_dim]
    v: Tensor
    columns: Tensor | None = None  # int32 [1, heads, n] ascending, no two equal
    offsets: Tensor | None = None
    mask: Tensor | None = None  # bool [1, heads, blocks, blocks]; the diagonal is in it
    block: int = 0
    per_row: int | None = None  # every row of the mask has so many blocks, or all that it can

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @cached_property
    def repeated(self) -> tuple[Tensor, Tensor]:
        """k and v with as many heads as q, for peers without grouped heads."""
        group = self.heads // self.k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (self.k, self.v))
        return k, v


Keys = Callable[[int, int], Tensor]


@dataclass
class Offer:
    """A peer's way to compute a problem.

    ``call`` is timed and returns ``[1, heads, tokens, head_dim]``. What goes before it (index,
    plan, copies) is ``prepare``, timed apart where it can be called again; ``prepared`` says what
    it is. Where the peer's keys are not exactly the problem's, ``differs`` says how, and
    ``keys(head, tile)`` gives the positions that it sees in a tile of 64 query rows, causality
    aside; ``pairs`` is how many (query, key) pairs it computes.
    """

    name: str
    call: Callable[[], Tensor]
    prepare: Callable[[], object] | None = None
    prepared: str = ""
    differs: str = ""
    keys: Keys | None = field(default=None, repr=False)
    pairs: float | None = None


def found(module: str, *distributions: str) -> tuple[bool, str]:
    """Whether ``module`` can be imported: its version, or why not."""
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        return False, first_line(error)
    for name in distributions:
        try:
            return True, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return True, str(getattr(imported, "__version__", "version unknown"))


def first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def on_cuda(device: torch.device) -> str:
    """Why a peer that needs a GPU cannot run, or nothing."""
    return "" if device.type == "cuda" else "runs on CUDA only"


def own_keys(problem: Problem, head: int, tile: int) -> Tensor:
    """Positions that the problem selects for a tile of 64 query rows, causality aside."""
    end, device = TILE * (tile + 1), problem.q.device
    keys = torch.arange(problem.tokens, device=device)
    if problem.kind == DENSE:
        return keys
    if problem.kind == BLOCK_SPARSE:
        assert problem.mask is not None
        row = problem.mask[0, head, TILE * tile // problem.block]
        return keys[row[keys // problem.block]]
    assert problem.columns is not None and problem.offsets is not None
    seen = torch.zeros(problem.tokens, dtype=torch.bool, device=device)
    steps = torch.arange(TILE, device=device)
    covered = (end - TILE - problem.offsets[0, head].long())[:, None] + steps
    for listed in (problem.columns[0, head].long(), covered.flatten()):
        seen[listed[(listed >= 0) & (listed < problem.tokens)]] = True
    return keys[seen]


def tile_output(problem: Problem, head: int, tile: int, keys: Tensor) -> Tensor:
    """fp64 ``[64, head_dim]``: attention of a tile of query rows over ``keys``, causal."""
    rows = torch.arange(TILE * tile, TILE * (tile + 1), device=problem.q.device)
    kv_head = head // (problem.heads // problem.k.shape[1])
    q = problem.q[0, head, rows].double()
    k, v = (x[0, kv_head, keys].double() for x in (problem.k, problem.v))
    scores = (q @ k.T * problem.head_dim**-0.5).masked_fill(keys > rows[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def tile_error(problem: Problem, out: Tensor, keys: Keys) -> float:
    """Largest difference of ``out`` from ``keys``'s own exact attention over a few tiles, over the
    largest value of the tile."""
    tiles = problem.tokens // TILE
    worst = 0.0
    for head in {0, problem.heads // 2, problem.heads - 1}:
        for tile in {0, tiles // 3, tiles - 1}:
            expected = tile_output(problem, head, tile, keys(head, tile))
            rows = out[0, head, TILE * tile : TILE * (tile + 1)].double()
            apart = (rows - expected).abs().max() / expected.abs().max()
            worst = max(worst, apart.item()) if apart.isfinite() else float("inf")
    return worst
