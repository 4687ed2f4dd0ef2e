"""The steps of ShadowKV decode (arXiv 2410.21465): thin functions over ``torch.ops.sparseattn.*``.

ShadowKV keeps of a long prompt a low-rank factor of its keys before RoPE, one landmark (the mean
key) per chunk of neighbouring tokens, and few exact keys and values; the other values go to a
store, on the device or in pinned host memory. A decode step selects chunks by their landmarks,
fetches the values it has not got, and attends over exact rows and rebuilt keys.

Words: chunk ``j`` of a sequence is its tokens ``j * chunk .. (j + 1) * chunk - 1``, ``chunk`` is 4,
8, 16 or 32; token ``n`` is at RoPE position ``n``, so padding on the left must be cut off first.
Keys of all heads lie side by side, ``width = kv_heads * head_dim``. Chunk lists are int32, ``-1``
where there is nothing. A name that ends in ``_`` writes its arguments in place.

The order of calls, for every layer::

    shadow_undo_rope_(k_rotated, flat, inv_freq)     # where there are no keys before RoPE
    k = flat.transpose(1, 2)
    shadow_gram_(k, gram, total, count)              # before RoPE, in pieces of any length
    basis, mean = shadow_basis(gram, total, count, rank=160)
    factor = shadow_project(k, basis, mean)
    shadow_landmarks_(k_rotated, landmarks, min_cosine, chunk=8)
    outliers = shadow_outliers(min_cosine, count=48, sink_chunks=1)   # their keys, values: exact
    store_rows_(v, store)                            # all values, chunk by chunk

    selected = shadow_select(q, landmarks, top_k=256, excluded=excluded)                # each step
    slot_of, misses, miss_count = shadow_plan_(selected, slot_chunk, last_used)
    gather_values_(store, values, misses, miss_count)
    out = shadow_attention(q, k_exact, v_exact, selected, slot_of, values, factor, basis, mean,
                           inv_freq)

A long prompt comes in pieces of tokens, ``first`` telling where one starts; with its mean
:func:`shadow_undo_rope_` gives at once what :func:`shadow_project` multiplies,
``flat.flatten(2) @ basis.transpose(1, 2).flatten(2).mT``: ``flat`` is all the memory needed then.

With a store on the device that is all in reach there is nothing to plan or gather: the store is
``values`` and ``selected`` its own ``slot_of``.

Batches of unequal length: ``q_lens``, ``kv_lens``, ``num_chunks``, ``first_chunk``, ``exact_lens``
and ``exact_starts`` are int32 or int64 tensors ``[batch]`` on the operators' device, clamped there
to what the shapes allow and never read by the host; None means the whole length (the first row or
chunk for ``first_chunk``, ``exact_starts``). What lies beyond them is not read, it may be NaN.

fp8: a store and a factor may be ``torch.float8_e4m3fn`` with fp32 scales, one for each of their
rows; :func:`store_rows_` writes them, the other operators take the scales beside them.

On the CPU: float32 and bfloat16, head_dim 16, 32, 64, 96 or 128; on CUDA from sm_80 on: float16 and
bfloat16, head_dim 64, 96 or 128; sums in fp32. Everything else
raises ``ValueError`` or ``TypeError`` that names the argument. There is no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _call, _ops, _result


def shadow_undo_rope_(
    k: Tensor,
    out: Tensor,
    inv_freq: Tensor,
    mean: Tensor | None = None,
    *,
    first: int = 0,
    interleaved: bool = False,
    rope_scale: float = 1.0,
) -> None:
    """Keys before RoPE, heads side by side, from keys after it: the inverse of what
    :func:`lowrank_reconstruct` does to rebuilt keys.

    ``k [batch, kv_heads, rows, head_dim]``, row ``n`` at position ``first + n`` (below 2^31); in
    place ``out [batch, rows, kv_heads, head_dim]`` of its dtype and in other memory, so that
    ``out.flatten(2)`` has rows of ``width`` and ``out.transpose(1, 2)`` is what
    :func:`shadow_gram_` takes. Of a pair ``(a, b)``, turned by the angle ``position * inv_freq[i]``
    (both fp32, and so is the product), become ``(a cos + b sin, b cos - a sin) / rope_scale``; dims
    from ``2 * len(inv_freq)`` on are copied. Then ``mean [batch, kv_heads, head_dim]`` fp32, where
    it is given, is subtracted. All in fp32, rounded once; sines and cosines are accurate at any
    position. ``interleaved`` and ``rope_scale``, which is not 0, as in :func:`lowrank_reconstruct`.
    """
    _call(
        _ops.shadow_undo_rope_,
        k,
        out,
        inv_freq,
        mean,
        first=first,
        interleaved=interleaved,
        rope_scale=rope_scale,
    )


def shadow_gram_(
    k: Tensor, gram: Tensor, total: Tensor, count: Tensor, *, kv_lens: Tensor | None = None
) -> None:
    """Adds keys to the sums from which :func:`shadow_basis` is computed.

    ``k [batch, kv_heads, rows, head_dim]`` before RoPE, any part of the prompt: a prompt may come
    in pieces. In place, contiguous: ``gram [batch, width, width]`` += k^T k, ``total [batch,
    width]`` += sum of the rows, both fp64, and ``count [batch]`` int64 += rows. Products of a few
    hundred rows are summed in fp32, all beyond in fp64.
    """
    _call(_ops.shadow_gram_, k, gram, total, count, kv_lens=kv_lens)


def shadow_basis(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    *,
    rank: int,
    kv_heads: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``rank`` directions in which keys vary most about their mean, from :func:`shadow_gram_`.

    Returns ``basis [batch, kv_heads, rank, head_dim]`` of ``dtype`` (default: fp32), orthonormal
    over all heads together, and ``mean [batch, kv_heads, head_dim]`` fp32. Eigenvectors of the
    mean-centred Gram matrix are the right singular vectors of the centred keys (arXiv 2410.21465,
    section 4.1, not centred there); the mean costs a vector and frees the rank of a bias. The
    largest eigenvalue comes first; of either sign, the one that makes a vector's largest entry
    positive. ``rank`` is a multiple of 16, at most ``width``. On a GPU, ``torch.linalg.eigh`` waits
    for the host.
    """
    _check_rank(gram, rank, kv_heads)
    mean = total / count.clamp(min=1).unsqueeze(-1)
    centred = gram - total.unsqueeze(-1) * mean.unsqueeze(-2)
    vectors = torch.linalg.eigh(centred).eigenvectors[..., -rank:].flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    basis = vectors.mT.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    mean = mean.unflatten(-1, (kv_heads, -1))
    return basis.to(dtype or torch.float32).contiguous(), mean.float().contiguous()


