"""GradientNoiseScale: how large a batch is worth its cost."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Optional, Tuple

import chainer
from chainer.training import extension

from chainer_accum._arguments import check_int, check_real
from chainer_accum._devices import device_of
from chainer_accum.cached_gradients import CachedGradientUpdater
from chainer_accum.gradient_norms import GradientNorms
from chainer_accum.updater import AccumulatingUpdater


class GradientNoiseScale(extension.Extension):
    r"""Trainer extension to estimate the critical batch size, from the gradients of the micro-batches.

    The noise scale is the trace of the covariance of the gradients of single examples, :math:`S`, over the squared norm
    of the true gradient, :math:`|G|^2`. With batches much smaller than that, twice the batch makes almost twice the
    progress per update; with much larger ones, it makes hardly more. With the gradients :math:`g_i` of :math:`n`
    micro-batches of :math:`b_i` examples, and :math:`g` of all :math:`B` of them, these are estimated without bias by

    .. math::

        S = \frac{\frac1n \sum_i |g_i|^2 - |g|^2}{\frac1n \sum_i \frac1{b_i} - \frac1B}, \qquad
        |G|^2 = |g|^2 - \frac SB.

    Both are noisy, so each is smoothed over updates by an exponential mean before the ratio is taken.

    It reports ``noise_scale``, in examples or whatever else the micro-batches are weighted by, and
    ``suggested_accumulation_steps``, with which an effective batch would be as large. It reports nothing as long as no
    update had two micro-batches, or the estimate of :math:`|G|^2` is not positive. The Trainer needs an
    :class:`~chainer_accum.AccumulatingUpdater`.

    Gradients are looked at before the hooks of the optimizer, and without the loss scale. An update in which they are
    looked at holds a second set of gradients.

    Source: McCandlish et al. 2018, `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_,
    appendix A.

    Args:
        interval (int): Each so many updates, gradients are looked at. In between, there is no cost.
        smoothing (float): What an exponential mean keeps of its last value, from 0 to less than 1.
        adapt_up_to (int): If it is given, :attr:`~chainer_accum.AccumulatingUpdater.accumulation_steps` is set to what
            is suggested as long as that is more than an update takes, up to this number, and to twice as many at a
            time. An update that the end of an epoch or of the data cut short does not count. It should be 2 or more
            from the start: from a single micro-batch, nothing can be estimated.

    Attributes:
        noise_scale (float): The present estimate, or ``None``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has an impossible value.

    """

    default_name = "gradient_noise_scale"
    priority = extension.PRIORITY_WRITER
    trigger = 1, "iteration"

    def __init__(self, interval: int = 10, smoothing: float = 0.95, adapt_up_to: Optional[int] = None) -> None:
        self._interval = check_int("interval", interval, 1, "use 1 to look at each update")
        self._smoothing = check_real(
            "smoothing", smoothing, lambda value: 0 <= value < 1, "a number from 0 to less than 1", "use 0 for none"
        )
        self._most_steps = adapt_up_to
        if adapt_up_to is not None:
            self._most_steps = check_int("adapt_up_to", adapt_up_to, 2, "use None to leave accumulation_steps alone")
        self._steps: Optional[int] = None
        # Iterator batches that a whole window takes, and what one of them weighs, or 0 as long as that is not known. A
        # window in which an epoch ended may be shorter, and its last batch smaller.
        self._steps_taken = 0
        self._weight_of_step = 0.0
        self._noise = _Mean(self._smoothing)
        self._signal = _Mean(self._smoothing)

    @property
    def noise_scale(self) -> Optional[float]:
        if self._signal.value <= 0:
            return None
        return max(self._noise.value, 0.0) / self._signal.value

    def initialize(self, trainer: Any) -> None:
        """Asks the updater for the norms of gradients."""
        updater = trainer.updater
        if not isinstance(updater, AccumulatingUpdater) or isinstance(updater, CachedGradientUpdater):
            raise TypeError(
                f"the Trainer's updater must be able to accumulate, got {type(updater).__name__}; "
                "use chainer_accum.AccumulatingUpdater"
            )
        if self._steps is not None:
            updater.accumulation_steps = self._steps
        self._steps_taken = max(self._steps_taken, updater.accumulation_steps)
        updater.gradient_norm_interval = self._interval

    def __call__(self, trainer: Any) -> None:
        """Takes the norms of the last update into account, and reports."""
        updater = trainer.updater
        steps = updater.accumulation_steps
        is_whole = not updater.is_new_epoch and steps > 0  # none if only other processes had data
        if is_whole or steps > self._steps_taken:
            self._steps_taken = steps
        if is_whole:
            self._check_steps(updater)
        norms = updater.gradient_norms
        if norms is not None and len(norms.weights) > 1:
            noise, signal = estimate(norms)
            if not (math.isfinite(noise) and math.isfinite(signal)):  # the loss scale was too large, or the data broken
                return
            self._noise.add(noise)
            self._signal.add(signal)
            if is_whole or not self._weight_of_step:
                self._weight_of_step = sum(norms.weights) / steps
            self._suggest(updater)

    def serialize(self, serializer: Any) -> None:
        """Serializes the estimate, what a window takes, and the accumulation steps if they were set."""
        self._noise.serialize(serializer, "noise")
        self._signal.serialize(serializer, "signal")
        with contextlib.suppress(KeyError):
            self._steps = serializer("accumulation_steps", self._steps or 0) or None
            self._steps_taken = serializer("steps_taken", self._steps_taken)
            self._weight_of_step = serializer("weight_of_step", self._weight_of_step)

    def _suggest(self, updater: AccumulatingUpdater) -> None:
        noise_scale = self.noise_scale
        if noise_scale is None:
            return
        steps = max(1, round(noise_scale / self._weight_of_step))
        chainer.report({"noise_scale": noise_scale, "suggested_accumulation_steps": steps})
        if self._most_steps is not None:
            present = max(self._steps_taken, self._steps or 0)
            # At most twice as many, for the first estimates are of few micro-batches and may be far off.
            steps = min(steps, self._most_steps, 2 * present)
            if steps > present:
                self._steps = updater.accumulation_steps = steps

    def _check_steps(self, updater: AccumulatingUpdater) -> None:
        if self._most_steps is not None and self._steps_taken == 1 and updater.micro_batch_size is None:
            raise ValueError(
                "accumulation_steps must be 2 or more for adapt_up_to, got 1; nothing can be estimated from a single "
                "micro-batch"
            )


def estimate(norms: GradientNorms) -> Tuple[float, float]:
    """Returns estimates of the trace of the covariance of single gradients, and of the squared norm of the true one.

    Args:
        norms (GradientNorms): Norms of two or more micro-batches.

    """
    n = len(norms.weights)
    with device_of(norms.window):
        mean_norm = float(sum(norms.micro_batches)) / n
    window_norm = float(norms.window)
    total = sum(norms.weights)
    noise = (mean_norm - window_norm) / (sum(1 / weight for weight in norms.weights) / n - 1 / total)
    return noise, window_norm - noise / total


class _Mean:
    """An exponential mean that is right from the first value on: it is divided by the weight of what came so far."""

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def add(self, value: float) -> None:
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + 1 - self._smoothing

    def serialize(self, serializer: Any, name: str) -> None:
        with contextlib.suppress(KeyError):  # a snapshot without the extension
            self._sum = serializer(f"{name}_sum", self._sum)
            self._weight = serializer(f"{name}_weight", self._weight)
