"""Runs every operator once on small shapes, for compute-sanitizer. Not a test module.

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py
"""

from __future__ import annotations

import argparse

import torch

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash, shadow

# batch, query heads, key/value heads, q_len, kv_len: partial tiles, one row, an exact tile.
SHAPES = [(1, 4, 2, 130, 201), (2, 2, 1, 1, 65), (1, 2, 2, 64, 64)]


def run(device: str, dtype: torch.dtype, dim: int, shape: tuple[int, ...]) -> None:
    batch, q_heads, kv_heads, q_len, kv_len = shape
    gen = torch.Generator().manual_seed(0)

    def randn(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, dim, generator=gen).to(device, dtype)

    def randint(count: int) -> torch.Tensor:
        x = torch.randint(-2, kv_len + 70, (batch, q_heads, count), generator=gen)
        return x.int().to(device)

    q, k, v = randn(q_heads, q_len), randn(kv_heads, kv_len), randn(kv_heads, kv_len)
    results = [sparseattn.a_shape_attention(q, k, v, sink=5, window=70, return_lse=True)[0]]
    results.append(
        sparseattn.vertical_slash_attention(q, k, v, randint(40), randint(9), return_lse=True)[0]
    )
    results.append(
        sparseattn.vertical_slash_attention(q, k, v, randint(0).long(), randint(3).long())
    )
    for block_q, block_kv in [(64, 64), (128, 64), (64, 128), (128, 128)]:
        blocks = (
            torch.rand(batch, q_heads, -(-q_len // block_q), -(-kv_len // block_kv), generator=gen)
            < 0.5
        )
        results.append(
            sparseattn.block_sparse_attention(
                q, k, v, blocks.to(device), block_q=block_q, block_kv=block_kv, return_lse=True
            )[0]
        )
    # The last sequence is cut, and there are rows, tiles and keys that nobody has.
    lens = {
        "q_lens": torch.tensor([q_len] * (batch - 1) + [q_len // 2]).to(device),
        "kv_lens": torch.tensor([kv_len] * (batch - 1) + [kv_len - q_len // 3]).int().to(device),
    }
    sparseattn.estimate_vertical_slash(q, k, num_columns=40, num_offsets=120)
    sparseattn.estimate_vertical_slash(q, k, num_columns=40, num_offsets=120, **lens)
    sparseattn.estimate_vertical_slash(q, k, num_columns=0, num_offsets=7, last_q=3, local=2)
    for block in (64, 128):
        sparseattn.estimate_block_sparse(q, k, top_k=2, block=block)
        sparseattn.estimate_block_sparse(q, k, top_k=2, block=block, **lens)
        for stride in (4, 32):
            how = {"block": block, "share": 0.7, "method": "antidiagonal", "stride": stride}
            sparseattn.estimate_block_sparse(q, k, top_k=3, **how)
            sparseattn.estimate_block_sparse(q, k, top_k=3, **how, **lens)
    for share in (0.5, 1.0):
        sparseattn.estimate_vertical_slash(q, k, num_columns=60, num_offsets=190, share=share)
    sparseattn.estimate_vertical_slash(q, k, num_columns=60, num_offsets=190, share=0.5, **lens)
    adaptive = [VerticalSlash(60, 190, share=0.6), BlockSparse(3, share=0.6, method="antidiagonal")]
    adaptive = (adaptive * 2)[:q_heads]
    results.append(sparseattn.sparse_attention(q, k, v, adaptive))
    results.append(sparseattn.sparse_attention(q, k, v, adaptive, **lens))
    patterns = [VerticalSlash(40, 110), BlockSparse(2), AShape(4, 20), Dense()][:q_heads]
    results.append(sparseattn.sparse_attention(q, k, v, patterns, return_lse=True)[0])
    results.append(sparseattn.sparse_attention(q, k, v, patterns, return_lse=True, **lens)[0])
    results.append(sparseattn.sparse_attention(q, k, v, [Dense()] * q_heads))
    for out in results:
        assert out.shape == q.shape and out.isfinite().all()


def run_shadow(device: str, dtype: torch.dtype, dim: int, rank: int) -> None:
    """Two steps of decode, the second with hits; a rank of 1024 takes its basis in pieces."""
    batch, heads, group, chunks, chunk, top_k = 2, 2, 4, 50, 8, 9
    rows = chunks * chunk
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(device, dtype)

    k, v = randn(batch, heads, rows, dim), randn(batch, heads, rows, dim)
    width = heads * dim
    gram = torch.zeros(batch, width, width, dtype=torch.float64, device=device)
    total = torch.zeros(batch, width, dtype=torch.float64, device=device)
    count = torch.zeros(batch, dtype=torch.int64, device=device)
    lens = torch.tensor([rows, rows - 77]).to(device)
    for pairs, interleaved in ((dim // 2, False), (dim // 4, True), (dim // 8 + 1, False)):
        frequencies = torch.rand(pairs, generator=gen).to(device)
        before = torch.zeros(batch, 37, heads, dim, dtype=dtype, device=device)
        for offset in (None, randn(batch, heads, dim).float()):
            how = {"first": 1_000_000, "interleaved": interleaved, "rope_scale": 1.3}
            shadow.shadow_undo_rope_(k[:, :, 5:42], before, frequencies, offset, **how)
            assert before.isfinite().all()
    shadow.shadow_gram_(before.transpose(1, 2), gram, total, count)
    shadow.shadow_gram_(k, gram, total, count, kv_lens=lens)
    landmarks = torch.zeros(batch, heads, chunks, dim, dtype=dtype, device=device)
    cosine = torch.zeros(batch, heads, chunks, device=device)
    shadow.shadow_landmarks_(k, landmarks, cosine, chunk=chunk, kv_lens=lens)
    outliers = shadow.shadow_outliers(cosine, count=5, sink_chunks=1, num_chunks=lens // chunk)
    excluded = shadow.chunk_mask(outliers, chunks)
    factor, basis = randn(batch, rows, rank), randn(batch, heads, rank, dim) * 0.05
    mean = randn(batch, heads, dim).float()
    inv_freq = (1e4 ** -torch.arange(dim // 4).div(dim // 4)).to(device)
    store = v.reshape(batch, heads, chunks, chunk * dim)
    if device == "cuda":
        store = store.cpu().pin_memory()
    store8 = torch.zeros(batch, heads, chunks, chunk * dim, dtype=torch.uint8)
    store8 = (store8.pin_memory() if device == "cuda" else store8).view(torch.float8_e4m3fn)
    scale8 = torch.zeros(batch, heads, chunks, device=device)
    shadow.store_rows_(v, store8, scale8)
    shadow.store_rows_(v[:, :, : 5 * chunk], store, first=7)
    factor8 = torch.zeros(batch, 1, rows, rank, device=device).to(torch.float8_e4m3fn)
    factor_scale = torch.zeros(batch, 1, rows, device=device)
    shadow.store_rows_(factor[:, None], factor8, factor_scale)
    slots = torch.zeros(batch, heads, 12, chunk * dim, dtype=dtype, device=device)
    slot_chunk = torch.full((batch, heads, 12), -1, dtype=torch.int32, device=device)
    last_used = torch.zeros_like(slot_chunk)
    exact_lens = torch.tensor([70, 33]).to(device)
    for q_len in (1, 1, 3):
        q = randn(batch, heads * group, q_len, dim)
        selected = shadow.shadow_select(
            q, landmarks, top_k=top_k, excluded=excluded, num_chunks=lens // chunk
        )
        slot_of, misses, missed = shadow.shadow_plan_(selected, slot_chunk, last_used)
        shadow.gather_values_(store, slots, misses, missed)
        shadow.gather_values_(store8, slots, misses, missed, store_scale=scale8)
        for interleaved, fp8 in ((False, False), (True, False), (False, True), (True, True)):
            how = {"interleaved": interleaved, "factor_scale": factor_scale[:, 0] if fp8 else None}
            rows_of = factor8[:, 0] if fp8 else factor
            shadow.lowrank_reconstruct(selected, rows_of, basis, mean, inv_freq, chunk=chunk, **how)
            out = shadow.shadow_attention(
                q,
                k[:, :, :70],
                v[:, :, :70],
                selected,
                slot_of,
                slots,
                rows_of,
                basis,
                mean,
                inv_freq,
                exact_lens=exact_lens,
                **how,
            )
            assert out.shape == q.shape and out.isfinite().all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--family", choices=["prefill", "shadow"], help="default: both")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dim", action="append", type=int, choices=[64, 96, 128])
    arguments = parser.parse_args()
    device, family = arguments.device, arguments.family
    dtypes = {"cuda": ("bfloat16", "float16"), "cpu": ("float32", "bfloat16")}
    for name in arguments.dtype or dtypes[device]:
        dtype = getattr(torch, name)
        for dim in arguments.head_dim or (64, 96, 128):
            for shape in SHAPES if family != "shadow" else ():
                run(device, dtype, dim, shape)
            for rank in (48, 160, 1024) if family != "prefill" else ():
                run_shadow(device, dtype, dim, rank)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"every operator{f' of {family}' if family else ''} ran on {device}")


if __name__ == "__main__":
    main()
