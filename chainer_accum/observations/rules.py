"""ObservationRules: how the values reported under each key are merged."""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Any, Callable, Collection, List, Mapping, Optional, Union

from chainer_accum._arguments import check_callable, check_choice

RuleFunction = Callable[[List[Any], List[Any]], Any]
Rule = Union[str, RuleFunction]

OBSERVATION_RULES = ("mean", "sum", "last", "max", "min", "concat")


class ObservationRules:
    """Rules for merging the values that micro-batches report, by key.

    All windows of an updater share one object, so that it can check once whether all keys are spelled correctly.

    Args:
        rules (dict): Maps keys of the observation, such as ``'main/n_correct'``, to a rule. Without a rule, scalars are
            averaged, and of anything else the last value is kept.

            ``'mean'``, ``'sum'``, ``'max'``, ``'min'``
                The weighted mean, the sum, the largest or the smallest of the values; for arrays, elementwise.

            ``'last'``
                The last value.

            ``'concat'``
                An array of all values: arrays are concatenated along axis 0, scalars become the elements.

            a function
                What the function returns when it is called with the list of values and the list of their weights.

    Raises:
        TypeError: If ``rules`` is not a dictionary, a key is not a string, or a rule is neither a name nor a function
            of two arguments.
        ValueError: If the name of a rule is unknown.

    """

    def __init__(self, rules: Optional[Mapping[str, Rule]] = None) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise TypeError(f"observation_rules must be a dict, got {rules!r}; map keys such as 'main/loss' to a rule")
        self._rules = dict(rules or {})
        for key, rule in self._rules.items():
            if not isinstance(key, str):
                raise TypeError(f"a key of observation_rules must be a str, got {key!r}; write it as in the log")
            _check_rule(f"observation_rules[{key!r}]", rule)
        self._is_checked = not self._rules

    @property
    def change_single_reports(self) -> bool:
        """Whether a rule changes what a single micro-batch reports."""
        return any(rule == "concat" or callable(rule) for rule in self._rules.values())

    def get(self, key: str) -> Optional[Rule]:
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


def _check_rule(name: str, rule: object) -> None:
    if isinstance(rule, str):
        check_choice(name, rule, OBSERVATION_RULES)
        return
    names = ", ".join(map(repr, OBSERVATION_RULES))
    check_callable(name, rule, f"pass a function of values and weights, or one of {names}")
    if not _takes_two_lists(rule):
        raise TypeError(
            f"{name} must be a function of a list of values and a list of weights, got {rule!r}; "
            f"write one such as lambda values, weights: max(values), or use one of {names}"
        )


def _takes_two_lists(function: Any) -> bool:
    if function in (max, min, sum):  # they would take the lists for two values, or for a list and its start
        return False
    try:
        bound = inspect.signature(function).bind([], [])
    except TypeError:
        return False
    except ValueError:  # it is not written in Python, and does not tell
        return True
    return "axis" not in bound.arguments  # numpy.mean and the like would take the weights for axes
