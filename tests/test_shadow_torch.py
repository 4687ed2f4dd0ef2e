"""The ShadowKV operators as torch sees them: schemas, fake kernels, opcheck, torch.compile."""

from __future__ import annotations

import pytest
import torch
from helpers import Place, generator, randn
from shadow_inputs import OPS, Sizes, make_attention, needs

from sparseattn import shadow

LOW_RANK = "Tensor? mean=None, Tensor? inv_freq=None, *, "
ROPE = "bool interleaved=False, float rope_scale=1., "
SCHEMAS = {
    "shadow_undo_rope_": "(Tensor k, Tensor(a!) out, Tensor inv_freq, Tensor? mean=None, *, "
    "int first=0, bool interleaved=False, float rope_scale=1.) -> ()",
    "shadow_gram_": "(Tensor k, Tensor(a!) gram, Tensor(b!) total, Tensor(c!) count, *, "
    "Tensor? kv_lens=None) -> ()",
    "shadow_landmarks_": "(Tensor k, Tensor(a!) landmarks, Tensor(b!)? min_cosine=None, *, "
    "int chunk, Tensor? first_chunk=None, Tensor? kv_lens=None) -> ()",
    "shadow_outliers": "(Tensor min_cosine, *, int count, int sink_chunks=0, "
    "Tensor? num_chunks=None) -> Tensor",
    "shadow_select": "(Tensor q, Tensor landmarks, *, int top_k, Tensor? excluded=None, "
    "Tensor? num_chunks=None, Tensor? q_lens=None, float? scale=None) -> Tensor",
    "shadow_plan_": "(Tensor selected, Tensor(a!) slot_chunk, Tensor(b!) last_used) "
    "-> (Tensor, Tensor, Tensor)",
    "store_rows_": "(Tensor x, Tensor(a!) store, Tensor(b!)? scale=None, *, int first=0) -> ()",
    "gather_values_": "(Tensor store, Tensor(a!) values, Tensor misses, Tensor miss_count, *, "
    "Tensor? store_scale=None) -> ()",
    "lowrank_reconstruct": f"(Tensor selected, Tensor factor, Tensor basis, {LOW_RANK}int chunk, "
    f"{ROPE}Tensor? factor_scale=None) -> Tensor",
    "shadow_attention": "(Tensor q, Tensor k, Tensor v, Tensor selected, Tensor slot_of, "
    f"Tensor values, Tensor factor, Tensor basis, {LOW_RANK}{ROPE}float? scale=None, "
    "bool return_lse=False, Tensor? q_lens=None, Tensor? exact_lens=None, "
    "Tensor? exact_starts=None, Tensor? factor_scale=None) -> (Tensor, Tensor)",
}
SIZES = Sizes(q_len=2)
CHUNKS = 50  # of SIZES


def inputs(op: str, place: Place) -> tuple[tuple, dict]:
    """Positional and keyword arguments of torch.ops.sparseattn.<op>, with all options given."""
    device = place.device
    full = make_attention(SIZES, place)
    k = randn(2, 2, 100, 64, place=place, seed=0)
    lens = torch.tensor([100, 37], device=device)
    some = torch.tensor([CHUNKS, 20], dtype=torch.int32, device=device)
    q_lens = torch.tensor([2, 1], device=device)
    cosines = torch.rand(2, 2, CHUNKS, generator=generator(4)).to(device)
    low_rank = tuple(full[x] for x in ("factor", "basis", "mean", "inv_freq"))
    rope = {"interleaved": True, "rope_scale": 1.1}
    if op == "shadow_undo_rope_":
        out = torch.zeros(2, 100, 2, 64, device=device, dtype=place.dtype)
        return (k, out, full["inv_freq"], full["mean"]), rope | {"first": 37}
    if op == "shadow_gram_":
        sums = [torch.zeros(2, *x, device=device).double() for x in ((128, 128), (128,))]
        return (k, *sums, torch.zeros(2, dtype=torch.int64, device=device)), {"kv_lens": lens}
    if op == "shadow_landmarks_":
        landmarks = torch.zeros(2, 2, CHUNKS, 64, device=device, dtype=place.dtype)
        options = {"chunk": 8, "first_chunk": some - 20, "kv_lens": lens}
        return (k, landmarks, cosines), options
    if op == "shadow_outliers":
        return (cosines,), {"count": 6, "sink_chunks": 1, "num_chunks": some}
    if op == "shadow_select":
        landmarks = randn(2, 2, CHUNKS, 64, place=place, seed=1)
        options = {"excluded": cosines < 0.2, "num_chunks": some, "q_lens": q_lens, "scale": 0.2}
        return (full["q"], landmarks), {"top_k": 6} | options
    table = torch.full((2, 2, 9), -1, dtype=torch.int32, device=device)
    if op == "shadow_plan_":
        return (full["selected"], table, torch.zeros_like(table)), {}
    if op == "store_rows_":
        return (k[:, :, :96], torch.zeros(2, 2, 20, 8 * 64).to(device, place.dtype)), {"first": 5}
    if op == "gather_values_":
        misses = torch.zeros(2, 2, 6, 2, dtype=torch.int32, device=device)
        store = randn(2, 2, CHUNKS, 8 * 64, place=place, seed=2)
        counts = torch.ones(2, 2, dtype=torch.int32, device=device)
        return (store, torch.zeros_like(store[:, :, :9]).clone(), misses, counts), {}
    if op == "lowrank_reconstruct":
        return (full["selected"], *low_rank), rope | {"chunk": 8}
    first = tuple(full[x] for x in ("q", "k", "v", "selected", "slot_of", "values"))
    options = {"scale": 0.1, "return_lse": True, "q_lens": q_lens, "exact_lens": some}
    return (*first, *low_rank), rope | options | {"exact_starts": some - 20}


