"""Pinned host memory: its size, its registration and its end; rows that grow in it."""

from __future__ import annotations

import gc
import mmap
from contextlib import nullcontext

import pytest
import torch
from helpers import PLACES, randn
from shadow_inputs import needs

from sparseattn import host_memory, reference, shadow
from sparseattn.host_memory import HostMemory
from sparseattn.shadow_rows import StoredRows, room_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Driver:
    """Stands in for the CUDA runtime: remembers what it was asked, and fails on demand."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple] = []
        self.status = 0
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _=None: self.calls.append(("wait",)))
        monkeypatch.setattr(torch, "ones", lambda *_, **__: None)

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(("register", address, nbytes, flags))
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5_000_000])
def test_plain_memory(nbytes):
    memory = HostMemory(nbytes, CPU)
    data = memory.tensor((nbytes,), torch.uint8)
    assert data.shape == (nbytes,) and (data == 0).all() and not data.requires_grad
    assert data.data_ptr() % mmap.PAGESIZE == 0 or nbytes == 0
    memory.free()
    memory.free()
    assert memory.nbytes == 0


def test_tensors_share_the_first_bytes():
    memory = HostMemory(4096, CPU)
    memory.tensor((2, 3), torch.bfloat16).fill_(1.5)
    assert (memory.tensor((6,), torch.bfloat16) == 1.5).all()
    with pytest.raises(ValueError, match="shape: expected at most 4096 bytes, got 4104"):
        memory.tensor((1026,), torch.float32)


def test_whole_pages_are_registered_and_unregistered_once(driver):
    memory = HostMemory(10_000, GPU)
    (call,) = driver.calls
    name, address, nbytes, flags = call
    assert (name, nbytes, flags) == ("register", 3 * mmap.PAGESIZE, 3)
    assert address % mmap.PAGESIZE == 0
    assert memory.tensor((1,), torch.uint8).data_ptr() == address
    memory.free()
    memory.free()
    assert driver.calls[1:] == [("wait",), ("unregister", address)]


def test_what_nobody_refers_to_is_waited_for_and_unpinned(driver):
    memory = HostMemory(100, GPU)
    data = memory.tensor((100,), torch.uint8)
    del memory
    gc.collect()
    assert [x[0] for x in driver.calls] == ["register", "wait", "unregister"]
    assert (data == 0).all()  # the memory stays as long as a tensor does


def test_a_refused_registration_is_a_memory_error(driver):
    driver.status = 2
    with pytest.raises(MemoryError, match=r"1\.0 MiB of host memory are needed: .* pinned \(2\)"):
        HostMemory(2**20, GPU)
    gc.collect()
    assert [x[0] for x in driver.calls] == ["register"]


def test_more_than_there_is_is_refused_before_it_is_touched(driver, monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 2.0**20)
    with pytest.raises(MemoryError, match=r"2\.0 MiB of host memory are needed: 1\.0 MiB are avai"):
        HostMemory(2**21, GPU)
    assert driver.calls == [] and HostMemory(2**20, CPU).nbytes == 2**20
    monkeypatch.undo()
    assert 0 < host_memory.available() < 2**60


def grown(place, steps: int, **options) -> tuple[StoredRows, torch.Tensor]:
    """Rows of four times 16 numbers, and what they were made of."""
    parts = [randn(2, 3, 160, 16, place=place, seed=i) for i in range(steps)]
    options = {"group": 4, "quantised": False, "host": True} | options
    rows = StoredRows("values", parts[0], **options)
    for part in parts[1:]:
        rows.append(part)
    return rows, torch.cat(parts, dim=2).unflatten(2, (-1, 4)).flatten(3)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_rows_grow_in_few_steps(quantised, host, place):
    needs(place, "store_rows_", "gather_values_")
    rows, source = grown(place, 6, quantised=quantised, host=host)
    expected = source
    if quantised:
        bytes_, scale = reference.quantise_rows(source)
        expected = reference.dequantise_rows(bytes_, scale).to(place.dtype)
    got = rows.numbers()
    assert torch.equal(got, expected) and got.device == source.device
    assert rows.data.shape[2] == room_for(200)  # after 40 and 120
    assert rows.data.device.type == ("cpu" if host else place.device)
    assert rows.data.element_size() == (1 if quantised else source.element_size())
    assert not host or rows.host.nbytes == rows.data.nbytes
    rows.select(torch.tensor([1, 0, 1, 1], device=place.device))
    assert torch.equal(rows.numbers(), expected[[1, 0, 1, 1]])
    rows.append(source[[0, 0, 0, 0]][:, :, :5].unflatten(3, (4, 16)).flatten(2, 3))
    assert torch.equal(rows.numbers()[:, :, -5:], expected[[0, 0, 0, 0]][:, :, :5])


def test_rows_without_memory_stay_as_they_are(monkeypatch):
    rows, expected = grown(PLACES[0], 2)
    more = expected.repeat(1, 1, 50, 1).unflatten(3, (4, 16)).flatten(2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "available", lambda: 100.0)
        with pytest.raises(MemoryError, match=r"ShadowKVCache: values: [0-9.]+ MiB of host memory"):
            rows.append(more)
    assert torch.equal(rows.numbers(), expected)
    rows.append(more[:, :, :320])
    assert rows.length == 160


@pytest.mark.cuda
def test_registered_memory_is_what_the_operators_take():
    place = PLACES[2]
    needs(place, "gather_values_", "store_rows_")
    source = randn(1, 2, 30 * 8, 128, place=place, seed=0)
    before = torch.cuda.memory_allocated()
    rows = StoredRows("values", source, group=8, quantised=False, host=True)
    assert torch.cuda.memory_allocated() == before
    source = source.unflatten(2, (30, 8)).flatten(3)
    values = torch.zeros(1, 2, 6, 8 * 128, device="cuda", dtype=place.dtype)
    misses = torch.tensor([[[(5, 29), (0, 3)]] * 2], dtype=torch.int32, device="cuda")
    count = torch.tensor([[2, 2]], dtype=torch.int32, device="cuda")
    shadow.gather_values_(rows.rows, values, misses, count)
    assert torch.equal(values[:, :, [5, 0]], source[:, :, [29, 3]])
    torch.cuda.synchronize()
    assert torch.equal(rows.rows, source.cpu())
    refused = "store: expected device memory or pinned host memory"
    x = source.unflatten(3, (8, 128)).flatten(2, 3)
    for memory in (rows.rows.clone(), rows.rows):
        if memory.data_ptr() == rows.data.data_ptr():
            rows.host.free()
        with pytest.raises(RuntimeError, match=refused):
            shadow.gather_values_(memory, values, misses, count)
        with pytest.raises(RuntimeError, match=refused):
            shadow.store_rows_(x, memory)


@pytest.mark.cuda
@pytest.mark.parametrize("quantised", [True, False])
def test_nobody_waits_but_who_frees(quantised):
    """Appending and gathering queue behind a sleeping device; giving the memory back waits."""
    place = PLACES[2]
    needs(place, "gather_values_", "store_rows_")
    rows, source = grown(place, 1, quantised=quantised)
    rows.reserve(100, source)
    torch.cuda.synchronize()
    values = torch.zeros(2, 3, 80, 64, device="cuda", dtype=place.dtype)
    ids = torch.arange(80, dtype=torch.int32, device="cuda")
    pairs = ids[:, None].expand(2, 3, 80, 2).contiguous()
    count = torch.full((2, 3), 80, dtype=torch.int32, device="cuda")
    more = source.unflatten(3, (4, 16)).flatten(2, 3)
    done = torch.cuda.Event()
    # Before the device sleeps: kernels are loaded when they are first used, which may wait for it.
    shadow.gather_values_(rows.rows, values, pairs, count, store_scale=rows.scale_rows)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    rows.append(more)
    shadow.gather_values_(rows.rows, values, pairs, count, store_scale=rows.scale_rows)
    done.record()
    assert not done.query()
    del rows
    assert done.query()
    expected = source
    if quantised:
        numbers, scale = reference.quantise_rows(source)
        expected = reference.dequantise_rows(numbers, scale).to(place.dtype)
    assert torch.equal(values, torch.cat([expected, expected], 2))
