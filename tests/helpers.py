"""Inputs, poison and the error bound that the operator tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn import reference


@dataclass(frozen=True)
class Place:
    """Where a test runs."""

    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}"


PLACES = [
    Place("cpu", torch.float32),
    Place("cpu", torch.bfloat16),
    Place("cuda", torch.bfloat16),
    Place("cuda", torch.float16),
]


class Case(NamedTuple):
    """Sizes of one call."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int

    def __str__(self) -> str:
        return "b{}-h{}of{}-q{}-kv{}-d{}".format(*self)


# Lengths around tile edges, q_len < kv_len, query groups of 1, 2, 4, 7, 8, and one key/value head.
CASES = [
    Case(1, 1, 1, 1, 1, 64),
    Case(2, 4, 1, 1, 200, 64),
    Case(1, 4, 4, 63, 63, 64),
    Case(1, 7, 1, 65, 65, 96),
    Case(2, 8, 2, 239, 301, 128),
    Case(1, 8, 1, 129, 129, 128),
    Case(1, 2, 2, 64, 777, 64),
    Case(2, 2, 1, 128, 799, 96),
    Case(1, 2, 1, 1023, 1023, 128),
]

# For estimates: fewer, and one of more keys than a chunk.
ESTIMATE_CASES = [
    Case(1, 1, 1, 1, 1, 64),
    Case(2, 4, 1, 1, 200, 64),
    Case(1, 7, 1, 65, 65, 96),
    Case(2, 8, 2, 239, 301, 128),
    Case(1, 2, 2, 64, 777, 64),
    Case(1, 8, 1, 129, 4500, 128),
]


def cuda_reason() -> str | None:
    """Why the CUDA operators cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return "no GPU"
    name = "sparseattn::a_shape_attention"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return "built without CUDA operators"
    return None


# --- inputs -------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, place: Place, seed: int) -> Tensor:
    x = torch.randn(*shape, generator=generator(seed))
    return x.to(place.device, place.dtype)


def make_qkv(case: Case, place: Place, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q = randn(case.batch, case.q_heads, case.q_len, case.dim, place=place, seed=seed)
    k = randn(case.batch, case.kv_heads, case.kv_len, case.dim, place=place, seed=seed + 1)
    v = randn(case.batch, case.kv_heads, case.kv_len, case.dim, place=place, seed=seed + 2)
    return q, k, v


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same values [B, H, L, D] in other storage; what no element owns is NaN."""
    batch, heads, length, dim = x.shape
    if layout == "blhd":
        y = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    elif layout == "packed":  # a slice of [B, L, heads of q, k and v, D]
        y = x.new_full((batch, length, 3 * heads, dim), math.nan)[:, :, heads : 2 * heads]
        y = y.transpose(1, 2)
    elif layout == "hblD":  # heads outermost, rows padded to a multiple of 16 bytes
        y = x.new_full((heads, batch, length, dim + 8), math.nan)[..., :dim].transpose(0, 1)
    elif layout == "odd":  # rows that start at any element
        y = x.new_full((batch, heads, length + 1, dim + 1), math.nan)[:, :, 1:, 1:]
    else:
        raise ValueError(layout)
    return y.copy_(x)


LAYOUTS = ["blhd", "packed", "hblD", "odd"]


def poison_unseen(k: Tensor, v: Tensor, mask: Tensor, value: float = math.nan):
    """k and v with ``value`` in every key that no query head of its group sees.

    mask: bool [B, Hq, q_len, kv_len].
    """
    seen = mask.any(dim=2).unflatten(1, (k.shape[1], -1)).any(dim=2).unsqueeze(-1)
    return k.where(seen, value), v.where(seen, value)


def full_mask(mask: Tensor, case: Case) -> Tensor:
    return mask.expand(case.batch, case.q_heads, case.q_len, case.kv_len)


# --- the error bound ----------------------------------------------------------------------------


def low_precision_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, float]:
    """The dense computation whose error is the yardstick: the same masked problem in q's dtype.

    Scores and softmax are fp32; weights and output are rounded to the dtype, as any dense kernel
    does. Also returns how far a few fp32 roundings of the largest score move an output.
    """
    group = q.shape[1] // k.shape[1]
    seen = mask.any(dim=2).unsqueeze(-1)
    k, v = (x.repeat_interleave(group, dim=1).where(seen, 0.0) for x in (k, v))
    scores = (q.float() @ k.float().mT * scale).masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1).nan_to_num(nan=0.0)  # a row that sees nothing
    largest = scores.masked_fill(~mask, 0.0).abs().max() * v.abs().max()
    return weights.to(q.dtype) @ v, 4 * torch.finfo(torch.float32).eps * largest.item()


