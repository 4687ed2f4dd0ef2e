"""The operators: thin Python functions over ``torch.ops.sparseattn.*``.

Shapes: ``q [batch, q_heads, q_len, head_dim]``, ``k, v [batch, kv_heads, kv_len, head_dim]``;
query head ``h`` reads key/value head ``h // (q_heads // kv_heads)``, nothing is repeated. Any
strides with the last dimension contiguous are taken as they are (on CUDA, views whose rows do not
start on a 16-byte boundary are copied first). Masks are causal and bottom-right aligned: query row
``i`` is at position ``p = i + kv_len - q_len`` and sees keys ``k <= p`` at most.

CUDA takes float16 and bfloat16 with head_dim 64, 96 or 128; the CPU takes float32 and bfloat16
with head_dim 16, 32, 64, 96 or 128. Sums are fp32. Everything else raises ``ValueError`` or
``TypeError`` that names the argument. There is no backward.

Batches of unequal length are padded at the end: ``q_lens`` and ``kv_lens``, int32 or int64 tensors
``[batch]`` on q's device, say how many query rows and keys each sequence has (None: ``q_len``,
``kv_len`` for all). A sequence gets what it would get alone, cut to its lengths: positions and
tiles count by its own lengths (row ``i`` of sequence ``b`` is at ``i + kv_lens[b] - q_lens[b]``),
estimates use its own last rows. Rows beyond ``q_lens[b]`` have output 0 and LSE -inf, and what
lies beyond the lengths in q, k and v may be NaN. 0 is a length, too: no row sees anything, and
estimates select nothing. Values are read on the device, never by the host, and clamped there:
``kv_lens`` to ``0 .. kv_len``, then ``q_lens`` to ``0 .. min(q_len, kv_lens)``.

Attention returns ``out`` of q's shape and dtype, or ``(out, lse)`` with ``return_lse=True``: the
natural log of the sum of exp(scaled scores), fp32 ``[batch, q_heads, q_len]``. A row that sees no
key has output 0 and LSE -inf. ``scale`` defaults to ``1/sqrt(head_dim)``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (loads the operators)
from .patterns import PATTERNS, Pattern

_ops = torch.ops.sparseattn
_SCHEMA_ERROR = re.compile(
    r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)
_ERRORS = {"ValueError: ": ValueError, "TypeError: ": TypeError}


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operator; what it refuses becomes the exception that its text names."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        text = str(error)
        for marker, kind in _ERRORS.items():
            _, found, rest = text.partition(marker)
            if found:
                raise kind(rest.splitlines()[0]) from None
        refused = _SCHEMA_ERROR.search(text)  # torch's own check of the schema
        if refused:
            expected, name, found = refused.groups()
            raise TypeError(f"{name}: expected {expected}, got {found}") from None
        raise


def _result(pair: tuple[Tensor, Tensor], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return pair if return_lse else pair[0]


def a_shape_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: int,
    window: int,
    scale: float | None = None,
    return_lse: bool = False,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the first ``sink`` keys and the ``window`` most recent ones.

    Key ``k <= p`` is visible iff ``k < sink`` or ``p - k < window``; ``sink, window >= 0``.
    StreamingLLM's mask (arXiv 2309.17453), one of MInference's patterns (arXiv 2407.02490, 3.1).
    """
    pair = _call(
        _ops.a_shape_attention,
        q,
        k,
        v,
        sink=sink,
        window=window,
        scale=scale,
        return_lse=return_lse,
        q_lens=q_lens,
        kv_lens=kv_lens,
    )
    return _result(pair, return_lse)


