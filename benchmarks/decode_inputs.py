"""Inputs of the decode benchmarks: shapes of models, one compressed layer, pinned memory, floors.

The data are random, of the scale of real keys: a mean key for each head, a factor whose columns
fall off, an orthonormal basis. Times hardly depend on the values but through which chunks are
selected, and those come from `shadow_select` itself.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparseattn import host_memory, shadow

DTYPE = torch.bfloat16
DEVICE_RATE, PCIE_RATE = 4.3e12, 55e9  # bytes a second: an H200's memory; pinned host to device


@dataclass(frozen=True)
class Shape:
    """Attention of one layer, and its rotary embedding."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    theta: float

    def inv_freq(self, device: torch.device) -> Tensor:
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        return self.theta ** (-exponents / self.rotary_dim)


LLAMA = Shape("Llama-3.1-8B", 32, 8, 128, 128, False, 5e5)
GLM = Shape("GLM-4-9B-1M", 32, 4, 128, 64, True, 1e8)


@dataclass(frozen=True)
class Setting:
    """Shapes and sizes of a run. Budgets are those published for a length, in tokens."""

    shapes: tuple[Shape, ...] = (LLAMA, GLM)
    budgets: tuple[tuple[int, int], ...] = ((61440, 1024), (124928, 2048), (249856, 4096))
    batches: tuple[int, ...] = (1, 4, 8, 24, 48)
    rank: int = 160
    chunk: int = 8
    outliers: int = 48  # chunks
    sinks: int = 1  # chunks
    tail: int = 64  # exact tokens at the end: half-way between two flushes of ShadowKVCache

    @property
    def lengths(self) -> list[int]:
        return [tokens for tokens, _ in self.budgets]

    def top_k(self, tokens: int) -> int:
        """Selected chunks: the published budget, for other lengths that of the nearest one."""
        published = dict(self.budgets)
        nearest = min(published, key=lambda known: abs(math.log(known / tokens)))
        return published[nearest] // self.chunk

    def slots(self, tokens: int) -> int:
        """Chunks of values at hand, as many as ShadowKVCache has by default."""
        return self.top_k(tokens) * 3 // 2

    @property
    def exact(self) -> int:
        """Rows of keys and values that are kept as they are."""
        return (self.outliers + self.sinks) * self.chunk + self.tail


