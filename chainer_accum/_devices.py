"""The device on which to compute with an array."""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager

import chainer
import numpy

_HOST: ContextManager[Any] = contextlib.nullcontext()


def device_of(array: Any) -> ContextManager[Any]:
    """Returns a context in which the device of ``array`` is the current one.

    :func:`chainer.using_device` costs as much as a small addition; for what lies in host memory there is nothing to do.

    """
    if isinstance(array, (numpy.ndarray, numpy.generic)):
        return _HOST
    device: ContextManager[Any] = chainer.using_device(chainer.backend.get_device_from_array(array))
    return device
