"""WeightedGradients: the weighted gradients of the losses of a window, and their total."""

from __future__ import annotations

import warnings
from typing import ContextManager, Dict, Iterable, Optional, Tuple

import chainer
import numpy

from chainer_accum._devices import Array, are_finite, device_of
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.gradient_sums import GradientSums
from chainer_accum.window.losses import describe, has_graph, is_constant, run_backward
from chainer_accum.window.weighting import Weights

# For gradients that are already computed, the divisor affects only the sums, whose dtype is wide.
_SLACK = 2.0**20


class WeightedGradients:
    """Sums of weighted gradients, from which the gradient of the mean or the sum of all losses is computed.

    Args:
        target (~chainer.Link): Link whose parameters are trained.
        is_mean (bool): Whether the losses are means over their examples. Otherwise they are sums.
        expected_weight (float): The likely sum of the weights, or ``None``.
        loss_scale (float): Loss scaling factor of all passes, or ``None``.
        norms (GradientNorms): Where to store the squared norms of the gradients, or ``None``.

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
        self._has_losses = False  # losses are scaled here; in its own backward pass, the caller does it
        self._has_losses_without_gradient = False
        if norms is not None:
            norms.clear()

    def add_loss(self, loss: chainer.Variable, weight: float, is_checked: bool = False) -> Optional[str]:
        """Runs the backward pass of a loss and adds its gradients.

        If the weight is 0 or the loss has no graph, there is no backward pass and the gradient is zero.

        Args:
            loss (~chainer.Variable): Loss.
            weight (float): Weight of the loss.
            is_checked (bool): Whether to add nothing if the gradient is not finite. This waits for the device.

        Returns:
            ``None``, or a description of the problem if nothing was added.

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
        # This clears the gradients. Before the forward pass would be too early: lazy parameters are initialized in it,
        # with gradients of NaN, and a loss function may run its own backward pass.
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

    def adding(self) -> ContextManager[None]:
        """Context manager in which further backward passes of losses that were added add their gradients."""
        return self._sums.adding()

    def are_finite(self) -> bool:
        """Returns whether all sums are finite. This waits for the device."""
        return are_finite(self._sums.arrays())

    def add_arrays(self, grads: Iterable[Tuple[chainer.Parameter, Array]], weight: float) -> None:
        """Adds gradients that the caller computed."""
        self._has_only_constants = False
        factor = self._make_room(weight, _SLACK)
        for param, grad in grads:
            self._sums.add(param, grad, factor)
        self.weights.add(weight)

    def check_target_is_reached(self) -> None:
        """Raises RuntimeError unless a parameter of the target has a gradient.

        If all losses are constants, it only issues a :class:`RuntimeWarning`.

        """
        if self._sums.arrays(self._target.params()):
            return
        target = type(self._target).__name__
        if not self._has_only_constants:
            raise RuntimeError(
                f"a loss must depend on the parameters of the optimizer's target, got none that depends on {target}; "
                "compute it from the output of that model, with chainer.config.enable_backprop on, and run the "
                "backward pass if your own code must do so"
            )
        warnings.warn(
            f"all losses of the first update are constants: no parameter of {target} gets a gradient; if the data "
            "is not the reason, compute the loss from the parameters",
            RuntimeWarning,
            stacklevel=4,
        )

    def correction(self) -> float:
        """Returns the factor for the sums, now that all weights are known."""
        return self.weights.correction() if self._is_mean else 1.0

    def give(self, correction: float, share: float = 1.0) -> None:
        """Sets the gradients of the parameters from the sums, and removes the sums.

        Gradients of the target are replaced. Those of other parameters are added to, as in a backward pass.

        Args:
            correction (float): Factor for the sums of the target.
            share (float): Factor of the gradient of the mean of these losses in the result.

        """
        self._target.cleargrads()
        own: Dict[int, chainer.Parameter] = {id(param): param for param in self._target.params()}
        own_correction = self.correction()
        for param, total in self._sums.take():
            is_own = id(param) in own
            factor = correction if is_own else own_correction
            # Dynamic loss scaling finds an overflow later.
            with device_of(total), numpy.errstate(over="ignore", under="ignore"):
                if factor != 1:
                    total *= factor
                grad = total.astype(param.dtype, copy=False)
                param.grad = grad if is_own or param.grad is None else param.grad + grad
            if self._has_losses:
                param._loss_scale = self.loss_scale  # as the backward pass does, for the update rule
        if self._has_losses_without_gradient:  # the backward pass of the whole batch would have recorded it
            for param in own.values():
                param._loss_scale = self.loss_scale
        if self._norms is not None:
            grads = [param.grad for param in own.values() if param.array is not None and param.grad is not None]
            self._norms.set_window(grads, (self.loss_scale or 1.0) * self._divisor(self.weights.total) * share)

    def end(self) -> None:
        """Cleans up after an interrupted backward pass."""
        self._sums.end()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sums, so that a window can continue in another process."""
        self.loss_scale = serializer("loss_scale", self.loss_scale or 0.0) or None
        self._has_losses = serializer("has_losses", self._has_losses)
        self._has_losses_without_gradient = serializer("has_zeros", self._has_losses_without_gradient)
        self.weights.serialize(serializer)
        self._sums.serialize(serializer["sums"])

    def _make_room(self, weight: float, slack: float = 1.0) -> float:
        """Makes room in the sums for a gradient of this weight, and returns the factor with which it is added."""
        shrinkage = self.weights.make_room(weight, slack)
        if not self._is_mean:
            return 1.0
        if shrinkage != 1:
            self._sums.multiply(shrinkage)
        return self.weights.factor(weight)

    def _divisor(self, weight: float) -> float:
        """Returns the number that turns a gradient of this weight into the gradient of a mean, by division."""
        return 1.0 if self._is_mean else weight or 1.0
