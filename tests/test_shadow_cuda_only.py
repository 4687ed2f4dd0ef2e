"""ShadowKV operators on a GPU: long lists, graphs, streams, repeats, memory of the host."""

from __future__ import annotations

import pytest
import torch
from helpers import Place, generator, randn

import sparseattn  # noqa: F401  (loads the operators)

pytestmark = pytest.mark.cuda

GPU = Place("cuda", torch.bfloat16)
ops = torch.ops.sparseattn


def whole_numbers(*shape: int, seed: int, most: int = 2) -> torch.Tensor:
    """Products of these are exact, so that equal scores are equal to the bit."""
    numbers = torch.randint(-most, most + 1, shape, generator=generator(seed))
    return numbers.to(GPU.dtype).cuda()


def best(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The largest scores, equal ones by the smaller index, ascending."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return order.sort(dim=-1).values.int()


def scores_of(q: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    return (q.double() @ landmarks.double().mT).squeeze(-2)


@pytest.mark.parametrize("chunks, top_k", [(15_616, 256), (70_000, 2048), (300, 300), (5, 9)])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_long_selections_are_exact(chunks, top_k, dim):
    """Keys in shared memory and, where they have no room there, outside it."""
    q = whole_numbers(2, 3, 1, dim, seed=0)
    landmarks = whole_numbers(2, 3, chunks, dim, seed=1)
    excluded = torch.rand(2, 3, chunks, generator=generator(2)).cuda() < 0.2
    scores = scores_of(q, landmarks)
    got = ops.shadow_select(q, landmarks, top_k=top_k, scale=0.01)
    want = best(scores, min(top_k, chunks))
    assert torch.equal(got[..., : want.shape[2]], want) and (got[..., want.shape[2] :] == -1).all()
    got = ops.shadow_select(q, landmarks, top_k=top_k // 2, scale=0.01, excluded=excluded)
    for b in range(2):
        for h in range(3):
            kept = (~excluded[b, h]).nonzero().flatten()
            want = kept[best(scores[b, h, kept], top_k // 2).long()].int()
            assert (
                torch.equal(got[b, h, : len(want)], want) and (got[b, h, len(want) :] == -1).all()
            )


def test_selection_in_rounds():
    """More rows than scratch memory holds scores of; the last one decides."""
    q = torch.zeros(1, 8, 80, 64, dtype=GPU.dtype, device="cuda")
    q[:, :, -1:] = whole_numbers(1, 8, 1, 64, seed=0)
    landmarks = whole_numbers(1, 8, 70_000, 64, seed=1)
    got = ops.shadow_select(q, landmarks, top_k=256, scale=0.01)
    assert torch.equal(got, best(scores_of(q[:, :, -1:], landmarks), 256))


@pytest.mark.parametrize("top_k, slots", [(2048, 8192), (10_000, 20_000)])
def test_long_plans(top_k, slots):
    """Arrays in shared memory, and outside it."""
    tables = [torch.full((1, 2, slots), -1, dtype=torch.int32) for _ in range(2)]
    tables = [tables[0], torch.zeros_like(tables[1])]
    on_gpu = [x.cuda() for x in tables]
    for step in range(6):
        order = torch.rand(1, 2, 3 * top_k, generator=generator(step)).argsort(-1)
        selected = order[..., :top_k].sort(-1).values.int()
        selected[..., -5:] = -1
        want = ops.shadow_plan_(selected, *tables)
        got = ops.shadow_plan_(selected.cuda(), *on_gpu)
        for x, y in zip((*want, *tables), (*got, *on_gpu), strict=True):
            assert torch.equal(x, y.cpu())


def test_gram_of_long_prompts():
    k = randn(1, 4, 20_000, 128, place=GPU, seed=0) + 0.5
    sums = [
        torch.zeros(1, 512, 512, dtype=torch.float64, device="cuda"),
        torch.zeros(1, 512, dtype=torch.float64, device="cuda"),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
    ]
    again = [x.clone() for x in sums]
    ops.shadow_gram_(k, *sums)
    ops.shadow_gram_(k, *again)
    rows = k[0].transpose(0, 1).reshape(20_000, 512).double()
    error = (sums[0][0] - rows.mT @ rows).abs() / (rows.abs().mT @ rows.abs())
    assert error.max() < 4e-6 and (sums[1][0] - rows.sum(0)).abs().max() < 1e-2
    assert sums[2].item() == 20_000
    assert all(torch.equal(x, y) for x, y in zip(sums, again, strict=True))


def step(q, landmarks, store, values, table, used, num_chunks):
    selected = ops.shadow_select(q, landmarks, top_k=64, num_chunks=num_chunks)
    slot_of, misses, counts = ops.shadow_plan_(selected, table, used)
    ops.gather_values_(store, values, misses, counts)
    return selected, slot_of


def test_steps_in_a_graph_on_a_stream():
    """A captured step reads lengths, queries and pinned values anew."""
    q = randn(1, 8, 1, 128, place=GPU, seed=0)
    landmarks = randn(1, 2, 2000, 128, place=GPU, seed=1)
    store = torch.randn(1, 2, 2000, 8 * 128, generator=generator(2)).to(GPU.dtype).pin_memory()
    values = torch.zeros(1, 2, 100, 8 * 128, dtype=GPU.dtype, device="cuda")
    table = torch.full((1, 2, 100), -1, dtype=torch.int32, device="cuda")
    used = torch.zeros_like(table)
    num_chunks = torch.tensor([1000], dtype=torch.int32, device="cuda")
    args = q, landmarks, store, values, table, used, num_chunks
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            selected, slot_of = step(*args)
    for turn in range(4):
        q.copy_(randn(1, 8, 1, 128, place=GPU, seed=10 + turn))
        num_chunks.fill_(1000 + 250 * turn)
        graph.replay()
        torch.cuda.synchronize()
        want = ops.shadow_select(q, landmarks, top_k=64, num_chunks=num_chunks)
        assert torch.equal(selected, want) and (want < num_chunks).all()
        for h in range(2):
            rows = store[0, h, selected[0, h].cpu().long()]
            assert torch.equal(values[0, h, slot_of[0, h].long()].cpu(), rows)


def test_a_store_in_pageable_memory_is_refused():
    store = torch.zeros(1, 1, 4, 512, dtype=GPU.dtype)
    values = torch.zeros(1, 1, 4, 512, dtype=GPU.dtype, device="cuda")
    misses = torch.zeros(1, 1, 1, 2, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="store: expected device memory or pinned host memory"):
        ops.gather_values_(store, values, misses, misses[..., 0, 0].contiguous())


def test_rows_off_the_boundary():
    """What is read is copied, what is written in place is refused."""
    odd = torch.zeros(1, 2, 65, 65, dtype=GPU.dtype, device="cuda")[:, :, 1:, 1:]
    odd.copy_(randn(1, 2, 64, 64, place=GPU, seed=0))
    landmarks = torch.zeros(1, 2, 8, 64, dtype=GPU.dtype, device="cuda")
    plain = torch.zeros_like(landmarks)
    ops.shadow_landmarks_(odd, landmarks, chunk=8)
    ops.shadow_landmarks_(odd.contiguous(), plain, chunk=8)
    assert torch.equal(landmarks, plain)
    with pytest.raises(RuntimeError, match="landmarks: expected rows that start on 16-byte"):
        ops.shadow_landmarks_(odd, odd[:, :, :8], chunk=8)
