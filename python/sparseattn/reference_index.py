"""The oracle's indexes: masses, scores and selections, in fp64 plain torch.

``sparseattn.reference`` has these names, too. Source: MInference (arXiv 2407.02490, section 3);
shares of the mass are FlexPrefill's idea, antidiagonal scores XAttention's, both as this library
defines them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lengths(
    q: Tensor, k: Tensor, q_lens: Tensor | None = None, kv_lens: Tensor | None = None
) -> list[tuple[int, int]]:
    """Query rows and keys of every sequence, clamped as the operators clamp them.

    ``0 <= rows <= keys``: a sequence has no more rows than keys, and without rows it has no keys,
    since nothing would see them.
    """
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    rows = [q_len] * batch if q_lens is None else q_lens.tolist()
    keys = [kv_len] * batch if kv_lens is None else kv_lens.tolist()
    keys = [min(max(n, 0), kv_len) for n in keys]
    rows = [min(max(m, 0), q_len, n) for m, n in zip(rows, keys, strict=True)]
    return [(m, n if m else 0) for m, n in zip(rows, keys, strict=True)]


def vertical_slash_mass(
    q: Tensor, k: Tensor, last_q: int = 64, sink: int = 0, local: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of the last ``min(last_q, q_len)`` rows summed per column and per offset.

    Returns fp64 [B, Hq, kv_len] twice: entry ``c`` sums ``P[row, c]``, entry ``o`` sums
    ``P[row, p - o]`` over the rows (MInference, section 3.2). Probabilities on columns below
    ``sink`` or offsets below ``local`` are left out of both.
    """
    rows, kv_len = min(last_q, q.shape[2]), k.shape[2]
    scores = q[:, :, -rows:].double() @ per_query_head(q, k).mT * q.shape[-1] ** -0.5
    mask = _causal(rows, kv_len, q.device)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    p, keys = positions(rows, kv_len, q.device)
    weights = weights.masked_fill((keys < sink) | (p - keys < local), 0.0)
    offsets = torch.zeros_like(weights[:, :, 0])
    for row in range(rows):
        p = kv_len - rows + row
        offsets[..., : p + 1] += weights[:, :, row, : p + 1].flip(-1)
    return weights.sum(dim=2), offsets


def estimate_vertical_slash(
    q,
    k,
    *,
    num_columns,
    num_offsets,
    last_q=64,
    sink=30,
    local=100,
    share=None,
    q_lens=None,
    kv_lens=None,
) -> tuple[Tensor, Tensor]:
    """What ``sparseattn.estimate_vertical_slash`` returns, decided in fp64.

    The columns and offsets of largest mass; columns ``0 .. sink-1`` and offsets ``0 .. local-1``
    rank before all others, equals by the smaller index. int32 [B, Hq, num_columns] and
    [B, Hq, num_offsets], ascending, then -1. With a share: what ``select_by_share`` keeps.
    """
    both = [
        torch.full((*q.shape[:2], count), -1, dtype=torch.int32, device=q.device)
        for count in (num_columns, num_offsets)
    ]
    for b, (m, n) in enumerate(lengths(q, k, q_lens, kv_lens)):
        if m == 0:
            continue
        own = q[b : b + 1, :, :m], k[b : b + 1, :, :n]
        if share is None:
            masses = vertical_slash_mass(*own, last_q)
            for out, mass, forced in zip(both, masses, (sink, local), strict=True):
                out[b] = _select(mass[0], forced, out.shape[-1])
            continue
        forced = min(sink, num_columns, n), min(local, num_offsets, n)
        masses = vertical_slash_mass(*own, last_q, *forced)
        for h in range(q.shape[1]):
            kept = select_by_share(
                masses[0][0, h],
                masses[1][0, h],
                min(last_q, m),
                num_columns,
                num_offsets,
                *forced,
                share,
            )
            for out, values in zip(both, kept, strict=True):
                out[b, h, : len(values)] = torch.tensor(values, dtype=torch.int32)
    return both[0], both[1]