def _check_rank(gram: Tensor, rank: int, kv_heads: int) -> None:
    width = gram.shape[-1]
    if not isinstance(rank, int):
        raise TypeError(f"rank: expected an int, got {type(rank).__name__}")
    if rank < 16 or rank % 16 or rank > width:
        raise ValueError(f"rank: expected a multiple of 16 up to width = {width}, got {rank}")
    if kv_heads < 1 or width % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of width = {width}, got {kv_heads}")


def shadow_project(
    k: Tensor, basis: Tensor, mean: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Rows of the factor: ``factor [batch, rows, rank]`` of the dtype of ``basis``.

    ``k [batch, kv_heads, rows, head_dim]`` before RoPE, ``basis`` and ``mean`` of
    :func:`shadow_basis`. The mean is subtracted in fp32 before anything is rounded, 16384 rows at a
    time, so no second copy of a long prompt is made. ``out``: where to write, e.g. rows of a larger
    factor.
    """
    batch, kv_heads, rows, _ = k.shape
    if basis.dim() != 4 or basis.shape[:2] != k.shape[:2] or basis.shape[3] != k.shape[3]:
        raise ValueError(
            f"basis: expected shape [batch = {batch}, kv_heads = {kv_heads}, rank, "
            f"head_dim = {k.shape[3]}], got {list(basis.shape)}"
        )
    flat = basis.transpose(1, 2).flatten(2).mT  # [batch, width, rank]
    if out is None:
        out = basis.new_empty(batch, rows, basis.shape[2])
    elif out.shape != (batch, rows, basis.shape[2]):
        raise ValueError(
            f"out: expected shape {[batch, rows, basis.shape[2]]}, got {list(out.shape)}"
        )
    size = max(1, min(rows, 16384))
    buffer = k.new_empty((batch, size, *k.shape[1::2]), dtype=basis.dtype)
    for first in range(0, rows, size):
        piece = k[:, :, first : first + size].transpose(1, 2)
        centred = buffer[:, : piece.shape[1]]
        if mean is None:
            centred.copy_(piece)
        else:  # one kernel: the difference in fp32, rounded where it is stored
            torch.sub(piece, mean.unsqueeze(1), out=centred)
        torch.matmul(centred.flatten(2), flat, out=out[:, first : first + size])
    return out


def shadow_landmarks_(
    k: Tensor,
    landmarks: Tensor,
    min_cosine: Tensor | None = None,
    *,
    chunk: int,
    first_chunk: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> None:
    """Writes the landmarks of the whole chunks in ``k``: the means of their keys.

    ``k [batch, kv_heads, rows, head_dim]`` **after** RoPE; ``landmarks [batch, kv_heads, chunks,
    head_dim]`` of its dtype. Rows ``j * chunk ..`` become chunk ``first_chunk[b] + j``; rows that
    fill no chunk are left, chunks beyond the room are dropped. ``min_cosine [batch, kv_heads,
    chunks]`` fp32, where it is given, takes the smallest cosine of a chunk's keys to their mean (0
    where one of the two is zero), from which :func:`shadow_outliers` chooses (arXiv 2410.21465,
    section 4.1).
    """
    _call(
        _ops.shadow_landmarks_,
        k,
        landmarks,
        min_cosine,
        chunk=chunk,
        first_chunk=first_chunk,
        kv_lens=kv_lens,
    )


def shadow_outliers(
    min_cosine: Tensor, *, count: int, sink_chunks: int = 0, num_chunks: Tensor | None = None
) -> Tensor:
    """The chunks that no landmark stands for: int32 ``[batch, kv_heads, count]``, ascending, -1.

    Chunks ``0 .. sink_chunks - 1`` rank before all others, then those of the smallest
    ``min_cosine [batch, kv_heads, chunks]`` (fp32, contiguous); equals go by the smaller id. Their
    keys and values are kept exactly, and they are no candidates of :func:`shadow_select`.
    """
    return _call(
        _ops.shadow_outliers,
        min_cosine,
        count=count,
        sink_chunks=sink_chunks,
        num_chunks=num_chunks,
    )


def chunk_mask(ids: Tensor, chunks: int) -> Tensor:
    """bool ``[batch, kv_heads, chunks]``, True at ``ids [batch, kv_heads, n]``; -1 marks nothing.

    Of :func:`shadow_outliers` it is the ``excluded`` of :func:`shadow_select`.
    """
    places = torch.where(ids < 0, chunks, ids).long()
    mask = torch.zeros(*ids.shape[:2], chunks + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(2, places, True)[..., :chunks].contiguous()


def chunk_rows(x: Tensor, ids: Tensor, *, chunk: int) -> Tensor:
    """The tokens of chunks: ``[batch, kv_heads, n * chunk, head_dim]`` of ``x [batch, kv_heads,
    rows, head_dim]`` at ``ids [batch, kv_heads, n]``, zeros for -1."""
    tokens = ids.unsqueeze(-1) * chunk + torch.arange(chunk, device=ids.device)
    tokens = tokens.clamp(min=0).flatten(2).unsqueeze(-1).long()
    rows = x.gather(2, tokens.expand(*tokens.shape[:3], x.shape[3]))
    return rows.where((ids >= 0).repeat_interleave(chunk, 2).unsqueeze(-1), 0.0)


def shadow_select(
    q: Tensor,
    landmarks: Tensor,
    *,
    top_k: int,
    excluded: Tensor | None = None,
    num_chunks: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The ``top_k`` chunks of highest score: int32 ``[batch, kv_heads, top_k]``, ascending, -1.

    ``q [batch, q_heads, q_len, head_dim]`` after RoPE. Every query row has a softmax of ``q .
    landmark * scale`` over the chunks ``0 .. num_chunks[b] - 1`` that ``excluded`` (bool ``[batch,
    kv_heads, chunks]``) does not exclude; a chunk's score is the largest log-probability that any
    row of any query head of the group gives it, in fp32 (arXiv 2410.21465, section 4.1, for one
    row). Equal scores go by the smaller id. ``scale`` defaults to ``1/sqrt(head_dim)``.
    """
    return _call(
        _ops.shadow_select,
        q,
        landmarks,
        top_k=top_k,
        excluded=excluded,
        num_chunks=num_chunks,
        q_lens=q_lens,
        scale=scale,
    )


