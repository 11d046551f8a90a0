"""Mergers: how the values of micro-batches become one as they arrive, so that none of them is kept."""

from __future__ import annotations

import functools
import math
import operator
from typing import Callable, Dict, Protocol, Type, Union

import numpy

from chainer_accum._devices import Array
from chainer_accum.observations.reports import Number, is_not_zero, where, widened


class Merger(Protocol):
    """Values that become one as they arrive."""

    def add(self, value: Number, weight: Number) -> None:
        """Adds the value of a micro-batch."""

    def result(self, last: Number) -> Number:
        """Returns the merged value, where ``last`` is the last one that was added."""

    def least_dtype(self, dtype: numpy.dtype) -> Type[numpy.generic]:
        """Returns the dtype to which that of the values is promoted."""


class Sum:
    """The sum of values. A value that is not finite and has weight 0, such as a mean over no examples, is left out."""

    def __init__(self) -> None:
        self._total: Number = 0

    def add(self, value: Number, weight: Number) -> None:
        value = widened(value, numpy.int64)
        self._total = self._total + where(_is_counted(value, weight), value)

    def result(self, last: Number) -> Number:
        return self._total

    def least_dtype(self, dtype: numpy.dtype) -> Type[numpy.generic]:
        return numpy.int64 if dtype.kind in "biu" else numpy.float32


class Extremum:
    """The largest or smallest value, or NaN if there is one. It leaves out what :class:`Sum` leaves out.

    Args:
        exceeds (callable): Function that returns whether its first argument replaces the second.

    """

    def __init__(self, exceeds: Callable[[Number, Number], Number]) -> None:
        self._exceeds = exceeds
        self._extremum: Number = 0
        self._is_known: Union[bool, Array] = False

    def add(self, value: Number, weight: Number) -> None:
        is_counted = _is_counted(widened(value, numpy.int64), weight)
        exceeds = (self._is_known == 0) | self._exceeds(value, self._extremum) | (value != value)
        self._extremum = where(is_counted & exceeds, value, self._extremum)
        self._is_known = self._is_known | is_counted

    def result(self, last: Number) -> Number:
        return where(self._is_known, self._extremum, last)

    def least_dtype(self, dtype: numpy.dtype) -> Type[numpy.generic]:
        return dtype.type


class Mean:
    """The weighted mean of values, or the last value if all weights are 0."""

    def __init__(self) -> None:
        # Both are in units of the largest power of 2 up to the largest weight, since the sum of weights may overflow.
        self._unit = 1.0
        self._total: Number = 0
        self._weight: Number = 0

    def add(self, value: Number, weight: Number) -> None:
        is_counted = is_not_zero(weight)
        if is_counted is False:
            return
        if is_counted is True and abs(weight) > self._unit:
            self._enlarge_unit(2.0 ** (math.frexp(abs(weight))[1] - 1))
        share = widened(weight, numpy.float64) / self._unit
        self._total = self._total + where(is_counted, widened(value, numpy.float64)) * share
        self._weight = self._weight + share

    def result(self, last: Number) -> Number:
        has_weight = is_not_zero(self._weight)
        return last if has_weight is False else where(has_weight, self._total / self._weight, last)

    def least_dtype(self, dtype: numpy.dtype) -> Type[numpy.generic]:
        return numpy.float32

    def _enlarge_unit(self, unit: float) -> None:
        ratio, self._unit = self._unit / unit, unit
        self._total = self._total * ratio
        self._weight = self._weight * ratio


def _is_counted(value: Number, weight: Number) -> Union[bool, Array]:
    """Returns where a value counts although its weight may be 0."""
    has_weight = is_not_zero(weight)
    return True if has_weight is True else has_weight | (value - value == 0)


MERGERS: Dict[str, Callable[[], Merger]] = {
    "mean": Mean,
    "sum": Sum,
    "max": functools.partial(Extremum, operator.gt),
    "min": functools.partial(Extremum, operator.lt),
}
