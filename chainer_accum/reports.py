"""A report: what was given to ``chainer.report`` under one key, and how to compute with it.

It may be a number, an array or a Variable, with or without a weight, in host memory or on a device. Here it is taken
apart and put together again. What may be on a device is never asked for its value, for that would wait for the device.
"""

from __future__ import annotations

import contextlib
import copy
import numbers
from typing import Any, ContextManager, Tuple

import chainer
import numpy

from chainer_accum._devices import device_of

# The first three are the last one, too, but are recognized faster. A Decimal is none, and cannot be added to a float.
_NUMBERS = (float, int, complex, numbers.Complex)
_ON_HOST = (numpy.generic, *_NUMBERS)
_NO_DEVICE: ContextManager[Any] = contextlib.nullcontext()


def value_and_weight(reported: Any) -> Tuple[Any, Any]:
    """Returns what was reported and its own weight, or ``None`` if it has none, as numbers or arrays.

    As for :class:`chainer.DictSummary`, the first two items of a tuple are a value and its weight, if they can be.

    """
    if isinstance(reported, tuple) and len(reported) > 1:
        value, weight = map(as_number, reported[:2])
        if is_numeric(value) and is_scalar(weight):
            return value, weight
    return as_number(reported), None


def as_number(value: Any) -> Any:
    """Returns what is in a Variable, and what is in an array of no dimension in host memory."""
    value = chainer.as_array(value)
    # Not with isinstance: what a subclass has in it may be anywhere.
    return value[()] if type(value) is numpy.ndarray and value.ndim == 0 else value


def is_numeric(value: Any) -> bool:
    """Returns whether the value is a number or an array of numbers."""
    if hasattr(value, "ndim"):
        return value.dtype.kind in "biufc"
    return isinstance(value, _NUMBERS)


def is_scalar(value: Any) -> bool:
    """Returns whether the value is a number or a zero-dimensional array of one."""
    return is_numeric(value) and getattr(value, "ndim", 0) == 0


def is_on_host(number: Any) -> bool:
    """Returns whether nothing has to be waited for to read a number."""
    return isinstance(number, _ON_HOST)


def is_not_zero(number: Any) -> Any:
    """Returns whether a number is not zero: a bool, or an array if the number may be on a device."""
    return bool(number != 0) if is_on_host(number) else number != 0


def where(condition: Any, value: Any, otherwise: Any = 0) -> Any:
    """Returns one of two values, chosen by a bool or by an array of them."""
    if is_on_host(condition):
        return value if condition else otherwise
    return chainer.backend.get_array_module(condition, value).where(condition, value, otherwise)


def widened(value: Any, least_of_integers: Any) -> Any:
    """Returns a number or an array in a dtype in which many can be added without loss."""
    if not hasattr(value, "dtype"):
        return value
    least = least_of_integers if value.dtype.kind in "biu" else numpy.float64
    return value.astype(promoted(value.dtype, least), copy=False)


def promoted(dtype: Any, least: Any) -> Any:
    """Returns the dtype, or one that holds its numbers and is as wide as another. An integer stays one."""
    if dtype.kind == "u" and dtype.itemsize == 8 and least is numpy.int64:
        return dtype
    return numpy.promote_types(dtype, least)


def dtype_of(value: Any) -> Any:
    """Returns the dtype of an array, or the one that an array of the number would have."""
    if hasattr(value, "dtype"):
        return value.dtype
    if isinstance(value, numbers.Integral):
        return numpy.dtype(int)
    return numpy.dtype(float if isinstance(value, numbers.Real) else complex)


def device_of_either(value: Any, weight: Any) -> ContextManager[Any]:
    """Returns a context in which the device is the current one on which the value or its weight is."""
    if not is_on_host(value):
        return device_of(value)
    return _NO_DEVICE if weight is None or is_on_host(weight) else device_of(weight)


def without_graph(reported: Any) -> Any:
    """Returns what was reported, in which no Variable has a graph."""
    if isinstance(reported, chainer.Variable) and reported.creator_node is not None:
        return copy.copy(reported)
    if isinstance(reported, tuple) and any(isinstance(item, chainer.Variable) for item in reported):
        return tuple(map(without_graph, reported))
    return reported


def as_reported(reported: Any, result: Any, dtype: Any) -> Any:
    """Returns the result as a Variable, an array or a number, as ``reported`` is."""
    if isinstance(reported, chainer.Variable):
        variable = chainer.Variable(as_reported(reported.array, result, dtype))
        if reported.creator_node is not None:  # graphs are kept on report, as DumpGraph asks
            variable.set_creator_node(reported.creator_node)
        return variable
    if not hasattr(reported, "dtype"):
        return result
    array = chainer.backend.get_array_module(reported, result).asarray(result, dtype=dtype)
    return array[()] if isinstance(reported, numpy.generic) else array
