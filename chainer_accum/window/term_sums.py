"""TermSums: the weighted gradients of one term of the losses of a window."""

from __future__ import annotations

import chainer

from chainer_accum.window.gradient_sums import GradientSums
from chainer_accum.window.loss_sums import LossSum
from chainer_accum.window.weighting import Weights


class TermSums:
    """What the passes add up for one term: weights, gradients and losses.

    Args:
        target (~chainer.Link): Link whose parameters are trained.
        is_mean (bool): Whether the losses are means over their examples. Otherwise they are sums.
        weights (Weights): The weights of the term.

    Attributes:
        weights (Weights): See the argument.
        gradients (GradientSums): The sums of the gradients, each times the factor of its pass.
        loss (LossSum): The sum of the losses, each times the same factor.

    """

    def __init__(self, target: chainer.Link, is_mean: bool, weights: Weights) -> None:
        self.weights = weights
        self.gradients = GradientSums(target)
        self.loss = LossSum()
        self._is_mean = is_mean

    def make_room(self, weight: float, slack: float = 1.0) -> float:
        """Makes room in the sums for a loss of this weight, and returns the factor with which it is added."""
        shrinkage = self.weights.make_room(weight, slack)
        if not self._is_mean:
            return 1.0
        if shrinkage != 1:
            self.gradients.multiply(shrinkage)
            self.loss.multiply(shrinkage)
        return self.weights.factor(weight)

    def correction(self) -> float:
        """Returns the factor for the sums, now that all weights are known."""
        return self.weights.correction() if self._is_mean else 1.0

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sums and the weights."""
        self.weights.serialize(serializer)
        self.gradients.serialize(serializer["sums"])
        self.loss.serialize(serializer["loss"])
