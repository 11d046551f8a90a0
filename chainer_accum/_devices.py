"""Helpers for devices: make one current, wait for one, test its values, and free its memory."""

from __future__ import annotations

import contextlib
import gc
from typing import Any, ContextManager, Iterable, Optional, Union

import chainer
import numpy
from chainer.backends import cuda

# NumPy's, CuPy's or ChainerX's, of which only the first has types.
Array = Any

# What chainer.get_device takes. Devices of CuPy and ChainerX, which it takes as well, have no types.
DeviceSpec = Union[chainer.backend.Device, str, int]

_HOST: ContextManager[object] = contextlib.nullcontext()


def device_of(array: Array) -> ContextManager[object]:
    """Returns a context manager that makes the device of ``array`` the current one.

    :func:`chainer.using_device` takes as long as a small addition. For arrays in host memory, this does nothing.

    """
    if isinstance(array, (numpy.ndarray, numpy.generic)):
        return _HOST
    return chainer.using_device(chainer.backend.get_device_from_array(array))


def synchronize(device: Optional[chainer.backend.Device]) -> None:
    """Waits until a device has finished all its work."""
    if isinstance(device, cuda.GpuDevice):
        device.device.synchronize()


def are_finite(arrays: Iterable[Array]) -> bool:
    """Returns whether all values are finite. This waits for the device."""
    flags = []
    for array in arrays:
        with device_of(array):
            flags.append(chainer.backend.get_array_module(array).isfinite(array).all())
    return all(bool(flag) for flag in flags)


def free_memory(device: Optional[chainer.backend.Device]) -> None:
    """Frees unreachable objects, and the memory that CuPy keeps for later use on a device."""
    gc.collect()
    if isinstance(device, cuda.GpuDevice):  # CuPy may be installed without a device
        with chainer.using_device(device):
            cuda.memory_pool.free_all_blocks()
        cuda.pinned_memory_pool.free_all_blocks()


def parameter_bytes(link: chainer.Link) -> int:
    """Returns how many bytes the initialized parameters of a link have."""
    return sum(param.array.nbytes for param in link.params(include_uninit=False))
