"""What only a GPU can show: streams, graphs, repeats, large grids, large offsets, two devices."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Case,
    Place,
    check_attention,
    full_mask,
    make_qkv,
    random_blocks,
    random_lists,
    vertical_slash_masks,
)

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash, reference

pytestmark = pytest.mark.cuda

GPU = Place("cuda", torch.bfloat16)
CASE = Case(2, 8, 2, 300, 450, 128)
PATTERNS = [VerticalSlash(40, 110), Dense(), BlockSparse(2), AShape(4, 90)] * 2


def a_shape(q, k, v):
    return sparseattn.a_shape_attention(q, k, v, sink=4, window=70, return_lse=True)


def vertical_slash(q, k, v, columns, offsets):
    return sparseattn.vertical_slash_attention(q, k, v, columns, offsets, return_lse=True)


def block_sparse(q, k, v, blocks):
    return sparseattn.block_sparse_attention(q, k, v, blocks, return_lse=True)


def mixed(q, k, v):
    return sparseattn.sparse_attention(q, k, v, PATTERNS, return_lse=True)


def find_lists(q, k, v):
    return sparseattn.estimate_vertical_slash(q, k, num_columns=50, num_offsets=150)


def find_blocks(q, k, v):
    return (sparseattn.estimate_block_sparse(q, k, top_k=3),)


def index_of(function, seed: int) -> tuple[torch.Tensor, ...]:
    """The index arguments that follow q, k, v."""
    if function is vertical_slash:
        return tuple(x.cuda() for x in random_lists(CASE, 40, 12, seed))
    if function is block_sparse:
        return (random_blocks(CASE, 64, 64, seed).cuda(),)
    return ()


FUNCTIONS = [a_shape, vertical_slash, block_sparse, mixed, find_lists, find_blocks]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@every_function
def test_repeats_are_bitwise_equal(function):
    args = *make_qkv(CASE, GPU), *index_of(function, 0)
    first = function(*args)
    for _ in range(20):
        for a, b in zip(function(*args), first, strict=True):
            assert torch.equal(a, b)


def test_bits_do_not_depend_on_who_takes_a_tile():
    """Far more tiles than multiprocessors: in every run others come one after the other."""
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 8192, 128, generator=gen, device="cuda", dtype=torch.bfloat16)
        for heads in (16, 4, 4)
    )
    patterns = [VerticalSlash(300, 900), BlockSparse(20), AShape(64, 700), VerticalSlash(60, 200)]
    first = sparseattn.sparse_attention(q, k, v, patterns * 4)
    for _ in range(10):
        assert torch.equal(sparseattn.sparse_attention(q, k, v, patterns * 4), first)


@every_function
def test_runs_on_the_current_stream(function):
    """Inputs appear late on a side stream; work queued anywhere else would read what was there."""
    args = *make_qkv(CASE, GPU), *index_of(function, 0)
    expected = function(*args)
    late = [torch.zeros_like(x) for x in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, args, strict=True):
            x.copy_(y)
        got = function(*late)
        for x in late:
            x.zero_()  # and the operator must have read them by then, in stream order
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@every_function
def test_does_not_wait_for_the_device(function):
    """The host returns while the stream is still busy: no hidden synchronisation."""
    args = *make_qkv(CASE, GPU), *index_of(function, 0)
    function(*args)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)  # about 0.3 s
    function(*args)
    done.record()
    waited = done.query()
    torch.cuda.synchronize()
    assert not waited


@every_function
def test_graph_replays_with_new_contents(function):
    """Captured once; lists, masks, queries and keys change in place between replays."""
    static = *make_qkv(CASE, GPU), *index_of(function, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*static)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*static)
    for seed in range(1, 4):
        fresh = *make_qkv(CASE, GPU, seed), *index_of(function, seed)
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        for x in captured:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, function(*fresh), strict=True):
            assert torch.equal(a, b)


def test_two_streams_at_once():
    """Calls on different streams share no scratch memory."""
    inputs = [(*make_qkv(CASE, GPU, seed), *index_of(vertical_slash, seed)) for seed in range(4)]
    expected = [vertical_slash(*x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = [[] for _ in inputs]
    for _ in range(10):
        for stream, x, results in zip(streams, inputs, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(vertical_slash(*x))
    torch.cuda.synchronize()
    for results, want in zip(got, expected, strict=True):
        for out, lse in results:
            assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_gpu_agrees_with_cpu():
    """The same call on both devices, bf16: two roundings apart at most."""
    q, k, v = make_qkv(CASE, GPU)
    lists = index_of(vertical_slash, 0)
    out, lse = vertical_slash(q, k, v, *lists)
    other, other_lse = vertical_slash(*(x.cpu() for x in (q, k, v, *lists)))
    torch.testing.assert_close(out.cpu(), other, rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(lse.cpu(), other_lse, rtol=1e-5, atol=1e-3)


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, heads", [(70_000, 1), (4375, 16), (1, 70_000)])
def test_seventy_thousand_tiles(batch, heads):
    """More sequences, heads or tiles than the 65 535 blocks of a grid's second dimension."""
    case = Case(batch, heads, 1, 1, 65, 64)
    q, k, v = make_qkv(case, GPU)
    mask = full_mask(reference.a_shape_mask(1, 65, 2, 9, "cuda"), case)
    check_attention(*a_shape_of(q, k, v, 2, 9), q, k, v, mask)
    if heads <= 16:
        columns = torch.randint(0, 65, (batch, heads, 3), device="cuda", dtype=torch.int32)
        offsets = torch.full((batch, heads, 1), -1, device="cuda", dtype=torch.int32)
        out, lse = vertical_slash(q, k, v, columns, offsets)
        mask = torch.zeros(batch, heads, 1, 65, dtype=torch.bool, device="cuda")
        mask.scatter_(-1, columns.long().unsqueeze(2), True)
        check_attention(out, lse, q, k, v, mask)
        blocks = torch.rand(batch, heads, 1, 2, device="cuda") < 0.5
        out, lse = block_sparse(q, k, v, blocks)
        check_attention(out, lse, q, k, v, blocks.repeat_interleave(64, dim=-1)[..., :65])


