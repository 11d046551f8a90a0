"""accumulate: a context manager for gradient accumulation in your own training loop."""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType
from typing import Dict, Mapping, NoReturn, Optional, Type

import chainer

from chainer_accum._arguments import check_bool, check_set_up, check_weight
from chainer_accum.lockstep import StoreSpec, make_lockstep_policy
from chainer_accum.observations import ObservationRules, Observations, Reported, Rule
from chainer_accum.optimizer import check_not_accumulating
from chainer_accum.state import DeferredSignals
from chainer_accum.window import ReportWeight, SkipUpdate, Window, WindowOptions, window_class


def accumulate(
    optimizer: chainer.Optimizer,
    *,
    loss_reduction: str = "mean",
    expected_weight: Optional[float] = None,
    nonfinite: str = "keep",
    running_statistics: str = "micro_batch",
    observation_rules: Optional[Mapping[str, Rule]] = None,
    lockstep: StoreSpec = None,
    skip_update: Optional[SkipUpdate] = None,
    update: bool = True,
) -> _Block:
    """Context manager that accumulates the gradients of several losses and updates the parameters once, when it ends.

    This is gradient accumulation for a training loop of your own:

    .. code-block:: python

        with accumulate(optimizer) as window:
            for x, t in micro_batches:
                window.add(model, x, t, weight=len(x))

    The block takes the step that ``optimizer.update(model, ...)`` would take with all examples at once. What is
    reported inside the block, for example by the model, is reported once when the block ends, merged as in
    :class:`~chainer_accum.AccumulatingUpdater`: scalars as weighted means. If the block raises, the parameters, the
    optimizer and the persistent values of the model stay unchanged, and nothing is reported. A block that adds no loss
    does not update.

    If only the forward pass finds the divisor of a loss, let the loss function return ``(loss, weight)``, or let
    ``weight`` be a function without arguments, which is called after the pass. For a sum of means with different
    divisors, return a list of such pairs. ``window.loss`` is the loss of the block so far.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up with the model.
        loss_reduction (str): ``'mean'`` or ``'sum'``: whether each loss is a mean or a sum over its examples.
        expected_weight (float): The likely sum of the arguments ``weight``. It sets the magnitude of the gradients
            during backpropagation, which matters in float16, but not the result.
        nonfinite (str): What to do with a micro-batch whose loss or gradient is not finite. ``'keep'`` counts it like
            any other, as Chainer does; ``'skip'`` leaves out its gradient and its weight, and undoes its changes to
            persistent values; ``'raise'`` raises :class:`FloatingPointError`. The last two wait for the device in each
            pass, and hold a second set of gradients. With dynamic loss scaling, a gradient that is not finite is kept,
            so that the optimizer finds it and lowers the scale.
        running_statistics (str): When the running averages of :class:`~chainer.links.BatchNormalization` move. With
            ``'micro_batch'``, each forward pass moves them, as in Chainer. With ``'update'``, they move once per
            update, by the statistics of everything that passed through the link in the window, as in one forward pass
            of the whole batch. Either way, each micro-batch is normalized by its own statistics.
        lockstep: Whether the passes run in lockstep: they wait for one another wherever a layer looks at the whole
            batch, such as batch normalization, so that the step is that of the whole batch for these layers, too. The
            value says where to keep what is needed in between: ``'memory'``, ``'host'`` memory instead of a device's,
            a temporary ``'file'``, or the path of a folder for it. Passes that wait are completed when the block ends,
            and so are their reports.
        observation_rules (dict): Maps keys such as ``'main/n_correct'`` to how the values reported by the passes are
            merged: a name or a function, as for :class:`~chainer_accum.AccumulatingUpdater`. If a function raises, the
            block raises, and does not update.
        skip_update (callable): Function of the window that is called before the optimizer updates. If it returns
            ``True``, there is no update: parameters, optimizer and persistent values are as before the block, and the
            gradients are cleared. It may read ``window.gradient_norm``, the norm of the gradient before hooks;
            ``window.loss``; ``window.num_micro_batches``; and ``window.weights.total``. What the passes reported is
            dropped, and ``skipped_updates`` is reported, which is 0 or 1.
        update (bool): Whether the optimizer updates when the block ends. If ``False``, the block leaves the gradient of
            the window in the parameters, and you call ``optimizer.update()``.

    Returns:
        Context manager that yields a :class:`~chainer_accum.window.Window`.

    Raises:
        FloatingPointError: If a micro-batch is not finite and ``nonfinite`` is ``'raise'``.
        RuntimeError: If the optimizer updates inside the block, or no loss of the first update depends on a parameter;
            or if passes in lockstep do not call the same layers, or cannot be computed again.
        TypeError: If the optimizer accumulates gradients itself, or an option has the wrong type.
        ValueError: If the optimizer has not been set up, an option has an unknown value, or options contradict each
            other.

    """
    check_set_up(optimizer, "optimizer")
    check_not_accumulating("optimizer", optimizer, "an accumulate block")
    policy = make_lockstep_policy(lockstep)
    options = WindowOptions(loss_reduction, nonfinite, running_statistics, policy, skip_update).checked()
    check_bool("update", update, "use False to update with the gradients yourself")
    if not update and skip_update is not None:
        raise ValueError("skip_update must be None with update=False, got both; decide before you call the optimizer")
    if expected_weight is not None and check_weight(expected_weight, "expected_weight") == 0:
        raise ValueError("expected_weight must be positive, got 0; use None if it is not known")
    rules = ObservationRules(observation_rules)
    return _Block(optimizer, options, expected_weight, rules, update)


