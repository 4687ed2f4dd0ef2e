"""The oracle: which keys every query sees, and attention over exactly those, in fp64 plain torch.

It is written to be read, not to be fast. Masks are bool, True where a query row sees a key; query
row ``i`` is at position ``p = i + kv_len - q_len`` (bottom-right aligned), and every mask keeps
``k <= p``. The functions named like operators take the operators' arguments and return what the
operators approximate, in fp64. Everything runs on the device of its inputs, so a GPU can check
itself. In a batch of unequal length every sequence is treated as if it were alone, cut to its
``q_lens[b]`` rows and ``kv_lens[b]`` keys; beyond them masks are False.

Sources: A-shape, vertical-slash and block-sparse patterns and their estimation are MInference's
(arXiv 2407.02490, section 3); the cover of an offset per tile of 64 rows is this library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparseattn.patterns import (
    AShape,
    BlockSparse,
    Dense,
    Pattern,
    VerticalSlash,
    options_of,
)
from sparseattn.reference_index import (  # noqa: F401  (most are names of this module)
    block_scores,
    block_weights,
    estimate_block_sparse,
    estimate_vertical_slash,
    group_of,
    lengths,
    per_query_head,
    positions,
    select_by_share,
    vertical_slash_mass,
)
from sparseattn.reference_shadow import (  # noqa: F401  (names of this module)
    dequantise_rows,
    lowrank_keys,
    lowrank_reconstruct,
    quantise_rows,
    rope,
    shadow_attention,
    shadow_factor,
    shadow_gram,
    shadow_landmarks,
    shadow_outliers,
    shadow_plan,
    shadow_scores,
    shadow_select,
    shadow_undo_rope,
)

TILE = 64  # query rows that share the cover of an offset
_CHUNK = 1 << 24  # score elements held at once


# --- masks: bool [q_len, kv_len] ----------------------------------------------------------------


def dense_mask(q_len: int, kv_len: int, device: torch.device | str | None = None) -> Tensor:
    """Every key at or before the query's position."""
    p, keys = positions(q_len, kv_len, device)
    return keys <= p


def a_shape_mask(
    q_len: int, kv_len: int, sink: int, window: int, device: torch.device | str | None = None
) -> Tensor:
    """``k < sink`` or ``p - k < window``."""
    p, keys = positions(q_len, kv_len, device)
    return (keys <= p) & ((keys < sink) | (p - keys < window))