SMOKE = Setting(
    shapes=(
        replace(LLAMA, heads=4, kv_heads=2, head_dim=64, rotary_dim=64),
        replace(GLM, heads=4, kv_heads=1, head_dim=64, rotary_dim=32),
    ),
    budgets=((512, 64), (1024, 128)),
    batches=(1, 2),
    rank=32,
    outliers=3,
    tail=16,
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a part must move: in device memory (read and written), and over PCIe."""

    device: float
    pcie: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.device + other.device, self.pcie + other.pcie)

    @property
    def floor_ms(self) -> float:
        """Both at full rate and at the same time."""
        return 1e3 * max(self.device / DEVICE_RATE, self.pcie / PCIE_RATE)


def traffic(
    shape: Shape, setting: Setting, tokens: int, batch: int, hits: float
) -> dict[str, Traffic]:
    """part -> bytes. Rows of the factor count once for each head that selects them; misses of
    "gather, host" cross PCIe once and are written once."""
    lists = batch * shape.kv_heads
    top_k, size = setting.top_k(tokens), 2  # bytes of a number
    chunk_bytes = setting.chunk * shape.head_dim * size
    selected = lists * top_k
    missed = round((1 - hits) * top_k) * lists * chunk_bytes
    weights = lists * shape.head_dim * (setting.rank * size + 4)  # basis and mean
    factor = selected * setting.chunk * setting.rank * size + weights
    queries = 2 * batch * shape.heads * shape.head_dim * size  # read, and the output written
    chunks = lists * (tokens // setting.chunk)
    parts = {
        "select": Traffic(chunks * (shape.head_dim * size + 1) + queries / 2 + 4 * selected),
        "plan": Traffic(16 * lists * setting.slots(tokens) + 16 * selected),
        "gather, device": Traffic(2 * missed),
        "gather, host": Traffic(missed, missed),
        "attention": Traffic(
            factor
            + selected * chunk_bytes
            + 2 * lists * setting.exact * shape.head_dim * size
            + queries
        ),
        "reconstruct": Traffic(factor + selected * chunk_bytes),
        "dense": Traffic(2 * lists * tokens * shape.head_dim * size + queries),
    }
    parts["step, direct"] = parts["select"] + parts["attention"]
    for store in ("device", "host"):
        name = f"step, {store}"
        parts[name] = parts["step, direct"] + parts["plan"] + parts[f"gather, {store}"]
    return parts


def device_bytes(shape: Shape, setting: Setting, tokens: int, batch: int) -> int:
    """Of a Layer, with a tenth for what the operators and the timer take."""
    width = shape.kv_heads * shape.head_dim
    slots = setting.slots(tokens) * setting.chunk * width
    chunks = tokens // setting.chunk
    per_sequence = 2 * (2 * tokens * width + tokens * setting.rank + chunks * width + slots)
    per_sequence += shape.kv_heads * chunks * 10  # the mask, and what prepare_tables draws
    return int(1.1 * batch * per_sequence)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def host_limit() -> float:
    """Three quarters of the host memory that this process can have."""
    return 0.75 * host_memory.available()


class HostMemory:
    """One piece of pinned memory (plain on the CPU), lent to one user after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: host_memory.HostMemory | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._memory is None else self._memory.nbytes

    def tensor(self, shape: Sequence[int], dtype: torch.dtype = DTYPE) -> Tensor:
        """Uninitialised, over the same memory as the tensors lent before.

        MemoryError if it takes more than ``host_limit()``.
        """
        needed = math.prod(shape) * dtype.itemsize
        if self._memory is None or self.nbytes < needed:
            self.free()
            if needed > host_limit():
                raise MemoryError(f"{needed / 2**30:.1f} GiB of host memory are needed")
            self._memory = host_memory.HostMemory(needed, self.device)
        return self._memory.tensor(shape, dtype)

    def free(self) -> None:
        """Tensors lent before must not be used after it."""
        if self._memory is not None:
            self._memory.free()
        self._memory = None


class Layer:
    """One layer of a decode step for ``batch`` sequences of ``tokens`` tokens, both ways.

    ``store`` are the dense values, chunk by chunk; ``host_store`` is a copy of them in pinned
    memory. ``tables`` are slots that hold the share ``hits`` of every head's selected chunks.
    """

    def __init__(
        self,
        shape: Shape,
        setting: Setting,
        tokens: int,
        batch: int,
        device: torch.device,
        *,
        seed: int = 0,
        hits: float = 0.35,
    ) -> None:
        self.shape, self.setting, self.tokens, self.batch = shape, setting, tokens, batch
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        lists = (batch, shape.kv_heads)
        dim, chunk = shape.head_dim, setting.chunk
        self.chunks = tokens // chunk
        self.q = self._normal(batch, shape.heads, 1, dim)
        self.k = self._normal(*lists, tokens, dim)
        self.store = self._normal(*lists, self.chunks, chunk * dim)
        self.exact_k = self._normal(*lists, setting.exact, dim)
        self.exact_v = self._normal(*lists, setting.exact, dim)
        mean = self._normal(*lists, dim, dtype=torch.float32)
        self.mean = mean
        # Means of keys: their head's mean, and what differs from chunk to chunk.
        self.landmarks = self._normal(*lists, self.chunks, dim).mul_(0.5).add_(mean.unsqueeze(2))
        falloff = torch.arange(1, setting.rank + 1, device=device).rsqrt()
        falloff *= math.sqrt(shape.kv_heads * dim / falloff.square().sum())
        self.factor = self._normal(batch, tokens, setting.rank).mul_(falloff.to(DTYPE))
        wide = self._normal(shape.kv_heads * dim, setting.rank, dtype=torch.float32)
        basis = torch.linalg.qr(wide).Q.T.unflatten(1, (shape.kv_heads, dim)).transpose(0, 1)
        self.basis = basis.to(DTYPE).expand(batch, -1, -1, -1).contiguous()
        self.inv_freq = shape.inv_freq(device)
        outliers = self._draw(*lists, self.chunks)
        outliers[..., : setting.sinks] = 2.0
        outliers = outliers.topk(setting.outliers + setting.sinks).indices
        self.excluded = shadow.chunk_mask(outliers.int(), self.chunks)
        del outliers
        self.selected = self.select()
        self.slot_chunk, self.last_used = self._tables(hits)
        self._kept = self.slot_chunk.clone(), self.last_used.clone()
        slots = self.slot_chunk.shape[2]
        self.slots = torch.zeros(*lists, slots, chunk * dim, dtype=DTYPE, device=device)
        self.slot_of, self.misses, self.miss_count = self.plan()
        self.fill_slots()

    def _normal(self, *size: int, dtype: torch.dtype = DTYPE) -> Tensor:
        empty = torch.empty(size, dtype=dtype, device=self.device)
        return empty.normal_(generator=self._generator)

    def _draw(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self._generator, device=self.device)

    def _tables(self, hits: float) -> tuple[Tensor, Tensor]:
        """slot_chunk and last_used: hits of the selected chunks, others in the other slots."""
        top_k = self.selected.shape[2]
        kept = round(hits * top_k)
        order = self._draw(*self.selected.shape).argsort(-1)[..., :kept]
        present = self.selected.gather(-1, order)
        scores = self._draw(*self.landmarks.shape[:3])
        scores.scatter_(-1, self.selected.long(), -1.0)
        slots = self.setting.slots(self.tokens)
        absent = scores.topk(slots - kept).indices.int()
        chunks = torch.cat((present, absent), dim=-1)
        order = self._draw(*chunks.shape).argsort(-1)
        stamps = self._draw(*chunks.shape).argsort(-1).int() + 1
        return chunks.gather(-1, order).contiguous(), stamps.contiguous()

    def restore(self) -> None:
        """The slots' tables as they were before the first plan."""
        self.slot_chunk.copy_(self._kept[0])
        self.last_used.copy_(self._kept[1])

    def fill_slots(self) -> None:
        """Restores the tables and puts into the slots what they say."""
        self.restore()
        self.slots.zero_()
        slots = self.slot_chunk.shape[2]
        places = torch.arange(slots, dtype=torch.int32, device=self.device)
        pairs = torch.stack((places.expand_as(self.slot_chunk), self.slot_chunk), dim=-1)
        count = torch.full_like(self.miss_count, slots)
        shadow.gather_values_(self.store, self.slots, pairs, count)

    @property
    def hit_rate(self) -> float:
        return 1 - int(self.miss_count.sum()) / self.selected.numel()

    @cached_property
    def v(self) -> Tensor:
        return self.store.view(self.batch, self.shape.kv_heads, self.tokens, -1)

    def copy_store(self, memory: HostMemory) -> None:
        self.host_store = memory.tensor(self.store.shape)
        self.host_store.copy_(self.store)

    # --- the parts of a step -----------------------------------------------------------------

    def select(self) -> Tensor:
        return shadow.shadow_select(
            self.q, self.landmarks, top_k=self.setting.top_k(self.tokens), excluded=self.excluded
        )

    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        return shadow.shadow_plan_(self.selected, self.slot_chunk, self.last_used)

    def gather(self, store: Tensor) -> None:
        shadow.gather_values_(store, self.slots, self.misses, self.miss_count)

    def attend(self, selected: Tensor, slot_of: Tensor, values: Tensor) -> Tensor:
        return shadow.shadow_attention(
            self.q,
            self.exact_k,
            self.exact_v,
            selected,
            slot_of,
            values,
            self.factor,
            self.basis,
            self.mean,
            self.inv_freq,
            interleaved=self.shape.interleaved,
        )

    def reconstruct(self) -> Tensor:
        return shadow.lowrank_reconstruct(
            self.selected,
            self.factor,
            self.basis,
            self.mean,
            self.inv_freq,
            chunk=self.setting.chunk,
            interleaved=self.shape.interleaved,
        )

    def step(self, store: Tensor) -> Tensor:
        """As ShadowKVCache does it: missing values go from the store into slots."""
        selected = self.select()
        slot_of, misses, count = shadow.shadow_plan_(selected, self.slot_chunk, self.last_used)
        shadow.gather_values_(store, self.slots, misses, count)
        return self.attend(selected, slot_of, self.slots)

    def direct_step(self) -> Tensor:
        """With all values on the device the store is its own slots."""
        selected = self.select()
        return self.attend(selected, selected, self.store)