def check_attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
) -> None:
    """Fails unless (out, lse) is attention over exactly ``mask`` [B, Hq, q_len, kv_len].

    Error against fp64 is at most twice that of the dense low-precision computation, as maximum
    over the call and as root mean square over each head; a looser bound holds row by row, since
    rows of many keys have outputs too small to show in the maximum. The floors are roundings of
    the output itself and of the scores.
    """
    expected, expected_lse = reference.masked_attention(q, k, v, mask, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    base, shift = low_precision_attention(q, k, v, mask, scale)

    assert out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} elements are not finite"
    error, base_error = (out - expected).abs(), (base - expected).abs()

    eps = torch.finfo(q.dtype).eps
    floor = (16 if q.dtype == torch.float32 else 1) * eps * expected.abs() + shift
    assert_at_most(error.max(), 2 * base_error.max() + floor.max(), "largest error")
    assert_at_most(
        _rms(error, (2, 3)),
        2 * _rms(base_error, (2, 3)) + _rms(floor, (2, 3)),
        "root mean square error of a head",
    )
    rows = 4 * base_error.amax(-1) + 4 * floor.amax(-1)
    assert_at_most(error.amax(-1), rows, "largest error of a row")

    empty = ~mask.any(dim=-1)
    assert (out[empty] == 0).all(), "a row that sees nothing must be 0"
    assert (expected.abs()[out == 0] <= rows.unsqueeze(-1).expand_as(out)[out == 0]).all()
    if lse is not None:
        check_lse(lse, expected_lse)


def check_lse(lse: Tensor, expected: Tensor) -> None:
    """Sums run in fp32 from exact products whatever the inputs' dtype, so one bound serves all:
    1e-4 in fp32 code on the CPU, 5e-4 for tensor cores, which drop low bits as they accumulate,
    and a few fp32 roundings of a large score."""
    assert lse.shape == expected.shape and lse.dtype == torch.float32
    assert (lse.isneginf() == expected.isneginf()).all(), "-inf exactly where a row sees nothing"
    assert not lse.isnan().any() and not lse.isposinf().any()
    finite = expected.isfinite()
    bound = (5e-4 if lse.is_cuda else 1e-4) + 2e-6 * expected[finite].abs()
    assert_at_most((lse[finite] - expected[finite]).abs(), bound, "LSE error")


def assert_at_most(value: Tensor, bound: Tensor, what: str) -> None:
    wrong = ~(value <= bound)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} above the bound, first at {at}: "
            f"{value[tuple(at)].item():.3e} > {bound[tuple(at)].item():.3e}"
        )


def _rms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.double().square().mean(dims).sqrt()


# --- masks as operators see them ----------------------------------------------------------------


def reveal_mask(attend, case: Case, place: Place) -> tuple[Tensor, Tensor]:
    """Reads an operator's mask back to the key: bool [B, Hq, q_len, kv_len], and the key counts.

    ``attend(q, k, v)`` returns (out, lse). With q = 0 every visible key weighs the same, so one-hot
    values show which keys a row sees, and exp(lse) how many terms the softmax had: a key counted
    twice shows.
    """
    q = torch.zeros(
        case.batch, case.q_heads, case.q_len, case.dim, device=place.device, dtype=place.dtype
    )
    k = torch.zeros(
        case.batch, case.kv_heads, case.kv_len, case.dim, device=place.device, dtype=place.dtype
    )
    eye = torch.eye(case.kv_len, device=place.device, dtype=place.dtype)
    pieces = []
    for first in range(0, case.kv_len, case.dim):
        hot = eye[:, first : first + case.dim]
        v = torch.zeros_like(k)
        v[..., : hot.shape[1]] = hot
        out, lse = attend(q, k, v)
        pieces.append(out[..., : hot.shape[1]] != 0)
    return torch.cat(pieces, dim=-1), lse.double().exp().round().long()