def torch_op(op: str):
    return getattr(torch.ops.sparseattn, op).default


def tensors(result) -> tuple[torch.Tensor, ...]:
    return () if result is None else result if isinstance(result, tuple) else (result,)


def run(op: str, place: Place) -> tuple[torch.Tensor, ...]:
    """What the operator returns and what it has written."""
    args, options = inputs(op, place)
    before = [x.clone() if torch.is_tensor(x) else x for x in args]
    result = tensors(torch_op(op)(*args, **options))
    for old, new, argument in zip(before, args, torch_op(op)._schema.arguments, strict=False):
        if torch.is_tensor(new) and not (argument.alias_info and argument.alias_info.is_write):
            assert torch.equal(old.nan_to_num(), new.nan_to_num()), f"{argument.name} was written"
    return (*result, *(x for x in args if torch.is_tensor(x)))


@pytest.mark.parametrize("op", OPS)
def test_schema(op):
    assert str(torch_op(op)._schema) == f"sparseattn::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, main_place):
    needs(main_place, op)
    args, options = inputs(op, main_place)
    required = ("chunk", "count", "top_k")
    torch.library.opcheck(torch_op(op), args, options)
    torch.library.opcheck(torch_op(op), args, {x: options[x] for x in required if x in options})


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_tell_sizes_and_strides(op, main_place):
    needs(main_place, op)
    args, options = inputs(op, main_place)
    real = tensors(torch_op(op)(*args, **options))
    meta = [x.to("meta") if torch.is_tensor(x) else x for x in args]
    fake = tensors(torch_op(op)(*meta, **options))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert b.device.type == "meta"


def step(q, k, v, landmarks, table, used, store, values, factor, basis, mean, inv_freq, lens):
    """All of a decode step, with torch around it."""
    selected = shadow.shadow_select(q, landmarks, top_k=6, num_chunks=lens)
    slot_of, misses, counts = shadow.shadow_plan_(selected, table, used)
    shadow.gather_values_(store, values, misses, counts)
    out, lse = shadow.shadow_attention(
        q, k, v, selected, slot_of, values, factor, basis, mean, inv_freq, return_lse=True
    )  # fmt: skip
    return out * 2, lse.exp(), counts.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, main_place):
    needs(main_place, "shadow_select", "shadow_plan_", "gather_values_", "shadow_attention")
    place = main_place
    full = make_attention(SIZES, place)
    store = randn(2, 2, CHUNKS, 8 * 64, place=place, seed=2)
    landmarks = randn(2, 2, CHUNKS, 64, place=place, seed=1)
    factor = randn(2, 400, 32, place=place, seed=3)
    lens = torch.tensor([CHUNKS, 20], device=place.device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for call in (step, compiled):
        table = torch.full((2, 2, 9), -1, dtype=torch.int32, device=place.device)
        used, values = torch.zeros_like(table), torch.zeros_like(store[:, :, :9]).clone()
        state = (landmarks, table, used, store, values, factor)
        rest = (full["basis"], full["mean"], full["inv_freq"], lens)
        for seed in range(3):
            q = randn(2, 4, 2, 64, place=place, seed=10 + seed)
            results.append((*call(q, full["k"], full["v"], *state, *rest), table, used, values))
            results[-1] = [x.clone() for x in results[-1]]
    for eager, other in zip(results[:3], results[3:], strict=True):
        for a, b in zip(eager, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op, main_place):
    needs(main_place, op)
    expected = run(op, main_place)
    with torch.inference_mode():
        for a, b in zip(run(op, main_place), expected, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_the_number_of_threads(op):
    place = Place("cpu", torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(run(op, place))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
