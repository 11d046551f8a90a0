"""Moments: mean and variance of the values of micro-batches, merged into those of the window."""

from __future__ import annotations

import math
import weakref
from typing import List, Optional, Tuple

import chainer
import numpy

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.link_states import LinkStates


class Moments:
    """Mean and variance of normalized values, one float64 array each, and the number of values behind each entry.

    Args:
        count (int): Number of values behind each entry.
        mean: Their means.
        variance: Their variances, divided by the number of values.

    """

    def __init__(self, count: int, mean: Array, variance: Array) -> None:
        self.count = count
        self.mean = mean
        self.variance = variance

    @classmethod
    def of(cls, x: Array, axis: Tuple[int, ...]) -> Moments:
        """Returns the moments of an array along some axes, computed in float64."""
        with device_of(x):
            kept = [each for each in range(x.ndim) if each not in axis]
            shape = tuple(x.shape[each] for each in kept)
            count = x.size // max(math.prod(shape), 1)
            if count == 0:
                xp = chainer.backend.get_array_module(x)
                return cls(0, xp.zeros(shape, numpy.float64), xp.zeros(shape, numpy.float64))
            wide = [1 if each in axis else size for each, size in enumerate(x.shape)]
            mean = sum_in_pairs(x, axis) / count
            # The variance is computed from differences, in the dtype of the values. So the mean may be rounded to it.
            rounded = mean.astype(numpy.promote_types(x.dtype, numpy.float32))
            difference = x - rounded.reshape(wide)
            difference *= difference
            shift = mean - rounded
            return cls(count, mean, sum_in_pairs(difference, axis) / count - shift * shift)

    def copy(self) -> Moments:
        """Returns a copy that can be merged with others."""
        with device_of(self.mean):
            return Moments(self.count, self.mean.copy(), self.variance.copy())

    def merge(self, other: Moments) -> None:
        """Adds the moments of other values, by the law of total variance."""
        if other.count == 0:
            return
        count = self.count + other.count
        share = other.count / count
        with device_of(self.mean):
            difference = other.mean - self.mean
            self.variance += share * (other.variance - self.variance) + share * (1 - share) * difference * difference
            self.mean += share * difference
        self.count = count

    def move(self, averages: Tuple[Array, ...], decay: float) -> None:
        """Moves a running mean and a running variance toward these moments, as batch normalization does."""
        unbiased = self.count / max(self.count - 1.0, 1.0)
        for average, value in zip(averages, (self.mean, unbiased * self.variance)):
            with device_of(average):
                average *= decay
                average += (1 - decay) * value.astype(average.dtype)


class Moves:
    """The running averages that have moved in a window, and their values before.

    Args:
        links (LinkStates): Links that may have them as persistent values.

    """

    def __init__(self, links: LinkStates) -> None:
        # A model may keep a graph, which refers to this. The links hold what the model kept of the graph before.
        self._links = weakref.ref(links)
        self._before: List[Tuple[Array, Array]] = []

    def add(self, average: Array) -> None:
        """Notes the value of a running average that is about to move for all passes."""
        with device_of(average):
            self._before.append((average, average.copy()))
        links = self._links()
        if links is not None:
            links.share(average)

    def undo(self) -> None:
        """Undoes all moves, the last one first."""
        while self._before:
            average, value = self._before.pop()
            with device_of(average):
                average[...] = value


def sum_in_pairs(x: Array, axis: Tuple[int, ...]) -> Array:
    """Returns the sum over some axes in float64.

    Over the last axes, which are contiguous in memory, NumPy adds in pairs, which is fast and exact enough in float32.

    """
    inner = [each for each in axis if set(range(each, x.ndim)) <= set(axis)]
    outer = tuple(each for each in axis if each not in inner)
    if inner and x.dtype.itemsize >= 4:
        x = x.sum(axis=tuple(inner))
    else:
        outer = axis
    return x.sum(axis=outer, dtype=numpy.float64)


def axis_of(ndim: int, num_kept: int, axis: Optional[Tuple[int, ...]]) -> Tuple[int, ...]:
    """Returns the axes over which batch normalization takes its statistics, as Chainer determines them.

    Args:
        ndim (int): Number of dimensions of the input.
        num_kept (int): Number of dimensions of the statistics.
        axis: The axes that the user named, if any.

    """
    return (0, *range(num_kept + 1, ndim)) if axis is None else axis


def expander_of(ndim: int, axis: Tuple[int, ...]) -> Tuple[Optional[slice], ...]:
    """Returns the index that inserts the axes into statistics, so that they can be broadcast with the input."""
    return tuple(None if each in axis else slice(None) for each in range(ndim))


def is_on_host(array: Array) -> bool:
    """Returns whether an array is one of NumPy's."""
    return chainer.backend.get_array_module(array) is numpy
