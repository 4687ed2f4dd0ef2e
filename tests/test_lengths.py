"""Batches of unequal length: each sequence gets what it would get alone.

Padding is NaN in q, k and v throughout, so a test fails where lengths are ignored.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    Case,
    Place,
    check_attention,
    check_mask,
    poison_unseen,
)
from length_cases import (
    ADAPTIVE,
    BATCHES,
    PATTERNS,
    Batch,
    a_shape,
    adaptive,
    attend_by,
    attend_by_index,
    block_sparse,
    check_alone,
    every_batch,
    index_of,
    lens_of,
    mask_of,
    mixed,
    padded,
    vertical_slash,
)
from test_errors import ATTENTION, ESTIMATES, check_refused, good
from test_estimate import check_blocks, check_selection
from test_mixed import separable
from torch import Tensor

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash, reference

# --- attention ----------------------------------------------------------------------------------


@attend_by
@every_batch
def test_each_sequence_as_if_alone(batch, attend, place):
    for seed, dtype in enumerate([torch.int32, torch.int64]):
        q, k, v = padded(batch, place, seed)
        index = index_of(attend, batch, place, seed)
        result = attend(q, k, v, index, **batch.tensors(place, dtype))
        check_alone(attend, batch, result, q, k, v, index)


@attend_by_index
@every_batch
def test_against_oracle(batch, attend, place):
    q, k, v = padded(batch, place)
    index = index_of(attend, batch, place)
    mask = mask_of(attend, batch, index, place)
    k, v = poison_unseen(k, v, mask)
    out, lse = attend(q, k, v, index, **batch.tensors(place))
    check_attention(out, lse, q, k, v, mask)


@attend_by_index
@every_batch
def test_mask_to_the_key(batch, attend, main_place):
    index = index_of(attend, batch, main_place)
    lens = batch.tensors(main_place)

    def call(q, k, v):
        return attend(q, k, v, index, **lens)

    check_mask(call, mask_of(attend, batch, index, main_place), batch.case, main_place)


def test_mixed_against_oracle(place):
    """Estimates included, on inputs whose selection is clear."""
    case, q, k, v = separable(place, 200, 300)
    batch = Batch(case, [129, 200], [190, 300])
    for b, (m, n) in batch.lengths():
        for x, length in ((q, m), (k, n), (v, n)):
            x[b, :, length:] = math.nan
    patterns = [VerticalSlash(45, 0), BlockSparse(2), AShape(4, 40), Dense()]
    lens = batch.tensors(place)
    out, lse = sparseattn.sparse_attention(q, k, v, patterns, return_lse=True, **lens)
    mask = reference.pattern_mask(q, k, patterns, **lens)
    assert not mask[0, :, 129:].any() and not mask[0, :, :, 190:].any()
    check_attention(out, lse, q, k, v, mask)


@attend_by
def test_without_lse(attend, main_place):
    batch = BATCHES[0]
    q, k, v = padded(batch, main_place)
    index = index_of(attend, batch, main_place)
    lens = batch.tensors(main_place)
    op, options = {
        a_shape: (sparseattn.a_shape_attention, {"sink": 4, "window": 70}),
        vertical_slash: (sparseattn.vertical_slash_attention, {}),
        block_sparse: (sparseattn.block_sparse_attention, {"block_q": 128}),
        mixed: (sparseattn.sparse_attention, {"patterns": PATTERNS}),
        adaptive: (sparseattn.sparse_attention, {"patterns": ADAPTIVE}),
    }[attend]
    out = op(q, k, v, *index, **options, **lens)
    result = attend(q, k, v, index, **lens)
    assert torch.equal(out, result[0])
    check_alone(attend, batch, result, q, k, v, index)


@attend_by
def test_padding_rows_are_zero_where_values_are_not_finite(attend, place):
    """Rows of padding share their tile with rows that see the value."""
    batch = BATCHES[0]
    q, k, v = padded(batch, place)
    v[:, :, 0] = math.inf
    index = index_of(attend, batch, place)
    if attend is vertical_slash:
        index[0][..., 0] = 0
    if attend is block_sparse:
        index[0][..., 0] = True
    out, lse = attend(q, k, v, index, **batch.tensors(place))
    for b, (m, _) in batch.lengths():
        assert (out[b, :, m:] == 0).all() and lse[b, :, m:].isneginf().all()
        assert m == 0 or not out[b, 0, :m].isfinite().all()


# --- estimates ----------------------------------------------------------------------------------

LISTS = [
    {"num_columns": 50, "num_offsets": 120},
    {"num_columns": 20, "num_offsets": 90, "last_q": 17, "sink": 4, "local": 64},
    {"num_columns": 0, "num_offsets": 7, "local": 2},
    {"num_columns": 400, "num_offsets": 0},
]


@pytest.mark.parametrize("options", LISTS, ids=lambda o: "-".join(map(str, o.values())))
@every_batch
def test_lists_of_each_sequence(batch, options, place):
    q, k, _ = padded(batch, place)
    q = q * 2  # some mass stands out
    got = sparseattn.estimate_vertical_slash(q, k, **options, **batch.tensors(place))
    check_lists(batch, options, got, q, k)
    for b, (m, n) in batch.lengths():
        if m == 0:
            continue
        alone = sparseattn.estimate_vertical_slash(
            q[b : b + 1, :, :m], k[b : b + 1, :, :n], **options
        )
        for x, y in zip(got, alone, strict=True):
            assert torch.equal(x[b : b + 1], y), f"sequence {b}"


def check_lists(batch: Batch, options: dict, got: tuple[Tensor, Tensor], q, k) -> None:
    for b, (m, n) in batch.lengths():
        columns, offsets = (x[b : b + 1] for x in got)
        if m == 0:
            assert (columns == -1).all() and (offsets == -1).all()
            continue
        own = q[b : b + 1, :, :m], k[b : b + 1, :, :n]
        masses = reference.vertical_slash_mass(*own, options.get("last_q", 64))
        check_selection(columns, masses[0], options.get("sink", 30), options["num_columns"])
        check_selection(offsets, masses[1], options.get("local", 100), options["num_offsets"])


def test_lists_of_long_sequences(place):
    """Many chunks of keys, of which the shorter sequences have a part of one, or a few."""
    batch = Batch(Case(4, 8, 2, 129, 4500, 64), [129, 1, 70, 100], [4500, 200, 2300, 513])
    q, k, _ = padded(batch, place)
    q = q * 2
    options = {"num_columns": 100, "num_offsets": 150}
    got = sparseattn.estimate_vertical_slash(q, k, **options, **batch.tensors(place))
    check_lists(batch, options, got, q, k)


@pytest.mark.parametrize("block", [64, 128])
@every_batch
def test_blocks_of_each_sequence(batch, block, place):
    q, k, _ = padded(batch, place)
    q, k = q + 0.1, k + 0.1
    for top_k in (1, 2, 1000):
        options = {"top_k": top_k, "block": block}
        got = sparseattn.estimate_block_sparse(q, k, **options, **batch.tensors(place))
        for b, (m, n) in batch.lengths():
            nq, nk = -(-m // block), -(-n // block)
            assert not got[b, :, nq:].any() and (m == 0 or not got[b, :, :, nk:].any())
            if m == 0:
                continue
            own = q[b : b + 1, :, :m], k[b : b + 1, :, :n]
            part = got[b : b + 1, :, :nq, :nk]
            assert torch.equal(part, sparseattn.estimate_block_sparse(*own, **options))
            check_blocks(part, reference.block_scores(*own, block), top_k)


def test_oracle_takes_lengths(place):
    """The oracle's operators with lengths: its operators on the slices."""
    batch = BATCHES[0]
    q, k, v = padded(batch, place)
    lens = batch.tensors(place)
    columns, offsets = index_of(vertical_slash, batch, place)
    (blocks,) = index_of(block_sparse, batch, place)
    attention = [
        ("a_shape_attention", (), {"sink": 4, "window": 70}),
        ("vertical_slash_attention", (columns, offsets), {}),
        ("block_sparse_attention", (blocks,), {"block_q": 128}),
        ("sparse_attention", (PATTERNS,), {}),
    ]
    estimates = [
        ("estimate_vertical_slash", {"num_columns": 40, "num_offsets": 110}, -1),
        ("estimate_block_sparse", {"top_k": 2}, False),
    ]
    for name, index, options in attention:
        op = getattr(reference, name)
        out, lse = op(q, k, v, *index, **options, return_lse=True, **lens)
        for b, (m, n) in batch.lengths():
            assert (out[b, :, m:] == 0).all() and lse[b, :, m:].isneginf().all()
            if m == 0:
                continue
            one = slice(b, b + 1)
            own = q[one, :, :m], k[one, :, :n], v[one, :, :n]
            index_b = [x[one] if isinstance(x, Tensor) else x for x in index]
            alone = op(*own, *index_b, **options, return_lse=True)
            torch.testing.assert_close(out[one, :, :m], alone[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[one, :, :m], alone[1], rtol=1e-12, atol=1e-12)
    for name, options, nothing in estimates:
        op = getattr(reference, name)
        got = op(q, k, **options, **lens)
        for b, (m, n) in batch.lengths():
            own = q[b : b + 1, :, :m], k[b : b + 1, :, :n]
            for x, y in zip(
                as_tuple(got), as_tuple(op(*own, **options)) if m else (), strict=False
            ):
                part = x[b, :, : y.shape[2], : y.shape[3]] if y.dim() == 4 else x[b]
                assert torch.equal(part, y[0])
            assert m or all((x[b] == nothing).all() for x in as_tuple(got))


def as_tuple(x) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


# --- the arguments ------------------------------------------------------------------------------


@attend_by
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_of_the_lengths(attend, dtype, place):
    batch = BATCHES[0]
    q, k, v = padded(batch, place)
    index = index_of(attend, batch, place)
    lens = batch.tensors(place, dtype)
    both = torch.stack([lens["q_lens"], lens["kv_lens"]], dim=1)  # [batch, 2]: stride 2
    result = attend(q, k, v, index, q_lens=both[:, 0], kv_lens=both[:, 1])
    check_alone(attend, batch, result, q, k, v, index)

    same = Batch(batch.case, [70] * 4, [140] * 4)
    q, k, v = padded(same, place)
    q_lens, kv_lens = (torch.tensor(n, dtype=dtype, device=place.device) for n in (70, 140))
    result = attend(q, k, v, index, q_lens=q_lens.expand(4), kv_lens=kv_lens.expand(4))
    check_alone(attend, same, result, q, k, v, index)


@attend_by
def test_index_lists_and_lengths_differ_in_width(attend, main_place):
    """int64 lists with int32 lengths and the reverse."""
    batch = BATCHES[0]
    q, k, v = padded(batch, main_place)
    for list_dtype, lens_dtype in [(torch.int64, torch.int32), (torch.int32, torch.int64)]:
        index = index_of(attend, batch, main_place)
        if attend is vertical_slash:
            index = tuple(x.to(list_dtype) for x in index)
        result = attend(q, k, v, index, **batch.tensors(main_place, lens_dtype))
        check_alone(attend, batch, result, q, k, v, index)


CLAMPED = {  # given q_lens, kv_lens; what they mean in storage of 200 rows and 300 keys
    "too-long": (
        [500, 70, 201, 2**31 - 1],
        [2**31 - 1, 301, 300, 100],
        [200, 70, 200, 100],
        [300, 300, 300, 100],
    ),
    "negative": ([-1, 70, -(2**31), 10], [90, -1, 80, 20], [0, 0, 0, 10], [0, 0, 0, 20]),
    "more-rows-than-keys": ([100, 2, 1, 70], [90, 1, 0, 70], [90, 1, 0, 70], [90, 1, 0, 70]),
    "beyond-int32": (
        [2**40, 2**32 + 5, -(2**40), 30],
        [2**40, 2**33, 50, 2**62],
        [200, 200, 0, 30],
        [300, 300, 0, 300],
    ),
}


@attend_by
@pytest.mark.parametrize("name", CLAMPED)
def test_values_out_of_range_are_clamped(attend, name, place):
    given_q, given_kv, q_lens, kv_lens = CLAMPED[name]
    batch = Batch(BATCHES[0].case, q_lens, kv_lens)
    q, k, v = padded(batch, place)
    index = index_of(attend, batch, place)
    dtype = torch.int64 if name == "beyond-int32" else torch.int32
    lens = lens_of(given_q, given_kv, place, dtype)
    check_alone(attend, batch, attend(q, k, v, index, **lens), q, k, v, index)
    assert reference.lengths(q, k, **lens) == list(zip(q_lens, kv_lens, strict=True))


@attend_by
def test_one_of_the_two(attend, place):
    """Without kv_lens all keys are there; without q_lens as many rows as storage and keys allow."""
    case = BATCHES[0].case
    only_q = Batch(case, [63, 1, 0, 200], [300] * 4)
    only_kv = Batch(case, [200, 65, 0, 200], [250, 65, 0, 300])
    for batch, name in ((only_q, "q_lens"), (only_kv, "kv_lens")):
        q, k, v = padded(batch, place)
        index = index_of(attend, batch, place)
        result = attend(q, k, v, index, **{name: batch.tensors(place)[name]})
        check_alone(attend, batch, result, q, k, v, index)


@pytest.mark.parametrize("name", ["q_lens", "kv_lens"])
@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_refused(op, name, main_place):
    args = good(op, main_place)
    lens = torch.tensor([100, 50], dtype=torch.int32, device=main_place.device)
    getattr(sparseattn, op)(**args, **{name: lens})
    for wrong in (lens.float(), lens.bool(), lens.short(), lens[:1], lens[None], lens[0]):
        check_refused(op, args | {name: wrong}, (name,))
    check_refused(op, args | {name: [100, 50]}, (name,), torch_too=False)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["q_lens", "kv_lens"])
