"""Host memory that a GPU reads: exactly as large as asked for, pinned, and given back when done.

torch's own pinned memory is rounded up to a power of two, and kept by its allocator for ever. This
is a mapping of its own, whole pages, registered with the CUDA runtime. To torch and the operators
it is pinned memory: what decides is what the driver says of an address.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_PORTABLE, _MAPPED = 1, 2  # flags of cudaHostRegister


def available() -> float:
    """Bytes of host memory that this process can have; inf where the system does not say.

    What the system has and, in a container, what its limit leaves; file pages that it would drop
    count as free.
    """
    free = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        free = 1024.0 * int(text.split("MemAvailable:")[1].split()[0])
    group = Path("/sys/fs/cgroup")
    for folder, limit, used, dropped in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            for line in (folder / "memory.stat").read_text().splitlines():
                name, count = line.split()
                left += int(count) if name == dropped else 0
            free = min(free, left)
    return free


class HostMemory:
    """``nbytes`` of zeroed memory, pinned where ``device`` is a GPU, plain where it is the CPU.

    It lives until :meth:`free`, or until nothing refers to this object, not to its tensors: then
    all that the device was asked to do is waited for, and the memory is unpinned. That may not be
    while a CUDA graph is captured. A tensor that is still around then is plain host memory, which
    the operators refuse.

    Raises:
        MemoryError: names the bytes; nothing is kept.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes = nbytes
        self.device = device
        if nbytes > available():
            raise _shortage(nbytes, f"{available() / 2**20:.1f} MiB are available")
        pages = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        try:
            pages_map = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise _shortage(nbytes, error) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without
                pages_map.madvise(mmap.MADV_HUGEPAGE)
        self._data = torch.frombuffer(pages_map, dtype=torch.uint8)
        self._finalizer = None
        if device.type == "cuda" and nbytes > 0:
            self._data[:: mmap.PAGESIZE] = 0  # all threads bring the pages; the driver uses one
            _register(self._data, device)
            self._finalizer = weakref.finalize(self, _release, self._data, device, os.getpid())

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The first bytes as a contiguous tensor."""
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.nbytes:
            raise ValueError(f"shape: expected at most {self.nbytes} bytes, got {needed}")
        return self._data[:needed].view(dtype).view(*shape)

    def free(self) -> None:
        """Tensors over the memory must not be used after it."""
        if self._finalizer is not None:
            self._finalizer()
        self._data = self._data[:0].clone()
        self.nbytes = 0


def _shortage(nbytes: int, reason: object) -> MemoryError:
    return MemoryError(f"{nbytes / 2**20:.1f} MiB of host memory are needed: {reason}")


def _register(data: Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(
            data.data_ptr(), data.nbytes, _PORTABLE | _MAPPED
        )
        if int(status) == 0:
            return
        # The runtime holds the failure ready for whoever asks next: that is this launch.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
    raise _shortage(data.nbytes, f"they could not be pinned ({status})")


def _release(data: Tensor, device: torch.device, process: int) -> None:
    """Copies and kernels may be under way, on any stream. A forked process has pinned nothing."""
    if os.getpid() != process:
        return
    with contextlib.suppress(RuntimeError):  # a device that has failed does nothing any more
        torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
