"""When a window has enough iterator batches: after a number of them, or when they have a number of tokens."""

from __future__ import annotations

import math
from typing import Any, Protocol

from chainer_accum.batches.cutting import as_list
from chainer_accum.batches.token_budget import LengthFunc, lengths_of


class Gathering(Protocol):
    """The iterator batches of one window.

    Attributes:
        to_come (int): How many more there will be, as far as known. With 0, the window has enough.

    """

    to_come: int

    def add(self, batch: Any) -> None:
        """Takes note of a batch."""


class NumBatches:
    """A window of a number of iterator batches."""

    def __init__(self, num_batches: int) -> None:
        self.to_come = num_batches

    def add(self, batch: Any) -> None:
        self.to_come -= 1


class NumTokens:
    """A window whose iterator batches have at least a number of tokens, without padding.

    Args:
        num_tokens (int): The number.
        length_func (callable): Function that returns the length of an example, or several, of which the longest counts.

    """

    def __init__(self, num_tokens: int, length_func: LengthFunc) -> None:
        self.to_come = num_tokens  # at most, because each batch has one or more
        self._missing = num_tokens
        self._length_func = length_func
        self._largest = 0

    def add(self, batch: Any) -> None:
        examples = as_list(batch, "to be counted by its tokens, a batch", "use accumulation_steps")
        tokens = sum(lengths_of(example, self._length_func).longest for example in examples)
        self._missing -= tokens
        self._largest = max(self._largest, tokens)
        self.to_come = max(math.ceil(self._missing / self._largest), 0)
