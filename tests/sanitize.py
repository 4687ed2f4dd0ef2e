"""Runs every operator once on small shapes, for compute-sanitizer. Not a test module.

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py
"""

from __future__ import annotations

import argparse

import torch

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    dtypes = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}
    for dtype in dtypes[device]:
        for dim in (64, 96, 128):
            for shape in SHAPES:
                run(device, dtype, dim, shape)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"every operator ran on {device}")


if __name__ == "__main__":
    main()
