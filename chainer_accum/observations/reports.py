"""Reports: values passed to ``chainer.report``, and computations with them.

A reported value may be a number, an array or a Variable, with or without a weight, in host memory or on a device. These
functions take it apart and reassemble it. They never read a value that may be on a device, because that would wait for
the device.
"""

from __future__ import annotations

import contextlib
import copy
import numbers
from typing import Any, ContextManager, Optional, Tuple, Type, Union

import chainer
import numpy

from chainer_accum._devices import Array, device_of

Reported = Any  # a number, an array or a Variable, with or without a weight, or something else
Number = Any  # a number or an array

# The first three are Complex, too, but are recognized faster. A Decimal is not, and cannot be added to a float.
_NUMBERS = (float, int, complex, numbers.Complex)
_ON_HOST = (numpy.generic, *_NUMBERS)
_NO_DEVICE: ContextManager[object] = contextlib.nullcontext()


def value_and_weight(reported: Reported) -> Tuple[Number, Optional[Number]]:
    """Returns a reported value and its own weight, or ``None`` if it has none, as numbers or arrays.

    As in :class:`chainer.DictSummary`, a tuple that begins with a value and a weight is taken as such.

    """
    if isinstance(reported, tuple) and len(reported) > 1:
        value, weight = map(as_number, reported[:2])
        if is_numeric(value) and is_scalar(weight):
            return value, weight
    return as_number(reported), None


def as_number(value: Reported) -> Number:
    """Returns the array of a Variable, and the number in a zero-dimensional array in host memory."""
    value = chainer.as_array(value)
    # Not isinstance: a subclass may keep its data on a device.
    return value[()] if type(value) is numpy.ndarray and value.ndim == 0 else value


def is_numeric(value: Reported) -> bool:
    """Returns whether the value is a number or an array of numbers."""
    if hasattr(value, "ndim"):
        return value.dtype.kind in "biufc"
    return isinstance(value, _NUMBERS)


def is_scalar(value: Reported) -> bool:
    """Returns whether the value is a number or a zero-dimensional array."""
    return is_numeric(value) and getattr(value, "ndim", 0) == 0


def is_on_host(number: Number) -> bool:
    """Returns whether a number can be read without waiting for a device."""
    return isinstance(number, _ON_HOST)


def is_not_zero(number: Number) -> Union[bool, Array]:
    """Returns whether a number is nonzero: a bool, or an array if the number may be on a device."""
    return bool(number != 0) if is_on_host(number) else number != 0


def where(condition: Union[bool, Array], value: Number, otherwise: Number = 0) -> Number:
    """Returns ``value`` where the condition holds, and ``otherwise`` elsewhere. The condition is a bool or an array."""
    if is_on_host(condition):
        return value if condition else otherwise
    return chainer.backend.get_array_module(condition, value).where(condition, value, otherwise)


def widened(value: Number, least_of_integers: Type[numpy.generic]) -> Number:
    """Returns a number or an array in a dtype wide enough to add many of them without loss."""
    if not hasattr(value, "dtype"):
        return value
    least = least_of_integers if value.dtype.kind in "biu" else numpy.float64
    return value.astype(promoted(value.dtype, least), copy=False)


def promoted(dtype: numpy.dtype, least: Type[numpy.generic]) -> numpy.dtype:
    """Returns the dtype promoted to at least ``least``. A dtype of integers stays one."""
    if dtype.kind == "u" and dtype.itemsize == 8 and least is numpy.int64:
        return dtype
    return numpy.promote_types(dtype, least)


def dtype_of(value: Number) -> numpy.dtype:
    """Returns the dtype of an array, or the dtype that an array of the number would have."""
    if hasattr(value, "dtype"):
        dtype: numpy.dtype = value.dtype
        return dtype
    if isinstance(value, numbers.Integral):
        return numpy.dtype(int)
    return numpy.dtype(float if isinstance(value, numbers.Real) else complex)


def device_of_either(value: Number, weight: Optional[Number]) -> ContextManager[object]:
    """Returns a context manager that makes the device of the value or its weight the current one."""
    if not is_on_host(value):
        return device_of(value)
    return _NO_DEVICE if weight is None or is_on_host(weight) else device_of(weight)


def without_graph(reported: Reported) -> Reported:
    """Returns the reported value, with every Variable in it detached from its graph."""
    if isinstance(reported, chainer.Variable) and reported.creator_node is not None:
        return copy.copy(reported)
    if isinstance(reported, tuple) and any(isinstance(item, chainer.Variable) for item in reported):
        return tuple(map(without_graph, reported))
    return reported


def as_reported(reported: Reported, result: Number, dtype: numpy.dtype) -> Reported:
    """Returns the result as a Variable, an array or a number, whichever ``reported`` is."""
    if isinstance(reported, chainer.Variable):
        variable = chainer.Variable(as_reported(reported.array, result, dtype))
        if reported.creator_node is not None:  # config.keep_graph_on_report is on, as for DumpGraph
            variable.set_creator_node(reported.creator_node)
        return variable
    if not hasattr(reported, "dtype"):
        return result
    array = chainer.backend.get_array_module(reported, result).asarray(result, dtype=dtype)
    return array[()] if isinstance(reported, numpy.generic) else array
