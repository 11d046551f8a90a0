"""Devices: the one on which to compute with an array, when one is done, and what it keeps in reserve."""

from __future__ import annotations

import contextlib
import gc
from typing import Any, ContextManager, Iterable

import chainer
import numpy
from chainer.backends import cuda

_HOST: ContextManager[Any] = contextlib.nullcontext()


def device_of(array: Any) -> ContextManager[Any]:
    """Returns a context in which the device of ``array`` is the current one.

    :func:`chainer.using_device` costs as much as a small addition; for what lies in host memory there is nothing to do.

    """
    if isinstance(array, (numpy.ndarray, numpy.generic)):
        return _HOST
    device: ContextManager[Any] = chainer.using_device(chainer.backend.get_device_from_array(array))
    return device


def synchronize(device: Any) -> None:
    """Waits until a device has done all that it was told to."""
    if isinstance(device, cuda.GpuDevice):
        device.device.synchronize()


def are_finite(arrays: Iterable[Any]) -> bool:
    """Returns whether all values are finite. This waits for the device."""
    flags = []
    for array in arrays:
        with device_of(array):
            flags.append(chainer.backend.get_array_module(array).isfinite(array).all())
    return all(bool(flag) for flag in flags)


def free_memory(device: Any) -> None:
    """Gives back what is held by objects that nothing refers to any more, and by CuPy for later use on a device."""
    gc.collect()
    if isinstance(device, cuda.GpuDevice):  # not wherever there is CuPy: it may be installed without a device
        with chainer.using_device(device):
            cuda.memory_pool.free_all_blocks()
        cuda.pinned_memory_pool.free_all_blocks()