def vertical_slash_mask(
    q_len: int,
    kv_len: int,
    columns: Tensor | Sequence[int],
    offsets: Tensor | Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Keys in ``columns`` and keys in the cover of ``offsets`` (one-dimensional, any order).

    Rows come in tiles of 64. With ``e = kv_len - q_len + 64 * (m + 1)`` the end of tile ``m``, an
    offset ``o >= 0`` makes keys ``e - 64 - o .. e - o - 1`` visible to the whole tile. Key ``k`` is
    at distance ``d = e - 1 - k``, so it is covered iff some offset lies in ``d - 63 .. d``, which
    is the same for every tile. Values that select no key (-1 pads among them) are dropped.
    """
    columns, offsets = (
        torch.as_tensor(x, dtype=torch.int64, device=device) for x in (columns, offsets)
    )
    column = torch.zeros(kv_len, dtype=torch.bool, device=columns.device)
    column[columns[(columns >= 0) & (columns < kv_len)]] = True

    span = kv_len + TILE  # distances of keys from a tile's end lie in 0 .. span - 1
    covered = torch.zeros(span + TILE, dtype=torch.bool, device=columns.device)
    offsets = offsets[(offsets >= 0) & (offsets < span)]
    for step in range(TILE):
        covered[offsets + step] = True

    mask = dense_mask(q_len, kv_len, columns.device)
    keys = torch.arange(kv_len, device=columns.device)
    for first in range(0, q_len, TILE):
        distance = kv_len - q_len + first + TILE - 1 - keys
        slash = covered[distance.clamp(min=0)] & (distance >= 0)
        mask[first : first + TILE] &= column | slash
    return mask


def block_sparse_mask(
    q_len: int, kv_len: int, block_mask: Tensor, block_q: int = 64, block_kv: int = 64
) -> Tensor:
    """Row ``i`` sees ``k`` iff ``block_mask[i // block_q, k // block_kv]`` (bool [nq, nk])."""
    rows = torch.arange(q_len, device=block_mask.device) // block_q
    keys = torch.arange(kv_len, device=block_mask.device) // block_kv
    mask = block_mask[rows[:, None], keys[None, :]]
    return mask & dense_mask(q_len, kv_len, block_mask.device)


def pattern_mask(
    q: Tensor,
    k: Tensor,
    patterns: Sequence[Pattern],
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """Mask of a pattern for each query head, estimates included: bool [B, Hq, q_len, kv_len]."""

    def head_mask(b: int, h: int, m: int, n: int) -> Tensor:
        kv_head = h // group_of(q, k)
        qh, kh = q[b : b + 1, h : h + 1, :m], k[b : b + 1, kv_head : kv_head + 1, :n]
        pattern = patterns[h]
        if isinstance(pattern, Dense):
            return dense_mask(m, n, q.device)
        if isinstance(pattern, AShape):
            return a_shape_mask(m, n, pattern.sink, pattern.window, q.device)
        if isinstance(pattern, VerticalSlash):
            columns, offsets = estimate_vertical_slash(
                qh,
                kh,
                num_columns=pattern.columns,
                num_offsets=pattern.offsets,
                share=pattern.share,
            )
            return vertical_slash_mask(m, n, columns[0, 0], offsets[0, 0])
        if isinstance(pattern, BlockSparse):
            blocks = estimate_block_sparse(qh, kh, top_k=pattern.top_k, **options_of(pattern))
            return block_sparse_mask(m, n, blocks[0, 0])
        raise TypeError(f"patterns: expected a pattern, got {type(pattern).__name__}")

    return _each_head(q, k, q_lens, kv_lens, head_mask)


# --- attention ----------------------------------------------------------------------------------


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every row over the keys its mask names, in fp64.

    Args:
        q: [B, Hq, q_len, D]. k, v: [B, Hkv, kv_len, D]; head h reads key/value head
            ``h // (Hq // Hkv)``.
        mask: bool, broadcastable to [B, Hq, q_len, kv_len].
        scale: factor of the scores; default ``1 / sqrt(D)``.

    Returns:
        out fp64 [B, Hq, q_len, D] and lse fp64 [B, Hq, q_len], the natural log of the summed
        exponentials. A row that sees nothing has out 0 and lse -inf. Keys and values that no row
        of a head sees may hold anything, NaN included.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = _four_dims(mask)
    seen = mask.any(dim=2).unsqueeze(-1)
    k = per_query_head(q, k).where(seen, 0.0)
    v = per_query_head(q, v).where(seen, 0.0)
    mask = mask.expand(*q.shape[:3], k.shape[2])
    out = q.new_empty(q.shape, dtype=torch.float64)
    lse = q.new_empty(q.shape[:3], dtype=torch.float64)
    for rows in _row_chunks(mask):
        scores = q[:, :, rows].double() @ k.mT * scale
        scores = scores.masked_fill(~mask[:, :, rows], -math.inf)
        lse[:, :, rows] = scores.logsumexp(dim=-1)
        shift = lse[:, :, rows, None]
        weights = (scores - shift.masked_fill(shift.isinf(), 0.0)).exp()
        out[:, :, rows] = weights @ v
    return out, lse


def a_shape_attention(
    q, k, v, *, sink, window, scale=None, return_lse=False, q_lens=None, kv_lens=None
):
    """What ``sparseattn.a_shape_attention`` approximates, fp64."""

    def head_mask(b, h, m, n):
        return a_shape_mask(m, n, sink, window, q.device)

    mask = _each_head(q, k, q_lens, kv_lens, head_mask)
    return _result(masked_attention(q, k, v, mask, scale), return_lse)


def vertical_slash_attention(
    q, k, v, columns, offsets, *, scale=None, return_lse=False, q_lens=None, kv_lens=None
):
    """What ``sparseattn.vertical_slash_attention`` approximates, fp64. Lists [B, Hq, n]."""

    def head_mask(b, h, m, n):
        return vertical_slash_mask(m, n, columns[b, h], offsets[b, h])

    mask = _each_head(q, k, q_lens, kv_lens, head_mask)
    return _result(masked_attention(q, k, v, mask, scale), return_lse)


def block_sparse_attention(
    q,
    k,
    v,
    block_mask,
    *,
    block_q=64,
    block_kv=64,
    scale=None,
    return_lse=False,
    q_lens=None,
    kv_lens=None,
):
    """What ``sparseattn.block_sparse_attention`` approximates, fp64. Mask [B, Hq, nq, nk]."""

    def head_mask(b, h, m, n):
        return block_sparse_mask(m, n, block_mask[b, h], block_q, block_kv)

    mask = _each_head(q, k, q_lens, kv_lens, head_mask)
    return _result(masked_attention(q, k, v, mask, scale), return_lse)


def sparse_attention(q, k, v, patterns, *, scale=None, return_lse=False, q_lens=None, kv_lens=None):
    """What ``sparseattn.sparse_attention`` approximates, fp64. One pattern per query head."""
    mask = pattern_mask(q, k, patterns, q_lens, kv_lens)
    return _result(masked_attention(q, k, v, mask, scale), return_lse)


# --- measures -----------------------------------------------------------------------------------


def density(mask: Tensor) -> Tensor:
    """Visible pairs over causal pairs: fp64 of the mask's shape without [q_len, kv_len]."""
    q_len, kv_len = mask.shape[-2:]
    causal = q_len * (2 * kv_len - q_len + 1) // 2
    return mask.sum(dim=(-2, -1)).double() / causal


def mass_kept(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Share of dense causal attention that falls on visible keys, mean over rows: fp64 [B, Hq].

    Scores are held for a few rows at a time, so 16K tokens fit in ordinary memory; the mask may
    be shared by heads ([q_len, kv_len]).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = per_query_head(q, k)
    mask = _four_dims(mask).expand(*q.shape[:3], k.shape[2])
    causal = dense_mask(q.shape[2], k.shape[2], q.device)
    kept = q.new_zeros(q.shape[:2], dtype=torch.float64)
    for rows in _row_chunks(mask):
        scores = q[:, :, rows].double() @ k.mT * scale
        weights = scores.masked_fill(~causal[rows], -math.inf).softmax(dim=-1)
        kept += weights.masked_fill(~mask[:, :, rows], 0.0).sum(dim=(2, 3))
    return kept / q.shape[2]


# --- helpers ------------------------------------------------------------------------------------


def _four_dims(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _row_chunks(mask: Tensor) -> Iterator[slice]:
    batch, heads, q_len, kv_len = mask.shape
    rows = max(1, _CHUNK // (batch * heads * kv_len))
    for first in range(0, q_len, rows):
        yield slice(first, min(first + rows, q_len))


def _each_head(
    q: Tensor,
    k: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    head_mask: Callable[[int, int, int, int], Tensor],
) -> Tensor:
    """bool [B, Hq, q_len, kv_len] of ``head_mask(b, h, rows, keys)`` [rows, keys] of every head."""
    mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    for b, (m, n) in enumerate(lengths(q, k, q_lens, kv_lens)):
        for h in range(q.shape[1] if m else 0):
            mask[b, h, :m, :n] = head_mask(b, h, m, n)
    return mask


def _result(result: tuple[Tensor, Tensor], return_lse: bool):
    return result if return_lse else result[0]
