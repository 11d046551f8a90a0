"""accumulate: a window as a context manager, for training loops of your own."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, Dict, Mapping, Optional, Tuple, Type

import chainer

from chainer_accum._arguments import check_choice, check_set_up, check_weight
from chainer_accum._signals import DeferredSignals
from chainer_accum.batch_statistics import BATCH_STATISTICS
from chainer_accum.distributed import begin_window
from chainer_accum.observations import ObservationRules, Observations
from chainer_accum.optimizer import check_not_accumulating
from chainer_accum.window import LOSS_REDUCTIONS, NONFINITE, Window


def accumulate(
    optimizer: Any,
    *,
    loss_reduction: str = "mean",
    expected_weight: Optional[float] = None,
    nonfinite: str = "keep",
    batch_statistics: str = "micro_batch",
    observation_rules: Optional[Mapping[str, str]] = None,
) -> _Block:
    """Context manager in which losses are added up, and after whose end the optimizer updates once.

    This is gradient accumulation for a training loop of your own:

    .. code-block:: python

        with accumulate(optimizer) as window:
            for x, t in micro_batches:
                window.add(model, x, t, weight=len(x))

    The step is that of ``optimizer.update(model, ...)`` with all examples at once. What is reported in the block, for
    example by the model, is reported once when it ends, merged as :class:`~chainer_accum.AccumulatingUpdater` merges
    it: scalars as means by weight. A block that raises changes neither the parameters nor the optimizer nor the
    persistent values of the model, and reports nothing. In a block that adds nothing, there is no update.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up with the model.
        loss_reduction (str): ``'mean'`` or ``'sum'``: what the losses are of their examples.
        expected_weight (float): What the weights are likely to add up to. It sets the magnitude of the gradients on
            their way, which matters in float16, not that of the result.
        nonfinite (str): What is done with a micro-batch whose loss or gradient is not finite. ``'keep'`` counts it like
            any other, as Chainer does; ``'skip'`` leaves it out, with its weight and what it did to persistent values;
            ``'raise'`` raises :class:`FloatingPointError`. The last two wait for the device in each pass, and hold a
            second set of gradients. With dynamic loss scaling, a gradient that is not finite is kept, for the optimizer
            to find and to lower the scale.
        batch_statistics (str): When the running averages of :class:`~chainer.links.BatchNormalization` move. With
            ``'micro_batch'``, each forward pass moves them, as in Chainer. With ``'window'``, the update moves them
            once, by the statistics of all that passed through the link in this window, as one forward pass would have.
            What is normalized is still normalized by the statistics of its micro-batch.

        observation_rules (dict): Maps keys such as ``'main/n_correct'`` to how the values that the passes reported
            become one, as for :class:`~chainer_accum.AccumulatingUpdater`.

    Returns:
        Context manager that yields a :class:`~chainer_accum.window.Window`.

    Raises:
        FloatingPointError: If a micro-batch is not finite and ``nonfinite`` is ``'raise'``.
        RuntimeError: If the optimizer updates within the block, or no loss of the first update depends on a parameter.
        TypeError: If the optimizer accumulates by itself.
        ValueError: If the optimizer has not been set up or an option is unknown.

    """
    check_set_up(optimizer, "optimizer")
    check_not_accumulating("optimizer", optimizer, "an accumulate block")
    check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
    check_choice("nonfinite", nonfinite, NONFINITE)
    check_choice("batch_statistics", batch_statistics, BATCH_STATISTICS)
    if expected_weight is not None and check_weight(expected_weight, "expected_weight") == 0:
        raise ValueError("expected_weight must be positive, got 0; use None if it is not known")
    rules = ObservationRules(observation_rules)
    return _Block(optimizer, (loss_reduction, expected_weight, nonfinite, batch_statistics), rules)


class _Block:
    """A window for as long as a block of code runs."""

    def __init__(self, optimizer: Any, options: Tuple[Any, ...], rules: ObservationRules) -> None:
        self._optimizer = optimizer
        self._options = options
        self._rules = rules
        self._is_entered = False

    def __enter__(self) -> Window:
        if self._is_entered:
            raise RuntimeError("a block must not be entered within itself; call accumulate again for another window")
        self._is_entered = True
        self._observations = Observations(self._rules)
        self._window = begin_window(self._optimizer, *self._options, on_added=self._merge_reports)
        self._last_weight = 1.0
        self._scope = contextlib.ExitStack()
        self._reported: Dict[str, Any] = self._scope.enter_context(self._observations.collecting())
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
            with DeferredSignals():  # the reports are to agree with the step
                window.check_open()
                if window.micro_batches > 0 or window.is_shared:
                    window.update()
                self._merge_reports(self._last_weight, True)  # what was reported after the last pass
                self._scope.close()
                chainer.report(self._observations.merged())
        except BaseException:
            window.abandon()
            raise
        finally:
            self._scope.close()
            self._is_entered = False

    def _merge_reports(self, weight: float, is_counted: bool) -> None:
        """Takes what was reported since it was called last, unless that does not count."""
        self._last_weight = weight
        if is_counted:
            self._observations.add(self._reported, weight)
        self._reported.clear()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"accumulate is a context manager and has no {name!r}, which is for its window: "
            f"with accumulate(optimizer) as window: window.{name}(...)"
        )