def a_shape_of(q, k, v, sink: int, window: int):
    return sparseattn.a_shape_attention(q, k, v, sink=sink, window=window, return_lse=True)


def test_seventy_thousand_tiles_of_one_head():
    """One head, 4.5 million rows: the last tile is as right as the first."""
    length = 64 * 70_000 + 3
    q, k, v = make_qkv(Case(1, 1, 1, length, length, 64), GPU)
    out, lse = a_shape_of(q, k, v, 2, 64)
    for first, last in [(0, 200), (64 * 65_535 - 100, 64 * 65_535 + 100), (length - 200, length)]:
        check_rows_a_shape(out, lse, q, k, v, 2, 64, first, last)


def check_rows_a_shape(out, lse, q, k, v, sink: int, window: int, first: int, last: int) -> None:
    """Rows first .. last - 1, q_len == kv_len, against the oracle on the keys that they see."""
    low = max(sink, first - window + 1)
    if low <= sink:
        keys = torch.arange(last, device=q.device)
    else:
        keys = torch.cat([torch.arange(sink), torch.arange(low, last)]).to(q.device)
    rows = torch.arange(first, last, device=q.device).unsqueeze(1)
    mask = (keys <= rows) & ((keys < sink) | (rows - keys < window))
    part = q[:, :, first:last]
    case = Case(*q.shape[:2], k.shape[1], last - first, len(keys), q.shape[3])
    check_attention(
        out[:, :, first:last],
        lse[:, :, first:last],
        part,
        k[:, :, keys],
        v[:, :, keys],
        full_mask(mask, case),
    )


@pytest.mark.large(12)
def test_offsets_beyond_31_bits_in_strides():
    """q, k and v share rows of 65 536 elements: the last row is 2.6e9 elements in."""
    length, width = 40_000, 65_536
    storage = torch.empty(1, length, width // 128, 128, device="cuda", dtype=GPU.dtype)
    views = [storage[:, :, i : i + 1].transpose(1, 2) for i in (0, 200, 511)]
    for seed, view in enumerate(views):
        view.copy_(make_qkv(Case(1, 1, 1, length, length, 128), GPU, seed)[0])
    q, k, v = views
    assert k.stride(2) * (length - 1) > 2**31
    columns = torch.tensor([[[3, 100, 20_000, 39_998]]], dtype=torch.int32, device="cuda")
    offsets = torch.tensor([[[0, 5000, 39_000]]], dtype=torch.int32, device="cuda")
    out, lse = vertical_slash(q, k, v, columns, offsets)
    contiguous = vertical_slash(*(x.contiguous() for x in views), columns, offsets)
    assert torch.equal(out, contiguous[0]) and torch.equal(lse, contiguous[1])
    mask = reference.vertical_slash_mask(64, length, columns[0, 0], offsets[0, 0])
    rows = slice(length - 64, length)  # the last tile, whole
    check_attention(out[:, :, rows], lse[:, :, rows], q[:, :, rows], k, v, mask[None, None])


@pytest.mark.large(20)
def test_output_beyond_31_bits():
    """An output of more than 2^31 elements; the queries of all heads are one head, stride 0."""
    heads, length, dim = 128, 64 * 4100, 64
    q, k, v = make_qkv(Case(1, 1, 1, length, length, dim), GPU)
    q = q.expand(1, heads, length, dim)
    out, lse = a_shape_of(q, k, v, 2, 64)
    assert out.numel() > 2**31
    for head in (0, heads - 1):
        h = slice(head, head + 1)
        check_rows_a_shape(out[:, h], lse[:, h], q[:, h], k, v, 2, 64, length - 200, length)
    for head in range(1, heads, 13):
        assert torch.equal(out[:, head], out[:, 0])


@pytest.mark.large(24)
def test_million_token_estimate_and_attention():
    """1M keys, 8 heads: lists, cover and masses far beyond what a block's memory holds."""
    length = 2**20
    q, k, v = make_qkv(Case(1, 8, 2, 256, length, 128), GPU)
    columns, offsets = sparseattn.estimate_vertical_slash(q, k, num_columns=1000, num_offsets=6096)
    assert (columns >= 0).all() and (offsets >= 0).all()
    assert (columns.diff(dim=-1) > 0).all() and (offsets.diff(dim=-1) > 0).all()
    out, lse = vertical_slash(q, k, v, columns, offsets)
    mask = vertical_slash_masks(Case(1, 1, 1, 256, length, 128), columns[:, 7:], offsets[:, 7:])
    check_attention(out[:, 7:], lse[:, 7:], q[:, 7:], k[:, 1:], v[:, 1:], mask)


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_function
def test_the_inputs_device_counts_not_the_current_one(function):
    args = *make_qkv(CASE, GPU), *index_of(function, 0)
    expected = function(*args)
    with torch.cuda.device(0):
        got = function(*(x.to("cuda:1") for x in args))
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1") and torch.equal(a.cpu(), b.cpu())
