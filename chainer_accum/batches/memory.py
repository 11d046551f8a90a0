"""Memory of the process and of a device: what is in use, what it was at the peak, and how much there may be.

NumPy rarely raises MemoryError on Linux: the kernel promises more memory than there is, and kills the process when it
is used. So whoever tries sizes must know beforehand what fits.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Protocol, Union

import chainer
from chainer.backends import cuda

from chainer_accum._arguments import check_int

MemoryLimit = Union[int, str, None]

_PROC = Path("/proc/self")
_MACHINE = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_SHARE = 0.9  # of what is available, unless the user sets a limit


class Share(NamedTuple):
    """A limit on memory: a number of bytes, a share of what there is, or a share of what is available.

    Attributes:
        num_bytes (float): Number of bytes, or infinity.
        of_total (float): Share of what the cgroup, the machine or the device has.
        of_available (float): Share of what nobody uses now, this process aside.

    """

    num_bytes: float = math.inf
    of_total: float = 1.0
    of_available: float = 1.0


def make_share(memory_limit: MemoryLimit) -> Share:
    """Returns the limit for an argument: bytes, a text such as ``'80%'``, or ``None`` for the default."""
    if memory_limit is None:
        return Share(of_available=_SHARE)
    remedy = "give bytes, or a share such as '80%'"
    if isinstance(memory_limit, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", memory_limit)
        share = float(found.group(1)) / 100 if found else 0.0
        if not 0 < share <= 1:
            raise ValueError(f"memory_limit must be between '0%' and '100%', got {memory_limit!r}; {remedy}")
        return Share(of_total=share)
    return Share(num_bytes=check_int("memory_limit", memory_limit, 1, remedy))


class Memory(Protocol):
    """Memory in which a model is trained, in bytes."""

    def in_use(self) -> float:
        """Returns what is in use now, and makes the peak begin there. Cached memory is freed first."""

    def peak(self) -> float:
        """Returns the most that has been in use since :meth:`in_use` was called, or more."""

    def reset_peak(self) -> bool:
        """Makes the peak begin at what is in use now, without freeing anything, and returns whether that was done."""

    def ceiling(self, share: Share) -> float:
        """Returns how much may be in use."""


class HostMemory:
    """Resident memory of this process, as Linux counts it."""

    def in_use(self) -> float:
        _trim()
        self.reset_peak()
        return _kib(_PROC / "status", "VmRSS") or 0.0

    def peak(self) -> float:
        return _kib(_PROC / "status", "VmHWM") or 0.0

    def reset_peak(self) -> bool:
        try:
            (_PROC / "clear_refs").write_text("5")
        except OSError:  # it is not allowed; then the peak may be an earlier one, which is safe
            return False
        return True

    def ceiling(self, share: Share) -> float:
        total = _kib(_MACHINE, "MemTotal") or math.inf
        available = _kib(_MACHINE, "MemAvailable") or math.inf
        for limit, used in _cgroups():
            total = min(total, limit)
            available = min(available, max(limit - used, 0.0))
        resident = _kib(_PROC / "status", "VmRSS") or 0.0
        return min(share.num_bytes, share.of_total * total, resident + share.of_available * available)


class PoolMemory:
    """CuPy's memory pool on a device. Its limit holds as well.

    Args:
        device (~chainer.backends.cuda.GpuDevice): Device.

    """

    def __init__(self, device: cuda.GpuDevice) -> None:
        self._device = device

    def in_use(self) -> float:
        with chainer.using_device(self._device):
            cuda.memory_pool.free_all_blocks()
            return float(cuda.memory_pool.total_bytes())

    def reset_peak(self) -> bool:
        return False

    def peak(self) -> float:
        with chainer.using_device(self._device):  # blocks that were freed in between stay in the pool
            return float(cuda.memory_pool.total_bytes())

    def ceiling(self, share: Share) -> float:
        with chainer.using_device(self._device):
            free, total = self._device.device.mem_info
            limit = cuda.memory_pool.get_limit() or math.inf
            in_pool = cuda.memory_pool.total_bytes()
        ceiling: float = min(share.num_bytes, limit, share.of_total * total, in_pool + share.of_available * free)
        return ceiling


def memory_of(device: Any) -> Optional[Memory]:
    """Returns the memory of a device, or ``None`` where it cannot be measured."""
    if isinstance(device, cuda.GpuDevice):
        return PoolMemory(device)
    return HostMemory() if _kib(_PROC / "status", "VmHWM") is not None else None


def _kib(path: Path, key: str) -> Optional[float]:
    """Returns the bytes that a file of Linux states in KiB under a key, or ``None`` if it does not."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return float(found.group(1)) * 1024 if found else None


def _cgroups() -> Iterator[Any]:
    """Returns an iterator over limits and what is used of them, of the cgroups that hold this process."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside version 1
            for root in (_CGROUPS, _CGROUPS / "unified"):
                yield from _limits(root, name, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits(_CGROUPS / "memory", name, *files)


def _limits(root: Path, name: str, limit: str, used: str, cache: str) -> Iterator[Any]:
    """Returns an iterator over the limits of a cgroup and those above it. In a container, the lower ones are hidden."""
    folder = root / name.lstrip("/")
    for each in [folder, *folder.parents]:
        with contextlib.suppress(OSError, ValueError):  # it is hidden, or its limit is "max"
            num_bytes = int((each / limit).read_text())
            in_use = int((each / used).read_text())
            found = re.search(rf"^{cache} (\d+)", (each / "memory.stat").read_text(), re.MULTILINE)
            yield num_bytes, in_use - (int(found.group(1)) if found else 0)
        if each == root:
            return


def _trim() -> None:
    """Has the C library give back memory that is free, so that what is resident is in use."""
    if os.name == "posix":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
