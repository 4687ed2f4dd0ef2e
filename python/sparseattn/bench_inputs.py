"""Inputs of the benchmarks, and how many (query, key) pairs a pattern selects on them.

Pairs are counted as the kernels work, in whole 64-wide tiles and whole blocks (what TFLOP/s count),
or exactly, as the rows see them (what density counts).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sparseattn import ops
from sparseattn.patterns import (
    AShape,
    BlockSparse,
    Dense,
    Pattern,
    VerticalSlash,
    options_of,
)

TILE = 64  # rows of a query tile in the cover rule


def random_qkv(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal ``q [1, heads, tokens, head_dim]`` and ``k, v [1, kv_heads, ...]``."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(count: int) -> Tensor:
        shape = (1, count, tokens, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def structured_qk(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """q and k of random_qkv's shapes: the mass lies on clustered offsets and a few columns.

    An estimate on normal noise picks offsets all over the prompt, and their cover is nearly dense:
    the worst case, unlike any real head. Here a score is the sum of three parts.

    * Offsets: three quarters of the dimensions rotate with the position, as RoPE does, with periods
      log-spaced from 256 to 8 M tokens. The part depends on ``p - k`` alone: 14 at most, largest
      near 0, falling about with log distance, with ripples whose tops make runs of offsets. Every
      query head weights and shifts the frequencies in its own way.
    * Columns: one dimension. Keys 0 to 3 add 8, and one key in 20 adds 5.5 (standard deviation
      0.5), the same for all rows.
    * Content: the other dimensions are normal noise, standard deviation about 0.5 in the score.

    At 128K tokens, D = 128, the estimates of (1000, 6096), (30, 800) and (3500, 100) then choose
    about 19, 2.7 and 1.6 % of the pairs; lists of ``clustered_indexes`` choose 16, 2.1 and 3.0 %.
    """
    host = torch.Generator().manual_seed(seed)
    device_generator = torch.Generator(device).manual_seed(seed)
    pairs = 3 * head_dim // 8
    root = math.sqrt(head_dim)  # undoes the softmax scale
    periods = torch.logspace(math.log2(256), 23, pairs, base=2, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64, device=device)[:, None]
    angle = angle * (2 * math.pi / periods).to(device)
    peak = 14.0
    amplitude = math.sqrt(peak * root / pairs)

    def build(count: int, phases: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty(1, count, tokens, head_dim, dtype=dtype, device=device)
        for head in range(count):
            turned = angle - phases[head].to(device)
            weight = (amplitude * weights[head]).to(device)
            out[0, head, :, :pairs] = turned.cos() * weight
            out[0, head, :, pairs : 2 * pairs] = turned.sin() * weight
            out[0, head, :, 2 * pairs] = columns[head]
            rest = (tokens, head_dim - 2 * pairs - 1)
            out[0, head, :, 2 * pairs + 1 :] = torch.randn(
                rest, generator=device_generator, device=device
            )
        return out

    spread = torch.randn(heads, pairs, generator=host, dtype=torch.float64)
    weights = (0.5 * spread).exp()
    weights *= pairs / weights.sum(1, keepdim=True)
    phases = 0.3 * torch.randn(heads, pairs, generator=host, dtype=torch.float64)
    strength = 5.5 + 0.5 * torch.randn(kv_heads, tokens, generator=host)
    strength *= torch.rand(kv_heads, tokens, generator=host) < 0.05
    strength[:, :4] = 8.0
    strength = strength.to(device)
    flat = torch.zeros(kv_heads, pairs, dtype=torch.float64)
    q = build(heads, phases, weights, torch.full((heads, 1), root, device=device))
    return q, build(kv_heads, flat, torch.ones_like(flat), strength)


# --- pair counts -----------------------------------------------------------------------------


def dense_pairs(tokens: int, *, exact: bool = False) -> float:
    """Pairs of one causal head, counted as half the square; exactly with ``exact``."""
    return tokens * (tokens + 1) / 2 if exact else tokens * tokens / 2


def block_pairs(mask: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Pairs of each head ``[heads]`` of a mask ``[1, heads, nq, nk]``: whole selected blocks."""
    return mask[0].sum((1, 2)) * (block_q * block_kv)


