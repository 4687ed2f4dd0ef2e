"""Tensors of a compressed layer that grow at their end: on the device, or in pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseattn.host_memory import HostMemory


def allocate(what: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty tensor of like's dtype and device; MemoryError says how much was needed."""
    needed = torch.Size(shape).numel() * like.element_size()
    try:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    except RuntimeError as error:
        raise MemoryError(
            f"ShadowKVCache: {what} needs {needed / 2**20:.1f} MiB of memory of {like.device}: "
            f"{error}"
        ) from error


def room_for(length: int) -> int:
    """Rows to allocate where ``length`` are needed."""
    return length + length // 32 + 64


class Rows:
    """A tensor [B, H, rows, D] that grows at its end, with room to spare."""

    def __init__(self, what: str, rows: Tensor):
        self.what = what
        self.length = 0
        self.data = self._new((*rows.shape[:2], 0, rows.shape[3]), rows)
        self.append(rows)

    @property
    def rows(self) -> Tensor:
        return self.data[:, :, : self.length]

    def reserve(self, length: int, like: Tensor) -> None:
        if length <= self.data.shape[2]:
            return
        shape = (*self.data.shape[:2], room_for(length), self.data.shape[3])
        grown = self._new(shape, like)
        grown[:, :, : self.length] = self.rows
        self.data = grown

    def append(self, rows: Tensor) -> None:
        length = self.length + rows.shape[2]
        self.reserve(length, rows)
        self.data[:, :, self.length : length] = rows
        self.length = length

    def drop(self, first: int, count: int) -> None:
        """Removes rows [first, first + count)."""
        moved = self.data[:, :, first + count : self.length].clone()
        self.length -= count
        self.data[:, :, first : self.length] = moved

    def select(self, index: Tensor) -> None:
        self.data = self.data.index_select(0, index.to(self.data.device))

    def _new(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return allocate(self.what, shape, like)


class HostRows(Rows):
    """Rows in host memory, pinned where they come from a GPU.

    Copies to and from the device are queued on the current stream, a piece for each head, and not
    waited for. Growing and selecting, which the host does itself, wait for the device and need the
    memory of this one tensor twice, for as long as they take.
    """

    def __init__(self, what: str, rows: Tensor):
        self.what, self.device = what, rows.device
        self.length = 0
        self.data = torch.empty(*rows.shape[:2], 0, rows.shape[3], dtype=rows.dtype)
        self.memory: HostMemory | None = None
        self.append(rows)

    def reserve(self, length: int, like: Tensor) -> None:
        if length > self.data.shape[2]:
            self._replace(range(self.data.shape[0]), room_for(length))

    def append(self, rows: Tensor) -> None:
        length = self.length + rows.shape[2]
        self.reserve(length, rows)
        self._copy(self.data[:, :, self.length : length], rows)
        self.length = length

    def drop(self, first: int, count: int) -> None:
        raise NotImplementedError("rows in host memory are not dropped")

    def select(self, index: Tensor) -> None:
        self._replace(index.tolist(), self.data.shape[2])

    def on_device(self) -> Tensor:
        like = torch.empty(0, dtype=self.data.dtype, device=self.device)
        rows = allocate(self.what, tuple(self.rows.shape), like)
        self._copy(rows, self.rows)
        return rows

    def _copy(self, to: Tensor, rows: Tensor) -> None:
        """Pieces are contiguous: of others torch makes a pageable copy, and waits for it."""
        rows = rows.contiguous() if rows.is_cuda else rows
        for target, source in zip(to.flatten(0, 1), rows.flatten(0, 1), strict=True):
            target.copy_(source, non_blocking=True)

    def _replace(self, sequences: Sequence[int], room: int) -> None:
        """Moves the rows of ``sequences`` into memory of their own, then frees the old one."""
        old, memory, length = self.data, self.memory, self.length
        shape = (len(sequences), old.shape[1], room, old.shape[3])
        try:
            new = HostMemory(torch.Size(shape).numel() * old.element_size(), self.device)
        except MemoryError as error:
            raise MemoryError(f"ShadowKVCache: {self.what}: {error}") from error
        data = new.tensor(shape, old.dtype)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for target, sequence in zip(data, sequences, strict=True):
            target[:, :length] = old[sequence, :, :length]
        self.data, self.memory = data, new
        if memory is not None:
            memory.free()
