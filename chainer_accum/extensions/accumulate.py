"""Accumulate: the number of accumulation steps, set and reported from a Trainer."""

from __future__ import annotations

from typing import Any, Optional

import chainer
from chainer.training import extension

from chainer_accum.schedules import Schedule, Steps
from chainer_accum.updater import AccumulatingUpdater


class Accumulate(extension.Extension):
    """Trainer extension to let the effective batch grow, and to log how large it is.

    It reports ``accumulation_steps``, the number of iterator batches in the last update, and ``effective_batch_size``,
    the number of examples, for :class:`~chainer.training.extensions.LogReport` and those that read its log. The Trainer
    needs an :class:`~chainer_accum.AccumulatingUpdater`.

    Args:
        accumulation_steps: Number of iterator batches per update, from the next one on. It is an int, a dictionary that
            maps epochs to numbers, or a function of the updater, as the argument of the updater is. If it is ``None``,
            what the updater does is reported, and nothing changed.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is not positive.

    """

    default_name = "accumulate"
    priority = extension.PRIORITY_WRITER
    trigger = 1, "iteration"

    def __init__(self, accumulation_steps: Optional[Steps] = None) -> None:
        if accumulation_steps is not None:
            Schedule(accumulation_steps)  # which checks it
        self._accumulation_steps = accumulation_steps

    def initialize(self, trainer: Any) -> None:
        """Sets the schedule of the updater."""
        if not isinstance(trainer.updater, AccumulatingUpdater):
            raise TypeError(
                f"the Trainer's updater must be able to accumulate, got {type(trainer.updater).__name__}; "
                "use chainer_accum.AccumulatingUpdater"
            )
        if self._accumulation_steps is not None:
            trainer.updater.accumulation_steps = self._accumulation_steps

    def __call__(self, trainer: Any) -> None:
        """Reports on the last update."""
        updater = trainer.updater
        observation = {"accumulation_steps": updater.accumulation_steps}
        if updater.effective_batch_size is not None:
            observation["effective_batch_size"] = updater.effective_batch_size
        chainer.report(observation)
