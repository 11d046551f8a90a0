"""Window: several weighted backward passes, followed by one ``optimizer.update()``.

Each pass does what :meth:`chainer.GradientMethod.update` does with a loss function, with two differences: the gradients
go to the window's own sums, and the optimizer waits. Until :meth:`Window.update`, neither the parameters nor the
optimizer change, so a failed window is simply dropped.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, Dict, Iterable, List, Optional

import chainer

from chainer_accum._arguments import check_callable, check_weight
from chainer_accum._devices import are_finite
from chainer_accum.observations import Reported
from chainer_accum.state import DeferredSignals
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.losses import ALL_SKIPPED, OWN_PASS_MOVES, check_loss, describe, has_updated, not_finite
from chainer_accum.window.options import DEFAULTS, WindowOptions
from chainer_accum.window.pass_effects import PassEffects
from chainer_accum.window.taken_gradients import mark_as_taken, take_gradients
from chainer_accum.window.weighted_gradients import WeightedGradients
from chainer_accum.window.weighting import Weights


class Window:
    r"""Sums the gradients of several losses and updates the parameters with them once.

    With losses that are means (the default), the gradient that reaches the optimizer is
    :math:`\sum_i w_i g_i / \sum_i w_i`, where :math:`g_i` is the gradient of the :math:`i`-th loss and :math:`w_i` its
    weight. If each weight is the number of examples behind the loss, this is the gradient of the mean over all examples
    of the window. With losses that are sums, it is :math:`\sum_i g_i`.

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
        on_added (callable): Function called after each pass, with the weight of the pass and whether it counts.
        on_reported (callable): Function called with what a pass has reported and the weight of the pass, if it does not
            run in the current thread.

    Attributes:
        is_shared (bool): Whether other processes take part in the window, and wait for this one to update.
        waits (bool): Whether passes wait until :meth:`run_passes`.
        is_repeatable (bool): Whether the passes can be repeated in a new window if one of them fails.
        num_examples (int): Number of examples in the next pass, or ``None`` if unknown.
        num_micro_batches (int): Number of micro-batches added, including skipped ones.
        num_skipped (int): Number of micro-batches skipped because they are not finite.
        is_open (bool): ``False`` after the window was updated or one of its backward passes failed.
        is_done (bool): Whether the optimizer has updated, or all micro-batches were skipped.

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
        on_added: Optional[Callable[[float, bool], None]] = None,
        on_reported: Optional[Callable[[Dict[str, Reported], float], None]] = None,
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
        self._updates = self._optimizer.t
        self._has_taken_gradients = False
        self._has_skipped_weight = False
        self.is_done = False
        self.num_micro_batches = 0
        self.num_skipped = 0
        self.is_open = True

    @property
    def links(self) -> List[chainer.Link]:
        """The links that passes have used, and those that were named."""
        return self._effects.links

    @property
    def weights(self) -> Weights:
        """The weights of the micro-batches so far, without skipped ones."""
        return self._gradients.weights

    @property
    def observation(self) -> Dict[str, int]:
        """What to report after :meth:`update`: the number of skipped micro-batches, if ``nonfinite`` is ``'skip'``."""
        is_reported = self.is_done and self._options.nonfinite == "skip"
        return {"skipped_micro_batches": self.num_skipped} if is_reported else {}

    def add(self, lossfun: Callable[..., chainer.Variable], *args: Any, weight: float = 1, **kwargs: Any) -> bool:
        """Runs one forward and one backward pass.

        Only the gradients of the pass are kept. A loss without a graph, such as a constant, has a zero gradient, and
        its weight counts.

        Args:
            lossfun (callable): Loss function. It returns a scalar :class:`~chainer.Variable`. If it has an argument
                called ``weight``, write ``window.add(lambda x: model(x, weight=w), x, weight=len(x))``.
            *args: Arguments for the loss function.
            **kwargs: Keyword arguments for the loss function.
            weight (float): Weight of this loss, a number of 0 or more. With 0, there is no backward pass.

        Returns:
            ``False`` if the micro-batch was skipped because its loss or gradient is not finite, ``True`` otherwise.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite and ``nonfinite`` is ``'raise'``.
            TypeError: If the loss is not a :class:`~chainer.Variable` or the weight is not a number.
            ValueError: If the loss is not a scalar, or the weight is negative or not finite.
            RuntimeError: If the window has ended, or the optimizer has updated the parameters during it.

        """
        self.check_open()
        check_callable("lossfun", lossfun, "pass a function that returns the loss, or the model")
        weight = check_weight(weight, "weight")
        try:
            loss = self._effects.run(functools.partial(lossfun, *args, **kwargs))
            check_loss(loss)
            self.is_open = False  # until the pass has been added
            self.num_micro_batches += 1
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
        self._has_taken_gradients = True
        new = take_gradients(self._params(), self._optimizer, self._updates == 0)
        is_counted = weight == 0 or not self._checks_gradients() or are_finite(grad for _, grad in new)
        if is_counted and weight > 0:
            self._gradients.add_arrays(new, weight)
        return self._end_pass(None if is_counted else "its gradient is not", weight)

    def run_passes(self) -> None:
        """Completes the passes that wait for others, as :meth:`update` does."""

    def update(self) -> bool:
        """Sets the gradients of the window in the parameters and updates them once.

        If all weights are 0, the gradients are zero. If all micro-batches with a weight were skipped, there is no
        update, and a :class:`RuntimeWarning` is issued.

        Returns:
            Whether the optimizer was asked to update.

        Raises:
            RuntimeError: If the window has ended, or if no loss of the first update depends on a parameter of the
                target.

        """
        self.check_open()
        self.is_open = False
        if self._updates == 0 and self.weights:
            self._gradients.check_target_is_reached()
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
        """Ends the window, and undoes the changes of its passes, unless it has updated the parameters.

        Args:
            undoes_all (bool): Whether to undo all passes, or only the last one.

        """
        self.is_open = False
        self._gradients.end()
        self._effects.clean_up()
        if not self.is_done and self._optimizer.t == self._updates:
            self._effects.undo_all() if undoes_all else self._effects.undo_pass()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the window with its sums, so that it can continue in another process."""
        self.num_micro_batches = serializer("num_micro_batches", self.num_micro_batches)
        self.num_skipped = serializer("num_skipped", self.num_skipped)
        self._gradients.serialize(serializer["gradients"])

    def _add_loss(self, loss: chainer.Variable, weight: float) -> Optional[str]:
        """Adds the gradients of a loss, or adds nothing and returns what is not finite, if values are checked."""
        if self._options.checks_values and not are_finite([loss.array]):
            return f"its loss is {describe(loss)}"
        return self._gradients.add_loss(loss, weight, self._checks_gradients())

    def _give_gradients(self) -> None:
        """Sets the gradients of the window in the parameters."""
        self._gradients.give(self._gradients.correction())

    def _checks_gradients(self) -> bool:
        # With dynamic scaling, a gradient that is not finite means that the scale is too large. The optimizer finds it
        # in the gradient of the window, skips the update and lowers the scale.
        return self._options.checks_values and not self._optimizer._loss_scaling_is_dynamic

    def _end_pass(self, finding: Optional[str], weight: float) -> bool:
        """Reopens the window for the next pass, and returns whether this pass counts."""
        self.is_open = True
        if finding is not None:
            self.num_skipped += 1
            self._has_skipped_weight = self._has_skipped_weight or weight > 0
        if self._on_added is not None:
            self._on_added(weight, finding is None)
        if finding is not None and self._options.nonfinite == "raise" and weight > 0:
            raise not_finite(self.num_micro_batches, finding)
        return finding is None

    def _is_all_skipped(self) -> bool:
        return self._has_skipped_weight and not self.weights

    def _params(self) -> List[chainer.Parameter]:
        return list({id(param): param for param in self._optimizer.target.params(include_uninit=False)}.values())

    def check_open(self) -> None:
        """Raises RuntimeError if the window has ended, or if the optimizer has updated the parameters during it."""
        if not self.is_open:
            raise RuntimeError("this window was updated or one of its backward passes failed; begin a new window")
        if self._optimizer.t != self._updates:
            self.is_open = False
            raise has_updated(self._optimizer.t - self._updates)
