"""The gradients of a window: of each loss by its weight, then of all of them together."""

from __future__ import annotations

import warnings
from typing import Any, Dict, Iterable, Optional, Tuple

import chainer
import numpy

from chainer_accum._devices import are_finite, device_of
from chainer_accum._losses import describe, has_graph, is_constant, run_backward
from chainer_accum.gradient_norms import GradientNorms
from chainer_accum.gradient_sums import GradientSums
from chainer_accum.weighting import Weights

# For gradients that are there already, the divisor matters to nothing but the sums, which are not narrow.
_SLACK = 2.0**20


class WeightedGradients:
    """Sums of weighted gradients, which become the gradient of the mean or of the sum of all losses.

    Args:
        target (~chainer.Link): Link whose parameters are trained.
        is_mean (bool): Whether the losses are means over their examples. Otherwise they are sums.
        expected_weight (float): What the weights are likely to add up to, or ``None``.
        loss_scale (float): Loss scaling factor of all passes, or ``None``.
        norms (GradientNorms): Where to put the squared norms of the gradients, or ``None``.

    Attributes:
        weights (Weights): The weights of the gradients so far.
        loss_scale (float): See the argument.

    """

    def __init__(
        self,
        target: chainer.Link,
        is_mean: bool,
        expected_weight: Optional[float] = None,
        loss_scale: Optional[float] = None,
        norms: Optional[GradientNorms] = None,
    ) -> None:
        self.weights = Weights(expected_weight)
        self.loss_scale = loss_scale
        self._has_only_constants = True
        self._target = target
        self._is_mean = is_mean
        self._norms = norms
        self._sums = GradientSums(target)
        self._has_losses = False  # whose gradients are scaled; for its own backward pass, the caller sees to that
        self._has_losses_without_gradient = False
        if norms is not None:
            norms.clear()

    def add_loss(self, loss: chainer.Variable, weight: float, is_checked: bool = False) -> Optional[str]:
        """Runs the backward pass of a loss and adds its gradients.

        With a weight of zero, or without a graph, there is no backward pass and the gradient is zero.

        Args:
            loss (~chainer.Variable): Loss.
            weight (float): What it counts for.
            is_checked (bool): Whether nothing is added if the gradient is not finite. This waits for the device.

        Returns:
            ``None``, or what is wrong with the gradient, if nothing was added.

        """
        self._has_losses = True
        if weight == 0 or not has_graph(loss):
            self._target.cleargrads()
            self._has_losses_without_gradient = True
            if weight > 0:
                self._has_only_constants = self._has_only_constants and is_constant(loss)
                self._make_room(weight)
                self.weights.add(weight)
            return None
        self._has_only_constants = False
        factor = self._make_room(weight)
        is_apart = is_checked or self._norms is not None
        sums = GradientSums(self._target) if is_apart else self._sums
        # This clears the gradients; not before the forward pass, in which lazy parameters are born with NaN for a
        # gradient and a loss function may run a backward pass of its own.
        with sums.adding():
            run_backward(loss, factor, self.loss_scale)
        if is_apart:
            if is_checked and not are_finite(sums.arrays()):
                return f"its gradient is not, and its loss is {describe(loss)}"
            if self._norms is not None:
                scale = factor * (self.loss_scale or 1.0) * self._divisor(weight)
                self._norms.add(sums.arrays(self._target.params()), scale, weight)
            self._sums.merge(sums)
        self.weights.add(weight)
        return None

    def add_arrays(self, grads: Iterable[Tuple[chainer.Parameter, Any]], weight: float) -> None:
        """Adds gradients that the caller has computed."""
        self._has_only_constants = False
        factor = self._make_room(weight, _SLACK)
        for param, grad in grads:
            self._sums.add(param, grad, factor)
        self.weights.add(weight)

    def check_target_is_reached(self) -> None:
        """Raises RuntimeError unless a parameter of the target has had a gradient; for constants, it only warns."""
        if self._sums.arrays(self._target.params()):
            return
        target = type(self._target).__name__
        if not self._has_only_constants:
            raise RuntimeError(
                f"a loss must depend on the parameters of the optimizer's target, got none that depends on {target}; "
                "compute it from the output of that model, with chainer.config.enable_backprop on, and run the "
                "backward pass if that is left to you"
            )
        warnings.warn(
            f"all losses of the first update are constants: no parameter of {target} gets a gradient; if that is not "
            "due to the data, compute the loss from the parameters",
            RuntimeWarning,
            stacklevel=4,
        )

    def correction(self) -> float:
        """Returns what the sums are to be multiplied by, now that all weights are known."""
        return self.weights.correction() if self._is_mean else 1.0

    def give(self, correction: float, share: float = 1.0) -> None:
        """Gives the parameters their gradients, and forgets the sums.

        Those of the target are replaced. Those of other parameters are added to, as a backward pass would.

        Args:
            correction (float): What the sums of the target are multiplied by.
            share (float): What the gradient of the mean of these losses is multiplied by in the result.

        """
        self._target.cleargrads()
        own: Dict[int, chainer.Parameter] = {id(param): param for param in self._target.params()}
        own_correction = self.correction()
        for param, total in self._sums.take():
            is_own = id(param) in own
            factor = correction if is_own else own_correction
            # An overflow is for dynamic loss scaling to find.
            with device_of(total), numpy.errstate(over="ignore", under="ignore"):
                if factor != 1:
                    total *= factor
                grad = total.astype(param.dtype, copy=False)
                param.grad = grad if is_own or param.grad is None else param.grad + grad
            if self._has_losses:
                param._loss_scale = self.loss_scale  # where the backward pass records it for the update rule
        if self._has_losses_without_gradient:  # with the whole batch, the backward pass would have been there as well
            for param in own.values():
                param._loss_scale = self.loss_scale
        if self._norms is not None:
            grads = [param.grad for param in own.values() if param.array is not None and param.grad is not None]
            self._norms.set_window(grads, (self.loss_scale or 1.0) * self._divisor(self.weights.total) * share)

    def end(self) -> None:
        """Takes away what an interrupted backward pass has left."""
        self._sums.end()

    def serialize(self, serializer: Any) -> None:
        """Serializes the sums, so that they can grow in another process."""
        self.loss_scale = serializer("loss_scale", self.loss_scale or 0.0) or None
        self._has_losses = serializer("has_losses", self._has_losses)
        self._has_losses_without_gradient = serializer("has_zeros", self._has_losses_without_gradient)
        self.weights.serialize(serializer)
        self._sums.serialize(serializer["sums"])

    def _make_room(self, weight: float, slack: float = 1.0) -> float:
        """Returns what a gradient of this weight is multiplied by on its way into the sums, for which it makes room."""
        shrinkage = self.weights.make_room(weight, slack)
        if not self._is_mean:
            return 1.0
        if shrinkage != 1:
            self._sums.multiply(shrinkage)
        return self.weights.factor(weight)

    def _divisor(self, weight: float) -> float:
        """Returns what a gradient of this weight is to be divided by to be that of a mean."""
        return 1.0 if self._is_mean else weight or 1.0
