"""Inputs and bounds that the ShadowKV tests share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Place, assert_at_most, generator, low_precision_attention, randn
from torch import Tensor

from sparseattn import reference

OPS = [
    "shadow_undo_rope_",
    "shadow_gram_",
    "shadow_landmarks_",
    "shadow_outliers",
    "shadow_select",
    "shadow_plan_",
    "store_rows_",
    "gather_values_",
    "lowrank_reconstruct",
    "shadow_attention",
]


def needs(place: Place, *ops: str) -> None:
    """Skips a test on a GPU for which an operator has no kernel yet."""
    for op in ops if place.device == "cuda" else ():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparseattn::{op}", "CUDA"):
            pytest.skip(f"{op} has no CUDA kernel yet")


class Sizes(NamedTuple):
    """Sizes of one decode call."""

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    q_len: int = 1
    dim: int = 64
    chunk: int = 8
    rank: int = 32
    tokens: int = 400  # of the factor
    exact: int = 50  # rows of the exact buffer
    top_k: int = 6
    slots: int = 9
    rope: str = "half"  # or "interleaved", "none"
    mean: bool = True

    def __str__(self) -> str:
        return "b{}-h{}of{}-q{}-d{}-c{}-r{}-t{}-e{}-k{}of{}-{}-{}".format(*self)


def pick_chunks(s: Sizes, seed: int = 0, missing: int = 1) -> Tensor:
    """Distinct ascending chunk ids [batch, kv_heads, top_k], the last ``missing`` of them -1."""
    chunks = s.tokens // s.chunk
    order = torch.rand(s.batch, s.kv_heads, chunks, generator=generator(seed)).argsort(-1)
    ids = order[..., : s.top_k].sort(-1).values.int()
    if missing and s.top_k > missing:
        ids[..., -missing:] = -1
    return ids


def pick_slots(s: Sizes, selected: Tensor, seed: int = 0) -> Tensor:
    """A slot of its own for every selected chunk, -1 for -1."""
    order = torch.rand(s.batch, s.kv_heads, s.slots, generator=generator(seed)).argsort(-1)
    return torch.where(selected < 0, -1, order[..., : selected.shape[2]].int())


def inverse_frequencies(s: Sizes, place: Place) -> Tensor | None:
    """Of the whole head if halves turn, of half the head if pairs do, as in Llama and GLM."""
    if s.rope == "none":
        return None
    count = s.dim // 2 if s.rope == "half" else s.dim // 4
    return (1e4 ** (-torch.arange(count) / count)).to(place.device)


def make_low_rank(s: Sizes, place: Place, seed: int = 0) -> dict[str, Any]:
    """factor, basis, mean, inv_freq, interleaved, rope_scale: keys of size one, roughly."""
    basis = torch.randn(s.batch, s.kv_heads, s.rank, s.dim, generator=generator(seed))
    return {
        "factor": randn(s.batch, s.tokens, s.rank, place=place, seed=seed + 1),
        "basis": (basis * s.rank**-0.5).to(place.device, place.dtype),
        "mean": randn(s.batch, s.kv_heads, s.dim, place=place, seed=seed + 2).float()
        if s.mean
        else None,
        "inv_freq": inverse_frequencies(s, place),
        "interleaved": s.rope == "interleaved",
        "rope_scale": 1.0 if s.rope == "none" else 1.1,
    }


def poison_factor(factor: Tensor, selected: Tensor, chunk: int) -> Tensor:
    """NaN in every row of a chunk that no head selects."""
    factor = factor.clone()
    for b in range(factor.shape[0]):
        seen = torch.zeros(factor.shape[1], dtype=torch.bool)
        for c in set(selected[b].flatten().tolist()) - {-1}:
            seen[c * chunk : (c + 1) * chunk] = True
        factor[b, ~seen.to(factor.device)] = math.nan
    return factor


def make_attention(s: Sizes, place: Place, seed: int = 0) -> dict[str, Any]:
    """Arguments of shadow_attention; NaN in all that its lists do not name."""
    selected = pick_chunks(s, seed)
    slot_of = pick_slots(s, selected, seed + 1)
    low_rank = make_low_rank(s, place, seed + 2)
    low_rank["factor"] = poison_factor(low_rank["factor"], selected, s.chunk)
    values = randn(s.batch, s.kv_heads, s.slots, s.chunk * s.dim, place=place, seed=seed + 6)
    filled = torch.zeros(s.batch, s.kv_heads, s.slots + 1, dtype=torch.bool)
    filled.scatter_(2, slot_of.long() % (s.slots + 1), True)
    values[~filled[..., :-1].to(place.device)] = math.nan
    kv = (s.batch, s.kv_heads, s.exact, s.dim)
    return {
        "q": randn(s.batch, s.q_heads, s.q_len, s.dim, place=place, seed=seed + 7),
        "k": randn(*kv, place=place, seed=seed + 8),
        "v": randn(*kv, place=place, seed=seed + 9),
        "selected": selected.to(place.device),
        "slot_of": slot_of.to(place.device),
        "values": values,
    } | low_rank


def poison_exact(args: dict[str, Any]) -> dict[str, Any]:
    """NaN in the exact rows that the lengths leave out."""
    rows = torch.arange(args["k"].shape[2], device=args["k"].device)
    outside = torch.zeros_like(rows, dtype=torch.bool).expand(len(args["k"]), -1)
    if args.get("exact_lens") is not None:
        outside = outside | (rows >= args["exact_lens"][:, None])
    if args.get("exact_starts") is not None:
        outside = outside | (rows < args["exact_starts"][:, None])
    at = outside[:, None, :, None]
    return args | {x: args[x].masked_fill(at, math.nan) for x in ("k", "v")}


def as_dense(args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem as dense keys (fp64), values and mask: exact rows, then rebuilt chunks."""
    q, k, v = args["q"], args["k"], args["v"]
    (batch, heads, q_len, dim), rows = q.shape, k.shape[2]
    selected, slot_of, slots = args["selected"], args["slot_of"], args["values"].shape[2]
    chunk = args["values"].shape[3] // dim
    fits = (selected >= 0) & (slot_of >= 0) & (slot_of < slots)
    fits &= (selected.long() + 1) * chunk <= args["factor"].shape[1]
    names = ("factor", "basis", "mean", "inv_freq", "interleaved", "rope_scale")
    rebuilt = reference.lowrank_reconstruct(
        selected.where(fits, -1), *(args[x] for x in names[:4]), chunk=chunk,
        **{x: args[x] for x in names[4:]}, factor_scale=args.get("factor_scale"),
    )  # fmt: skip
    at = slot_of.where(fits, 0).long().unsqueeze(-1).expand(-1, -1, -1, chunk * dim)
    chosen = args["values"].gather(2, at) if slots else args["values"]
    chosen = chosen.where(fits.unsqueeze(-1), 0.0).unflatten(-1, (chunk, dim)).flatten(2, 3)

    mask = torch.zeros(batch, heads, q_len, rows + rebuilt.shape[2], dtype=torch.bool)
    for b in range(batch):
        m, start, end = (
            most if args.get(x) is None else max(0, min(most, int(args[x][b])))
            for x, most in (("q_lens", q_len), ("exact_starts", rows), ("exact_lens", rows))
        )
        start = start if args.get("exact_starts") is not None else 0
        for i in range(m):
            mask[b, :, i, start : max(start, end - m + i + 1)] = True
        tokens = fits[b].repeat_interleave(heads // k.shape[1], 0).repeat_interleave(chunk, 1)
        mask[b, :, :m, rows:] = tokens.cpu().unsqueeze(1)
    seen = mask.any(2).unflatten(1, (k.shape[1], -1)).any(2).unsqueeze(-1).to(q.device)
    keys = torch.cat([k.double(), rebuilt], 2).where(seen, 0.0)
    return keys, torch.cat([v, chosen], 2).where(seen, 0.0), mask.to(q.device)


def check_shadow(out: Tensor, lse: Tensor, args: dict[str, Any]) -> None:
    """Fails unless (out, lse) is the attention that ``args`` ask for.

    The error is at most twice that of dense attention in q's dtype over rebuilt keys of that
    dtype, as maximum over the call and, more loosely, over each row.
    """
    q = args["q"]
    keys, values, mask = as_dense(args)
    scale = q.shape[-1] ** -0.5 if args.get("scale") is None else args["scale"]
    expected, expected_lse = reference.masked_attention(q, keys, values, mask, scale)
    rounded = keys.to(q.dtype)
    base, shift = low_precision_attention(q, rounded, values, mask, scale)
    _, base_lse = reference.masked_attention(q, rounded, values, mask, scale)

    assert out.shape == q.shape and out.dtype == q.dtype
    assert out.isfinite().all()
    error, base_error = (out - expected).abs(), (base - expected).abs()
    eps = torch.finfo(q.dtype).eps
    floor = (16 if q.dtype == torch.float32 else 1) * eps * expected.abs() + shift
    assert_at_most(error.max(), 2 * base_error.max() + floor.max(), "largest error")
    rows = 4 * base_error.amax(-1) + 4 * floor.amax(-1)
    assert_at_most(error.amax(-1), rows, "largest error of a row")
    assert (out[~mask.any(-1)] == 0).all(), "a row that sees nothing must be 0"

    assert lse.dtype == torch.float32 and (lse.isneginf() == expected_lse.isneginf()).all()
    finite = expected_lse.isfinite()
    if not finite.any():
        return
    bound = 1e-4 + 2e-6 * expected_lse[finite].abs()
    if lse.is_cuda:  # keys are rounded before they are multiplied
        bound = bound + 4e-4 + 2 * (base_lse - expected_lse)[finite].abs().max()
    assert_at_most((lse[finite] - expected_lse[finite]).abs(), bound, "LSE error")