def vertical_slash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over chosen columns and the cover of chosen offsets (arXiv 2407.02490, 3.1).

    ``columns [batch, q_heads, n]`` are key positions and ``offsets [batch, q_heads, m]`` distances
    ``p - k``, int32 or int64, in any order; duplicates count once, ``-1`` pads, values out of range
    select nothing, stride 0 (``expand``) is welcome.

    Cover: query rows are taken in tiles of 64. With ``e = kv_len - q_len + 64 (m + 1)`` each offset
    ``o`` makes keys ``e - 64 - o .. e - o - 1`` visible to all rows of tile ``m``: every key that
    the diagonal crosses inside the tile. Lengths are those of the sequence, here and everywhere.
    """
    pair = _call(
        _ops.vertical_slash_attention,
        q,
        k,
        v,
        columns,
        offsets,
        scale=scale,
        return_lse=return_lse,
        q_lens=q_lens,
        kv_lens=kv_lens,
    )
    return _result(pair, return_lse)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    block_q: int = 64,
    block_kv: int = 64,
    scale: float | None = None,
    return_lse: bool = False,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks that ``block_mask`` selects.

    ``block_mask`` is bool ``[batch, q_heads, ceil(q_len / block_q), ceil(kv_len / block_kv)]``: row
    ``i`` sees key ``k <= p`` iff ``block_mask[..., i // block_q, k // block_kv]``. Blocks are 64 or
    128, each way.
    """
    pair = _call(
        _ops.block_sparse_attention,
        q,
        k,
        v,
        block_mask,
        block_q=block_q,
        block_kv=block_kv,
        scale=scale,
        return_lse=return_lse,
        q_lens=q_lens,
        kv_lens=kv_lens,
    )
    return _result(pair, return_lse)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Sequence[Pattern],
    *,
    scale: float | None = None,
    return_lse: bool = False,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Estimate, select, attend: one pattern per query head, mixed freely, in one call.

    ``patterns`` has ``q_heads`` entries (:class:`~sparseattn.Dense`, :class:`~sparseattn.AShape`,
    :class:`~sparseattn.VerticalSlash`, :class:`~sparseattn.BlockSparse`). Vertical-slash heads get
    the index of :func:`estimate_vertical_slash` with its defaults, block-sparse heads that of
    :func:`estimate_block_sparse` with blocks of 64, each sequence its own (arXiv 2407.02490, alg. 1
    to 3). No host sync on CUDA.
    """
    pair = _call(
        _ops.sparse_attention,
        q,
        k,
        v,
        flatten(patterns),
        scale=scale,
        return_lse=return_lse,
        q_lens=q_lens,
        kv_lens=kv_lens,
    )
    return _result(pair, return_lse)


def flatten(patterns: Sequence[Pattern]) -> list[int]:
    """Patterns as the flat (code, a, b) triples of ``torch.ops.sparseattn.sparse_attention``.

    ``a`` and ``b`` are the sizes (sink and window, columns and offsets, top_k and 0). Bits 0 to 7
    of ``code`` are the kind: 0 dense, 1 A-shape, 2 vertical-slash, 3 block-sparse. Bits 8 to 15 are
    the stride of antidiagonal scores (4, 8, 16 or 32; 0: means) and bits 16 to 35 the share in
    millionths (0: none), so that a code below 4 is a pattern without options.
    """
    if not isinstance(patterns, Sequence):
        raise TypeError(f"patterns: expected a sequence of patterns, got {type(patterns).__name__}")
    flat: list[int] = []
    kinds = tuple(PATTERNS.values())
    for head, pattern in enumerate(patterns):
        if not isinstance(pattern, kinds):
            raise TypeError(
                f"patterns: expected a pattern ({', '.join(p.__name__ for p in kinds)}) for head "
                f"{head}, got {type(pattern).__name__}"
            )
        flat += (pattern.code | pattern.options(), *pattern.sizes())
    return flat


def estimate_vertical_slash(
    q: Tensor,
    k: Tensor,
    *,
    num_columns: int,
    num_offsets: int,
    last_q: int = 64,
    sink: int = 30,
    local: int = 100,
    share: float | None = None,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns and offsets that carry the last rows' attention mass (arXiv 2407.02490, alg. 2).

    The last ``min(last_q, q_len)`` query rows (``last_q <= 64``) attend to all keys, softmax in
    fp32; the probabilities are summed per column and per offset ``p - k``. Returns int32
    ``(columns [batch, q_heads, num_columns], offsets [batch, q_heads, num_offsets])``, ascending,
    then ``-1`` where a prompt has fewer. Columns ``0 .. sink-1`` and offsets ``0 .. local-1`` rank
    before all others; equal masses rank by the smaller index.

    With a ``share`` in (0, 1] (taken in millionths) the two numbers are limits, and a head keeps
    the cheapest selection that covers this share of those rows' mass (the idea of FlexPrefill,
    arXiv 2502.20766): what the forced columns and offsets cover is counted first; of the rest,
    single columns and whole runs of offsets ``64 j .. 64 j + 63`` are taken by mass per cost, a run
    costing as much as 16 columns, until the mass left uncovered is small enough, columns and
    offsets taken as independent. Masses are added in fixed point, so results do not depend on
    timing. ``sparseattn.reference.estimate_vertical_slash`` is the definition.
    """
    return _call(
        _ops.estimate_vertical_slash,
        q,
        k,
        num_columns=num_columns,
        num_offsets=num_offsets,
        last_q=last_q,
        sink=sink,
        local=local,
        share=share,
        q_lens=q_lens,
        kv_lens=kv_lens,
    )


def estimate_block_sparse(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int,
    block: int = 64,
    share: float | None = None,
    method: str = "mean",
    stride: int = 16,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """The ``top_k`` best key blocks of every query block (arXiv 2407.02490, alg. 3).

    Queries and keys are averaged over blocks of ``block`` (64 or 128) rows and multiplied. A key
    block is a candidate if it starts at or before the query block's last position; the one that
    holds the position of the query block's first row ranks first, so that no row is left empty;
    equal scores rank by the smaller index. Returns bool
    ``[batch, q_heads, ceil(q_len / block), ceil(kv_len / block)]`` for
    :func:`block_sparse_attention`.

    ``method="antidiagonal"`` (XAttention, arXiv 2503.16428) scores a pair of blocks by the mean of
    ``q_i . k_j`` over the pairs inside it with ``(i + j) % stride == stride - 1``, where what
    alternates from row to row does not cancel. Every column is met, and every diagonal ``i - j``
    that is odd. It is computed from the means of the rows of each residue ``i % stride``; in a
    partial last block, those that exist count. ``stride`` is 4, 8, 16 or 32, and the cost grows
    with it. On CUDA these means are rounded to the dtype of q and k.

    With a ``share`` in (0, 1] (taken in millionths) ``top_k`` is a limit: a row keeps the fewest
    blocks, the forced one first and then by score, whose weights reach the share, weights being the
    softmax of the row's candidate scores times ``1/sqrt(head_dim)``.
    """
    return _call(
        _ops.estimate_block_sparse,
        q,
        k,
        top_k=top_k,
        block=block,
        share=share,
        method=method,
        stride=stride,
        q_lens=q_lens,
        kv_lens=kv_lens,
    )
