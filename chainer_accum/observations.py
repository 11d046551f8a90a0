"""What the micro-batches of a window reported, merged into one observation.

A model reports once per forward pass, but a Trainer extension must see one observation per update, and one that says
what the whole effective batch would have said. Scalars are averaged by weight as they come, on the device where they
are, so nothing grows with the number of micro-batches and nothing waits for a device.
"""

from __future__ import annotations

import contextlib
import copy
import numbers
from typing import Any, ContextManager, Dict, Iterator, Mapping, Optional

import chainer
import numpy

from chainer_accum._devices import device_of

OBSERVATION_RULES = ("mean", "sum", "last")


class Observations:
    """Merges the observations of the micro-batches of a window.

    Args:
        rules (dict): Maps keys of the observation, such as ``'main/n_correct'``, to ``'mean'`` (the mean over the
            micro-batches that reported the key, by weight), ``'sum'`` (their plain sum) or ``'last'`` (the last value).
            For other keys, the rule is ``'mean'``. Whatever the rule is, of values that are not scalars the last stays.

    """

    def __init__(self, rules: Optional[Mapping[str, str]] = None) -> None:
        self._rules = rules or {}
        self._values: Dict[str, _Value] = {}

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Dict[str, Any]]:
        """Returns a context that returns a dictionary, in which is, after it, what was reported in the context."""
        for value in self._values.values():
            value.drop_graph()
        observation: Dict[str, Any] = {}
        with reporting_to(observation):
            yield observation

    def add(self, observation: Mapping[str, Any], weight: float) -> None:
        """Adds what was reported of one micro-batch."""
        for key, reported in observation.items():
            if key not in self._values:
                self._values[key] = _Value(self._rules.get(key, "mean"))
            self._values[key].add(reported, weight)

    def merged(self) -> Dict[str, Any]:
        """Returns the observation of the window, each value of the type that was reported.

        Means and sums of arrays are arrays on the same device, of the dtype that was reported but at least float32, or
        int64 for sums of integers.

        """
        return {key: value.merged() for key, value in self._values.items()}


def reporting_to(observation: Dict[str, Any]) -> ContextManager[None]:
    """Returns a context in which what is reported goes to the dictionary, if there is a reporter at all."""
    try:
        scope: ContextManager[None] = chainer.get_current_reporter().scope(observation)
    except IndexError:  # there is no reporter, and nothing to collect
        return contextlib.nullcontext()
    return scope


class _Value:
    """What was reported under one key.

    As for :class:`chainer.DictSummary`, a scalar is a number, a zero-dimensional array or a :class:`~chainer.Variable`
    of one, and may come in a tuple with a weight of its own.

    """

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._reports = 0
        self._last: Any = None
        self._total: Any = 0
        self._weight: Any = 0

    def add(self, reported: Any, weight: Any) -> None:
        self._reports += 1
        self._last = reported
        if _has_weight(reported):
            reported, weight = reported
        scalar = chainer.as_array(reported)
        if self._rule == "last" or not is_scalar(scalar):
            return
        with device_of(scalar):
            if self._rule == "sum":
                self._total = self._total + _times(scalar, 1)
            elif not _is_zero(weight):  # a loss without examples may be NaN
                self._total = self._total + _times(scalar, weight)
                self._weight = self._weight + weight

    def drop_graph(self) -> None:
        if isinstance(self._last, chainer.Variable) and self._last.creator_node is not None:
            self._last = copy.copy(self._last)

    def merged(self) -> Any:
        value, weight = self._last if _has_weight(self._last) else (self._last, None)
        scalar = chainer.as_array(value)
        if self._reports == 1 or self._rule == "last" or not is_scalar(scalar):
            return self._last
        with device_of(scalar):
            if self._rule == "sum":
                return _as_type_of(value, self._total, numpy.int64)
            if _is_zero(self._weight):
                return self._last
            mean = _as_type_of(value, self._total / self._weight, numpy.float32)
        return mean if weight is None else (mean, self._weight)


def is_scalar(value: Any) -> bool:
    """Returns whether the value is a number or a zero-dimensional array of one."""
    return (getattr(value, "ndim", -1) == 0 and value.dtype.kind in "biufc") or isinstance(value, numbers.Number)


def _is_zero(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and weight == 0  # a weight on a device is not waited for


def _has_weight(reported: Any) -> bool:
    return isinstance(reported, tuple) and len(reported) == 2 and is_scalar(chainer.as_array(reported[0]))


def _times(scalar: Any, weight: Any) -> Any:
    """Returns the product in a type in which many of them can be added without loss."""
    if hasattr(scalar, "astype"):
        scalar = scalar.astype(numpy.complex128 if scalar.dtype.kind == "c" else numpy.float64)
    return scalar * weight


def _as_type_of(reported: Any, value: Any, dtype_of_integers: Any) -> Any:
    """Returns the scalar ``value`` as a Variable, an array or a number, as ``reported`` is."""
    if isinstance(reported, chainer.Variable):
        variable = chainer.Variable(_as_type_of(reported.array, value, dtype_of_integers))
        if reported.creator_node is not None:  # graphs are kept on report, as DumpGraph asks
            variable.set_creator_node(reported.creator_node)
        return variable
    if not hasattr(reported, "dtype"):
        return value
    at_least = dtype_of_integers if reported.dtype.kind in "biu" else numpy.float32
    array = chainer.backend.get_array_module(reported).asarray(
        value, dtype=numpy.promote_types(reported.dtype, at_least)
    )
    return array[()] if isinstance(reported, numpy.generic) else array
