"""Tensors of a compressed layer that grow at their end: on the device, or in pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseattn import shadow
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
        count = rows.shape[2]
        self.reserve(self.length + count, rows)
        self.spare(count).copy_(rows)
        self.extend(count)

    def spare(self, count: int) -> Tensor:
        """The next ``count`` rows, which are reserved: to be written, then :meth:`extend` counts
        them."""
        return self.data[:, :, self.length : self.length + count]

    def extend(self, count: int) -> None:
        self.length += count

    def drop(self, first: int, count: int) -> None:
        """Removes rows [first, first + count)."""
        moved = self.data[:, :, first + count : self.length].clone()
        self.length -= count
        self.data[:, :, first : self.length] = moved

    def select(self, index: Tensor) -> None:
        self.data = self.data.index_select(0, index.to(self.data.device))

    def _new(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return allocate(self.what, shape, like)


class StoredRows(Rows):
    """Rows [B, H, rows, group * D] that :func:`sparseattn.shadow.store_rows_` writes.

    They may be quantised: then ``data`` is float8_e4m3fn, and ``scales`` [B, H, rows] on the device
    of what is appended. They may be in host memory, pinned where that device is a GPU: appending
    then waits for nothing, and the host may read them once it has waited for the device; growing
    and selecting them, which the host does itself, wait for the device. Growing needs the memory of
    this one tensor twice for as long as it takes, in both places.
    """

    def __init__(self, what: str, x: Tensor, *, group: int, quantised: bool, host: bool = False):
        """x: the first rows, [B, H, n * group, D]; there may be none."""
        self.what, self.group = what, group
        self.dtype, self.device = x.dtype, x.device
        self.length = 0
        self.host = HostMemory(0, x.device) if host else None
        empty = torch.empty(*x.shape[:2], 0, group * x.shape[3], device="cpu" if host else x.device)
        self.data = empty.to(torch.float8_e4m3fn if quantised else x.dtype)
        self.scales: Tensor | None = None
        if quantised:
            self.scales = torch.empty(*x.shape[:2], 0, dtype=torch.float32, device=x.device)
        if x.shape[2] > 0:
            self.append(x)

    @property
    def scale_rows(self) -> Tensor | None:
        return None if self.scales is None else self.scales[:, :, : self.length]

    def reserve(self, length: int, like: Tensor) -> None:
        if length > self.data.shape[2]:
            self._replace(range(self.data.shape[0]), room_for(length))

    def append(self, x: Tensor) -> None:
        count = x.shape[2] // self.group
        self.reserve(self.length + count, x)
        self.write(x, 0)
        self.extend(count)

    def write(self, x: Tensor, at: int) -> None:
        """x becomes the rows from the ``at``-th spare one on, which are reserved; :meth:`extend`
        counts them."""
        shadow.store_rows_(x, self.data, self.scales, first=self.length + at)

    def drop(self, first: int, count: int) -> None:
        raise NotImplementedError(f"{self.what}: stored rows are not dropped")

    def select(self, index: Tensor) -> None:
        if self.host is not None:
            self._replace(index.tolist(), self.data.shape[2])
            return
        index = index.to(self.device)
        # As bytes: torch does not pick rows of fp8.
        self.data = self.data.view(torch.uint8).index_select(0, index).view(self.data.dtype)
        if self.scales is not None:
            self.scales = self.scales.index_select(0, index)

    def numbers(self) -> Tensor:
        """The rows as they were appended, or as far as that was kept, on their device."""
        if self.scales is None and self.host is None:
            return self.rows
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        rows = allocate(self.what, tuple(self.rows.shape), like)
        ids = torch.arange(self.length, dtype=torch.int32, device=self.device)
        lists = rows.shape[:2]
        shadow.gather_values_(
            self.rows,
            rows,
            ids[:, None].expand(*lists, -1, 2).contiguous(),
            torch.full(lists, self.length, dtype=torch.int32, device=self.device),
            store_scale=self.scale_rows,
        )
        return rows

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def _replace(self, sequences: Sequence[int], room: int) -> None:
        """Moves the rows of ``sequences`` into memory of their own; all is allocated first."""
        old, length = self.data, self.length
        shape = (len(sequences), old.shape[1], room, old.shape[3])
        scales, memory = self.scales, None
        if scales is not None:
            scales = allocate(self.what, shape[:3], scales)
        if self.host is None:
            data = allocate(self.what, shape, old)
        else:
            try:
                memory = HostMemory(torch.Size(shape).numel() * old.element_size(), self.device)
            except MemoryError as error:
                raise MemoryError(f"ShadowKVCache: {self.what}: {error}") from error
            data = memory.tensor(shape, old.dtype)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        for place, sequence in enumerate(sequences):
            data[place, :, :length] = old[sequence, :, :length]
            if scales is not None and self.scales is not None:
                scales[place, :, :length] = self.scales[sequence, :, :length]
        self.data, self.scales = data, scales
        if memory is not None and self.host is not None:
            self.host.free()
            self.host = memory
