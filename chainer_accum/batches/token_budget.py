"""TokenBudget: a limit on the tokens of a pass, for examples of different lengths.

A batch of sequences is padded to its longest one. If a batch is sorted by length before it is cut, each micro-batch is
padded to a length that its own examples nearly have.
"""

from __future__ import annotations

import numbers
from typing import Any, Callable, NamedTuple, Sequence, Tuple, Union

from chainer_accum._arguments import call, check_bool, check_callable, check_int

LengthFunc = Callable[[Any], Union[int, Sequence[int]]]


class TokenBudget:
    """Limit on the tokens of a micro-batch, padding included.

    As the ``micro_batch_size`` of an updater, it sorts the examples of each iterator batch by length and packs them so
    that the longest length times the number of examples is at most ``max_tokens``. Longer examples come first. The step
    is that of the whole batch, because distributing examples does not change the gradient. Each update reports
    ``padding``, the share of positions that hold no token.

    As the ``effective_batch_size`` of an updater, it gathers iterator batches until their examples have at least
    ``max_tokens`` tokens, without padding. With several ranks, each rank gathers its share.

    .. code-block:: python

        budget = chainer_accum.TokenBudget(4096, lambda example: len(example[0]))
        updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=budget)

    Args:
        max_tokens: The largest number of tokens in a micro-batch. If an example alone is longer, the update raises
            ValueError. ``'auto'`` finds the number that makes updates fastest and fits in memory.
        length_func (callable): Function that takes an example, as the iterator returned it, and returns its length; or
            several lengths, such as those of source and target, of which the longest counts. An empty example counts as
            one token.
        across_window (bool): Whether to sort the examples of all iterator batches of an update together, rather than
            those of each iterator batch. The update then keeps all its examples in memory until it ends.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``max_tokens`` is less than 1.

    """

    def __init__(self, max_tokens: Union[int, str], length_func: LengthFunc, *, across_window: bool = False) -> None:
        if not isinstance(max_tokens, str) or max_tokens != "auto":
            max_tokens = check_int("max_tokens", max_tokens, 1, "use 'auto' to find the fastest")
        check_callable("length_func", length_func, "pass a function that returns the length of an example")
        check_bool("across_window", across_window, "use True to sort the examples of a whole update")
        self.max_tokens = max_tokens
        self.length_func = length_func
        self.across_window = across_window

    def __repr__(self) -> str:
        return f"TokenBudget({self.max_tokens!r}, {self.length_func!r}, across_window={self.across_window})"


class Lengths(NamedTuple):
    """The lengths of an example.

    Attributes:
        longest (int): The longest one, at least 1, so that every example counts.
        each (tuple of int): All of them.

    """

    longest: int
    each: Tuple[int, ...]


def lengths_of(example: Any, length_func: LengthFunc) -> Lengths:
    """Returns the lengths of an example, or raises TypeError or ValueError unless they are numbers of 0 or more."""
    value = call("length_func", length_func, example)
    values = (value,) if isinstance(value, numbers.Number) or not isinstance(value, Sequence) else tuple(value)
    remedy = "return a length, or a tuple of lengths"
    each = tuple(check_int("the value of length_func", one, 0, remedy) for one in values)
    if not each:
        raise ValueError(f"the value of length_func must have at least one length, got {value!r}; {remedy}")
    return Lengths(max(*each, 1), each)
