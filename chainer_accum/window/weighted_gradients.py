"""WeightedGradients: the weighted gradients of the losses of a window, and their total."""

from __future__ import annotations

import warnings
from typing import ContextManager, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import chainer
import numpy

from chainer_accum._devices import Array, are_finite, device_of
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.gradient_sums import GradientSums
from chainer_accum.window.loss_sums import total_of
from chainer_accum.window.losses import describe, has_graph, is_constant, run_backward
from chainer_accum.window.term_sums import TermSums
from chainer_accum.window.terms import Losses, different_kinds
from chainer_accum.window.weighting import Weights

# For gradients that are already computed, the divisor affects only the sums, whose dtype is wide.
_SLACK = 2.0**20


class WeightedGradients:
    """Sums of weighted gradients, from which the gradient of the mean or the sum of all losses is computed.

    If the loss function returns several pairs ``(loss, weight)``, there is one set of sums for each of these terms, and
    the gradient is the sum of their means.

    Args:
        target (~chainer.Link): Link whose parameters are trained.
        is_mean (bool): Whether the losses are means over their examples. Otherwise they are sums.
        expected_weight (float): The likely sum of the given weights, or ``None``.
        loss_scale (float): Loss scaling factor of all passes, or ``None``.
        norms (GradientNorms): Where to store the squared norms of the gradients, or ``None``.

    Attributes:
        weights (Weights): The weights of the passes so far, as their callers gave them.
        loss_scale (float): See the argument.
        num_pairs (int): The number of pairs that loss functions return, 0 if they return no weights, or ``None`` if it
            is not known yet.
        are_taken (bool): Whether gradients come from backward passes of the caller.

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
        self.num_pairs: Optional[int] = None  # that each loss function returns, once known
        self.are_taken = False
        self._has_only_constants = True
        self._target = target
        self._is_mean = is_mean
        self._norms = norms
        self._terms = [TermSums(target, is_mean, self.weights)]
        self._has_losses = False  # losses are scaled here; in its own backward pass, the caller does it
        self._has_losses_without_gradient = False
        self._replaced: List[Tuple[chainer.Parameter, Optional[chainer.Variable]]] = []
        if norms is not None:
            norms.clear()

    def __bool__(self) -> bool:
        """Whether a loss has a weight."""
        return any(self.term_weights)

    @property
    def term_weights(self) -> List[Weights]:
        """The weights of each term so far, by which its losses count."""
        return [term.weights for term in self._terms]

    @property
    def loss(self) -> Optional[Array]:
        """The mean or the sum of the losses so far, or ``None`` if there is none, or one that is not known."""
        return self.loss_scaled([term.correction() for term in self._terms])

    def loss_scaled(self, factors: Sequence[float]) -> Optional[Array]:
        """Returns the sum over all terms of their losses so far, each times its factor, or ``None`` as for a loss."""
        if not self._has_losses or not all(term.loss.is_known for term in self._terms):
            return None
        return total_of(term.loss.scaled(factor) for term, factor in zip(self._terms, factors))

    def add_losses(
        self, losses: Losses, is_checked: bool = False, factors: Optional[Sequence[float]] = None
    ) -> Optional[str]:
        """Runs the backward passes of the losses of a pass and adds their gradients.

        If a weight is 0 or a loss has no graph, there is no backward pass and its gradient is zero.

        Args:
            losses (Losses): The losses.
            is_checked (bool): Whether to add nothing if a gradient is not finite. This waits for the device.
            factors: The factor of each loss in the gradient of the window, if known: for all its passes or for none.

        Returns:
            ``None``, or a description of the problem if nothing was added.

        """
        if losses.num_pairs > 0 or self.num_pairs != 0:
            self._begin(losses, factors is not None)
        is_apart = is_checked or self._norms is not None
        parts = []
        for index, (loss, weight) in enumerate(zip(losses.losses, losses.weights)):
            term = self._terms[0 if factors else index]
            factor = term.make_room(weight) if weight > 0 else 0.0
            factor = factors[index] if factors else factor
            parts.append(_Part(term, loss, weight, factor, self._run(term, loss, weight, factor, is_apart)))
        for part in parts:
            if is_checked and part.gradients is not None and not are_finite(part.gradients.arrays()):
                return f"its gradient is not, and its loss is {describe(part.loss)}"
        self._has_losses = True
        for part in parts:
            self._keep(part)
        if self._terms[0].weights is not self.weights and losses.given > 0:
            self.weights.make_room(losses.given)
            self.weights.add(losses.given)
        return None

    def adding(self) -> ContextManager[None]:
        """Context manager in which further backward passes of losses that were added add their gradients."""
        return self._terms[0].gradients.adding()

    def are_finite(self) -> bool:
        """Returns whether all sums are finite. This waits for the device."""
        return are_finite(array for term in self._terms for array in term.gradients.arrays())

    def add_arrays(self, grads: Iterable[Tuple[chainer.Parameter, Array]], weight: float) -> None:
        """Adds gradients that the caller computed."""
        self._check_kind(0)
        self._has_only_constants = False
        (term,) = self._terms
        factor = term.make_room(weight, _SLACK)
        for param, grad in grads:
            term.gradients.add(param, grad, factor)
        term.weights.add(weight)
        term.loss.is_known = False

    def check_target_is_reached(self) -> None:
        """Raises RuntimeError unless a parameter of the target has a gradient.

        If all losses are constants, it only issues a :class:`RuntimeWarning`.

        """
        params = list(self._target.params())
        if any(term.gradients.arrays(params) for term in self._terms):
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

    def give(self, corrections: Optional[Sequence[float]] = None, share: float = 1.0) -> None:
        """Sets the gradients of the parameters from the sums, and removes the sums.

        Gradients of the target are replaced. Those of other parameters are added to, as in a backward pass.

        Args:
            corrections: Factor for the target's sums, for each term. By default, that of a mean or a sum of its losses.
            share (float): Factor of the gradient of the mean of these losses in the result.

        """
        if self.are_taken:  # they belong to the caller
            self._replaced = [(param, param.grad_var) for param in self._target.params(include_uninit=False)]
        self._target.cleargrads()
        own: Dict[int, chainer.Parameter] = {id(param): param for param in self._target.params()}
        for term, correction in zip(self._terms, corrections or [term.correction() for term in self._terms]):
            term.gradients.multiply(correction, own, term.correction())
        first, *others = [term.gradients for term in self._terms]
        for other in others:
            first.merge(other)
        with numpy.errstate(over="ignore", under="ignore"):
            for param, total in first.take():
                with device_of(total):
                    grad = total.astype(param.dtype, copy=False)
                    if id(param) not in own:
                        self._replaced.append((param, param.grad_var))
                    param.grad = grad if id(param) in own or param.grad is None else param.grad + grad
                if self._has_losses:
                    param._loss_scale = self.loss_scale  # as the backward pass does, for the update rule
        if self._has_losses_without_gradient:  # the backward pass of the whole batch would have recorded it
            for param in own.values():
                param._loss_scale = self.loss_scale
        if self._norms is not None:
            grads = [param.grad for param in own.values() if param.array is not None and param.grad is not None]
            weight = self._terms[0].weights.total
            self._norms.set_window(grads, (self.loss_scale or 1.0) * self._divisor(weight) * share)

    def take_back(self) -> None:
        """Clears the gradients of the target, and restores those of the caller and of other parameters."""
        self._target.cleargrads()
        for param, grad in self._replaced:
            param.grad_var = grad
        self.forget_replaced()

    def forget_replaced(self) -> None:
        """Frees the gradients that were replaced."""
        self._replaced = []

    def end(self) -> None:
        """Cleans up after an interrupted backward pass."""
        for term in self._terms:
            term.gradients.end()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sums, so that a window can continue in another process."""
        self.loss_scale = serializer("loss_scale", self.loss_scale or 0.0) or None
        self._has_losses = serializer("has_losses", self._has_losses)
        self._has_losses_without_gradient = serializer("has_zeros", self._has_losses_without_gradient)
        num_pairs = serializer("num_pairs", -1 if self.num_pairs is None else self.num_pairs)
        if isinstance(serializer, chainer.Deserializer) and num_pairs >= 0:
            self._check_kind(num_pairs)
        self.weights.serialize(serializer)
        for index, term in enumerate(self._terms):
            term.serialize(serializer[f"term_{index}"])

    def _begin(self, losses: Losses, is_exact: bool) -> None:
        """Prepares the terms for the losses of a pass."""
        if is_exact and self.num_pairs is None:
            self._terms = [TermSums(self._target, False, Weights())]
            self.num_pairs = losses.num_pairs
        self._check_kind(losses.num_pairs)
        weight = self.weights.total + losses.given
        if losses.num_pairs > 0 and not is_exact and weight > 0:
            # The sum of the returned weights is likely to grow as that of the given ones, of which more is known.
            for term, returned in zip(self._terms, losses.weights):
                term.weights.expect((term.weights.total + returned) / weight * max(self.weights.expected, weight))

    def _check_kind(self, num_pairs: int) -> None:
        """Begins with losses of this kind, or raises TypeError if those so far are of another one."""
        if self.num_pairs is None:
            if num_pairs > 0:
                self._terms = [TermSums(self._target, self._is_mean, Weights()) for _ in range(num_pairs)]
            self.num_pairs = num_pairs
        if self.num_pairs != num_pairs:
            raise different_kinds(num_pairs, self.num_pairs)
        if self._norms is not None and num_pairs > 1:
            raise ValueError(
                "gradient norms of micro-batches must not be measured if the loss function returns several pairs "
                "(loss, weight), got gradient_norm_interval or GradientNoiseScale: the losses of a micro-batch have no "
                "common weight; leave it out, or return one loss"
            )

    def _run(
        self, term: TermSums, loss: chainer.Variable, weight: float, factor: float, is_apart: bool
    ) -> Optional[GradientSums]:
        """Runs the backward pass of a loss, and returns the sums with its gradients, or ``None`` if it needs none."""
        if weight == 0 or not has_graph(loss):
            self._target.cleargrads()
            self._has_losses_without_gradient = True
            if weight > 0:
                self._has_only_constants = self._has_only_constants and is_constant(loss)
            return None
        self._has_only_constants = False
        gradients = GradientSums(self._target) if is_apart else term.gradients
        # This clears the gradients. Before the forward pass would be too early: lazy parameters are initialized in it,
        # with gradients of NaN, and a loss function may run its own backward pass.
        with gradients.adding():
            run_backward(loss, factor, self.loss_scale)
        return gradients

    def _keep(self, part: _Part) -> None:
        term, weight = part.term, part.weight
        if weight == 0:
            return
        if part.gradients is not None and part.gradients is not term.gradients:
            if self._norms is not None:
                scale = part.factor * (self.loss_scale or 1.0) * self._divisor(weight)
                self._norms.add(part.gradients.arrays(self._target.params()), scale, weight)
            term.gradients.merge(part.gradients)
        term.weights.add(weight)
        term.loss.add(part.loss, part.factor)

    def _divisor(self, weight: float) -> float:
        """Returns the number that turns a gradient of this weight into the gradient of a mean, by division."""
        return 1.0 if self._is_mean else weight or 1.0


class _Part(NamedTuple):
    """The loss of a pass for one term, and its gradients, if it has any."""

    term: TermSums
    loss: chainer.Variable
    weight: float
    factor: float
    gradients: Optional[GradientSums]