def select_by_share(
    column_mass: Tensor,
    offset_mass: Tensor,
    rows: int,
    num_columns: int,
    num_offsets: int,
    sink: int,
    local: int,
    share: float,
) -> tuple[list[int], list[int]]:
    """Columns and offsets of one head that cover ``share`` of the mass of ``rows`` query rows.

    The masses [kv_len] are those of ``vertical_slash_mass`` without what the forced columns
    ``0 .. sink-1`` and offsets ``0 .. local-1`` hold, which are kept and within the limits
    ``num_columns``, ``num_offsets``. Candidates are the single columns and the runs of offsets
    ``64 j .. 64 j + 63`` of nonzero mass, on either side those of largest mass that the limit has
    room for (64 offsets a run). They are taken by mass per price, a run costing as much as 16
    columns, equals columns first and then by index, until they cover enough: a probability lies on
    one column and one offset, and as if these were independent, ``(1 - kept columns' share) (1 -
    kept runs' share)`` of the mass is uncovered. Masses are integers, multiples of 2^-40.

    Sixteen columns: 64 of them are one tile of keys, as a run next to others is, but in 64 rows a
    diagonal also shows as 64 columns of 1/64 of its mass, which must not win over it.
    """
    kv_len, unit, run = column_mass.shape[0], 2**40, 64
    columns = (column_mass * unit).round().long().tolist()
    padded = torch.nn.functional.pad((offset_mass * unit).round().long(), (0, -kv_len % run))
    runs = padded.unflatten(0, (-1, run)).sum(-1).tolist()

    def best(masses: list[int], count: int) -> list[int]:
        ranked = sorted(range(len(masses)), key=lambda i: (-masses[i], i))
        return [i for i in ranked[: max(count, 0)] if masses[i] > 0]

    candidates = [(-16 * columns[i], 0, i, columns[i]) for i in best(columns, num_columns - sink)]
    candidates += [(-runs[j], 1, j, runs[j]) for j in best(runs, (num_offsets - local) // run)]
    kept_columns, kept_offsets = list(range(sink)), list(range(local))
    left_columns, left_runs = sum(columns), sum(runs)
    allowed = (10**6 - round(share * 10**6)) * rows * unit * left_runs
    for _, is_run, i, mass in sorted(candidates):
        if left_columns * left_runs * 10**6 <= allowed:
            break
        if is_run:
            left_runs -= mass
            kept_offsets += range(max(run * i, local), min(run * (i + 1), kv_len))
        else:
            left_columns -= mass
            kept_columns.append(i)
    return sorted(kept_columns), sorted(kept_offsets)


def block_scores(
    q: Tensor, k: Tensor, block: int = 64, method: str = "mean", stride: int = 16
) -> Tensor:
    """Scores of pairs of blocks: fp64 [B, Hq, nq, nk].

    "mean": mean-pooled queries against mean-pooled keys (MInference, section 3.2). "antidiagonal":
    the mean of ``q_i . k_j`` over ``(i + j) % stride == stride - 1``, i and j counted inside their
    blocks (XAttention, arXiv 2503.16428), which is that of the products of the means of residue
    ``r`` of the queries and residue ``stride - 1 - r`` of the keys. Means run over the rows that
    exist; in partial blocks, over the residues that both blocks have (0 if there is none). As
    ``stride - 1`` is odd, diagonals ``i - j`` of the pair that are even are not sampled. On CUDA
    tensors the means of residues are rounded to their dtype, as the operator does there.

    Key blocks that start after the last position of a query block are -inf; the block that holds
    the position of its first row is +inf.
    """
    scores = _plain_block_scores(q, k, block, method, stride)
    q_len, kv_len = q.shape[2], k.shape[2]
    starts = torch.arange(scores.shape[3], device=q.device) * block
    for i in range(scores.shape[2]):
        first = i * block + kv_len - q_len
        last = min((i + 1) * block, q_len) - 1 + kv_len - q_len
        scores[:, :, i, starts > last] = -math.inf
        scores[:, :, i, first // block] = math.inf
    return scores


def block_weights(
    q: Tensor, k: Tensor, block: int = 64, method: str = "mean", stride: int = 16
) -> Tensor:
    """Softmax over the candidates of every row of the scores times 1/sqrt(D): [B, Hq, nq, nk]."""
    scores = _plain_block_scores(q, k, block, method, stride) * q.shape[-1] ** -0.5
    hidden = block_scores(q, k, block, method, stride) == -math.inf
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1)


def estimate_block_sparse(
    q, k, *, top_k, block=64, share=None, method="mean", stride=16, q_lens=None, kv_lens=None
) -> Tensor:
    """What ``sparseattn.estimate_block_sparse`` returns, decided in fp64: bool [B, Hq, nq, nk].

    With a share, a row keeps the first of its ``top_k`` blocks whose weights reach it.
    """
    nq, nk = (-(-x.shape[2] // block) for x in (q, k))
    mask = torch.zeros(*q.shape[:2], nq, nk, dtype=torch.bool, device=q.device)
    for b, (m, n) in enumerate(lengths(q, k, q_lens, kv_lens)):
        if m == 0:
            continue
        own = q[b : b + 1, :, :m], k[b : b + 1, :, :n]
        scores = block_scores(*own, block, method, stride)[0]
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        kept = torch.ones_like(best, dtype=torch.bool)
        if share is not None:
            weights = block_weights(*own, block, method, stride)[0].gather(-1, best)
            kept[..., 1:] = weights.cumsum(-1)[..., :-1] < share
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, kept)
        mask[b, :, : scores.shape[1], : scores.shape[2]] = chosen & (scores > -math.inf)
    return mask


def _plain_block_scores(q: Tensor, k: Tensor, block: int, method: str, stride: int) -> Tensor:
    """``block_scores`` of all pairs of blocks, before any is excluded or forced."""
    if method == "mean":
        pooled_q = torch.stack([x.double().mean(2) for x in q.split(block, dim=2)], dim=2)
        pooled_k = torch.stack([x.double().mean(2) for x in k.split(block, dim=2)], dim=2)
        return pooled_q @ per_query_head(q, pooled_k).mT
    if method != "antidiagonal":
        raise ValueError(f'method: expected "mean" or "antidiagonal", got "{method}"')

    def residues(x: Tensor) -> tuple[Tensor, Tensor]:
        """Means [B, H, blocks, stride, D], and which residues a block has: [blocks, stride]."""
        rows, dtype = x.shape[2], x.dtype
        x = torch.nn.functional.pad(x.double(), (0, 0, 0, -rows % block))
        sums = x.unflatten(2, (-1, block // stride, stride)).sum(3)
        exists = (torch.arange(x.shape[2], device=x.device) < rows).double()
        counts = exists.unflatten(0, (-1, block // stride, stride)).sum(1)
        means = sums / counts.clamp(min=1).unsqueeze(-1)
        return (means.to(dtype).double() if x.is_cuda else means), counts > 0

    means_q, has_q = residues(q)
    means_k, has_k = residues(k)
    means_k, has_k = means_k.flip(3).flatten(3), has_k.flip(1)
    pairs = has_q.double() @ has_k.double().T
    return means_q.flatten(3) @ per_query_head(q, means_k).mT / pairs.clamp(min=1)


def _select(mass: Tensor, forced: int, count: int) -> Tensor:
    """Indices of the `count` largest, the first `forced` before all: int32, ascending, then -1."""
    mass = mass.clone()
    mass[..., :forced] = math.inf
    best = mass.argsort(dim=-1, descending=True, stable=True)[..., :count]
    best = best.sort(dim=-1).values.int()
    return torch.nn.functional.pad(best, (0, count - best.shape[-1]), value=-1)


def _causal(q_len: int, kv_len: int, device) -> Tensor:
    p, keys = positions(q_len, kv_len, device)
    return keys <= p


def positions(q_len: int, kv_len: int, device) -> tuple[Tensor, Tensor]:
    """Positions of the rows [q_len, 1] and the keys [1, kv_len]."""
    keys = torch.arange(kv_len, device=device)
    return keys[kv_len - q_len :, None], keys[None, :]


def group_of(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1]


def per_query_head(q: Tensor, x: Tensor) -> Tensor:
    """[B, Hkv, ...] to fp64 [B, Hq, ...]: query head h takes head h // group."""
    return x.double().repeat_interleave(group_of(q, x), dim=1)
