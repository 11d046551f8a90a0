"""Weights: the weights of a window, and the factor with which each gradient enters the sums.

The gradient of a window of mean losses is the weighted sum of the gradients, divided by the sum of all weights, which
is known only at the end. Until then, a divisor takes its place. The factor of a gradient must not exceed its factor in
the whole batch, as far as known, so that no gradient overflows that would not overflow there. So the divisor grows with
the weights that arrive, by powers of two, and the sums shrink by the same powers, which causes no rounding.
"""

from __future__ import annotations

import math
import sys
from typing import Optional

import chainer

# The largest ratio of the divisor to the weight so far. An expected weight that is far too large must not make the
# gradients vanish.
_MOST_AHEAD = 2.0**40

_LARGEST_EXPONENT = 1023  # of a power of two that leaves room for a sum


class Weights:
    """The sum of the weights of a window, and the divisor of its passes.

    Args:
        expected (float): The likely sum of the weights, or ``None`` if unknown. The divisor is this number, or else the
            first weight, times a power of two.

    Attributes:
        total (float): The sum of the weights so far. It may be infinite.
        largest (float): The largest weight so far.
        divisor (float): The number by which each weight is divided, or 0 before the first weight.

    """

    def __init__(self, expected: Optional[float] = None) -> None:
        self.total = 0.0
        self.largest = 0.0
        self._base = expected or 0.0
        self._expected = 0.0
        self.divisor = 0.0
        self._share = 0.0  # the sum of the weights divided by the divisor: finite even if the total is not

    def __bool__(self) -> bool:
        return self.total > 0

    @property
    def expected(self) -> float:
        """The likely sum of the weights, or 0 if nothing is known."""
        return max(self._base, self._expected)

    def expect(self, total: float) -> None:
        """Tells the window that the weights are likely to add up to ``total`` or more."""
        self._expected = max(self._expected, total)

    def make_room(self, weight: float, slack: float = 1.0) -> float:
        """Increases the divisor for another weight if needed, and returns the factor for the sums.

        Args:
            weight (float): The weight.
            slack (float): The multiple of the divisor that the total weight may reach before the divisor grows.

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
        """Returns the factor for the gradient of a pass of this weight. Call :meth:`make_room` first."""
        return weight / self.divisor

    def add(self, weight: float) -> None:
        """Adds the weight of a pass."""
        self.total += weight
        self.largest = max(self.largest, weight)
        self._share += weight / self.divisor

    def correction(self) -> float:
        """Returns the final factor for the sums."""
        if not self:
            return 1.0
        return self.divisor / self.total if math.isfinite(self.total) else 1.0 / self._share

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sum and the divisor."""
        self.total = serializer("weight", self.total)
        self._base = serializer("base", self._base)
        self._expected = serializer("expected_weight", self._expected)
        self.divisor = serializer("divisor", self.divisor)
        self._share = serializer("share", self._share)
