"""The window: weighted backward passes, then one ``optimizer.update()``.

Each pass is what :meth:`chainer.GradientMethod.update` does with a loss function, but for two things: its gradients go
to sums of the window's own, and the optimizer waits. Until :meth:`Window.update`, neither a parameter nor the optimizer
has changed, so a window that fails is one that is dropped.
"""

from __future__ import annotations

import warnings
from typing import Any, Callable, Iterable, List, Optional

import chainer
import numpy

from chainer_accum._arguments import check_callable, check_weight
from chainer_accum._devices import device_of
from chainer_accum.batch_statistics import BatchStatistics
from chainer_accum.gradient_norms import GradientNorms
from chainer_accum.gradient_sums import GradientSums
from chainer_accum.persistent_values import PersistentValues

LOSS_REDUCTIONS = ("mean", "sum")
NONFINITE = ("keep", "skip", "raise")


class Window:
    r"""Sums the gradients of several losses and updates the parameters with them once.

    With losses that are means (the default), the gradient that reaches the optimizer is
    :math:`\sum_i w_i g_i / \sum_i w_i`, where :math:`g_i` is the gradient of the :math:`i`-th loss and :math:`w_i`
    its weight: the gradient of the mean over all examples of the window, if each weight is the number of examples
    behind the loss. With losses that are sums, it is :math:`\sum_i g_i`.

    The weights reach the gradients through the initial gradient of each loss, as the loss scale does, so no node is
    added to a graph and every intermediate value is as large as it would be with the whole window as one batch.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up with the model.
        loss_reduction (str): ``'mean'`` or ``'sum'``: what the losses are of their examples.
        expected_weight (float): What the weights are likely to add up to; by default, the first weight that is not
            zero. It sets the magnitude of the gradients on their way, not that of the result.
        nonfinite (str): What is done with a micro-batch whose loss or gradient is not finite: ``'keep'``, ``'skip'`` or
            ``'raise'``; see :func:`~chainer_accum.accumulate`.
        batch_statistics (str): When the running averages of batch normalization move: with each ``'micro_batch'`` or
            once per ``'window'``; see :func:`~chainer_accum.accumulate`.
        norms (GradientNorms): Where to put the squared norms of the gradients, or ``None`` if they are not asked for.

    Attributes:
        is_shared (bool): Whether other processes take part in the window, and wait for this one to update.
        is_repeatable (bool): Whether the passes can be run again with a new window if one of them fails.
        micro_batches (int): How many micro-batches have been added, those that were skipped among them.
        skipped_micro_batches (int): How many have been skipped, as they were not finite.
        is_open (bool): ``False`` once the window was updated or a backward pass of it failed.

    """

    is_shared = False
    is_repeatable = True

    def __init__(
        self,
        optimizer: Any,
        loss_reduction: str = "mean",
        expected_weight: Optional[float] = None,
        nonfinite: str = "keep",
        batch_statistics: str = "micro_batch",
        norms: Optional[GradientNorms] = None,
    ) -> None:
        self._optimizer = optimizer
        self._is_mean = loss_reduction == "mean"
        self._expected_weight = expected_weight
        self._nonfinite = nonfinite
        self._batch_statistics = batch_statistics
        self._norms = norms
        # Chainer has no public way to ask for the scale. It is read once: a window has one scale from end to end.
        self._loss_scale: Optional[float] = optimizer._loss_scale
        self._has_run_backward = False
        self._begin()

    def _begin(self) -> None:
        """Makes the window one to which nothing has been added."""
        self._sums = GradientSums(self._optimizer.target)
        self._statistics = BatchStatistics(is_collecting=self._batch_statistics == "window")
        if self._norms is not None:
            self._norms.clear()
        self._weight = 0.0
        self.micro_batches = 0
        self.skipped_micro_batches = 0
        self.is_open = True

    def add(self, lossfun: Callable[..., chainer.Variable], *args: Any, weight: float = 1, **kwargs: Any) -> bool:
        """Runs one forward and one backward pass.

        Nothing is kept of the pass but its gradients.

        Args:
            lossfun (callable): Loss function. It returns a scalar :class:`~chainer.Variable`.
            *args: Arguments for the loss function.
            **kwargs: Keyword arguments for the loss function.
            weight (float): What this loss counts for, zero or more. With zero, the backward pass is left out.

        Returns:
            ``False`` if the micro-batch has been skipped, as its loss or gradient is not finite; or else ``True``.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite, and that is to be raised.
            TypeError: If the loss is not a :class:`~chainer.Variable` or the weight is not a number.
            ValueError: If the loss is not a scalar or has no graph, or the weight is negative or not finite.
            RuntimeError: If the window is over: it was updated, or a backward pass of it failed.

        """
        self._check_open()
        check_callable("lossfun", lossfun, "pass a function that returns the loss, or the model")
        weight = check_weight(weight, "weight")
        persistent_values = PersistentValues([self._optimizer.target] if self._nonfinite != "keep" else [])
        with self._statistics.collecting() as statistics:
            loss = lossfun(*args, **kwargs)
        _check_loss(loss, weight)
        self.micro_batches += 1
        if weight > 0:
            finding = self._backward(loss, weight)
            if finding is not None:
                persistent_values.restore()
                self._skip(finding)
                return False
        self._statistics.add(statistics)
        return True

    def add_gradients(self, weight: float = 1) -> bool:
        """Adds the gradients that the parameters have, from a backward pass of the caller's own, and clears them.

        If the optimizer scales the loss, it is for the caller to pass the scale to ``backward()``.

        Args:
            weight (float): What the loss counts for, zero or more.

        Returns:
            ``False`` if the micro-batch has been skipped, as a gradient is not finite, and ``True`` otherwise.

        Raises:
            FloatingPointError: If a gradient is not finite, and that is to be raised.
            TypeError: If the weight is not a number.
            ValueError: If the weight is negative or not finite.
            RuntimeError: If the window is over: it was updated, or a backward pass of it failed.

        """
        self._check_open()
        weight = check_weight(weight, "weight")
        self.micro_batches += 1
        params = self._params()
        if self._checks_gradients() and weight > 0 and not _are_finite(_grads(params)):
            self._optimizer.target.cleargrads()
            self._skip("its gradient is not")
            return False
        if weight > 0:
            self._sums.take_from(params, self._scale(weight))
            self._weight += weight
        else:
            self._optimizer.target.cleargrads()
        return True

    def update(self) -> bool:
        """Hands the gradients of the window to the optimizer and updates the parameters once.

        Without any weight, the gradients are zero. But if what had a weight has been skipped, there is no update, and a
        :class:`RuntimeWarning`.

        Returns:
            Whether the optimizer was asked to update.

        Raises:
            RuntimeError: If the window is over: it was updated, or a backward pass of it failed.

        """
        self._check_open()
        self.is_open = False
        self._optimizer.target.cleargrads()
        if self._nonfinite == "skip":
            chainer.report({"skipped_micro_batches": self.skipped_micro_batches})
        if self._is_all_skipped():
            warnings.warn(
                "no update: all micro-batches of the window that have a weight were skipped, as their losses or "
                "gradients are not finite; look at the learning rate and at the data",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._statistics.update()
        correction = self._correction()
        for param, total in self._sums.take():
            with device_of(total), numpy.errstate(over="ignore"):  # an overflow is for dynamic loss scaling to find
                if correction != 1:
                    total *= correction
                param.grad = total.astype(param.dtype, copy=False)
            if self._has_run_backward:
                param._loss_scale = self._loss_scale  # where the backward pass records it for the update rule
        if self._norms is not None:
            self._norms.set_window(_grads(self._params()), (self._loss_scale or 1.0) * self._divisor_of_window())
        self._step()
        return True

    def serialize(self, serializer: Any) -> None:
        """Serializes the window with its sums, so that it can go on in another process."""
        self.micro_batches = serializer("micro_batches", self.micro_batches)
        self.skipped_micro_batches = serializer("skipped_micro_batches", self.skipped_micro_batches)
        self._weight = serializer("weight", self._weight)
        self._expected_weight = serializer("expected_weight", self._expected_weight or 0.0) or None
        self._loss_scale = serializer("loss_scale", self._loss_scale or 0.0) or None
        self._has_run_backward = serializer("has_run_backward", self._has_run_backward)
        self._sums.serialize(serializer["sums"])

    def _backward(self, loss: chainer.Variable, weight: float) -> Optional[str]:
        """Adds the gradients of a loss, or adds none and returns what is not finite, if that matters."""
        if self._nonfinite != "keep" and not _are_finite([loss.array]):
            return f"its loss is {float(loss.array)}"
        self.is_open = False
        if not self._checks_gradients() and self._norms is None:
            # This clears the gradients; not before the forward pass, in which lazy parameters are born with NaN for a
            # gradient and a loss function may run a backward pass of its own.
            with self._sums.adding():
                self._run_backward(loss, weight)
        else:
            self._optimizer.target.cleargrads()
            self._run_backward(loss, weight)
            params = self._params()
            if self._checks_gradients() and not _are_finite(_grads(params)):
                self.is_open = True
                return f"its gradient is not, and its loss is {float(loss.array)}"
            if self._norms is not None:
                scale = self._scale(weight) * (self._loss_scale or 1.0)
                self._norms.add(_grads(params), scale * self._divisor(weight), weight)
            self._sums.take_from(params)
        self.is_open = True
        self._has_run_backward = True
        self._weight += weight
        return None

    def _run_backward(self, loss: chainer.Variable, weight: float) -> None:
        scale = self._scale(weight)
        if self._loss_scale is not None:
            scale *= float(self._loss_scale)
        with device_of(loss.array):
            loss.grad = loss.xp.full_like(loss.array, scale)
        loss.backward(loss_scale=self._loss_scale)  # which records the scale, and no more, as there is a gradient

    def _checks_gradients(self) -> bool:
        # With dynamic scaling, a gradient that is not finite means a scale that is too large. The optimizer finds it in
        # the gradient of the window, skips the update and lowers the scale.
        return self._nonfinite != "keep" and not self._optimizer._loss_scaling_is_dynamic

    def _skip(self, finding: str) -> None:
        if self._nonfinite == "raise":
            raise FloatingPointError(
                f"micro-batch {self.micro_batches} of the window is not finite: {finding}; "
                "look at its data and the learning rate, or use nonfinite='skip'"
            )
        self.skipped_micro_batches += 1

    def _scale(self, weight: float) -> float:
        """Returns what a gradient of this weight is multiplied by on its way into the sum."""
        if not self._is_mean:
            return 1.0
        if self._expected_weight is None:
            self._expected_weight = weight
        return weight / self._expected_weight

    def _divisor(self, weight: float) -> float:
        """Returns what a gradient of this weight is to be divided by to be that of a mean."""
        return 1.0 if self._is_mean else weight or 1.0

    def _divisor_of_window(self) -> float:
        """Returns what the gradient that the parameters have is to be divided by to be that of a mean."""
        return self._divisor(self._weight)

    def _is_all_skipped(self) -> bool:
        return self.skipped_micro_batches > 0 and self._weight == 0

    def _params(self) -> List[chainer.Parameter]:
        return list(self._optimizer.target.params(include_uninit=False))

    def _correction(self) -> float:
        """Returns what the sums are multiplied by, now that all weights are known."""
        if self._is_mean and self._expected_weight and self._weight:
            return self._expected_weight / self._weight
        return 1.0

    def _step(self) -> None:
        """Updates the parameters with the gradients that they have."""
        self._optimizer.update()

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("this window was updated or a backward pass of it failed; begin a new window")


def _check_loss(loss: Any, weight: float) -> None:
    if not isinstance(loss, chainer.Variable):
        raise TypeError(
            f"the loss function must return a chainer.Variable, got {type(loss).__name__}; "
            "return the loss as one scalar Variable"
        )
    if loss.array is None or (loss.array.size != 1 and not _is_delegate(loss)):
        shape = None if loss.array is None else loss.shape
        raise ValueError(
            f"the loss must be a scalar, got a Variable of shape {shape}; reduce it, for example with F.mean(loss)"
        )
    if weight > 0 and loss.creator_node is None and not isinstance(loss, chainer.Parameter):
        raise ValueError(
            f"the loss has no graph, got {loss.array!r} without a creator; compute it from the parameters and with "
            "chainer.config.enable_backprop on, or give a micro-batch that has none the weight 0"
        )


def _grads(params: Iterable[chainer.Parameter]) -> List[Any]:
    return [param.grad for param in params if param.grad is not None]


def _are_finite(arrays: Iterable[Any]) -> bool:
    """Returns whether all values are finite. This waits for the device."""
    flags = []
    for array in arrays:
        with device_of(array):
            flags.append(chainer.backend.get_array_module(array).isfinite(array).all())
    return all(bool(flag) for flag in flags)


def _is_delegate(loss: chainer.Variable) -> bool:
    """Returns whether it is what ChainerMN has in the place of a loss that another process computes."""
    return loss.array.size == 0 and type(loss.creator).__module__.startswith("chainermn.")
