"""Vertical-slash as vLLM's and MInference's kernels take it: 64-wide tiles and single columns of
every tile of query rows, which a converter of theirs makes of columns and offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import TILE, Keys, Problem

PREPARED = "conversion of columns and offsets to tiles and columns"
DIFFERS = "a run of covered keys ends at a whole tile of 64: up to 63 keys more at its end"


@dataclass
class Lists:
    """int32; tiles begin at any key."""

    tile_count: Tensor  # [1, heads, tiles of rows]
    tile_start: Tensor  # [1, heads, tiles of rows, offsets]
    column_count: Tensor  # [1, heads, tiles of rows]
    column: Tensor  # [1, heads, tiles of rows, columns]

    def keys(self, tokens: int) -> Keys:
        def at(head: int, tile: int) -> Tensor:
            where = (0, head, tile)
            starts = self.tile_start[where][: int(self.tile_count[where])].long()
            tiles = (starts[:, None] + torch.arange(TILE, device=starts.device)).flatten()
            columns = self.column[where][: int(self.column_count[where])].long()
            return torch.cat((tiles[tiles < tokens], columns))

        return at

    @property
    def pairs(self) -> float:
        tiles, columns = (x.sum(dtype=torch.int64) for x in (self.tile_count, self.column_count))
        return float(TILE * (TILE * tiles + columns))


def converter_inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence's length, columns ascending, offsets descending."""
    assert problem.columns is not None and problem.offsets is not None
    length = torch.tensor([problem.tokens], dtype=torch.int32, device=problem.q.device)
    columns = problem.columns.int().sort(-1).values.contiguous()
    return length, columns, problem.offsets.int().sort(-1, descending=True).values.contiguous()