@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_devices_must_agree(op, name):
    lens = torch.tensor([100, 50])
    check_refused(op, good(op, Place("cuda", torch.bfloat16)) | {name: lens}, (name,))
    for dtype in (torch.float32, torch.bfloat16):
        check_refused(op, good(op, Place("cpu", dtype)) | {name: lens.cuda()}, (name,))


# --- torch and CUDA -----------------------------------------------------------------------------


def test_compile_fullgraph(main_place):
    """Lengths are inputs of the graph: other values do not compile anew."""
    torch._dynamo.reset()
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    case = BATCHES[0].case
    others = [Batch(case, [200, 0, 5, 64], [200, 7, 300, 65]), Batch(case, [9] * 4, [99] * 4)]
    for batch in [BATCHES[0], *others]:
        q, k, v = padded(batch, main_place)
        result = compiled(q, k, v, **batch.tensors(main_place))
        check_alone(mixed, batch, result, q, k, v, ())


GPU = Place("cuda", torch.bfloat16)


@pytest.mark.cuda
@attend_by
def test_graph_replays_with_new_lengths(attend):
    index = index_of(attend, BATCHES[0], GPU)
    static = *padded(BATCHES[0], GPU), *BATCHES[0].tensors(GPU).values()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(*static[:3], index, q_lens=static[3], kv_lens=static[4])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*static[:3], index, q_lens=static[3], kv_lens=static[4])
    for q_lens, kv_lens in [([200, 0, 5, 64], [200, 0, 300, 65]), ([9] * 4, [99] * 4)]:
        batch = Batch(BATCHES[0].case, q_lens, kv_lens)
        fresh = *padded(batch, GPU, 3), *batch.tensors(GPU).values()
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        check_alone(attend, batch, captured, *fresh[:3], index)


@pytest.mark.cuda
@attend_by
def test_lengths_do_not_wait_for_the_device(attend):
    """Lengths are still being written when the call returns."""
    batch = BATCHES[0]
    q, k, v = padded(batch, GPU)
    index = index_of(attend, batch, GPU)
    lens = batch.tensors(GPU)
    late = {name: torch.zeros_like(x) for name, x in lens.items()}
    attend(q, k, v, index, **lens)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)  # about 0.3 s
    for name, x in lens.items():
        late[name].copy_(x)
    result = attend(q, k, v, index, **late)
    done.record()
    waited = done.query()
    torch.cuda.synchronize()
    assert not waited
    check_alone(attend, batch, result, q, k, v, index)
