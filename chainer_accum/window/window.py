"""Window: several weighted backward passes, followed by one ``optimizer.update()``.

Each pass does what :meth:`chainer.GradientMethod.update` does with a loss function, with two differences: the gradients
go to the window's own sums, and the optimizer waits. Until :meth:`Window.update`, neither the parameters nor the
optimizer change, so a failed window is simply dropped.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Iterable, Optional

import chainer

from chainer_accum._arguments import check_callable, check_weight
from chainer_accum._devices import are_finite
from chainer_accum.observations import Reported
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.losses import OWN_PASS_MOVES
from chainer_accum.window.options import DEFAULTS, WindowOptions
from chainer_accum.window.pass_effects import PassEffects
from chainer_accum.window.readings import Readings
from chainer_accum.window.step import Step
from chainer_accum.window.taken_gradients import take_gradients
from chainer_accum.window.terms import Losses, ReportWeight, Weight, check_given_weight, evaluate
from chainer_accum.window.value_checks import ValueChecks
from chainer_accum.window.weighted_gradients import WeightedGradients


class Window(Readings):
    r"""Sums the gradients of several losses and updates the parameters with them once.

    With losses that are means (the default), the gradient that reaches the optimizer is
    :math:`\sum_i w_i g_i / \sum_i w_i`, where :math:`g_i` is the gradient of the :math:`i`-th loss and :math:`w_i` its
    weight. If each weight is the number of examples behind the loss, this is the gradient of the mean over all examples
    of the window. With losses that are sums, it is :math:`\sum_i g_i`. If a loss function returns several pairs of a
    loss and a weight, the gradient is the sum of such means, one for each pair.

    The weights are applied through the initial gradient of each loss, as the loss scale is. The graph gets no extra
    node, and no value is larger than with the whole window as one batch, as far as the later weights are known; see
    :class:`~chainer_accum.window.Weights`. Other parameters that a loss reaches get their gradients as well.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up with the model.
        options (~chainer_accum.window.WindowOptions): How to treat losses, values that are not finite, and running
            averages.
        expected_weight (float): The likely sum of the weights. It sets the magnitude of the gradients during
            backpropagation, but not the result.
        norms (GradientNorms): Where to store the squared norms of the gradients, or ``None`` to skip them.
        links: Links besides the target whose persistent values the passes may change. Items may be ``None``.
        undoes_passes (bool): Whether a pass that raises is undone immediately, so that the window can continue without
            it. If not, the caller abandons the window.
        looks_for_links (bool): Whether passes may call links that are not named.
        on_added (callable): Function called after each pass, with the weight of its reports and whether it counts.
        on_reported (callable): Function called with what a pass has reported and the weight of that, if the pass does
            not run in the current thread.

    Attributes:
        is_shared (bool): Whether other processes take part in the window, and wait for this one to update.
        waits (bool): Whether passes wait until :meth:`run_passes`.
        is_repeatable (bool): Whether the passes can be repeated in a new window if one of them fails.
        num_examples (int): Number of examples in the next pass, or ``None`` if unknown.
        num_micro_batches (int): Number of micro-batches added, including skipped ones.
        is_open (bool): ``False`` after the window was updated or one of its backward passes failed.
        report_weight: The weight of what the last pass has reported: a number, or a function that returns it for a
            reported value.

    """

    is_shared = False
    is_repeatable = True
    waits = False
    num_examples: Optional[int] = None

    def __init__(
        self,
        optimizer: chainer.Optimizer,
        options: WindowOptions = DEFAULTS,
        *,
        expected_weight: Optional[float] = None,
        norms: Optional[GradientNorms] = None,
        links: Iterable[Optional[chainer.Link]] = (),
        undoes_passes: bool = True,
        looks_for_links: bool = True,
        on_added: Optional[Callable[[ReportWeight, bool], None]] = None,
        on_reported: Optional[Callable[[Dict[str, Reported], ReportWeight], None]] = None,
    ) -> None:
        self._optimizer = optimizer
        self._options = options
        self._expected_weight = expected_weight
        self._norms = norms
        self._on_added = on_added
        self._on_reported = on_reported
        self._effects = PassEffects(
            optimizer.target,
            links,
            options.moves_averages_once,
            undoes_passes=undoes_passes or options.checks_values,
            looks_for_links=looks_for_links or options.checks_values,
            looks_at_functions=options.checks_values,
        )
        self._begin()

    def _begin(self) -> None:
        """Resets the window, so that it has no micro-batches."""
        # Chainer has no public way to read the scale. It is read once: a window has the same scale throughout.
        scale, target = self._optimizer._loss_scale, self._optimizer.target
        self._gradients = WeightedGradients(target, self._options.is_mean, self._expected_weight, scale, self._norms)
        self._effects.begin()
        self._step = Step(self._optimizer, self._options, self._gradients, self._effects)
        self._checks = ValueChecks(self._options, self._optimizer)
        self.num_micro_batches = 0
        self.report_weight: ReportWeight = 1.0
        self.is_open = True

    def add(self, lossfun: Callable[..., Any], *args: Any, weight: Weight = 1, **kwargs: Any) -> bool:
        """Runs one forward and one backward pass.

        Only the gradients of the pass are kept. A loss without a graph, such as a constant, has a zero gradient, and
        its weight counts.

        Args:
            lossfun (callable): Loss function. It returns a scalar :class:`~chainer.Variable`; or a pair ``(loss,
                weight)``, whose weight then counts instead of the argument; or a list of such pairs, each a mean over
                the window with its own weights. If it has an argument called ``weight``, write
                ``window.add(lambda x: model(x, weight=w), x, weight=len(x))``.
            *args: Arguments for the loss function.
            **kwargs: Keyword arguments for the loss function.
            weight: Weight of this loss, a number of 0 or more; or a function without arguments that returns it, called
                after the forward pass. With 0, there is no backward pass.

        Returns:
            ``False`` if the micro-batch was skipped because its loss or gradient is not finite, ``True`` otherwise.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite and ``nonfinite`` is ``'raise'``.
            TypeError: If the loss is not a :class:`~chainer.Variable`, a weight is not a number, or the passes of the
                window return different numbers of pairs.
            ValueError: If a loss is not a scalar, or a weight is negative or not finite.
            RuntimeError: If the window has ended, or the optimizer has updated the parameters during it.

        """
        self.check_open()
        check_callable("lossfun", lossfun, "pass a function that returns the loss, or the model")
        given = check_given_weight(weight)
        try:
            function = functools.partial(lossfun, *args, **kwargs)
            losses = self._effects.run(functools.partial(evaluate, function, given))
            self.is_open = False  # until the pass has been added
            self.num_micro_batches += 1
            finding = self._add_losses(losses)
            if finding is None:
                self._effects.keep_pass()
            else:
                self._effects.undo_pass()
        except BaseException:
            self._effects.undo_pass()
            if self._on_added is not None:
                self._on_added(self.report_weight, False)
            raise
        self.report_weight = losses.report_weight()
        return self._end_pass(finding, losses.has_weight)

    def add_gradients(self, weight: float = 1) -> bool:
        """Adds the present gradients of the parameters, from your own backward pass.

        They stay in the parameters, so that other optimizers can take them; the next backward pass that reaches a
        parameter starts without them. If the optimizer scales the loss, pass the scale to ``backward()``.

        Args:
            weight (float): Weight of the loss, a number of 0 or more.

        Returns:
            ``False`` if the micro-batch was skipped because a gradient is not finite, ``True`` otherwise.

        Raises:
            RuntimeError: If there was no backward pass.
            ValueError: If the window moves the running averages. The errors of :meth:`add` may occur as well.

        """
        self.check_open()
        weight = check_weight(weight, "weight")
        if self._effects.is_collecting:
            raise ValueError(OWN_PASS_MOVES)
        self.is_open = False  # until they have been added
        self._effects.forget_pass()
        self.num_micro_batches += 1
        self._gradients.are_taken = True
        new = take_gradients(self._step.params(), self._optimizer, self._step.is_first)
        is_counted = weight == 0 or not self._checks.look_at_gradients or are_finite(grad for _, grad in new)
        if is_counted and weight > 0:
            self._gradients.add_arrays(new, weight)
        self.report_weight = weight
        return self._end_pass(None if is_counted else "its gradient is not", weight > 0)

    def run_passes(self) -> None:
        """Completes the passes that wait for others, as :meth:`update` does."""

    def update(self) -> bool:
        """Sets the gradients of the window in the parameters and updates them once.

        If all weights are 0, the gradients are zero. If all micro-batches with a weight were skipped, there is no
        update, and a :class:`RuntimeWarning` is issued. If ``skip_update`` says so, there is none, all that the passes
        have changed is undone, and the gradients are cleared.

        Returns:
            Whether the optimizer was asked to update.

        Raises:
            RuntimeError: If the window has ended, or if no loss of the first update depends on a parameter of the
                target.

        """
        self.check_open()
        return self._complete() and self._step.take(self, self._undo_all)

    def give_gradients(self) -> None:
        """Ends the window like :meth:`update`, but only sets the gradients, and leaves the update to the caller."""
        self.check_open()
        if self._complete():
            self._step.leave()

    def abandon(self, undoes_all: bool = True) -> None:
        """Ends the window, and undoes the changes of its passes, unless it has updated the parameters.

        Args:
            undoes_all (bool): Whether to undo all passes, or only the last one.

        """
        self.is_open = False
        self._gradients.end()
        self._effects.clean_up()
        if not self.is_done and self._step.is_ahead:
            self._undo_all() if undoes_all else self._effects.undo_pass()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the window with its sums, so that it can continue in another process."""
        self.num_micro_batches = serializer("num_micro_batches", self.num_micro_batches)
        self._checks.serialize(serializer)
        self._gradients.serialize(serializer["gradients"])

    def _add_losses(self, losses: Losses) -> Optional[str]:
        """Adds the gradients of a pass, or adds nothing and returns what is not finite."""
        return self._checks.find(losses) or self._gradients.add_losses(losses, self._checks.look_at_gradients)

    def _complete(self) -> bool:
        """Sets the gradients of the window in the parameters, and returns whether there are any."""
        self.is_open = False
        if self._is_all_skipped():
            self._step.drop()
            return False
        self._step.prepare(self._give_gradients)
        return True

    def _undo_all(self) -> None:
        self._effects.undo_all()

    def _give_gradients(self) -> None:
        """Sets the gradients of the window in the parameters."""
        self._gradients.give()

    def _end_pass(self, finding: Optional[str], has_weight: bool) -> bool:
        """Reopens the window for the next pass, and returns whether this pass counts."""
        self.is_open = True
        if finding is not None:
            self._checks.skip(has_weight)
        if self._on_added is not None:
            self._on_added(self.report_weight, finding is None)
        if finding is not None:
            self._checks.raise_if_asked(self.num_micro_batches, finding, has_weight)
        return finding is None

    def _is_all_skipped(self) -> bool:
        return self._checks.has_skipped_weight and not self._gradients

    def check_open(self) -> None:
        """Raises RuntimeError if the window has ended, or if the optimizer has updated the parameters during it."""
        if not self.is_open:
            raise RuntimeError("this window was updated or one of its backward passes failed; begin a new window")
        if not self._step.is_ahead:
            self.is_open = False
            raise self._step.too_late()
