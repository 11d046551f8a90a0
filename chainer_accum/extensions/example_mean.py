"""ExampleMean: a Trainer extension that reports the mean of a value over the examples of an epoch."""

from __future__ import annotations

import warnings
from typing import Optional

import chainer
import numpy
from chainer.training import Trainer, extension
from chainer.training import trigger as trigger_module

from chainer_accum._trainer import Trigger
from chainer_accum.observations import (
    Reported,
    device_of_either,
    is_not_zero,
    is_numeric,
    value_and_weight,
    where,
    widened,
)
from chainer_accum.updater import AccumulatingUpdater


class ExampleMean(extension.Extension):
    """Trainer extension that reports the mean of an observed value over examples, not over updates.

    :class:`~chainer.training.extensions.LogReport` averages over updates. It gives every update the same weight, even
    if the effective batches differ in size: because the end of an epoch or of the data cut one short, or because a
    schedule changed the size. This extension weights each update by its number of examples instead. The Trainer needs
    an :class:`~chainer_accum.AccumulatingUpdater`, and the iterator must return lists of examples, so that they can be
    counted. A value reported with a weight of its own, as ``(value, weight)``, is weighted by that. A value of weight 0
    is left out, even if it is NaN.

    Args:
        key (str): Key of the observed value, such as ``'main/loss'``. The value is a number or an array of one element.
        result_key (str): Key of the mean. By default, ``key`` followed by ``'/example_mean'``.
        trigger: Trigger that decides when to report the mean and start a new one. By default, once per epoch.

    Raises:
        TypeError: If ``key`` is not a string.

    """

    priority = extension.PRIORITY_EDITOR

    def __init__(self, key: str, result_key: Optional[str] = None, trigger: Trigger = (1, "epoch")) -> None:
        if not isinstance(key, str):
            raise TypeError(f"key must be a str, got {key!r}; give the key of an observed value, such as 'main/loss'")
        self.name = f"example_mean:{key}"
        self._key = key
        self._result_key = f"{key}/example_mean" if result_key is None else result_key
        self._trigger = trigger_module.get_trigger(trigger)
        self._summary = chainer.reporter.Summary()

    def initialize(self, trainer: Trainer) -> None:
        """Raises TypeError if the updater does not count examples."""
        if not isinstance(trainer.updater, AccumulatingUpdater):
            raise TypeError(
                f"the Trainer's updater must count examples, got {type(trainer.updater).__name__}; "
                "use chainer_accum.AccumulatingUpdater"
            )

    def __call__(self, trainer: Trainer) -> None:
        """Adds the value of the last update, and reports the mean when the trigger fires."""
        if self._key in trainer.observation:
            self._add(trainer.observation[self._key], trainer.updater.effective_batch_size)
        if self._trigger(trainer):
            try:
                chainer.report({self._result_key: self._summary.compute_mean()})
            except ZeroDivisionError:
                reason = "all its weights were 0"
                if self._key not in trainer.observation:
                    reason = f"it was not observed; use one of {', '.join(map(repr, sorted(trainer.observation)))}"
                warnings.warn(f"no mean of {self._key!r}, because {reason}", RuntimeWarning, stacklevel=2)
            self._summary = chainer.reporter.Summary()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sums and the trigger."""
        if not isinstance(serializer, chainer.Serializer):
            self._summary = chainer.reporter.Summary()  # a summary that is already in float32 cannot load float64 sums
        self._summary.serialize(serializer["summary"])
        if hasattr(self._trigger, "serialize"):
            self._trigger.serialize(serializer["trigger"])

    def _add(self, reported: Reported, examples: Optional[int]) -> None:
        value, weight = value_and_weight(reported)
        if not is_numeric(value) or getattr(value, "size", 1) != 1:
            raise ValueError(
                f"{self._key!r} must be a number or an array of one element, got {value!r}; "
                "report a mean over the examples"
            )
        if weight is None and examples is None:
            raise ValueError(
                "effective_batch_size must be known, got None; let the iterator return lists of examples, or report "
                "the value with its weight"
            )
        weight = examples if weight is None else widened(weight, numpy.float64)
        is_counted = is_not_zero(weight)
        if is_counted is False:
            return
        with device_of_either(value, weight):
            value = widened(value, numpy.float64)
            value = value.reshape(()) if hasattr(value, "reshape") else value
            self._summary.add(where(is_counted, value), weight)
