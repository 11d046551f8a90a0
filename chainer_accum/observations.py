"""What the micro-batches of a window reported, merged into one observation.

A model reports once per forward pass, but a Trainer extension must see one observation per update, and one that says
what the whole effective batch would have said. Values are added up as they come, on the device where they are, so
nothing grows with the number of micro-batches and nothing waits for a device.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import types
import warnings
from typing import Any, Collection, ContextManager, Dict, Iterator, Mapping, Optional, Tuple, Union

import chainer
import numpy

from chainer_accum._arguments import check_choice
from chainer_accum.reports import (
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
    """How the values that micro-batches reported become one, by key.

    The windows of an updater share one of these, so that it can tell once whether all keys are spelt right.

    Args:
        rules (dict): Maps keys of the observation, such as ``'main/n_correct'``, to ``'mean'`` (the mean over the
            micro-batches that reported the key, by weight), ``'sum'`` (the sum over them) or ``'last'`` (the last
            value). Arrays are added elementwise. Without a rule, a scalar becomes a mean, and of anything else, the
            last value stays.

    Raises:
        TypeError: If it is not a dictionary, or a key is not a string.
        ValueError: If a rule is unknown.

    """

    def __init__(self, rules: Optional[Mapping[str, str]] = None) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise TypeError(f"observation_rules must be a dict, got {rules!r}; map keys such as 'main/loss' to a rule")
        self._rules = dict(rules or {})
        for key, rule in self._rules.items():
            if not isinstance(key, str):
                raise TypeError(f"a key of observation_rules must be a str, got {key!r}; write it as it is logged")
            check_choice(f"observation_rules[{key!r}]", rule, OBSERVATION_RULES)
        self._is_checked = not self._rules

    def get(self, key: str) -> Optional[str]:
        """Returns the rule for a key, or ``None`` if there is none."""
        return self._rules.get(key)

    def check(self, reported: Collection[str]) -> None:
        """Warns of each rule whose key is not among those that the first window reported."""
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
                f"reported were {', '.join(map(repr, names))}",
                RuntimeWarning,
                stacklevel=2,
            )


class Observations:
    """Merges the observations of the micro-batches of a window.

    Args:
        rules (ObservationRules): How values become one, or a dictionary of which to make that.

    """

    def __init__(self, rules: Union[ObservationRules, Mapping[str, str], None] = None) -> None:
        self._rules = rules if isinstance(rules, ObservationRules) else ObservationRules(rules)
        self._values: Dict[str, _Value] = {}

    def collecting(self) -> ContextManager[Dict[str, Any]]:
        """Context manager that yields a dictionary; when the block ends, it holds everything reported inside it."""
        for value in self._values.values():
            value.drop_graph()
        return reporting_to({})

    def add(self, observation: Mapping[str, Any], weight: Any) -> None:
        """Adds what was reported of one micro-batch.

        Args:
            observation (dict): What was reported.
            weight: What the micro-batch counts for in the means of values without a weight of their own.

        Raises:
            TypeError: If a value that is to be added up is neither a number nor an array of numbers.
            ValueError: If arrays that are to be added up differ in shape.

        """
        weight = as_number(weight)
        for key, reported in observation.items():
            if key not in self._values:
                self._values[key] = _Value(key, self._rules.get(key))
            self._values[key].add(reported, weight)

    def merged(self) -> Dict[str, Any]:
        """Returns the observation of the window, each value of the type that was reported.

        Means and sums of arrays are arrays on the same device, of the dtype that was reported but at least float32, or
        int64 for sums of integers. Values with a weight of their own have the sum of these weights.

        """
        self._rules.check(self._values)
        with numpy.errstate(all="ignore"):
            return {key: value.merged() for key, value in self._values.items()}


@contextlib.contextmanager
def reporting_to(observation: Optional[Dict[str, Any]] = None) -> Iterator[Any]:
    """Context manager in which what is reported goes to the dictionary, if there is a reporter at all.

    Without a dictionary it goes where it goes. After the context, it does so again, whatever has happened within.

    """
    try:
        reporter = chainer.get_current_reporter()
    except IndexError:  # there is none, and nothing to collect
        reporter = _NO_REPORTER
    before = reporter.observation
    try:  # before anything changes, for an interrupt may come at once
        if observation is not None:
            reporter.observation = observation
        yield observation
    finally:
        reporter.observation = before


_NO_REPORTER = types.SimpleNamespace(observation=None)


_FLOATS = (float, numpy.float32, numpy.float16)


class _Value:
    """What was reported under one key, and the merger to which the rule for the key leads."""

    def __init__(self, key: str, rule: Optional[str]) -> None:
        self._key = key
        self._rule = rule
        self._merger = _Sum() if rule == "sum" else _Mean()
        self._reports = 0
        self._last: Any = None
        self._own_weight: Any = None
        # Of the values that have been given to the merger.
        self._shape: Optional[Tuple[int, ...]] = None
        self._dtype: Any = None

    def add(self, reported: Any, weight: Any) -> None:
        self._reports += 1
        self._last = reported
        if isinstance(reported, tuple) and not chainer.config.keep_graph_on_report:
            self.drop_graph()  # chainer.report looks for Variables, but not in tuples
        value, own_weight = value_and_weight(reported)
        if not self._is_merged(value):
            return
        if self._rule is not None:
            self._check_shape(value)
        dtype = dtype_of(value)
        if dtype is not self._dtype:
            self._dtype = dtype if self._dtype is None else numpy.promote_types(self._dtype, dtype)
        weight = weight if own_weight is None else own_weight
        if own_weight is None and type(weight) is float and type(value) in _FLOATS:  # as most values are
            self._merger.add(float(value), weight)
            return
        # It is for others to find NaN and infinity.
        with numpy.errstate(all="ignore"), device_of_either(value, weight):
            self._merger.add(value, weight)
            if own_weight is not None:
                own_weight = widened(own_weight, numpy.int64)
                self._own_weight = own_weight if self._own_weight is None else self._own_weight + own_weight

    def drop_graph(self) -> None:
        self._last = without_graph(self._last)

    def merged(self) -> Any:
        value, _ = value_and_weight(self._last)
        if self._reports == 1 or not self._is_merged(value):
            return self._last
        with device_of_either(value, self._own_weight):
            dtype = promoted(self._dtype, self._merger.least_dtype(self._dtype))
            reported = self._last[0] if isinstance(self._last, tuple) else self._last
            merged = as_reported(reported, self._merger.result(value), dtype)
        return merged if self._own_weight is None else (merged, self._own_weight)

    def _is_merged(self, value: Any) -> bool:
        if self._rule is None:
            return is_scalar(value)
        if self._rule == "last":
            return False
        if not is_numeric(value):
            raise TypeError(
                f"{self._key!r} must be a number or an array of numbers for the rule {self._rule!r}, got {value!r}; "
                "report numbers, or give it the rule 'last'"
            )
        return True

    def _check_shape(self, value: Any) -> None:
        shape = getattr(value, "shape", ())
        self._shape = shape if self._shape is None else self._shape
        if shape != self._shape:
            raise ValueError(
                f"{self._key!r} must have the same shape in all micro-batches for the rule {self._rule!r}, got "
                f"{self._shape} and {shape}; report what does not depend on the size of a micro-batch, such as a sum "
                "over its examples, or give it the rule 'last'"
            )


class _Sum:
    """The sum of values. One that is not finite and has no weight is the mean of nothing, and left out."""

    def __init__(self) -> None:
        self._total: Any = 0

    def add(self, value: Any, weight: Any) -> None:
        value = widened(value, numpy.int64)
        is_counted = is_not_zero(weight)
        if is_counted is not True:
            is_finite = value - value == 0
            value = where(is_counted | is_finite, value)
        self._total = self._total + value

    def result(self, last: Any) -> Any:
        return self._total

    def least_dtype(self, dtype: Any) -> Any:
        return numpy.int64 if dtype.kind in "biu" else numpy.float32


class _Mean:
    """The mean of values by weight. If there is no weight at all, it is the last value."""

    def __init__(self) -> None:
        # Both in units of the largest power of 2 among the weights, for weights may be too large to be added up.
        self._unit = 1.0
        self._total: Any = 0
        self._weight: Any = 0

    def add(self, value: Any, weight: Any) -> None:
        is_counted = is_not_zero(weight)
        if is_counted is False:
            return
        if is_counted is True and abs(weight) > self._unit:
            self._enlarge_unit(2.0 ** (math.frexp(abs(weight))[1] - 1))
        share = widened(weight, numpy.float64) / self._unit
        self._total = self._total + where(is_counted, widened(value, numpy.float64)) * share
        self._weight = self._weight + share

    def result(self, last: Any) -> Any:
        has_weight = is_not_zero(self._weight)
        return last if has_weight is False else where(has_weight, self._total / self._weight, last)

    def least_dtype(self, dtype: Any) -> Any:
        return numpy.float32

    def _enlarge_unit(self, unit: float) -> None:
        ratio, self._unit = self._unit / unit, unit
        self._total = self._total * ratio
        self._weight = self._weight * ratio
