"""Observations: what the micro-batches of a window report, merged into one observation.

A model reports once per forward pass, but Trainer extensions expect one observation per update, equal to that of the
whole effective batch. Values stay on their device, and nothing waits for it. They are merged as they arrive, so that
memory does not grow with the number of micro-batches, unless a rule needs all of them at once.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any, Callable, ContextManager, Dict, Iterator, Mapping, Optional, Union

import chainer

from chainer_accum.observations.kept_values import KeptValues, concatenation
from chainer_accum.observations.reports import Number, Reported, as_number
from chainer_accum.observations.rules import ObservationRules, Rule
from chainer_accum.observations.running_values import RunningValue


class Observations:
    """Merges the observations of the micro-batches of a window.

    Args:
        rules (ObservationRules): Rules for merging values, or a dictionary of such rules.

    """

    def __init__(self, rules: Union[ObservationRules, Mapping[str, Rule], None] = None) -> None:
        self._rules = rules if isinstance(rules, ObservationRules) else ObservationRules(rules)
        self._values: Dict[str, Union[RunningValue, KeptValues]] = {}

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
                self._values[key] = _begin(key, self._rules.get(key))
            self._values[key].add(reported, weight(reported) if callable(weight) else common)

    def merged(self) -> Dict[str, Reported]:
        """Returns the observation of the window.

        Means, sums and extrema have the type that was reported, and stay on their device. The dtype of means and sums
        is the reported one, widened to at least float32, or to int64 for sums of integers. If the values had weights of
        their own, the merged weight is the sum of these.

        Raises:
            Exception: Whatever the function of a rule raises.
            TypeError: If a value to be concatenated is neither a number nor an array of numbers.
            ValueError: If arrays to be concatenated do not fit together.

        """
        self._rules.check(self._values)
        return {key: value.merged() for key, value in self._values.items()}


def _begin(key: str, rule: Optional[Rule]) -> Union[RunningValue, KeptValues]:
    """Returns the object to which the values of a key are added."""
    if rule == "concat":
        return KeptValues(key, concatenation(key))
    return RunningValue(key, rule) if rule is None or isinstance(rule, str) else KeptValues(key, rule)


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
