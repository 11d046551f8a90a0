"""GradientNoiseScale: a Trainer extension that estimates up to which size a larger batch pays off."""

from __future__ import annotations

import contextlib
import math
from typing import Optional, Tuple

import chainer
from chainer.training import Trainer, extension

from chainer_accum._arguments import check_int, check_real
from chainer_accum._devices import device_of
from chainer_accum.cached_gradients import CachedGradientUpdater
from chainer_accum.updater import AccumulatingUpdater
from chainer_accum.window import GradientNorms


class GradientNoiseScale(extension.Extension):
    r"""Trainer extension that estimates the critical batch size from the gradients of micro-batches.

    The noise scale is :math:`S / |G|^2`, where :math:`S` is the trace of the covariance of single-example gradients and
    :math:`|G|^2` the squared norm of the true gradient. With batches much smaller than the noise scale, doubling the
    batch almost doubles the progress per update; with much larger batches, it gains little. Let :math:`g_i` be the
    gradients of :math:`n` micro-batches of :math:`b_i` examples, and :math:`g` the gradient of all :math:`B` examples.
    Unbiased estimates are

    .. math::

        S = \frac{\frac1n \sum_i |g_i|^2 - |g|^2}{\frac1n \sum_i \frac1{b_i} - \frac1B}, \qquad
        |G|^2 = |g|^2 - \frac SB.

    Both estimates are noisy, so an exponential moving average over updates smooths each of them before they are
    divided.

    The extension reports ``noise_scale``, in examples or whatever else the micro-batches are weighted by, and
    ``suggested_accumulation_steps``, the number of steps that makes an effective batch of that size. It reports nothing
    until an update has had two micro-batches, or while the estimate of :math:`|G|^2` is not positive. The Trainer needs
    an :class:`~chainer_accum.AccumulatingUpdater`.

    Gradients are measured before the hooks of the optimizer run, and without the loss scale. An update that measures
    them holds a second set of gradients.

    Source: McCandlish et al. 2018, `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_,
    appendix A.

    Args:
        interval (int): Gradients are measured every ``interval`` updates. Other updates have no extra cost.
        smoothing (float): Weight of the previous value in the moving averages, from 0 to less than 1.
        adapt_up_to (int): If given, :attr:`~chainer_accum.AccumulatingUpdater.accumulation_steps` is raised to the
            suggested number, but to at most ``adapt_up_to``, and to at most twice its value at a time. It is never
            lowered. It should be 2 or more from the start, because nothing can be estimated from a single micro-batch.
            Updates cut short by the end of an epoch or of the data are disregarded.

    Attributes:
        noise_scale (float): The current estimate, or ``None``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an invalid value.

    """

    default_name = "gradient_noise_scale"
    priority = extension.PRIORITY_WRITER
    trigger = 1, "iteration"

    def __init__(self, interval: int = 10, smoothing: float = 0.95, adapt_up_to: Optional[int] = None) -> None:
        self._interval = check_int("interval", interval, 1, "use 1 to measure every update")
        self._smoothing = check_real(
            "smoothing", smoothing, lambda value: 0 <= value < 1, "a number from 0 to less than 1", "use 0 for none"
        )
        self._most_steps = adapt_up_to
        if adapt_up_to is not None:
            self._most_steps = check_int("adapt_up_to", adapt_up_to, 2, "use None to leave accumulation_steps alone")
        self._steps: Optional[int] = None
        # The iterator batches in a whole window, and the weight of one of them, or 0 while that is unknown. A window in
        # which an epoch ended may have fewer batches and a smaller last one.
        self._steps_taken = 0
        self._weight_of_step = 0.0
        self._noise = _Mean(self._smoothing)
        self._signal = _Mean(self._smoothing)

    @property
    def noise_scale(self) -> Optional[float]:
        if self._signal.value <= 0:
            return None
        return max(self._noise.value, 0.0) / self._signal.value

    def initialize(self, trainer: Trainer) -> None:
        """Makes the updater measure gradient norms."""
        updater = trainer.updater
        if not isinstance(updater, AccumulatingUpdater) or isinstance(updater, CachedGradientUpdater):
            raise TypeError(
                f"the Trainer's updater must be able to accumulate gradients, got {type(updater).__name__}; "
                "use chainer_accum.AccumulatingUpdater"
            )
        if self._steps is not None:
            updater.accumulation_steps = self._steps
        self._steps_taken = max(self._steps_taken, updater.accumulation_steps)
        updater.gradient_norm_interval = self._interval

    def __call__(self, trainer: Trainer) -> None:
        """Adds the gradient norms of the last update to the estimate, and reports it."""
        updater: AccumulatingUpdater = trainer.updater
        steps = updater.accumulation_steps
        is_whole = not updater.is_new_epoch and steps > 0  # 0 steps if only other processes had data
        if is_whole or steps > self._steps_taken:
            self._steps_taken = steps
        if is_whole:
            self._check_steps(updater)
        norms = updater.gradient_norms
        if norms is not None and len(norms.weights) > 1:
            noise, signal = estimate(norms)
            if not (math.isfinite(noise) and math.isfinite(signal)):  # the loss scale or the data is at fault
                return
            self._noise.add(noise)
            self._signal.add(signal)
            if is_whole or not self._weight_of_step:
                self._weight_of_step = sum(norms.weights) / steps
            self._suggest(updater)

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the estimate, the size of a window, and the accumulation steps if they were set."""
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
            # At most double it: the first estimates come from few micro-batches and may be far off.
            steps = min(steps, self._most_steps, 2 * present)
            if steps > present:
                self._steps = updater.accumulation_steps = steps

    def _check_steps(self, updater: AccumulatingUpdater) -> None:
        if self._most_steps is not None and self._steps_taken == 1 and updater.micro_batch_size is None:
            raise ValueError(
                "accumulation_steps must be 2 or more for adapt_up_to, got 1; nothing can be estimated from a single "
                "micro-batch, so start with 2, or set micro_batch_size"
            )


def estimate(norms: GradientNorms) -> Tuple[float, float]:
    """Returns estimates of :math:`S` and :math:`|G|^2`, as defined in :class:`GradientNoiseScale`.

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
    """An exponential moving average, divided by the sum of its weights, so that the zero start does not bias it."""

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

    def serialize(self, serializer: chainer.AbstractSerializer, name: str) -> None:
        with contextlib.suppress(KeyError):  # a snapshot without the extension
            self._sum = serializer(f"{name}_sum", self._sum)
            self._weight = serializer(f"{name}_weight", self._weight)
