"""The weights of a window, and the factor with which each pass enters its sums.

The gradient of a window of means is the sum of all weights times gradients, divided by the sum of all weights, which is
known only in the end. Until then a divisor stands in for it. A factor is never larger than it would be in the whole
batch as far as that is known, so that no gradient overflows that would not overflow there: the divisor grows with the
weights that arrive, by powers of two, and the sums shrink by the same powers, which rounds nothing.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Optional

# How many times the weight so far the divisor may be. An expectation that is far too large must not make the gradients
# vanish.
_MOST_AHEAD = 2.0**40

_LARGEST_EXPONENT = 1023  # of a power of two, with some room for a sum


class Weights:
    """The sum of the weights of a window, and the divisor of its passes.

    Args:
        expected (float): What the weights are likely to add up to, or ``None`` if that is not known. The divisor is
            that, or else the first weight, times a power of two.

    Attributes:
        total (float): The sum of the weights so far. It may be infinite.
        largest (float): The largest weight so far.
        divisor (float): What each weight is divided by, or 0 before the first.

    """

    def __init__(self, expected: Optional[float] = None) -> None:
        self.total = 0.0
        self.largest = 0.0
        self._base = expected or 0.0
        self._expected = 0.0
        self.divisor = 0.0
        self._share = 0.0  # the sum of the weights, each divided by the divisor: finite where the total is not

    def __bool__(self) -> bool:
        return self.total > 0

    def expect(self, total: float) -> None:
        """Takes note that the weights are likely to add up to ``total`` or more."""
        self._expected = max(self._expected, total)

    def make_room(self, weight: float, slack: float = 1.0) -> float:
        """Lets the divisor grow for another weight, and returns by what the sums are to be multiplied.

        Args:
            weight (float): The weight.
            slack (float): How many times the divisor the weights may add up to before it grows.

        """
        so_far = min(self.total + weight, sys.float_info.max)
        needed = min(max(so_far, min(self._expected, so_far * _MOST_AHEAD)), sys.float_info.max)
        if self.divisor == 0:
            self.divisor = min(self._base, so_far * _MOST_AHEAD) or weight
        if needed <= self.divisor * slack:
            return 1.0
        mantissa, exponent = math.frexp(self.divisor)
        needed_mantissa, needed_exponent = math.frexp(needed)
        doublings = needed_exponent - exponent + (needed_mantissa > mantissa)
        doublings = max(min(doublings, _LARGEST_EXPONENT - exponent), 0)
        self.divisor = math.ldexp(self.divisor, doublings)
        shrinkage = math.ldexp(1.0, -doublings)
        self._share *= shrinkage
        return shrinkage

    def factor(self, weight: float) -> float:
        """Returns what the gradient of a pass of this weight is multiplied by, once there is room for it."""
        return weight / self.divisor

    def add(self, weight: float) -> None:
        """Adds the weight of a pass."""
        self.total += weight
        self.largest = max(self.largest, weight)
        self._share += weight / self.divisor

    def correction(self) -> float:
        """Returns what the sums are to be multiplied by in the end."""
        if not self:
            return 1.0
        return self.divisor / self.total if math.isfinite(self.total) else 1.0 / self._share

    def serialize(self, serializer: Any) -> None:
        """Serializes the sum and the divisor."""
        self.total = serializer("weight", self.total)
        self._base = serializer("base", self._base)
        self._expected = serializer("expected_weight", self._expected)
        self.divisor = serializer("divisor", self.divisor)
        self._share = serializer("share", self._share)
