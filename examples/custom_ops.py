"""The operators as torch.ops: from other code, under torch.compile, in a CUDA graph.

python examples/custom_ops.py

`import sparseattn` registers them. As torch.ops they always return (out, lse); lse has no elements
unless return_lse=True. Errors come as RuntimeError.
"""

from __future__ import annotations

import torch

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash
from sparseattn.ops import flatten


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q = torch.randn(1, 8, 2048, 128, device=device, dtype=dtype)
    k, v = (torch.randn(1, 2, 2048, 128, device=device, dtype=dtype) for _ in "kv")
    patterns = [AShape(64, 512), VerticalSlash(128, 256), BlockSparse(8), Dense()] * 2

    # A plain call. A pattern is three integers: code, then its two sizes.
    codes = flatten(patterns)
    out, lse = torch.ops.sparseattn.sparse_attention(q, k, v, codes, return_lse=True)
    print(f"torch.ops: out {tuple(out.shape)} {out.dtype}, lse {tuple(lse.shape)} {lse.dtype}")
    assert torch.equal(out, sparseattn.sparse_attention(q, k, v, patterns))

    # torch.compile, without a graph break ("aot_eager": traced, no code generation needed).
    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparseattn.sparse_attention(q, k, v, patterns).transpose(1, 2).flatten(2)

    assert torch.equal(layer(q, k, v), out.transpose(1, 2).flatten(2))
    print("torch.compile(fullgraph=True): same result")

    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = torch.ops.sparseattn.sparse_attention(q, k, v, codes)
        q.copy_(torch.randn_like(q))
        graph.replay()  # the index is estimated anew, from the new q
        assert torch.equal(captured, sparseattn.sparse_attention(q, k, v, patterns))
        print("CUDA graph: same result")

    try:
        torch.ops.sparseattn.a_shape_attention(q, k, v, sink=-1, window=1)
    except RuntimeError as error:
        print(f"bad input: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
