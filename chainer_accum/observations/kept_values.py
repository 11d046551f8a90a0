"""KeptValues: values that are kept until the window ends, for rules that need all of them at once."""

from __future__ import annotations

import functools
from typing import Any, List

import chainer

from chainer_accum._arguments import call
from chainer_accum._devices import Array
from chainer_accum.observations.reports import (
    Number,
    Reported,
    device_of_either,
    is_numeric,
    value_and_weight,
    without_graph,
)
from chainer_accum.observations.rules import RuleFunction


class KeptValues:
    """The values reported under one key, and the function that merges them.

    Arrays are copied on their device, because the model may report a view of a larger array or write to the array
    again.

    Args:
        key (str): The key.
        function (callable): Function of the list of values and the list of their weights.

    """

    def __init__(self, key: str, function: RuleFunction) -> None:
        self._name = f"observation_rules[{key!r}]"
        self._function = function
        self._values: List[Any] = []
        self._weights: List[Number] = []

    def add(self, reported: Reported, weight: Number) -> None:
        value, own_weight = value_and_weight(without_graph(reported))
        with device_of_either(value, own_weight):
            self._values.append(_copied(value))
            self._weights.append(weight if own_weight is None else _copied(own_weight))

    def drop_graph(self) -> None:
        """Does nothing, because no graph is kept."""

    def merged(self) -> Reported:
        with device_of_either(self._values[-1], self._weights[-1]):
            return call(self._name, self._function, self._values, self._weights)


def concatenation(key: str) -> RuleFunction:
    """Returns the function for the rule ``'concat'``."""
    return functools.partial(_concatenate, key)


def _concatenate(key: str, values: List[Any], weights: List[Number]) -> Array:
    for value in values:
        if not is_numeric(value):
            raise TypeError(
                f"{key!r} must be a number or an array of numbers for the rule 'concat', got {value!r}; "
                "report numbers, or give this key a function of values and weights"
            )
    shapes = [getattr(value, "shape", ()) for value in values]
    if len({(len(shape), shape[1:]) for shape in shapes}) > 1:
        raise ValueError(
            f"{key!r} must have the same shape in all micro-batches, except along axis 0, for the rule 'concat', got "
            f"{', '.join(map(str, sorted(set(shapes), key=shapes.index)))}; report an array whose other axes do not "
            "depend on the micro-batch, or give this key a function of values and weights"
        )
    xp = chainer.backend.get_array_module(*values)
    arrays = [xp.asarray(value) for value in values]
    return xp.concatenate(arrays) if arrays[0].ndim > 0 else xp.stack(arrays)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, chainer.get_array_types()) else value
