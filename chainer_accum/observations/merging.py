"""Observations: what the micro-batches of a window report, merged into one observation.

A model reports once per forward pass, but Trainer extensions expect one observation per update, equal to that of the
whole effective batch. Values are added as they arrive, on their device, so that memory does not grow with the number of
micro-batches and nothing waits for a device.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import types
import warnings
from typing import Any, Callable, Collection, ContextManager, Dict, Iterator, Mapping, Optional, Tuple, Type, Union

import chainer
import numpy

from chainer_accum._arguments import check_choice
from chainer_accum.observations.reports import (
    Number,
    Reported,
    as_number,
    as_reported,
    device_of_either,
    dtype_of,
    is_not_zero,
    is_numeric,
    is_scalar,
    promoted,
    value_and_weight,
    where,
    widened,
    without_graph,
)

OBSERVATION_RULES = ("mean", "sum", "last")


class ObservationRules:
    """Rules for merging the values that micro-batches report, by key.

    All windows of an updater share one object, so that it can check once whether all keys are spelled correctly.

    Args:
        rules (dict): Maps keys of the observation, such as ``'main/n_correct'``, to ``'mean'`` (the weighted mean over
            the micro-batches that reported the key), ``'sum'`` (the sum over them) or ``'last'`` (the last value).
            Arrays are merged elementwise. Without a rule, scalars are averaged, and of anything else the last value is
            kept.

    Raises:
        TypeError: If ``rules`` is not a dictionary, or a key is not a string.
        ValueError: If a rule is unknown.

    """

    def __init__(self, rules: Optional[Mapping[str, str]] = None) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise TypeError(f"observation_rules must be a dict, got {rules!r}; map keys such as 'main/loss' to a rule")
        self._rules = dict(rules or {})
        for key, rule in self._rules.items():
            if not isinstance(key, str):
                raise TypeError(f"a key of observation_rules must be a str, got {key!r}; write it as in the log")
            check_choice(f"observation_rules[{key!r}]", rule, OBSERVATION_RULES)
        self._is_checked = not self._rules

    def get(self, key: str) -> Optional[str]:
        """Returns the rule for a key, or ``None`` if there is none."""
        return self._rules.get(key)

    def check(self, reported: Collection[str]) -> None:
        """Warns about each rule whose key was not reported in the first window."""
        if self._is_checked or not reported:
            return
        self._is_checked = True
        names = sorted(map(str, reported))
        for key in self._rules:
            if key in reported:
                continue
            closest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            warnings.warn(
                f"observation_rules has a rule for {key!r}, which was not reported; did you mean {closest!r}? "
                f"These keys were reported: {', '.join(map(repr, names))}",
                RuntimeWarning,
                stacklevel=2,
            )


class Observations:
    """Merges the observations of the micro-batches of a window.

    Args:
        rules (ObservationRules): Rules for merging values, or a dictionary of such rules.

    """

    def __init__(self, rules: Union[ObservationRules, Mapping[str, str], None] = None) -> None:
        self._rules = rules if isinstance(rules, ObservationRules) else ObservationRules(rules)
        self._values: Dict[str, _Value] = {}

    def collecting(self) -> ContextManager[Dict[str, Reported]]:
        """Context manager that yields a dictionary; when the block ends, it holds everything reported inside it."""
        for value in self._values.values():
            value.drop_graph()
        return reporting_to({})

    def add(self, observation: Mapping[str, Reported], weight: Union[Number, Callable[[Reported], Number]]) -> None:
        """Adds what one micro-batch reported.

        Args:
            observation (dict): What was reported.
            weight: Weight of the micro-batch in the means of values that have no weight of their own, or a function
                that returns it for a reported value.

        Raises:
            TypeError: If a value to be added is neither a number nor an array of numbers.
            ValueError: If arrays to be added differ in shape.

        """
        common = None if callable(weight) else as_number(weight)
        for key, reported in observation.items():
            if key not in self._values:
                self._values[key] = _Value(key, self._rules.get(key))
            self._values[key].add(reported, weight(reported) if callable(weight) else common)

    def merged(self) -> Dict[str, Reported]:
        """Returns the observation of the window, each value with the type that was reported.

        Merged arrays stay on their device. Their dtype is the reported one, widened to at least float32, or to int64
        for sums of integers. If the values had weights of their own, the merged weight is the sum of these.

        """
        self._rules.check(self._values)
        with numpy.errstate(all="ignore"):
            return {key: value.merged() for key, value in self._values.items()}


@contextlib.contextmanager
def reporting_to(observation: Optional[Dict[str, Reported]] = None) -> Iterator[Any]:
    """Context manager that sends reports to the dictionary, if there is a reporter.

    Without a dictionary, reports go where they went before. In either case, the target of the reports is restored when
    the block ends, whatever happened inside it.

    """
    try:
        reporter = chainer.get_current_reporter()
    except IndexError:  # there is no reporter, so nothing to collect
        reporter = _NO_REPORTER
    before = reporter.observation
    try:  # before anything changes, since an interrupt may arrive at any time
        if observation is not None:
            reporter.observation = observation
        yield observation
    finally:
        reporter.observation = before


_NO_REPORTER: Any = types.SimpleNamespace(observation=None)


_FLOATS = (float, numpy.float32, numpy.float16)


class _Value:
    """The values reported under one key, and how they are merged."""

    def __init__(self, key: str, rule: Optional[str]) -> None:
        self._key = key
        self._rule = rule
        self._merger = _Sum() if rule == "sum" else _Mean()
        self._reports = 0
        self._last: Reported = None
        self._own_weight: Number = None
        # Shape and dtype of the merged values.
        self._shape: Optional[Tuple[int, ...]] = None
        self._dtype: Any = None

    def add(self, reported: Reported, weight: Number) -> None:
        self._reports += 1
        self._last = reported
        if isinstance(reported, tuple) and not chainer.config.keep_graph_on_report:
            self.drop_graph()  # chainer.report drops the graph of a Variable, but not inside a tuple
        value, own_weight = value_and_weight(reported)
        if not self._is_merged(value):
            return
        if self._rule is not None:
            self._check_shape(value)
        dtype = dtype_of(value)
        if dtype is not self._dtype:
            self._dtype = dtype if self._dtype is None else numpy.promote_types(self._dtype, dtype)
        weight = weight if own_weight is None else own_weight
        if own_weight is None and type(weight) is float and type(value) in _FLOATS:  # the common case
            self._merger.add(float(value), weight)
            return
        # NaN and infinity are not errors here; extensions look for them.
        with numpy.errstate(all="ignore"), device_of_either(value, weight):
            self._merger.add(value, weight)
            if own_weight is not None:
                own_weight = widened(own_weight, numpy.int64)
                self._own_weight = own_weight if self._own_weight is None else self._own_weight + own_weight

    def drop_graph(self) -> None:
        self._last = without_graph(self._last)

    def merged(self) -> Reported:
        value, _ = value_and_weight(self._last)
        if self._reports == 1 or not self._is_merged(value):
            return self._last
        with device_of_either(value, self._own_weight):
            dtype = promoted(self._dtype, self._merger.least_dtype(self._dtype))
            reported = self._last[0] if isinstance(self._last, tuple) else self._last
            merged = as_reported(reported, self._merger.result(value), dtype)
        return merged if self._own_weight is None else (merged, self._own_weight)

    def _is_merged(self, value: Number) -> bool:
        if self._rule is None:
            return is_scalar(value)
        if self._rule == "last":
            return False
        if not is_numeric(value):
            raise TypeError(
                f"{self._key!r} must be a number or an array of numbers for the rule {self._rule!r}, got {value!r}; "
                "report numbers, or give this key the rule 'last'"
            )
        return True

    def _check_shape(self, value: Number) -> None:
        shape = getattr(value, "shape", ())
        self._shape = shape if self._shape is None else self._shape
        if shape != self._shape:
            raise ValueError(
                f"{self._key!r} must have the same shape in all micro-batches for the rule {self._rule!r}, got "
                f"{self._shape} and {shape}; report a value whose shape does not depend on the micro-batch, such as "
                "a sum over its examples, or give this key the rule 'last'"
            )


class _Sum:
    """The sum of values. A value that is not finite and has weight 0, such as a mean over no examples, is left out."""

    def __init__(self) -> None:
        self._total: Number = 0

    def add(self, value: Number, weight: Number) -> None:
        value = widened(value, numpy.int64)
        is_counted = is_not_zero(weight)
        if is_counted is not True:
            is_finite = value - value == 0
            value = where(is_counted | is_finite, value)
        self._total = self._total + value

    def result(self, last: Number) -> Number:
        return self._total

    def least_dtype(self, dtype: numpy.dtype) -> Type[numpy.generic]:
        return numpy.int64 if dtype.kind in "biu" else numpy.float32


class _Mean:
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
