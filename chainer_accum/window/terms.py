"""Losses: what a loss function returned, as one or several losses, each with the weight by which it counts.

The divisor of a loss may be known only after the forward pass, such as the number of matched boxes. Then the loss
function returns it: ``(loss, weight)``. A loss that is a sum of means with different divisors is several such pairs,
called terms. Each term is a mean over the window with weights of its own.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Callable, List, NamedTuple, NoReturn, Sequence, Tuple, Union

import chainer

from chainer_accum._arguments import check_weight, takes
from chainer_accum._devices import Array, device_of
from chainer_accum.observations import Reported
from chainer_accum.window.losses import check_loss

# A number or a zero-dimensional array, or a function that is called after the forward pass and returns one.
Weight = Union[float, Array, Callable[[], Any]]


class Losses(NamedTuple):
    """The losses of a pass.

    Attributes:
        losses (tuple of ~chainer.Variable): The losses, one for each term.
        weights (tuple of float): The weight of each loss.
        given (float): The weight of the pass as its caller gave it.
        num_pairs (int): The number of pairs that the loss function returned, or 0 for a loss without a weight.

    """

    losses: Tuple[chainer.Variable, ...]
    weights: Tuple[float, ...]
    given: float
    num_pairs: int = 0

    @property
    def has_weight(self) -> bool:
        """Whether any of the losses counts."""
        return max(self.weights) > 0

    def to_check(self) -> Sequence[chainer.Variable]:
        """Returns the losses that must be finite: those that count, or all if none does."""
        counted = [loss for loss, weight in zip(self.losses, self.weights) if weight > 0]
        return counted or self.losses

    def report_weight(self) -> ReportWeight:
        """Returns the weight of what the pass reported, or a function that returns it for a reported value."""
        if len(self.losses) == 1:
            return self.weights[0]
        return _WeightOfReport([loss.array for loss in self.losses], self.weights, self.given)

    def total(self) -> chainer.Variable:
        """Returns the sum of the losses that count, as in a batch that is not split, or zero if none does."""
        if self.num_pairs == 0:
            return self.losses[0]
        counted = [loss for loss, weight in zip(self.losses, self.weights) if weight > 0]
        if len(counted) == 1:
            return counted[0]
        if not counted:
            first = self.losses[0]
            with device_of(first.array):
                return chainer.Variable(first.xp.zeros((), first.dtype))
        return functools.reduce(operator.add, map(chainer.functions.sum, counted))


class _WeightOfReport:
    """The weight of a reported value in a pass of several losses: a loss has its own, anything else that of the pass.

    It has the arrays of the losses, which are scalars, and not their graph.

    """

    def __init__(self, arrays: Sequence[Array], weights: Sequence[float], given: float) -> None:
        self._arrays = arrays
        self._weights = weights
        self._given = given

    def __call__(self, reported: Reported) -> float:
        value = chainer.as_array(reported)
        for array, weight in zip(self._arrays, self._weights):
            if array is value:
                return weight
        return self._given


ReportWeight = Union[float, _WeightOfReport]


def kind_of(num_pairs: int) -> str:
    """Returns in words what a loss function returns."""
    return "a loss without a weight" if num_pairs == 0 else "a pair" if num_pairs == 1 else f"{num_pairs} pairs"


def different_kinds(num_pairs: int, num_before: int) -> TypeError:
    """Returns the error for a loss function that returns something else than in the passes before."""
    return TypeError(
        "the loss function must return the same number of pairs (loss, weight) in each pass of a window, got "
        f"{kind_of(num_pairs)} after {kind_of(num_before)}; return a weight of 0 for a loss that a micro-batch does "
        "not have"
    )


def factors_of(losses: Losses, weights: Sequence[Sequence[float]]) -> List[float]:
    """Returns the factor of each loss in the mean over all passes of a window.

    Args:
        losses (Losses): The losses of a pass.
        weights: The weights of the losses of each pass, including this one.

    Raises:
        TypeError: If the passes have different numbers of losses.

    """
    for other in weights:
        if len(other) != len(losses.weights):
            raise different_kinds(len(losses.weights), len(other))
    largest = [max(each) or 1.0 for each in zip(*weights)]  # to divide by first, since the sum may overflow
    sums = [sum(weight / unit for weight in each) for each, unit in zip(zip(*weights), largest)]
    return [weight / unit / (total or 1.0) for weight, unit, total in zip(losses.weights, largest, sums)]


def check_given_weight(weight: Weight) -> Union[float, Callable[[], Any]]:
    """Returns a weight as a float, or unchanged if it is a function.

    Raises:
        TypeError: If it is neither a number nor a function without arguments.
        ValueError: If it is negative or not finite.

    """
    if not callable(weight):
        return check_weight(weight, "weight")
    if not takes(weight):
        raise TypeError(
            f"weight must be a number or a function without arguments, got {weight!r}; write lambda: ..., which is "
            "called after the forward pass"
        )
    return weight


def evaluate(function: Callable[[], Any], weight: Union[float, Callable[[], Any]]) -> Losses:
    """Calls a loss function, and then the function that returns the weight, if it is one.

    Raises:
        TypeError: If the loss function returned something else than a loss or pairs of a loss and a weight.
        ValueError: If a loss is not a scalar, or a weight is negative or not finite.

    """
    returned = function()
    given = check_weight(weight(), "the value of weight") if callable(weight) else weight
    if not isinstance(returned, (tuple, list)):
        check_loss(returned)
        return Losses((returned,), (given,), given)
    pairs = [returned] if isinstance(returned, tuple) and not _has_sequence(returned) else returned
    if not pairs or not all(map(_is_pair, pairs)):
        _refuse(returned)
    losses, weights = zip(*pairs)
    for loss in losses:
        check_loss(loss)
    checked = tuple(check_weight(weight, "a weight that the loss function returns") for weight in weights)
    return Losses(losses, checked, given, len(losses))


def total_loss(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a loss function, and returns the sum of its losses if it returned pairs."""
    returned = function(*args, **kwargs)
    return evaluate(lambda: returned, 1.0).total() if isinstance(returned, (tuple, list)) else returned


def _has_sequence(returned: Sequence[Any]) -> bool:
    return len(returned) == 0 or any(isinstance(each, (tuple, list)) for each in returned)


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    return isinstance(pair[0], chainer.Variable) and not isinstance(pair[1], chainer.Variable)


def _refuse(returned: Sequence[Any]) -> NoReturn:
    raise TypeError(
        "the loss function must return the loss, a pair (loss, weight) whose weight is a number or an array, or a list "
        f"of such pairs, got {_describe(returned)}; report other values with chainer.report, and return the array of a "
        "Variable as the weight"
    )


def _describe(returned: object) -> str:
    if not isinstance(returned, (tuple, list)):
        return type(returned).__name__
    inner = ", ".join(map(_describe, returned))
    return f"({inner})" if isinstance(returned, tuple) else f"[{inner}]"
