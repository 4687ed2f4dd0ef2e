"""Loads the compiled operators and tells torch their output shapes (fake kernels)."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from . import _C


def _load() -> None:
    # Next to _C, not to this file: in an editable install they lie apart.
    folder = Path(_C.__file__).parent
    torch.ops.load_library(folder / "libsparseattn_cpu.so")
    if _C.build_info()["cuda"] and torch.version.cuda:
        torch.ops.load_library(folder / "libsparseattn_cuda.so")


if platform.system() != "Linux":
    raise ImportError(f"sparseattn: expected Linux, got {platform.system()}")
_load()


def _attention_fake(q: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, q_len, head_dim = q.shape
    out = q.new_empty((batch, q_len, heads, head_dim)).transpose(1, 2)
    lse_shape = (batch, heads, q_len) if return_lse else (0,)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("sparseattn::a_shape_attention")
def _(q, k, v, *, sink, window, scale=None, return_lse=False, q_lens=None, kv_lens=None):
    return _attention_fake(q, return_lse)


@torch.library.register_fake("sparseattn::vertical_slash_attention")
def _(q, k, v, columns, offsets, *, scale=None, return_lse=False, q_lens=None, kv_lens=None):
    return _attention_fake(q, return_lse)


@torch.library.register_fake("sparseattn::block_sparse_attention")
def _(
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
    return _attention_fake(q, return_lse)


@torch.library.register_fake("sparseattn::sparse_attention")
def _(q, k, v, patterns, *, scale=None, return_lse=False, q_lens=None, kv_lens=None):
    return _attention_fake(q, return_lse)


@torch.library.register_fake("sparseattn::estimate_vertical_slash")
def _(
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
):
    batch, heads = q.shape[:2]
    return (
        q.new_empty((batch, heads, num_columns), dtype=torch.int32),
        q.new_empty((batch, heads, num_offsets), dtype=torch.int32),
    )


@torch.library.register_fake("sparseattn::estimate_block_sparse")
def _(q, k, *, top_k, block=64, share=None, method="mean", stride=16, q_lens=None, kv_lens=None):
    batch, heads, q_len, _ = q.shape
    q_blocks, kv_blocks = -(-q_len // block), -(-k.shape[2] // block)
    return q.new_empty((batch, heads, q_blocks, kv_blocks), dtype=torch.bool)


# --- ShadowKV -----------------------------------------------------------------------------------


@torch.library.register_fake("sparseattn::shadow_undo_rope_")
def _(k, out, inv_freq, mean=None, *, first=0, interleaved=False, rope_scale=1.0):
    return None


@torch.library.register_fake("sparseattn::shadow_gram_")
def _(k, gram, total, count, *, kv_lens=None):
    return None


@torch.library.register_fake("sparseattn::shadow_landmarks_")
def _(k, landmarks, min_cosine=None, *, chunk, first_chunk=None, kv_lens=None):
    return None


@torch.library.register_fake("sparseattn::shadow_outliers")
def _(min_cosine, *, count, sink_chunks=0, num_chunks=None):
    return min_cosine.new_empty((*min_cosine.shape[:2], count), dtype=torch.int32)


@torch.library.register_fake("sparseattn::shadow_select")
def _(q, landmarks, *, top_k, excluded=None, num_chunks=None, q_lens=None, scale=None):
    return q.new_empty((*landmarks.shape[:2], top_k), dtype=torch.int32)


@torch.library.register_fake("sparseattn::shadow_plan_")
def _(selected, slot_chunk, last_used):
    shape = selected.shape
    return selected.new_empty(shape), selected.new_empty((*shape, 2)), selected.new_empty(shape[:2])


@torch.library.register_fake("sparseattn::store_rows_")
def _(x, store, scale=None, *, first=0):
    return None


@torch.library.register_fake("sparseattn::gather_values_")
def _(store, values, misses, miss_count, *, store_scale=None):
    return None


@torch.library.register_fake("sparseattn::lowrank_reconstruct")
def _(
    selected,
    factor,
    basis,
    mean=None,
    inv_freq=None,
    *,
    chunk,
    interleaved=False,
    rope_scale=1.0,
    factor_scale=None,
):
    batch, kv_heads, _, head_dim = basis.shape
    return basis.new_empty((batch, kv_heads, selected.shape[2] * chunk, head_dim))


@torch.library.register_fake("sparseattn::shadow_attention")
def _(
    q,
    k,
    v,
    selected,
    slot_of,
    values,
    factor,
    basis,
    mean=None,
    inv_freq=None,
    *,
    interleaved=False,
    rope_scale=1.0,
    scale=None,
    return_lse=False,
    q_lens=None,
    exact_lens=None,
    exact_starts=None,
    factor_scale=None,
):
    return _attention_fake(q, return_lse)
