"""The operators as torch sees them: schemas, fake kernels, opcheck, torch.compile."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, Place, make_qkv, random_blocks, random_lists

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash

CASE = Case(2, 4, 2, 100, 130, 64)
PATTERNS = [Dense(), AShape(4, 20), VerticalSlash(40, 110), BlockSparse(2)]
FLAT = [x for p in PATTERNS for x in (p.code, *p.sizes())]

LENGTHS = "Tensor? q_lens=None, Tensor? kv_lens=None"
SCHEMAS = {
    "a_shape_attention": "(Tensor q, Tensor k, Tensor v, *, int sink, int window, "
    f"float? scale=None, bool return_lse=False, {LENGTHS}) -> (Tensor, Tensor)",
    "vertical_slash_attention": "(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor offsets, *, "
    f"float? scale=None, bool return_lse=False, {LENGTHS}) -> (Tensor, Tensor)",
    "block_sparse_attention": "(Tensor q, Tensor k, Tensor v, Tensor block_mask, *, "
    "int block_q=64, int block_kv=64, float? scale=None, bool return_lse=False, "
    f"{LENGTHS}) -> (Tensor, Tensor)",
    "sparse_attention": "(Tensor q, Tensor k, Tensor v, int[] patterns, *, "
    f"float? scale=None, bool return_lse=False, {LENGTHS}) -> (Tensor, Tensor)",
    "estimate_vertical_slash": "(Tensor q, Tensor k, *, int num_columns, int num_offsets, "
    f"int last_q=64, int sink=30, int local=100, float? share=None, {LENGTHS}) -> (Tensor, Tensor)",
    "estimate_block_sparse": "(Tensor q, Tensor k, *, int top_k, int block=64, "
    f'float? share=None, str method="mean", int stride=16, {LENGTHS}) -> Tensor',
}
OPS = list(SCHEMAS)


def inputs(op: str, place: Place, case: Case = CASE) -> tuple[tuple, dict]:
    """Positional and keyword arguments of torch.ops.sparseattn.<op>."""
    q, k, v = make_qkv(case, place)
    if op == "a_shape_attention":
        return (q, k, v), {"sink": 4, "window": 20}
    if op == "vertical_slash_attention":
        lists = random_lists(case, 20, 10, seed=0)
        return (q, k, v, *(x.to(place.device) for x in lists)), {}
    if op == "block_sparse_attention":
        return (q, k, v, random_blocks(case, 64, 128, seed=0).to(place.device)), {"block_kv": 128}
    if op == "sparse_attention":
        return (q, k, v, FLAT), {}
    if op == "estimate_vertical_slash":
        return (q, k), {"num_columns": 40, "num_offsets": 110}
    return (q, k), {"top_k": 2}


def torch_op(op: str):
    return getattr(torch.ops.sparseattn, op).default


def tensors(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", OPS)
def test_schema(op):
    assert str(torch_op(op)._schema) == f"sparseattn::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, main_place):
    args, options = inputs(op, main_place)
    lens = {
        "q_lens": torch.tensor([100, 7], device=main_place.device),
        "kv_lens": torch.tensor([120, 70], device=main_place.device).int(),
    }
    variants = [{}, lens] + ([{"return_lse": True}] if op.endswith("attention") else [])
    for more in variants:
        torch.library.opcheck(torch_op(op), args, options | more)


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_tell_sizes_and_strides(op, main_place):
    for case in (CASE, Case(1, 8, 1, 1, 777, 128)):
        if op == "sparse_attention" and case is not CASE:
            continue
        args, options = inputs(op, main_place, case)
        options |= {"return_lse": True} if op.endswith("attention") else {}
        real = tensors(torch_op(op)(*args, **options))
        fake = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
        fake = tensors(torch_op(op)(*fake, **options))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert b.device.type == "meta"


@pytest.mark.parametrize("op", [o for o in OPS if o.endswith("attention")])
def test_lse_is_empty_unless_asked_for(op, main_place):
    args, options = inputs(op, main_place)
    out, lse = torch_op(op)(*args, **options)
    assert lse.numel() == 0 and lse.dtype == torch.float32
    out_too, lse = torch_op(op)(*args, **options, return_lse=True)
    assert torch.equal(out, out_too) and lse.shape == (2, 4, 100)
    assert out.shape == (2, 4, 100, 64) and out.transpose(1, 2).is_contiguous()


def composed(q, k, v, columns, offsets):
    """Every operator, with torch around it."""
    a = sparseattn.a_shape_attention(q, k, v, sink=4, window=20)
    b, lse = sparseattn.vertical_slash_attention(q, k, v, columns, offsets, return_lse=True)
    blocks = sparseattn.estimate_block_sparse(q, k, top_k=2)
    c = sparseattn.block_sparse_attention(q, k, v, blocks, scale=0.1)
    d = sparseattn.sparse_attention(q, k, v, PATTERNS)
    found = sparseattn.estimate_vertical_slash(q, k, num_columns=40, num_offsets=110)
    e = sparseattn.vertical_slash_attention(q, k, v, *found)
    return a + b, c * 2, d - e, lse.exp()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, main_place):
    torch._dynamo.reset()
    compiled = torch.compile(composed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for q_len, kv_len in [(100, 130), (65, 65), (130, 300)]:
        case = CASE._replace(q_len=q_len, kv_len=kv_len)
        args, _ = inputs("vertical_slash_attention", main_place, case)
        for got, expected in zip(compiled(*args), composed(*args), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.cuda
def test_inductor():
    pytest.importorskip("triton")
    torch._dynamo.reset()
    args, _ = inputs("vertical_slash_attention", Place("cuda", torch.bfloat16))
    for got, expected in zip(
        torch.compile(composed, fullgraph=True)(*args), composed(*args), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op, main_place):
    args, options = inputs(op, main_place)
    expected = tensors(torch_op(op)(*args, **options))
    with torch.inference_mode():
        args, options = inputs(op, main_place)
        assert args[0].is_inference()
        for a, b in zip(tensors(torch_op(op)(*args, **options)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_the_number_of_threads(op):
    args, options = inputs(op, Place("cpu", torch.float32))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(tensors(torch_op(op)(*args, **options)))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_batch_members_do_not_depend_on_each_other(place):
    """A sequence gives the same bits alone and in a batch."""
    case = Case(3, 4, 2, 130, 200, 64)
    q, k, v = make_qkv(case, place)
    whole = sparseattn.sparse_attention(q, k, v, PATTERNS)
    for b in range(3):
        alone = sparseattn.sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], PATTERNS)
        assert torch.equal(alone, whole[b : b + 1])
