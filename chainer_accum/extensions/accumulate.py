"""Accumulate: a Trainer extension that sets and reports the number of accumulation steps."""

from __future__ import annotations

from typing import Optional

import chainer
from chainer.training import Trainer, extension

from chainer_accum.batches import Schedule, Steps
from chainer_accum.updater import AccumulatingUpdater


class Accumulate(extension.Extension):
    """Trainer extension that changes the effective batch size during training and reports it.

    It reports ``accumulation_steps``, the number of iterator batches in the last update, and ``effective_batch_size``,
    the number of examples in it, for example for :class:`~chainer.training.extensions.LogReport`. The Trainer needs an
    :class:`~chainer_accum.AccumulatingUpdater`.

    Args:
        accumulation_steps: Number of iterator batches per update, from the next update on: an int, a dictionary from
            epochs to numbers, or a function of the updater, as for :class:`~chainer_accum.AccumulatingUpdater`. If
            ``None``, the extension reports and changes nothing. It replaces what the updater was given, be that
            ``accumulation_steps`` or ``effective_batch_size``.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is not positive.

    """

    default_name = "accumulate"
    priority = extension.PRIORITY_WRITER
    trigger = 1, "iteration"

    def __init__(self, accumulation_steps: Optional[Steps] = None) -> None:
        self._schedule = None if accumulation_steps is None else Schedule(accumulation_steps)

    def initialize(self, trainer: Trainer) -> None:
        """Sets the schedule of the updater, if one was given."""
        if not isinstance(trainer.updater, AccumulatingUpdater):
            raise TypeError(
                f"the Trainer's updater must be able to accumulate gradients, got {type(trainer.updater).__name__}; "
                "use chainer_accum.AccumulatingUpdater"
            )
        if self._schedule is not None:
            trainer.updater.accumulation_steps = self._schedule

    def __call__(self, trainer: Trainer) -> None:
        """Reports the number of batches and examples in the last update."""
        updater: AccumulatingUpdater = trainer.updater
        observation = {"accumulation_steps": updater.accumulation_steps}
        if updater.effective_batch_size is not None:
            observation["effective_batch_size"] = updater.effective_batch_size
        chainer.report(observation)
