"""The window: weighted backward passes, then one ``optimizer.update()``.

Each pass is what :meth:`chainer.GradientMethod.update` does with a loss function, but for two things: its gradients go
to sums of the window's own, and the optimizer waits. Until :meth:`Window.update`, neither a parameter nor the optimizer
has changed, so a window that fails is one that is dropped.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, Iterable, List, Optional

import chainer

from chainer_accum._arguments import check_callable, check_weight
from chainer_accum._devices import are_finite
from chainer_accum._losses import ALL_SKIPPED, check_loss, describe, not_finite
from chainer_accum._signals import DeferredSignals
from chainer_accum.gradient_norms import GradientNorms
from chainer_accum.pass_effects import PassEffects
from chainer_accum.taken_gradients import mark_as_taken, take_gradients
from chainer_accum.weighted_gradients import WeightedGradients
from chainer_accum.weighting import Weights

LOSS_REDUCTIONS = ("mean", "sum")
NONFINITE = ("keep", "skip", "raise")


class Window:
    r"""Sums the gradients of several losses and updates the parameters with them once.

    With losses that are means (the default), the gradient that reaches the optimizer is
    :math:`\sum_i w_i g_i / \sum_i w_i`, where :math:`g_i` is the gradient of the :math:`i`-th loss and :math:`w_i`
    its weight: the gradient of the mean over all examples of the window, if each weight is the number of examples
    behind the loss. With losses that are sums, it is :math:`\sum_i g_i`.

    The weights reach the gradients through the initial gradient of each loss, as the loss scale does. No node is added
    to a graph, and no value is larger than with the whole window as one batch, as far as the weights to come are known;
    see :class:`~chainer_accum.weighting.Weights`. Other parameters that a loss reaches get their gradient as well.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up with the model.
        loss_reduction (str): ``'mean'`` or ``'sum'``: what the losses are of their examples.
        expected_weight (float): What the weights are likely to add up to. It sets the magnitude of the gradients on
            their way, not that of the result.
        nonfinite (str): What is done with a micro-batch whose loss or gradient is not finite: ``'keep'``, ``'skip'`` or
            ``'raise'``; see :func:`~chainer_accum.accumulate`.
        batch_statistics (str): When the running averages of batch normalization move: with each ``'micro_batch'`` or
            once per ``'window'``; see :func:`~chainer_accum.accumulate`.
        norms (GradientNorms): Where to put the squared norms of the gradients, or ``None`` if they are not asked for.
        links: Links besides the target whose persistent values the passes may change, or ``None`` in the place of one.
        undoes_passes (bool): Whether a pass that raises is undone at once, so that the window can go on without it. If
            not, the caller abandons the window.
        looks_for_links (bool): Whether other links may turn up, as they are called.
        on_added (callable): Function that is called after each pass, with its weight and whether it counts.

    Attributes:
        is_shared (bool): Whether other processes take part in the window, and wait for this one to update.
        is_repeatable (bool): Whether the passes can be run again with a new window if one of them fails.
        micro_batches (int): How many micro-batches have been added, those that were skipped among them.
        skipped_micro_batches (int): How many have been skipped, as they were not finite.
        is_open (bool): ``False`` once the window was updated or a backward pass of it failed.
        is_done (bool): Whether the optimizer has updated, or all was skipped.

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
        links: Iterable[Any] = (),
        undoes_passes: bool = True,
        looks_for_links: bool = True,
        on_added: Optional[Callable[[float, bool], None]] = None,
    ) -> None:
        self._optimizer = optimizer
        self._is_mean = loss_reduction == "mean"
        self._expected_weight = expected_weight
        self._nonfinite = nonfinite
        self._norms = norms
        self._on_added = on_added
        is_keeping = nonfinite == "keep"
        self._effects = PassEffects(
            optimizer.target,
            links,
            batch_statistics,
            undoes_passes=undoes_passes or not is_keeping,
            looks_for_links=looks_for_links or not is_keeping,
            looks_at_functions=not is_keeping,
        )
        self._begin()

    def _begin(self) -> None:
        """Makes the window one to which nothing has been added."""
        # Chainer has no public way to ask for the scale. It is read once: a window has one scale from end to end.
        scale = self._optimizer._loss_scale
        self._gradients = WeightedGradients(
            self._optimizer.target, self._is_mean, self._expected_weight, scale, self._norms
        )
        self._effects.begin()
        self._updates = self._optimizer.t
        self._has_taken_gradients = False
        self._has_skipped_weight = False
        self.is_done = False
        self.micro_batches = 0
        self.skipped_micro_batches = 0
        self.is_open = True

    @property
    def links(self) -> List[chainer.Link]:
        """The links that passes have used, and those that were named."""
        return self._effects.links

    @property
    def weights(self) -> Weights:
        """The weights so far, of what has not been skipped."""
        return self._gradients.weights

    def add(self, lossfun: Callable[..., chainer.Variable], *args: Any, weight: float = 1, **kwargs: Any) -> bool:
        """Runs one forward and one backward pass.

        Nothing is kept of the pass but its gradients. A loss without a graph, such as a constant, has a gradient of
        zero, and its weight counts.

        Args:
            lossfun (callable): Loss function. It returns a scalar :class:`~chainer.Variable`. For one with
                an argument called ``weight``, write ``window.add(lambda: model(x, weight=w), weight=len(x))``.
            *args: Arguments for the loss function.
            **kwargs: Keyword arguments for the loss function.
            weight (float): What this loss counts for, zero or more. With zero, the backward pass is left out.

        Returns:
            ``False`` if the micro-batch has been skipped, as its loss or gradient is not finite; or else ``True``.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite, and that is to be raised.
            TypeError: If the loss is not a :class:`~chainer.Variable` or the weight is not a number.
            ValueError: If the loss is not a scalar, or the weight is negative or not finite.
            RuntimeError: If the window is over, or the optimizer has updated the parameters within it.

        """
        self.check_open()
        check_callable("lossfun", lossfun, "pass a function that returns the loss, or the model")
        weight = check_weight(weight, "weight")
        try:
            loss = self._effects.run(functools.partial(lossfun, *args, **kwargs))
            check_loss(loss)
            self.is_open = False  # until the pass is added
            self.micro_batches += 1
            finding = self._add_loss(loss, weight)
            if finding is None:
                self._effects.keep_pass()
            else:
                self._effects.undo_pass()
        except BaseException:
            self._effects.undo_pass()
            if self._on_added is not None:
                self._on_added(weight, False)
            raise
        return self._end_pass(finding, weight)

    def add_gradients(self, weight: float = 1) -> bool:
        """Adds the gradients that the parameters have, from a backward pass of the caller's own.

        They stay where they are, for other optimizers to take; the next backward pass that reaches a parameter begins
        with none. If the optimizer scales the loss, it is for the caller to pass the scale to ``backward()``.

        Args:
            weight (float): What the loss counts for, zero or more.

        Returns:
            ``False`` if the micro-batch has been skipped, as a gradient is not finite, and ``True`` otherwise.

        Raises:
            RuntimeError: If there was no backward pass.
            ValueError: If the window moves the running averages. There are the errors of :meth:`add` as well.

        """
        self.check_open()
        weight = check_weight(weight, "weight")
        if self._effects.is_collecting:
            raise ValueError(
                "batch_statistics must be 'micro_batch' for passes of your own, got 'window'; they have moved running "
                "averages already, so let window.add run them"
            )
        self.is_open = False  # until they are added
        self._effects.forget_pass()
        self.micro_batches += 1
        self._has_taken_gradients = True
        new = take_gradients(self._params(), self._optimizer, self._updates == 0)
        is_counted = weight == 0 or not self._checks_gradients() or are_finite(grad for _, grad in new)
        if is_counted and weight > 0:
            self._gradients.add_arrays(new, weight)
        return self._end_pass(None if is_counted else "its gradient is not", weight)

    def update(self) -> bool:
        """Hands the gradients of the window to the optimizer and updates the parameters once.

        Without any weight, the gradients are zero. But if what had a weight has been skipped, there is no update, and a
        :class:`RuntimeWarning`.

        Returns:
            Whether the optimizer was asked to update.

        Raises:
            RuntimeError: If the window is over, or if no loss of the first update depends on a parameter of the target.

        """
        self.check_open()
        self.is_open = False
        if self._updates == 0 and self.weights:
            self._gradients.check_target_is_reached()
        if self._nonfinite == "skip":
            chainer.report({"skipped_micro_batches": self.skipped_micro_batches})
        if self._is_all_skipped():
            self.is_done = True
            self._optimizer.target.cleargrads()
            warnings.warn(ALL_SKIPPED, RuntimeWarning, stacklevel=2)
            return False
        self._give_gradients()
        with DeferredSignals():
            self._effects.end()
            self._optimizer.update()
            self.is_done = True
        self._effects.let_go()
        if self._has_taken_gradients:
            for param in self._params():
                mark_as_taken(param, self._optimizer)
        return True

    def abandon(self, undoes_all: bool = True) -> None:
        """Ends the window, and puts back what its passes have changed, unless it has updated the parameters.

        Args:
            undoes_all (bool): Whether all passes are undone, or only the last.

        """
        self.is_open = False
        self._gradients.end()
        self._effects.clean_up()
        if not self.is_done and self._optimizer.t == self._updates:
            self._effects.undo_all() if undoes_all else self._effects.undo_last()

    def serialize(self, serializer: Any) -> None:
        """Serializes the window with its sums, so that it can go on in another process."""
        self.micro_batches = serializer("micro_batches", self.micro_batches)
        self.skipped_micro_batches = serializer("skipped_micro_batches", self.skipped_micro_batches)
        self._gradients.serialize(serializer["gradients"])

    def _add_loss(self, loss: chainer.Variable, weight: float) -> Optional[str]:
        """Adds the gradients of a loss, or adds none and returns what is not finite, if that matters."""
        if self._nonfinite != "keep" and not are_finite([loss.array]):
            return f"its loss is {describe(loss)}"
        return self._gradients.add_loss(loss, weight, self._checks_gradients())

    def _give_gradients(self) -> None:
        """Gives the parameters the gradients of the window."""
        self._gradients.give(self._gradients.correction())

    def _checks_gradients(self) -> bool:
        # With dynamic scaling, a gradient that is not finite means a scale that is too large. The optimizer finds it in
        # the gradient of the window, skips the update and lowers the scale.
        return self._nonfinite != "keep" and not self._optimizer._loss_scaling_is_dynamic

    def _end_pass(self, finding: Optional[str], weight: float) -> bool:
        """Opens the window for the next pass, and returns whether this one counts."""
        self.is_open = True
        if finding is not None:
            self.skipped_micro_batches += 1
            self._has_skipped_weight = self._has_skipped_weight or weight > 0
        if self._on_added is not None:
            self._on_added(weight, finding is None)
        if finding is not None and self._nonfinite == "raise" and weight > 0:
            raise not_finite(self.micro_batches, finding)
        return finding is None

    def _is_all_skipped(self) -> bool:
        return self._has_skipped_weight and not self.weights

    def _params(self) -> List[chainer.Parameter]:
        return list({id(param): param for param in self._optimizer.target.params(include_uninit=False)}.values())

    def check_open(self) -> None:
        """Raises RuntimeError if the window is over, or if the optimizer has updated the parameters within it."""
        if not self.is_open:
            raise RuntimeError("this window was updated or a backward pass of it failed; begin a new window")
        if self._optimizer.t != self._updates:
            self.is_open = False
            raise RuntimeError(
                f"the optimizer must not update within a window, got {self._optimizer.t - self._updates} updates since "
                "it began; leave out optimizer.update(), which the window calls when it ends, and other windows of it"
            )