def a_shape_pairs(tokens: int, sink: int, window: int) -> int:
    """Visible pairs of one head."""
    position = torch.arange(tokens)
    recent = (position + 1).clamp(max=window)
    return int((recent + (position + 1 - window).clamp(0, sink)).sum())


def vertical_slash_pairs(
    columns: Tensor, offsets: Tensor, tokens: int, *, exact: bool = False
) -> Tensor:
    """Pairs of each head ``[heads]`` for lists ``[1, heads, n]``, ``q_len == kv_len == tokens``.

    In each tile of 64 rows every maximal run of covered keys counts as whole 64-wide tiles, and
    every column at or before the tile's last row that the cover does not hold counts once. With
    ``exact`` (``tokens`` a multiple of 64) keys count once for every row that sees them.
    """
    device = offsets.device
    ends = torch.arange(TILE, tokens + TILE, TILE, device=device)[:, None]
    counts = []
    for head_columns, head_offsets in zip(columns[0].long(), offsets[0].long(), strict=True):
        # A key is at distance e - 1 - k from the end e of a tile; offset o covers o .. o + 63.
        chosen = head_offsets[(head_offsets >= 0) & (head_offsets < tokens)]
        steps = torch.zeros(tokens + TILE + 1, dtype=torch.int64, device=device)
        steps.index_add_(0, chosen, torch.ones_like(chosen))
        steps.index_add_(0, chosen + TILE, -torch.ones_like(chosen))
        cover = steps.cumsum(0) > 0  # the last entry is never covered
        listed = head_columns[(head_columns >= 0) & (head_columns < tokens)].unique()
        distance = ends - 1 - listed
        alone = (distance >= 0) & ~cover[distance.clamp(min=0)]
        if exact:  # distance + 1 rows of a tile are at or past the key, 64 at most
            rows = torch.arange(1, tokens + 1, device=device).clamp(max=TILE)
            covered = (cover[:tokens] * rows).cumsum(0)[TILE - 1 :: TILE].sum()
            counts.append(covered + (alone * (distance + 1).clamp(max=TILE)).sum())
            continue
        change = cover.int().diff(prepend=cover.new_zeros(1).int())
        starts, stops = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
        widths = (torch.minimum(stops, ends) - starts).clamp(min=0)
        keys = (widths + TILE - 1).div(TILE, rounding_mode="floor").sum() * TILE
        counts.append(TILE * (keys + alone.sum()))
    return torch.stack(counts)


def _selected_block_pairs(q: Tensor, k: Tensor, pattern: BlockSparse, exact: bool) -> Tensor:
    """Pairs of each head; head by head, as a mask of all heads of a long prompt takes gigabytes."""
    group = q.shape[1] // k.shape[1]
    counts = []
    for head in range(q.shape[1]):
        kv = head // group
        own = q[:, head : head + 1], k[:, kv : kv + 1]
        mask = ops.estimate_block_sparse(*own, top_k=pattern.top_k, **options_of(pattern))
        count = block_pairs(mask, TILE, TILE)
        if exact:  # a diagonal block's rows see its keys up to their own
            diagonal = mask[0].diagonal(dim1=1, dim2=2).sum(1)
            count = count - diagonal * (TILE * (TILE - 1) // 2)
        counts.append(count)
    return torch.cat(counts)


def pattern_pairs(
    q: Tensor, k: Tensor, patterns: Iterable[Pattern], *, exact: bool = False
) -> dict[Pattern, Tensor]:
    """Pairs of each head ``[heads]``, for every pattern, as ``sparse_attention`` would choose."""
    heads, tokens = q.shape[1:3]
    counts = {}
    for pattern in set(patterns):
        if isinstance(pattern, VerticalSlash):
            lists = ops.estimate_vertical_slash(
                q, k, num_columns=pattern.columns, num_offsets=pattern.offsets, share=pattern.share
            )
            counted = vertical_slash_pairs(*lists, tokens, exact=exact).cpu()
        elif isinstance(pattern, BlockSparse):
            counted = _selected_block_pairs(q, k, pattern, exact).cpu()
        elif isinstance(pattern, AShape):
            counted = torch.full((heads,), a_shape_pairs(tokens, pattern.sink, pattern.window))
        else:
            assert isinstance(pattern, Dense)
            counted = torch.full((heads,), dense_pairs(tokens, exact=exact))
        counts[pattern] = counted.double()
    return counts
