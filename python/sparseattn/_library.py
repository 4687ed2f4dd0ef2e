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
