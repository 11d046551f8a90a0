"""LearningRateSurvey: a Trainer extension that finds suitable learning rates."""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Callable, Dict, List, Mapping, Optional, Tuple, Union

import chainer
import numpy
from chainer.training import Trainer, extension

from chainer_accum._arguments import check_int, check_real
from chainer_accum.observations import Number, Observations, Reported, value_and_weight
from chainer_accum.state import TrainingState

# The names of the learning rate in Chainer's optimizers. If there are both, alpha is something else.
_RATE_NAMES = ("lr", "alpha")


class LearningRateSurvey(extension.Extension):
    r"""Trainer extension that finds out which learning rates a model can be trained with.

    While the Trainer runs, the learning rate grows exponentially from ``start`` to ``stop``. The loss of each update,
    computed before the step with that rate, is recorded. The Trainer stops after ``updates`` updates, or as soon as the
    loss diverges. Then everything is restored: the updater, its models, optimizers and iterators, other links that were
    used, and the random generators; see :class:`~chainer_accum.state.TrainingState`. The same holds if training raises.
    Pass the updater to the Trainer for the real run afterwards; that run is the same as without a survey.

    With an optimizer of :func:`~chainer_accum.create_accumulating_optimizer`, which updates once in several iterations,
    the recorded loss is the mean of the losses since its last update.

    The losses are smoothed by an exponential moving average with bias correction: with ``smoothing`` :math:`\beta`, the
    average of the losses :math:`l_1, \dots, l_i` is
    :math:`(1 - \beta) \sum_{j \le i} \beta^{i - j} l_j / (1 - \beta^i)`.
    It lags behind the loss by about :math:`\beta / (1 - \beta)` updates.

    When the Trainer ends, the learning rates and losses are written to a JSON file in its output folder.

    See: Leslie N. Smith, `Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_,
    2017, section 3.3. In the paper, the rate grows linearly.

    Args:
        start (float): First learning rate.
        stop (float): Last learning rate, larger than ``start``.
        updates (int): Number of updates, each with its own learning rate.
        attr (str): Name of the optimizer's hyperparameter that is the learning rate. By default, ``'lr'`` if it has
            one, or else ``'alpha'``.
        optimizer_name (str): Name of the optimizer in the updater.
        loss_key (str): Key of the observed loss.
        smoothing (float): Weight of the previous value in the average of the losses, from 0, for no smoothing, to less
            than 1.
        divergence (float): The loss has diverged when its average is not finite, or is more than this many times the
            lowest average so far, if that is positive. With ``math.inf``, only the first condition applies.
        filename (str): Name of the file to write. If ``None``, nothing is written.

    Attributes:
        learning_rates (list of float): Learning rates of the updates, without the one at which the average was not
            finite.
        losses (list of float): The loss at each of them.
        smoothed_losses (list of float): The average of the losses at each of them.
        diverged_at (float): Learning rate at which the loss diverged, or ``None`` if it did not.
        is_finished (bool): Whether the survey has ended, with or without divergence.

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If a number is out of range.

    """

    default_name = "learning_rate_survey"
    trigger = 1, "iteration"
    # Low, so that it runs after extensions that set the learning rate or load a snapshot when the Trainer starts.
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
        check_real("start", start, lambda rate: 0 < rate < math.inf, "a positive number", "start with a small rate")
        check_real("stop", stop, lambda rate: start < rate < math.inf, f"larger than {start}", "the rate must grow")
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
        self._trainer: Optional[Trainer] = None
        self._following = contextlib.ExitStack()

    @property
    def suggestion(self) -> Optional[float]:
        """A tenth of the learning rate at which the smoothed loss was lowest, as a rule of thumb.

        It is ``None`` if no smoothed loss was lower than the first.

        """
        lowest = int(numpy.argmin(self.smoothed_losses)) if self.smoothed_losses else 0
        return self.learning_rates[lowest] / 10 if lowest > 0 else None

    def initialize(self, trainer: Trainer) -> None:
        """Stores the state of the training, and sets the first learning rate."""
        self._following.close()  # from a run that was not finalized
        self._begin()
        self._optimizer = trainer.updater.get_optimizer(self._optimizer_name)
        self._rate_name = _find_rate_name(self._optimizer, self._attr)
        self._state = TrainingState(trainer.updater)
        self._trainer, self._stop_trigger = trainer, trainer.stop_trigger
        self._begin_update()
        # Only an accumulating optimizer has this attribute. If its window has begun, the survey ends slightly sooner.
        self._iterations = getattr(self._optimizer, "accumulation_steps", 1)
        iterations = self._iterations * len(self._rates)
        trainer.stop_trigger = _SurveyTrigger(self, trainer.stop_trigger, trainer.updater.iteration + iterations)
        setattr(self._optimizer, self._rate_name, self._rates[0])
        self._following.enter_context(self._state.following())

    def _begin_update(self) -> None:
        self._t = self._optimizer.t  # t counts updates
        self._losses = Observations({self._loss_key: "mean"})

    def __call__(self, trainer: Trainer) -> None:
        """Records the loss of the last update once it is complete, and sets the next learning rate."""
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
        """Restores the training, and writes the file."""
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

    def plot(self, path: Union[str, os.PathLike[str]]) -> None:
        """Plots the losses against the learning rate, without losses above the highest smoothed loss.

        Args:
            path (str): Name of the file to write. Its extension determines the format.

        Raises:
            ImportError: If Matplotlib is not installed.
            ValueError: If no loss has been recorded.

        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs Matplotlib; install it with: pip install matplotlib") from error
        if not self.losses:
            raise ValueError("losses must not be empty, got none; plot after the Trainer has run")
        figure = Figure(figsize=(8, 5), constrained_layout=True)
        axes = figure.subplots()
        # A loss far above the curve, as often at the end, would flatten it.
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

    def _get_loss(self, observation: Mapping[str, Reported]) -> Tuple[float, Optional[Number]]:
        """Returns the mean loss since the last update, and its weight, or ``None`` if it was reported without one."""
        if self._loss_key not in observation:
            if observation.get("skipped_micro_batches"):  # all of them: none was finite
                return math.nan, None
            raise ValueError(
                f"loss_key must be the key of an observed value, got {self._loss_key!r}; "
                f"use one of {', '.join(map(repr, sorted(observation)))}"
            )
        self._losses.add({self._loss_key: observation[self._loss_key]}, 1.0)
        value, weight = value_and_weight(self._losses.merged()[self._loss_key])
        return float(value.item() if hasattr(value, "item") else value), weight

    def _as_dict(self) -> Dict[str, object]:
        names = ("learning_rates", "losses", "smoothed_losses", "diverged_at", "suggestion")
        return {name: getattr(self, name) for name in names}


class _SurveyTrigger:
    """Trigger that stops the Trainer when the survey has ended, or when the Trainer's own trigger fires."""

    def __init__(self, survey: LearningRateSurvey, trigger: Callable[[Trainer], bool], last_iteration: int) -> None:
        self._survey = survey
        self._trigger = trigger
        self._last_iteration = last_iteration

    def __call__(self, trainer: Trainer) -> bool:
        return self._survey.is_finished or bool(self._trigger(trainer))

    def get_training_length(self) -> Tuple[int, str]:
        """Returns the training length for ProgressBar."""
        return self._last_iteration, "iteration"


def _find_rate_name(optimizer: chainer.GradientMethod, name: Optional[str]) -> str:
    known = optimizer.hyperparam.get_dict()
    for candidate in _RATE_NAMES if name is None else (name,):
        if candidate in known:
            return candidate
    raise ValueError(
        f"attr must be the hyperparameter that is the learning rate, got {name!r}; "
        f"{type(optimizer).__name__} has {', '.join(sorted(known))}, so use one of these"
    )
