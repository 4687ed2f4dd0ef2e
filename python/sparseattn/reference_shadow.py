"""The oracle of ShadowKV's steps, in fp64 plain torch; names of ``sparseattn.reference``, too.

Functions named like operators take their arguments (``sparseattn.shadow`` tells the shapes) and
return what the operators approximate; where an operator writes in place, a function returns what
it would write. Source: arXiv 2410.21465; landmark scores in log space, centred keys, explicit sinks
and slots that stay in place are this library's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shadow_gram(k: Tensor, kv_lens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix [B, width, width], sum [B, width] and number [B] of keys before RoPE."""
    rows = k.double().transpose(1, 2).flatten(2)  # [B, rows, width]
    counts = _each(kv_lens, k.shape[0], k.shape[2])
    parts = [rows[b, :n] for b, n in enumerate(counts)]
    return (
        torch.stack([x.mT @ x for x in parts]),
        torch.stack([x.sum(0) for x in parts]),
        torch.tensor(counts, device=k.device),
    )


def shadow_factor(k: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best factor of rank ``rank`` of keys about their mean, by a full SVD.

    (factor [B, rows, rank], basis [B, Hkv, rank, D], mean [B, Hkv, D]); a basis is fixed up to the
    sign of its vectors, the product ``factor @ basis`` is not.
    """
    rows = k.double().transpose(1, 2).flatten(2)
    mean = rows.mean(1, keepdim=True)
    _, _, vectors = torch.linalg.svd(rows - mean, full_matrices=True)
    basis = vectors[:, :rank]
    heads = basis.unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
    return (rows - mean) @ basis.mT, heads, mean[:, 0].unflatten(-1, (k.shape[1], -1))


def shadow_landmarks(k: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Means of the whole chunks [B, Hkv, chunks, D], and each one's smallest cosine to a key."""
    chunks = k[:, :, : k.shape[2] // chunk * chunk].double().unflatten(2, (-1, chunk))
    means = chunks.mean(3)
    dots = (chunks * means.unsqueeze(3)).sum(-1)
    norms = chunks.norm(dim=-1) * means.norm(dim=-1, keepdim=True)
    return means, torch.where(norms == 0, 0.0, dots / norms).amin(-1)


def shadow_outliers(
    min_cosine: Tensor, *, count: int, sink_chunks: int = 0, num_chunks: Tensor | None = None
) -> Tensor:
    """Sinks, then the chunks of smallest cosine, then the smaller id: int32, ascending, then -1."""
    ranks = -min_cosine.double()
    ranks[..., :sink_chunks] = math.inf
    return _largest(ranks, count, _each(num_chunks, ranks.shape[0], ranks.shape[2]))


def shadow_scores(
    q: Tensor,
    landmarks: Tensor,
    *,
    excluded: Tensor | None = None,
    num_chunks: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Largest log-probability that a query row of the group gives a chunk: fp64 [B, Hkv, chunks].

    -inf for chunks that are no candidates.
    """
    batch, kv_heads, chunks, dim = landmarks.shape
    scale = dim**-0.5 if scale is None else scale
    scores = q.new_full((batch, kv_heads, chunks), -math.inf, dtype=torch.float64)
    lens = zip(_each(q_lens, batch, q.shape[2]), _each(num_chunks, batch, chunks), strict=True)
    for b, (m, n) in enumerate(lens):
        for h in range(kv_heads if m else 0):
            kept = torch.arange(n, device=q.device)
            if excluded is not None:
                kept = kept[~excluded[b, h, :n]]
            rows = q[b].unflatten(0, (kv_heads, -1))[h, :, :m].flatten(0, 1).double()
            logits = rows @ landmarks[b, h, kept].double().mT * scale
            scores[b, h, kept] = logits.log_softmax(-1).amax(0)
    return scores


def shadow_select(q: Tensor, landmarks: Tensor, *, top_k: int, **options) -> Tensor:
    """The ``top_k`` candidates of highest score, then the smaller id: int32, ascending, then -1."""
    scores = shadow_scores(q, landmarks, **options)
    return _largest(scores, top_k, [scores.shape[2]] * scores.shape[0])


def shadow_plan(
    selected: list[int], slot_chunk: list[int], last_used: list[int]
) -> tuple[list[int], list[tuple[int, int]], list[int], list[int]]:
    """Of one head: (slot of every selected chunk, misses (slot, chunk), slot_chunk, last_used)."""
    slot_chunk, last_used = list(slot_chunk), list(last_used)
    stamp = 1 + max(last_used)
    wanted = {c for c in selected if c >= 0}
    free = [s for s, c in enumerate(slot_chunk) if c not in wanted]
    free.sort(key=lambda s: (last_used[s], s))
    misses = []
    for c in selected:
        if c >= 0 and c not in slot_chunk:
            slot = free.pop(0)
            slot_chunk[slot] = c
            misses.append((slot, c))
    for s, c in enumerate(slot_chunk):
        if c in wanted:
            last_used[s] = stamp
    slots = [slot_chunk.index(c) if c >= 0 else -1 for c in selected]
    return slots, misses, slot_chunk, last_used


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., n] as float8_e4m3fn [..., n], and their fp32 scales [...].

    The scale is the row's largest magnitude, NaN apart, / 448; its rounding and that of x / scale
    to fp32 are part of the definition.
    """
    x = x.float()
    largest = x.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1)
    scale = largest / torch.full_like(largest, 448)  # a number would be divided by otherwise
    quotient = torch.where(scale[..., None] > 0, x / scale[..., None], x)
    return quotient.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def dequantise_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """The numbers of quantised rows, in fp32."""
    return rows.float() * scale[..., None]


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None,
    *,
    interleaved: bool = False,
    rope_scale: float = 1.0,
) -> Tensor:
    """x [..., n, D] at positions [n], turned in fp64 by angles that are rounded to fp32 once."""
    x = x.double()
    if inv_freq is None:
        return x
    count = inv_freq.shape[0]
    angles = (positions.float()[:, None] * inv_freq.float()).double()
    cos, sin = angles.cos() * rope_scale, angles.sin() * rope_scale
    turned, rest = x[..., : 2 * count], x[..., 2 * count :]
    pairs = turned.unflatten(-1, (count, 2)) if interleaved else turned.unflatten(-1, (2, count)).mT
    a, b = pairs[..., 0], pairs[..., 1]
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    turned = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat([turned, rest], -1)


def shadow_undo_rope(
    k: Tensor,
    inv_freq: Tensor,
    mean: Tensor | None = None,
    *,
    first: int = 0,
    interleaved: bool = False,
    rope_scale: float = 1.0,
) -> Tensor:
    """Keys before RoPE, turned back, less the mean, heads side by side: fp64 [B, rows, Hkv, D]."""
    positions = torch.arange(first, first + k.shape[2], device=k.device)
    options = {"interleaved": interleaved, "rope_scale": 1 / rope_scale}
    keys = rope(k, -positions, inv_freq, **options)
    if mean is not None:
        keys = keys - mean.double().unsqueeze(2)
    return keys.transpose(1, 2)


def lowrank_keys(
    factor: Tensor,
    basis: Tensor,
    mean: Tensor | None = None,
    inv_freq: Tensor | None = None,
    *,
    factor_scale: Tensor | None = None,
    **options,
) -> Tensor:
    """All keys of a factor after RoPE: fp64 [B, Hkv, rows, D]."""
    factor = factor.double()
    if factor_scale is not None:
        factor = factor * factor_scale.double()[..., None]
    keys = factor.unsqueeze(1) @ basis.double()
    if mean is not None:
        keys = keys + mean.double().unsqueeze(2)
    return rope(keys, torch.arange(factor.shape[1], device=factor.device), inv_freq, **options)


def lowrank_reconstruct(
    selected: Tensor,
    factor: Tensor,
    basis: Tensor,
    mean: Tensor | None = None,
    inv_freq: Tensor | None = None,
    *,
    chunk: int,
    **options,
) -> Tensor:
    """Keys of the tokens of ``selected``, 0 for what is no chunk: [B, Hkv, top_k * chunk, D]."""
    keys = lowrank_keys(factor, basis, mean, inv_freq, **options)
    out = keys.new_zeros(*selected.shape, chunk, keys.shape[3])
    for b, h, i in (selected >= 0).nonzero().tolist():
        tokens = keys[b, h, selected[b, h, i] * chunk :][:chunk]
        if len(tokens) == chunk:
            out[b, h, i] = tokens
    return out.flatten(2, 3)


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
):
    """Softmax attention of every row over its exact rows and the tokens of its chunks, in fp64."""
    batch, heads, q_len, dim = q.shape
    kv_heads, rows, slots = k.shape[1], k.shape[2], values.shape[2]
    scale = dim**-0.5 if scale is None else scale
    values = values.unflatten(-1, (-1, dim))
    chunk = values.shape[3]
    rebuilt = lowrank_keys(
        factor,
        basis,
        mean,
        inv_freq,
        factor_scale=factor_scale,
        interleaved=interleaved,
        rope_scale=rope_scale,
    )
    out = q.new_zeros(q.shape, dtype=torch.float64)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float64)
    q_lens, ends = _each(q_lens, batch, q_len), _each(exact_lens, batch, rows)
    starts = [0] * batch if exact_starts is None else exact_starts.clamp(min=0).tolist()
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            chosen = [
                (c, s)
                for c, s in zip(selected[b, g].tolist(), slot_of[b, g].tolist(), strict=True)
                if c >= 0 and (c + 1) * chunk <= factor.shape[1] and 0 <= s < slots
            ]
            chunk_k = [rebuilt[b, g, c * chunk : (c + 1) * chunk] for c, _ in chosen]
            chunk_v = [values[b, g, s].double() for _, s in chosen]
            for i in range(q_lens[b]):
                seen = slice(starts[b], max(0, ends[b] - q_lens[b] + i + 1))
                all_k = torch.cat([k[b, g, seen].double(), *chunk_k])
                all_v = torch.cat([v[b, g, seen].double(), *chunk_v])
                if len(all_k):
                    scores = all_k @ q[b, h, i].double() * scale
                    out[b, h, i] = scores.softmax(0) @ all_v
                    lse[b, h, i] = scores.logsumexp(0)
    return (out, lse) if return_lse else out


def _each(lens: Tensor | None, batch: int, most: int) -> list[int]:
    return [most] * batch if lens is None else lens.clamp(0, most).tolist()


def _largest(ranks: Tensor, count: int, lens: list[int]) -> Tensor:
    """Ids of the ``count`` largest of the first ``lens[b]`` that are not -inf: [B, Hkv, count]."""
    out = torch.full((*ranks.shape[:2], count), -1, dtype=torch.int32, device=ranks.device)
    for b, n in enumerate(lens):
        for h in range(ranks.shape[1]):
            row = ranks[b, h, :n]
            best = row.argsort(descending=True, stable=True)[:count]
            best = best[row[best] > -math.inf].sort().values
            out[b, h, : len(best)] = best.int()
    return out
