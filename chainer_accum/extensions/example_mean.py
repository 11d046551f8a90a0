"""ExampleMean: the mean of a value over all examples of an epoch."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import chainer
import numpy
from chainer.training import extension
from chainer.training import trigger as trigger_module

from chainer_accum.reports import device_of_either, is_not_zero, is_numeric, value_and_weight, where, widened
from chainer_accum.updater import AccumulatingUpdater


class ExampleMean(extension.Extension):
    """Trainer extension to report the mean of an observed value over examples rather than over updates.

    :class:`~chainer.training.extensions.LogReport` averages over updates, in which an effective batch that the end of
    an epoch or of the data cut short counts as much as a whole one, and a small one early in a schedule as much as a
    large one later. This mean is weighted by the examples of each update. The Trainer needs an
    :class:`~chainer_accum.AccumulatingUpdater` that counts them: see its attribute ``effective_batch_size``. A value
    that is reported with a weight of its own, as ``(value, weight)``, is weighted by that instead. A value whose weight
    is zero is left out, even if it is NaN.

    Args:
        key (str): Key of the observed value, such as ``'main/loss'``. It is a number, or an array of one element.
        result_key (str): Key of the mean. By default, ``key`` and ``'/example_mean'``.
        trigger: Trigger that decides when to report the mean, and to begin anew. By default, once per epoch.

    Raises:
        TypeError: If the key is not a string.

    """

    priority = extension.PRIORITY_EDITOR

    def __init__(self, key: str, result_key: Optional[str] = None, trigger: Any = (1, "epoch")) -> None:
        if not isinstance(key, str):
            raise TypeError(f"key must be a str, got {key!r}; give the key of an observed value, such as 'main/loss'")
        self.name = f"example_mean:{key}"
        self._key = key
        self._result_key = f"{key}/example_mean" if result_key is None else result_key
        self._trigger = trigger_module.get_trigger(trigger)
        self._summary = chainer.reporter.Summary()

    def initialize(self, trainer: Any) -> None:
        """Checks that the updater counts examples."""
        if not isinstance(trainer.updater, AccumulatingUpdater):
            raise TypeError(
                f"the Trainer's updater must count examples, got {type(trainer.updater).__name__}; "
                "use chainer_accum.AccumulatingUpdater"
            )

    def __call__(self, trainer: Any) -> None:
        """Adds the value of the last update, and reports the mean if it is time."""
        if self._key in trainer.observation:
            self._add(trainer.observation[self._key], trainer.updater.effective_batch_size)
        if self._trigger(trainer):
            try:
                chainer.report({self._result_key: self._summary.compute_mean()})
            except ZeroDivisionError:
                reason = "all its weights were 0"
                if self._key not in trainer.observation:
                    reason = f"it was not observed; observed are {', '.join(map(repr, sorted(trainer.observation)))}"
                warnings.warn(f"no mean of {self._key!r}, as {reason}", RuntimeWarning, stacklevel=2)
            self._summary = chainer.reporter.Summary()

    def serialize(self, serializer: Any) -> None:
        """Serializes the sums and the trigger."""
        if not isinstance(serializer, chainer.Serializer):
            self._summary = chainer.reporter.Summary()  # one in float32 would refuse sums in float64
        self._summary.serialize(serializer["summary"])
        if hasattr(self._trigger, "serialize"):
            self._trigger.serialize(serializer["trigger"])

    def _add(self, reported: Any, examples: Optional[int]) -> None:
        value, weight = value_and_weight(reported)
        if not is_numeric(value) or getattr(value, "size", 1) != 1:
            raise ValueError(
                f"{self._key!r} must be a number or an array of one element, got {value!r}; "
                "report a mean over the examples"
            )
        if weight is None and examples is None:
            raise ValueError(
                "effective_batch_size must be known, got None; let the iterator return lists, and for single "
                "batches give the updater accumulation_steps={0: 1}"
            )
        weight = examples if weight is None else widened(weight, numpy.float64)
        is_counted = is_not_zero(weight)
        if is_counted is False:
            return
        with device_of_either(value, weight):
            value = widened(value, numpy.float64)
            value = value.reshape(()) if hasattr(value, "reshape") else value
            self._summary.add(where(is_counted, value), weight)