def check_mask(attend, mask: Tensor, case: Case, place: Place) -> None:
    """Fails unless the operator sees exactly ``mask`` and counts every key once."""
    seen, count = reveal_mask(attend, case, place)
    wrong = seen != mask
    assert not wrong.any(), (
        f"{int((seen & ~mask).sum())} pairs too many, {int((mask & ~seen).sum())} missing; "
        f"first wrong [b, h, row, key]: {wrong.nonzero()[0].tolist()}"
    )
    assert (count == mask.sum(-1)).all(), "a visible key is counted other than once"


def check_no_influence(attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seed: int) -> None:
    """Replaces some keys and values by 1e4: rows that see none of them must not change a bit."""
    before, before_lse = attend(q, k, v)
    batch, kv_heads, kv_len, _ = k.shape
    share = torch.rand(batch, kv_heads, kv_len, generator=generator(seed)).to(k.device)
    changed = share < 4 / kv_len
    huge = torch.where(share < 2 / kv_len, 1e4, -1e4).to(k.dtype).unsqueeze(-1)
    at = changed.unsqueeze(-1)
    out, lse = attend(q, torch.where(at, huge, k), torch.where(at, huge, v))
    touched = changed.repeat_interleave(q.shape[1] // kv_heads, dim=1).unsqueeze(2)
    same = ~(mask & touched).any(dim=-1)
    assert same.any(), "the test needs rows that see none of the changed keys"
    assert torch.equal(out[same], before[same]) and torch.equal(lse[same], before_lse[same])


# --- indexes ------------------------------------------------------------------------------------


def random_lists(
    case: Case, num_columns: int, num_offsets: int, seed: int, dtype: torch.dtype = torch.int32
) -> tuple[Tensor, Tensor]:
    """Different lists for every head: unsorted, with duplicates, pads and values out of range.

    The last head is empty where there are several, so whole heads see nothing.
    """
    gen = generator(seed)
    lists = []
    for count in (num_columns, num_offsets):
        shape = (case.batch, case.q_heads, count)
        x = torch.randint(0, case.kv_len, shape, generator=gen)
        if count >= 8:
            x[..., 1] = x[..., 0]
            x[..., 2] = x[..., 5]
            x[..., 3] = -1
            x[..., 4] = case.kv_len + 64 + torch.randint(0, 1000, shape[:2], generator=gen)
            x[..., 6] = 2**31 - 1 if dtype == torch.int32 else 2**32 + 3
            x[..., 7] = -64 if dtype == torch.int32 else -(2**40) + 5
        if case.q_heads > 1:
            x[:, -1] = -1
        order = torch.rand(shape, generator=gen).argsort(dim=-1)
        lists.append(x.gather(-1, order).to(dtype))
    return lists[0], lists[1]


def vertical_slash_masks(case: Case, columns: Tensor, offsets: Tensor) -> Tensor:
    """bool [B, Hq, q_len, kv_len] of lists [B, Hq, n]."""
    masks = [
        reference.vertical_slash_mask(case.q_len, case.kv_len, columns[b, h], offsets[b, h])
        for b in range(case.batch)
        for h in range(case.q_heads)
    ]
    return torch.stack(masks).unflatten(0, (case.batch, case.q_heads))


def random_blocks(case: Case, block_q: int, block_kv: int, seed: int, share: float = 0.4) -> Tensor:
    """bool [B, Hq, nq, nk] with an empty row in the first head and the whole last head empty."""
    nq, nk = -(-case.q_len // block_q), -(-case.kv_len // block_kv)
    blocks = torch.rand(case.batch, case.q_heads, nq, nk, generator=generator(seed)) < share
    blocks[:, 0, nq // 2] = False
    if case.q_heads > 1:
        blocks[:, -1] = False
    return blocks


def block_masks(case: Case, blocks: Tensor, block_q: int, block_kv: int) -> Tensor:
    """bool [B, Hq, q_len, kv_len] of blocks [B, Hq, nq, nk]."""
    masks = [
        reference.block_sparse_mask(case.q_len, case.kv_len, blocks[b, h], block_q, block_kv)
        for b in range(case.batch)
        for h in range(case.q_heads)
    ]
    return torch.stack(masks).unflatten(0, (case.batch, case.q_heads))


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys, joined through their LSE, in fp64."""
    lse = torch.stack([p[1].double() for p in parts])
    total = lse.logsumexp(dim=0)
    share = (lse - total).exp().nan_to_num(nan=0.0)
    out = sum(s.unsqueeze(-1) * p[0].double() for s, p in zip(share, parts, strict=True))
    return out, total