def shadow_plan_(
    selected: Tensor, slot_chunk: Tensor, last_used: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives every selected chunk a slot for its values; who has one keeps it.

    ``selected [batch, kv_heads, top_k]``: distinct ids, -1 where there is none. In place:
    ``slot_chunk [batch, kv_heads, slots]``, the chunk in every slot (-1: empty), and ``last_used``
    of the same shape, stamps (0: never); ``slots >= top_k``. Misses, in the order of the list, take
    the slots that hold no selected chunk, least recently used first, then lower slots. The slots of
    all selected chunks are stamped with 1 + the head's largest stamp.

    Returns int32 ``slot_of [batch, kv_heads, top_k]`` (-1 for -1), ``misses [batch, kv_heads,
    top_k, 2]`` (slot, chunk), -1 after the last, and ``miss_count [batch, kv_heads]``.
    """
    return _call(_ops.shadow_plan_, selected, slot_chunk, last_used)


def store_rows_(x: Tensor, store: Tensor, scale: Tensor | None = None, *, first: int = 0) -> None:
    """Writes rows into a store, ``group`` of them side by side, and quantises them if it is fp8.

    ``x [batch, heads, rows, dim]``: values, of which the ``chunk`` rows of a chunk become a row of
    ``store [batch, heads, n, group * dim]``, or rows of the factor (one head, group 1). The first
    one becomes row ``first`` of the store; the rows of a head lie one after the other, and it may
    be pinned host memory where the rest is on a GPU: then the kernel writes there, in the order of
    the stream, and nobody waits. dim is a multiple of 8, group * dim of 16.

    With ``scale`` (fp32 ``[batch, heads, n]``, on x's device) the store is ``torch.float8_e4m3fn``
    (4 bits of exponent, 3 of mantissa, up to 448) and every row has its own scale: the largest
    magnitude / 448 in fp32. A number ``x`` becomes the e4m3 nearest to ``x / scale``, ties to even:
    off by at most 1/16 of itself, or by 2^-10 * scale if it is that small. NaN stays NaN and does
    not count in the scale; a row with an infinity becomes NaN. Without, store is of x's dtype.
    """
    _call(_ops.store_rows_, x, store, scale, first=first)


def gather_values_(
    store: Tensor,
    values: Tensor,
    misses: Tensor,
    miss_count: Tensor,
    *,
    store_scale: Tensor | None = None,
) -> None:
    """Copies missed chunks from the store into their slots.

    ``store [batch, kv_heads, chunks, chunk * head_dim]`` may be pinned host memory where the rest
    is on a GPU; ``values [batch, kv_heads, slots, chunk * head_dim]`` of the same dtype. In both
    the rows of a head lie one after the other. ``misses [batch, kv_heads, top_k, 2]`` (slot, chunk)
    and ``miss_count [batch, kv_heads]`` int32 as :func:`shadow_plan_` returns them; pairs out of
    range are dropped.

    With ``store_scale`` (fp32 ``[batch, kv_heads, chunks]``, where the values are) the store is
    ``torch.float8_e4m3fn``, as :func:`store_rows_` writes it, and slots take its numbers times the
    chunk's scale, rounded to their dtype.
    """
    _call(_ops.gather_values_, store, values, misses, miss_count, store_scale=store_scale)


def lowrank_reconstruct(
    selected: Tensor,
    factor: Tensor,
    basis: Tensor,
    mean: Tensor | None = None,
    inv_freq: Tensor | None = None,
    *,
    chunk: int,
    interleaved: bool = False,
    rope_scale: float = 1.0,
    factor_scale: Tensor | None = None,
) -> Tensor:
    """Keys of chunks after RoPE: ``[batch, kv_heads, top_k * chunk, head_dim]`` of basis's dtype.

    The key of token ``n`` and head ``h`` is ``rope(factor[b, n] @ basis[b, h] + mean[b, h], n)``:
    ``factor [batch, rows, rank]``, ``basis [batch, kv_heads, rank, head_dim]``, ``mean [batch,
    kv_heads, head_dim]`` fp32 or None, rank a multiple of 16. ``selected [batch, kv_heads, top_k]``
    int32; an entry that is no chunk of ``rows`` tokens gives zeros.

    RoPE turns pair ``i`` of the first ``2 * len(inv_freq)`` dims by the angle ``n * inv_freq[i]``
    (``inv_freq`` fp32, the product rounded to fp32 as models do), cosine and sine times
    ``rope_scale``. Pairs are dims ``(2i, 2i + 1)`` if ``interleaved`` (GLM), else ``(i, i +
    len(inv_freq))`` (Llama, Qwen, Yi, Phi-3). YaRN, Llama-3 and LongRoPE are frequencies and a
    ``rope_scale``: ``inv_freq`` and ``attention_scaling`` of a model's rotary embedding. None: no
    rotation.

    With ``factor_scale`` (fp32 ``[batch, rows]``) the factor is ``torch.float8_e4m3fn``, as
    :func:`store_rows_` writes it, and ``factor[b, n]`` above stands for its numbers times
    ``factor_scale[b, n]``; products and their sum are those of the numbers, then scaled in fp32.
    """
    return _call(
        _ops.lowrank_reconstruct,
        selected,
        factor,
        basis,
        mean,
        inv_freq,
        chunk=chunk,
        interleaved=interleaved,
        rope_scale=rope_scale,
        factor_scale=factor_scale,
    )


def shadow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    slot_of: Tensor,
    values: Tensor,
    factor: Tensor,
    basis: Tensor,
    mean: Tensor | None = None,
    inv_freq: Tensor | None = None,
    *,
    interleaved: bool = False,
    rope_scale: float = 1.0,
    scale: float | None = None,
    return_lse: bool = False,
    q_lens: Tensor | None = None,
    exact_lens: Tensor | None = None,
    exact_starts: Tensor | None = None,
    factor_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode attention over exact rows and selected chunks, keys of the latter rebuilt on the way.

    ``q [batch, q_heads, q_len, head_dim]`` after RoPE. ``k, v [batch, kv_heads, rows, head_dim]``
    are the exact keys (after RoPE) and values: sinks, outliers, the local tail, generated tokens,
    in any order but that the last ``q_lens[b]`` of a sequence's rows ``exact_starts[b] ..
    exact_lens[b] - 1`` are the queries' own. Query row ``i`` sees the rows up to ``exact_lens[b] -
    q_lens[b] + i`` and all tokens of the selected chunks: ``selected`` and ``slot_of [batch,
    kv_heads, top_k]`` int32, values in ``values [batch, kv_heads, slots, chunk * head_dim]``, keys
    from ``factor``, ``basis``, ``mean``, ``inv_freq``, ``factor_scale`` as in
    :func:`lowrank_reconstruct`. ``chunk``
    is what the rows of ``values`` say. Entries of which either is out of range are dropped; ids
    must be distinct, and not among the exact rows, or keys count twice.

    Returns ``out`` of q's shape and dtype, or ``(out, lse)``: natural log of the sum of exp(scaled
    scores), fp32 ``[batch, q_heads, q_len]``. A row that sees nothing, as those from ``q_lens[b]``
    on, has output 0 and LSE -inf. ``scale`` defaults to ``1/sqrt(head_dim)``.
    """
    pair = _call(
        _ops.shadow_attention,
        q,
        k,
        v,
        selected,
        slot_of,
        values,
        factor,
        basis,
        mean,
        inv_freq,
        interleaved=interleaved,
        rope_scale=rope_scale,
        scale=scale,
        return_lse=return_lse,
        q_lens=q_lens,
        exact_lens=exact_lens,
        exact_starts=exact_starts,
        factor_scale=factor_scale,
    )
    return _result(pair, return_lse)