class _Block:
    """Context manager for one window."""

    def __init__(
        self,
        optimizer: chainer.Optimizer,
        options: WindowOptions,
        expected_weight: Optional[float],
        rules: ObservationRules,
        updates: bool,
    ) -> None:
        self._begin_window = functools.partial(
            window_class(optimizer, options), optimizer, options, expected_weight=expected_weight
        )
        self._rules = rules
        self._updates = updates
        self._is_entered = False

    def __enter__(self) -> Window:
        if self._is_entered:
            raise RuntimeError("a block must not be entered inside itself; call accumulate again for another window")
        self._is_entered = True
        self._observations = Observations(self._rules)
        self._window = self._begin_window(on_added=self._merge_reports, on_reported=self._observations.add)
        self._last_weight: ReportWeight = 1.0
        self._scope = contextlib.ExitStack()
        self._reported: Dict[str, Reported] = self._scope.enter_context(self._observations.collecting())
        return self._window

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        window = self._window
        try:
            if exc_type is not None:
                window.abandon()
                return
            window.check_open()
            window.run_passes()
            self._merge_reports(self._last_weight, True)  # what was reported after the last pass
            of_passes, of_update = self._observations.merged(), Observations()  # a rule may raise, but not later
            with DeferredSignals():  # so that the reports agree with the step
                if not self._updates:
                    window.give_gradients()
                elif window.num_micro_batches > 0 or window.is_shared:
                    window.update()
                if window.is_skipped:
                    of_passes = {}
                chainer.report(window.observation)
                of_update.add(self._reported, 1.0)
                self._scope.close()
                chainer.report({**of_passes, **of_update.merged()})
        except BaseException:
            window.abandon()
            raise
        finally:
            self._scope.close()
            self._is_entered = False

    def _merge_reports(self, weight: ReportWeight, is_counted: bool) -> None:
        """Merges what was reported since the last call, or discards it if it does not count."""
        self._last_weight = weight
        if is_counted:
            self._observations.add(self._reported, weight)
        self._reported.clear()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"accumulate returns a context manager, which has no {name!r}; use the window that it yields: "
            f"with accumulate(optimizer) as window: window.{name}(...)"
        )
