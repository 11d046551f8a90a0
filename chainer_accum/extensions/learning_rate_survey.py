"""LearningRateSurvey: which learning rates a model can be trained with."""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy
from chainer.training import extension

from chainer_accum._arguments import check_int, check_real
from chainer_accum.observations import Observations
from chainer_accum.reports import value_and_weight
from chainer_accum.training_state import TrainingState

# By these names Chainer's optimizers call their learning rate. Where there are both, alpha is something else.
_RATE_NAMES = ("lr", "alpha")


class LearningRateSurvey(extension.Extension):
    r"""Trainer extension to find out which learning rates a model can be trained with.

    While the Trainer runs, the learning rate grows exponentially from ``start`` to ``stop``, and the loss of each
    update, which is computed before the step with that rate, is recorded. With an optimizer of
    :func:`~chainer_accum.create_accumulating_optimizer`, which updates once in several iterations, it is the mean of
    the losses since its last update. The Trainer stops after that many updates, or as soon as the loss diverges. Then
    all is put back as it was: the updater, its models, optimizers and iterators, other links that were used, and the
    random generators; see :class:`~chainer_accum.training_state.TrainingState`. The same holds if training raises. The
    updater can then be given to the Trainer that is to train, whose run is the one that it would have been without a
    survey.

    The losses are smoothed by an exponential mean that is corrected for its start: with ``smoothing`` :math:`\beta`,
    after losses :math:`l_1, \dots, l_i` it is
    :math:`(1 - \beta) \sum_{j \le i} \beta^{i - j} l_j / (1 - \beta^i)`. It lags behind the loss by about
    :math:`\beta / (1 - \beta)` updates.

    The learning rates and losses are written to a JSON file in the folder of the Trainer as it ends.

    See: Leslie N. Smith, `Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_,
    2017, section 3.3. There, the rate grows linearly.

    Args:
        start (float): First learning rate.
        stop (float): Last learning rate, larger than ``start``.
        updates (int): Number of updates from the first to the last, each with a rate of its own.
        attr (str): Name of the hyperparameter of the optimizer that is its learning rate. By default, ``'lr'`` if it
            has one, or else ``'alpha'``.
        optimizer_name (str): Name of the optimizer in the updater.
        loss_key (str): Key of the observed value that is the loss.
        smoothing (float): Weight of the past in the mean of the losses, from 0, for no smoothing, to less than 1.
        divergence (float): The loss diverges when its mean is not finite or more than this many times the lowest so
            far; the latter if that is positive. ``math.inf`` leaves the former only.
        filename (str): Name of the file to write. If it is ``None``, nothing is written.

    Attributes:
        learning_rates (list of float): Learning rates of the updates, but for one at which the mean was not finite.
        losses (list of float): The loss at each of them.
        smoothed_losses (list of float): The mean of the losses at each of them.
        diverged_at (float): Learning rate at which the loss diverged, or ``None`` if it did not.
        is_finished (bool): Whether the survey has ended, either way.

    Raises:
        TypeError: If a number is of the wrong type.
        ValueError: If a number is not possible.

    """

    default_name = "learning_rate_survey"
    trigger = 1, "iteration"
    # The last: after others that set the learning rate, and after a snapshot that is loaded as the Trainer starts.
    priority = -200

    def __init__(
        self,
        start: float,
        stop: float,
        updates: int = 100,
        *,
        attr: Optional[str] = None,
        optimizer_name: str = "main",
        loss_key: str = "main/loss",
        smoothing: float = 0.9,
        divergence: float = 4.0,
        filename: Optional[str] = "learning_rate_survey.json",
    ) -> None:
        check_real("start", start, lambda rate: 0 < rate < math.inf, "a positive number", "begin with a small rate")
        check_real("stop", stop, lambda rate: start < rate < math.inf, f"larger than {start}", "the rate is to grow")
        check_int("updates", updates, 2, "each update has a learning rate of its own")
        check_real("smoothing", smoothing, lambda weight: 0 <= weight < 1, "from 0 to less than 1", "use 0 for none")
        check_real("divergence", divergence, lambda factor: factor > 1, "larger than 1", "use math.inf for no limit")
        self._rates: List[float] = numpy.geomspace(start, stop, updates).tolist()
        self._attr = attr
        self._optimizer_name = optimizer_name
        self._loss_key = loss_key
        self._smoothing = smoothing
        self._divergence = divergence
        self._filename = filename
        self._begin()

    def _begin(self) -> None:
        self.learning_rates: List[float] = []
        self.losses: List[float] = []
        self.smoothed_losses: List[float] = []
        self.diverged_at: Optional[float] = None
        self.is_finished = False
        self._updates = 0
        self._sum = 0.0  # of the losses, weighted
        self._trainer: Optional[Any] = None
        self._following = contextlib.ExitStack()

    @property
    def suggestion(self) -> Optional[float]:
        """A tenth of the learning rate at which the smoothed loss was lowest, as a rule of thumb.

        It is ``None`` if none was lower than the first.

        """
        lowest = int(numpy.argmin(self.smoothed_losses)) if self.smoothed_losses else 0
        return self.learning_rates[lowest] / 10 if lowest > 0 else None

    def initialize(self, trainer: Any) -> None:
        """Remembers how everything is, and sets the first learning rate."""
        self._following.close()  # of a run that was not finalized
        self._begin()
        self._optimizer = trainer.updater.get_optimizer(self._optimizer_name)
        self._rate_name = _find_rate_name(self._optimizer, self._attr)
        self._state = TrainingState(trainer.updater)
        self._trainer, self._stop_trigger = trainer, trainer.stop_trigger
        self._begin_update()
        # Only a wrapped optimizer has this. If it has begun to accumulate, the survey ends somewhat sooner.
        self._iterations = getattr(self._optimizer, "accumulation_steps", 1)
        iterations = self._iterations * len(self._rates)
        trainer.stop_trigger = _SurveyTrigger(self, trainer.stop_trigger, trainer.updater.iteration + iterations)
        setattr(self._optimizer, self._rate_name, self._rates[0])
        self._following.enter_context(self._state.following())

    def _begin_update(self) -> None:
        self._t = self._optimizer.t  # which counts updates
        self._losses = Observations({self._loss_key: "mean"})

    def __call__(self, trainer: Any) -> None:
        """Records the loss of the last update, if it is over, and sets the learning rate of the next."""
        loss, weight = self._get_loss(trainer.observation)
        is_under_way = self._iterations > 1 and self._optimizer.t == self._t
        if is_under_way and (math.isfinite(loss) or weight == 0):
            return
        self._begin_update()
        rate = self._rates[self._updates]
        self._updates += 1
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * loss
        smoothed = self._sum / (1 - self._smoothing**self._updates)
        is_finite = math.isfinite(smoothed)
        if is_finite:
            self.learning_rates.append(rate)
            self.losses.append(loss)
            self.smoothed_losses.append(smoothed)
        if not is_finite or 0 < self._divergence * min(self.smoothed_losses) < smoothed:
            self.diverged_at = rate
        self.is_finished = self.diverged_at is not None or self._updates == len(self._rates)
        if not self.is_finished:
            setattr(self._optimizer, self._rate_name, self._rates[self._updates])

    def finalize(self) -> None:
        """Puts everything back, and writes the file."""
        if self._trainer is None:  # initialize has failed, or was not called
            return
        trainer, self._trainer = self._trainer, None
        trainer.stop_trigger = self._stop_trigger
        self._following.close()
        self._state.restore()
        del self._state, self._stop_trigger, self._optimizer  # the survey may be kept for long
        if self._filename is not None:
            with open(os.path.join(trainer.out, self._filename), "w", encoding="utf-8") as file:
                json.dump(self._as_dict(), file, indent=4)

    def plot(self, path: Any) -> None:
        """Draws the losses against the learning rate, but for those above the highest smoothed one.

        Args:
            path (str): Name of the file to write. Its ending decides on the format.

        Raises:
            ImportError: If Matplotlib is not installed.
            ValueError: If there is no loss to be drawn.

        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs Matplotlib; install it with: pip install matplotlib") from error
        if not self.losses:
            raise ValueError("losses must not be empty, got none; plot after the Trainer has run")
        figure = Figure(figsize=(8, 5), constrained_layout=True)
        axes = figure.subplots()
        # A loss that is far above the curve, as one may be in the end, would flatten it.
        highest = max(self.smoothed_losses)
        losses = [loss if loss <= highest else math.nan for loss in self.losses]
        axes.plot(self.learning_rates, losses, ".", color="#9ecae1", label=self._loss_key)
        axes.plot(self.learning_rates, self.smoothed_losses, color="#08519c", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="#e6550d", linestyle="--", label=f"suggestion: {self.suggestion:.2g}")
        if self.diverged_at is not None:
            axes.axvline(self.diverged_at, color="black", linestyle=":", label=f"diverged at {self.diverged_at:.2g}")
        axes.set(xscale="log", xlabel=f"learning rate ({self._rate_name})", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)

    def _get_loss(self, observation: Any) -> Tuple[float, Any]:
        """Returns the mean loss since the last update, and its weight, or ``None`` if it is reported without one."""
        if self._loss_key not in observation:
            if observation.get("skipped_micro_batches"):  # all of them, as they were not finite
                return math.nan, None
            raise ValueError(
                f"loss_key must be the key of an observed value, got {self._loss_key!r}; "
                f"use one of {', '.join(map(repr, sorted(observation)))}"
            )
        self._losses.add({self._loss_key: observation[self._loss_key]}, 1.0)
        value, weight = value_and_weight(self._losses.merged()[self._loss_key])
        return float(value.item() if hasattr(value, "item") else value), weight

    def _as_dict(self) -> Dict[str, Any]:
        names = ("learning_rates", "losses", "smoothed_losses", "diverged_at", "suggestion")
        return {name: getattr(self, name) for name in names}


class _SurveyTrigger:
    """Stops the Trainer when the survey has ended, or when its own trigger does."""

    def __init__(self, survey: LearningRateSurvey, trigger: Any, last_iteration: int) -> None:
        self._survey = survey
        self._trigger = trigger
        self._last_iteration = last_iteration

    def __call__(self, trainer: Any) -> bool:
        return self._survey.is_finished or bool(self._trigger(trainer))

    def get_training_length(self) -> Tuple[int, str]:
        """Tells ProgressBar how long it may take."""
        return self._last_iteration, "iteration"


def _find_rate_name(optimizer: Any, name: Optional[str]) -> str:
    known = optimizer.hyperparam.get_dict()
    for candidate in _RATE_NAMES if name is None else (name,):
        if candidate in known:
            return candidate
    raise ValueError(
        f"attr must be the hyperparameter that is the learning rate, got {name!r}; "
        f"{type(optimizer).__name__} has {', '.join(sorted(known))}"
    )
