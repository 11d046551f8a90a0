"""LossSum: the weighted sum of the losses of a window, from which their mean is computed without waiting."""

from __future__ import annotations

from typing import Any, Iterable, Optional, Tuple, Union

import chainer
import numpy

from chainer_accum._devices import Array, device_of


class LossSum:
    """The sum of the losses of a term, each times the factor of its gradient.

    On the host, it is a float. On a device, it is an array there, and nothing waits for it.

    Attributes:
        is_known (bool): Whether every loss was a scalar.

    """

    def __init__(self) -> None:
        self.is_known = True
        self._total: Union[float, Array] = 0.0
        self._dtype: Any = numpy.dtype(numpy.float32)

    def add(self, loss: chainer.Variable, factor: float) -> None:
        """Adds a loss times ``factor``."""
        array = loss.array
        if array.size != 1:  # the loss function has preset its gradient
            self.is_known = False
            return
        if array.dtype is not self._dtype:
            self._dtype = numpy.promote_types(self._dtype, array.dtype)
        if type(array) is numpy.ndarray:  # not isinstance: a subclass may keep its data on a device
            self._total += array.item() * factor
        else:
            with device_of(array):
                self._total = self._total + array.reshape(()).astype(numpy.float64) * factor

    def multiply(self, factor: float) -> None:
        """Multiplies the sum by a number."""
        if isinstance(self._total, float):
            self._total *= factor
        else:
            with device_of(self._total):
                self._total = self._total * factor

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sum."""
        self.is_known = bool(serializer("is_known", self.is_known))
        self._total = serializer("total", self._total)

    def scaled(self, factor: float) -> Tuple[Union[float, Array], Any]:
        """Returns the sum times ``factor``, and the dtype of the losses."""
        with device_of(self._total):
            return self._total * factor, self._dtype


def total_of(parts: Iterable[Tuple[Union[float, Array], Any]]) -> Optional[Array]:
    """Returns the sum of the values with their dtypes as a zero-dimensional array, on the device of the values."""
    total: Union[float, Array] = 0.0
    dtype = numpy.dtype(numpy.float32)
    for value, its_dtype in parts:
        with device_of(value):
            total = total + value
        dtype = numpy.promote_types(dtype, its_dtype)
    with device_of(total), numpy.errstate(over="ignore"):
        return numpy.asarray(total, dtype) if isinstance(total, float) else total.astype(dtype)
