"""Measurements of one layer: how much a pattern visits, what it keeps, what it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseattn import ops, plots
from sparseattn.patterns import (
    AShape,
    BlockSparse,
    Dense,
    Pattern,
    VerticalSlash,
    options_of,
)
from sparseattn.search_model import attention_visitor

_TILE = 64
_CHUNK = 2**25  # mask or score elements held at once
_MASS_ROWS = 128


class VisitedKeys:
    """Which keys one head's pattern visits on a whole prompt (q_len == kv_len), by design.

    The index is what the operators estimate; the mask is never formed as a whole.
    """

    def __init__(self, pattern: Pattern, q: Tensor, k: Tensor) -> None:
        """q, k: [1, 1, L, D] of the head."""
        self.pattern, self.length, self.device = pattern, q.shape[2], q.device
        if isinstance(pattern, VerticalSlash):
            columns, offsets = ops.estimate_vertical_slash(
                q, k, num_columns=pattern.columns, num_offsets=pattern.offsets, share=pattern.share
            )
            columns, offsets = (x[x >= 0].long() for x in (columns, offsets))
            self.column = torch.zeros(self.length, dtype=torch.bool, device=q.device)
            self.column[columns] = True
            # Key k of a tile that ends at e is covered iff an offset lies in d - 63 .. d, with
            # d = e - 1 - k: a running count of offsets.
            ends = torch.zeros(self.length + 2 * _TILE, dtype=torch.int32, device=q.device)
            one = torch.ones_like(offsets, dtype=torch.int32)
            ends.index_add_(0, offsets, one)
            ends.index_add_(0, offsets + _TILE, -one)
            self.covered = ends.cumsum(0) > 0
        elif isinstance(pattern, BlockSparse):
            blocks = ops.estimate_block_sparse(q, k, top_k=pattern.top_k, **options_of(pattern))
            self.blocks = blocks[0, 0]

    def rows(self, rows: Tensor) -> Tensor:
        """bool [len(rows), L]: the keys that these query rows see."""
        keys = torch.arange(self.length, device=self.device)
        return self._of_tiles(rows, keys) & (keys <= rows[:, None])

    def _of_tiles(self, rows: Tensor, keys: Tensor) -> Tensor:
        pattern, tile = self.pattern, rows // _TILE
        if isinstance(pattern, Dense):
            return torch.ones(len(rows), len(keys), dtype=torch.bool, device=self.device)
        if isinstance(pattern, AShape):
            return (keys < pattern.sink) | (rows[:, None] - keys < pattern.window)
        if isinstance(pattern, BlockSparse):
            return self.blocks[tile][:, keys // _TILE]
        distance = (tile[:, None] + 1) * _TILE - 1 - keys
        return self.column | (self.covered[distance.clamp(min=0)] & (distance >= 0))

    def pairs(self) -> int:
        """How many (query, key) pairs are visited."""
        length = self.length
        if isinstance(self.pattern, AShape):
            p = torch.arange(length)
            near = (p + 1).clamp(max=self.pattern.window)
            return int((near + (p + 1 - near).clamp(max=self.pattern.sink)).sum())
        keys = torch.arange(length, device=self.device)
        total = 0
        first = torch.arange(0, length, _TILE, device=self.device)  # of each tile
        for part in first.split(max(1, _CHUNK // length)):
            end = (part + _TILE).clamp(max=length)[:, None]
            below = (end - torch.maximum(part[:, None], keys)).clamp(min=0)  # rows at or past key
            total += int((self._of_tiles(part, keys) * below).sum())
        return total

    def density(self) -> float:
        """Share of the causal pairs that are visited."""
        return self.pairs() / (self.length * (self.length + 1) // 2)


def attention_rows(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """fp32 [len(rows), L]: the dense attention of some rows of one head, q and k [1, 1, L, D]."""
    scores = (q[0, 0, rows].float() @ k[0, 0].float().mT) * scale
    keys = torch.arange(k.shape[2], device=k.device)
    return scores.masked_fill(keys > rows[:, None], -torch.inf).softmax(-1)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, result): one call on the CPU; on a GPU the median of 5 after a warm-up."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result
    result, times = call(), []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times), result


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def measure_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dense: Tensor,
    patterns: Sequence[Pattern],
    picture_heads: Sequence[int],
) -> tuple[dict[str, Any], list[plots.HeadPicture]]:
    """Times, and for each head density, mass kept and output error; pictures of some heads.

    q [1, Hq, L, D], k and v [1, Hkv, L, D], dense [1, Hq, L, D] the dense output. Mass kept is the
    mean over sampled rows; the error is the norm of the difference over the dense output's norm. A
    pattern with a share is named by it.
    """
    sparse_s, out = timed(lambda: ops.sparse_attention(q, k, v, patterns, scale=scale), q.device)
    dense_s, _ = timed(lambda: dense_attention(q, k, v, scale), q.device)
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    rows = torch.linspace(0, length - 1, min(_MASS_ROWS, length), device=q.device).long()
    drawn = torch.linspace(0, length - 1, min(plots.PIXELS, length), device=q.device).long()
    heads, pictures = [], []
    for h, pattern in enumerate(patterns):
        qh, kh = q[:, h : h + 1], k[:, h // group : h // group + 1]
        visited = VisitedKeys(pattern, qh, kh)
        kept = (attention_rows(qh, kh, rows, scale) * visited.rows(rows)).sum(-1).mean()
        error = (out[0, h].float() - dense[0, h].float()).norm() / dense[0, h].float().norm()
        share = getattr(pattern, "share", None)
        sizes = ",".join(str(s) for s in pattern.sizes() if s) if share is None else f"{share:.0%}"
        name = f"{pattern.kind} {sizes}"
        density = visited.density()
        heads.append(
            {
                "head": h,
                "pattern": name,
                "density": density,
                "mass_kept": float(kept),
                "output_error": float(error),
            }
        )
        if h in picture_heads:
            pictures.append(
                plots.HeadPicture(
                    f"head {h}: {name}\ndensity {density:.1%}, mass kept {float(kept):.1%}",
                    plots.attention_image(attention_rows(qh, kh, drawn, scale)),
                    plots.pattern_image(visited.rows(drawn)),
                )
            )
    layer = {
        "dense_s": dense_s,
        "sparse_s": sparse_s,
        "speedup": dense_s / sparse_s,
        "heads": heads,
    }
    for key in ("density", "mass_kept", "output_error"):
        layer[key] = statistics.fmean(head[key] for head in heads)
    return layer, pictures


def measure_layers(
    model: Any,
    ids: Tensor,
    patterns: Sequence[Sequence[Pattern]],
    pictured: Sequence[tuple[int, int]],
    steps: Any,
) -> tuple[list[dict[str, Any]], list[plots.HeadPicture], float]:
    """``measure_layer`` of all layers on the prompt ``ids`` [1, L], pictures of the (layer, head)s
    ``pictured``, and ``exactness`` in layer 0. ``steps``: a progress bar, layers + 1 steps."""
    layers: list[dict[str, Any]] = []
    pictures: list[plots.HeadPicture] = []
    exact: list[float] = []

    def visit(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, dense: Tensor) -> None:
        if layer == 0:
            steps.set_description("exactness")
            exact.append(exactness(q, k, v, scale))  # warms the operators up, too
            steps.update()
        steps.set_description(f"layer {layer}")
        heads = [head for at, head in pictured if at == layer]
        measured, drawn = measure_layer(q, k, v, scale, dense, patterns[layer], heads)
        layers.append({"layer": layer, **measured})
        for picture in drawn:
            picture.title = f"layer {layer}, {picture.title}"
        pictures.extend(drawn)
        steps.update()

    with attention_visitor(model, visit):
        model(ids, use_cache=False, logits_to_keep=1)
    return layers, pictures, exact[0]


def exactness(q: Tensor, k: Tensor, v: Tensor, scale: float, length: int = 1024) -> float:
    """Largest difference, relative to the largest output, between dense attention and patterns that
    leave out nothing, on the first ``length`` tokens."""
    q, k, v = (x[:, :, :length] for x in (q, k, v))
    length = q.shape[2]
    cover = [
        AShape(0, length),
        VerticalSlash(length, length),
        BlockSparse(-(-length // 64)),
        VerticalSlash(length, 0),
    ]
    patterns = [cover[h % len(cover)] for h in range(q.shape[1])]
    dense = dense_attention(q, k, v, scale).float()
    out = ops.sparse_attention(q, k, v, patterns, scale=scale).float()
    return float((out - dense).abs().max() / dense.abs().max())
