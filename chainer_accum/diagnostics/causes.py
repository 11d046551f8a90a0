"""The reasons why the accumulated step of a model differs from its full-batch step, and how to find them."""

from __future__ import annotations

from typing import Any, Iterable, List, NamedTuple, Sequence, Tuple

import chainer
import numpy

from chainer_accum._arguments import check_weight
from chainer_accum._late_weights import LateWeights, is_late
from chainer_accum.diagnostics.comparison import TOLERANCES, check_usable, compare, largest_scales
from chainer_accum.diagnostics.trials import Gradient, Settings, Trials


class Cause(NamedTuple):
    """A reason why the accumulated step differs from the full-batch step.

    Attributes:
        name (str): ``'batch normalization'``, ``'randomness'``, ``'state'``, ``'float16'``, ``'sum'`` (the loss is a
            sum over examples), ``'mean'`` (it is a mean over examples), ``'normalizer'`` (it is divided by something
            else), ``'padding'`` (it depends on how far examples are padded), ``'comparison'`` (it compares examples),
            or ``'unknown'``.
        explanation (str): What was found.
        remedy (str): What to set or change.

    """

    name: str
    explanation: str
    remedy: str


_FLOAT16 = Cause(
    "float16",
    "The gradient in float16 differs from that in float32: it is so small, or so large, that float16 rounds it.",
    "Use loss scaling, for example optimizer.loss_scaling(), or compute in float32.",
)

_STATE = Cause(
    "state",
    "The gradient of the same batch differs between two calls, so the model carries something from one call to the "
    "next, such as the state of a recurrent layer or of its own random generator.",
    "Reset the state at each call, for example with reset_state(), or set lockstep='memory'.",
)

_RANDOMNESS = Cause(
    "randomness",
    "The loss draws random numbers, for example for dropout, and micro-batches draw different ones than the batch.",
    "Nothing needs to be changed: the step is as random as before. To draw the same as the batch, set "
    "lockstep='memory'.",
)

_BATCH_NORMALIZATION = Cause(
    "batch normalization",
    "Batch normalization normalizes each micro-batch by its own statistics.",
    "Set lockstep='memory', which normalizes by the statistics of the whole batch.",
)

_SUM = Cause("sum", "The loss is a sum over examples.", "Set loss_reduction='sum'.")

_PADDING = Cause(
    "padding",
    "The gradient of a micro-batch depends on the size to which its examples are padded, so the model or the loss "
    "reads padding. The converter pads micro-batches less than the whole batch.",
    "Mask the padded positions in the model and in the loss, or let the converter pad all examples to a fixed size.",
)

_COMPARISON = Cause(
    "comparison",
    "No weights make the gradients of the micro-batches add up to that of the batch: something is computed over all "
    "examples of the batch, such as a loss that compares examples with one another.",
    "Use CachedGradientUpdater for a loss that compares what an encoder returns, pairs (loss, weight) for a sum of "
    "means with different divisors, an optimizer hook for regularization, or a loss to which each example "
    "contributes independently.",
)

AGREEABLE = {_FLOAT16, _STATE, _RANDOMNESS, _BATCH_NORMALIZATION}  # without these, the steps may agree

_HIDDEN = Cause(
    "unknown",
    "Other causes could not be checked: there is no loss in test mode, or it differs between calls.",
    "Remove the other causes, for example with a dropout ratio of 0, and check again.",
)

_UNKNOWN = Cause(
    "unknown",
    "No cause was found. The network may amplify rounding errors.",
    "Check again with wider floats, whose rounding errors are far smaller.",
)


def find_causes(trials: Trials, full: Gradient) -> List[Cause]:
    """Returns the causes. The search for each one excludes those already found."""
    causes: List[Cause] = []
    wide = trials.widened() if trials.itemsize == 2 else None
    if wide is not None:
        if compare(full, wide)[0] > TOLERANCES[2]:
            causes.append(_FLOAT16)
        full = wide
    if trials.settings.lockstep is not None and _agrees_if_padded_alike(trials, full):
        return [*causes, _PADDING]  # in lockstep, the other causes make no difference
    can_be_repeated = not _differs(trials, full)
    if not can_be_repeated or _differs(trials, full, same_state=False):
        causes.append(_STATE)
    if can_be_repeated and _differs(trials, full, same_random=False):
        causes.append(_RANDOMNESS)
    if trials.normalizes_batches:
        causes.append(_BATCH_NORMALIZATION)
    is_in_the_way = _RANDOMNESS in causes or _BATCH_NORMALIZATION in causes
    with chainer.using_config("train", chainer.config.train and not is_in_the_way):
        wrong = _find_wrong_factors(trials)
    if wrong == [_COMPARISON] and _STATE in causes:
        wrong = [_HIDDEN]  # the state may be that of a random generator, whose numbers differ for each micro-batch
    if wrong == [_COMPARISON] and trials.itemsize == 2:
        wrong = [_UNKNOWN]  # rounding in float16 may look the same
    return causes + wrong or [_UNKNOWN]


def _agrees_if_padded_alike(trials: Trials, full: Gradient) -> bool:
    """Returns whether the accumulated step is the full-batch step if all parts are padded like the whole batch."""
    alike = trials.padded_alike()
    try:
        return alike is not None and compare(alike.accumulated(), full)[0] <= TOLERANCES[trials.itemsize]
    except Exception:  # lockstep refuses what it cannot make exact
        return False


def _find_wrong_factors(trials: Trials) -> List[Cause]:
    """Returns what is wrong with the factors of the micro-batch gradients, or with the loss if no factors are right."""
    try:
        full = trials.full_batch()
        check_usable(full)
        parts = _Parts(trials, full)
    except Exception:  # in test mode, a model may return anything
        return [_HIDDEN]
    if _differs(trials, full, same_random=False):
        return [_HIDDEN]
    _, wrong = parts.explain()
    alike = trials.padded_alike() if wrong else None
    if alike is None:
        return wrong
    try:
        factors, others = _Parts(alike, full).explain()
    except Exception:  # the model may refuse arrays that are longer than each of its examples
        return wrong
    is_padding = _COMPARISON not in others and not parts.add_up(factors)
    return [_PADDING, *others] if is_padding else wrong


class _Parts:
    """The gradients of the micro-batches, and the factors with which they add up to the gradient of the batch.

    Args:
        trials (Trials): The trials.
        full (dict): The gradient of the batch.

    """

    def __init__(self, trials: Trials, full: Gradient) -> None:
        self._settings = trials.settings
        self._parts = trials.parts
        self._tolerance = TOLERANCES[trials.itemsize]
        self._full = full
        self._gradients = [_finite_or_zero(trials.single(part)) for part in trials.parts]

    def add_up(self, factors: numpy.ndarray) -> bool:
        """Returns whether the gradients, multiplied by the factors, add up to that of the batch."""
        total = {
            name: sum(c * gradient[name].astype(float) for c, gradient in zip(factors, self._gradients))
            for name in self._full
        }
        return compare(total, self._full)[0] <= self._tolerance

    def explain(self) -> Tuple[numpy.ndarray, List[Cause]]:
        """Returns the right factors, or the closest ones, and what is wrong with those of the accumulated step."""
        counts = numpy.array([len(part) for part in self._parts])
        ones, shares = numpy.ones(len(counts)), counts / counts.sum()
        used = _factors(self._settings, self._parts)
        if self.add_up(used):
            return used, []
        factors = _fit_factors(self._gradients, self._full)
        if self.add_up(ones) and factors.sum() > 1.5:  # a single nonzero gradient would fit a mean as well
            return ones, [_SUM]
        if self.add_up(shares):
            return shares, [_wrong_for_a_mean(self._settings)]
        slack = 10 * self._tolerance
        if not self.add_up(factors) or factors.min() < -slack:
            return factors, [_COMPARISON]
        if abs(factors.sum() - 1) > slack:
            return factors, [_neither_mean_nor_sum(factors)]
        return factors, [_wrong_weights(self._settings, self._parts, factors)]


def _wrong_for_a_mean(settings: Settings) -> Cause:
    remedies = ["Set loss_reduction='mean'."] if settings.loss_reduction == "sum" else []
    remedies += ["Leave weight_func out."] if settings.weight_func else []
    return Cause("mean", "The loss is a mean over examples.", " ".join(remedies))


def _neither_mean_nor_sum(factors: numpy.ndarray) -> Cause:
    return Cause(
        "normalizer",
        "The loss is neither a mean nor a sum: the gradients of the micro-batches add up to that of the batch when "
        f"multiplied by {listed(f'{factor:.3g}' for factor in factors)}.",
        "Return a mean, or return a sum and set loss_reduction='sum'.",
    )


def _wrong_weights(settings: Settings, parts: Sequence[Sequence[Any]], factors: numpy.ndarray) -> Cause:
    counts = [len(part) for part in parts]
    instead = ""
    if settings.weight_func and not is_late(settings.weight_func):
        instead = f", not like {listed(f'{weight:g}' for weight in _weights(settings, parts))}"
    return Cause(
        "normalizer",
        f"The loss is a mean over something other than examples: micro-batches of {listed(counts)} examples count "
        f"like {listed(_as_counts(factors, sum(counts)))}{instead}.",
        "Set weight_func to a function that returns what the loss of a micro-batch is divided by, such as its number "
        "of tokens or of labels that are not ignored."
        + (" Set loss_reduction='mean'." if settings.loss_reduction == "sum" else ""),
    )


def _differs(trials: Trials, full: Gradient, **kwargs: bool) -> bool:
    """Returns whether a second computation of the full-batch gradient gives a different result."""
    return compare(trials.full_batch(**kwargs), full)[0] > TOLERANCES[trials.itemsize]


def _factors(settings: Settings, parts: Sequence[Sequence[Any]]) -> numpy.ndarray:
    """Returns the factor of each micro-batch's gradient in the accumulated step."""
    weights = numpy.array(_weights(settings, parts))
    if settings.loss_reduction == "sum":
        return (weights > 0).astype(float)
    return weights / (weights.sum() or 1)


def _weights(settings: Settings, parts: Sequence[Sequence[Any]]) -> List[float]:
    weight_func = LateWeights().early(settings.weight_func) or len
    return [check_weight(weight_func(part), "the value of weight_func") for part in parts]


def _fit_factors(gradients: Sequence[Gradient], expected: Gradient) -> numpy.ndarray:
    """Returns the least-squares factors with which the gradients add up to the expected one."""
    products = numpy.zeros((len(gradients), len(gradients) + 1))
    for name, scale in largest_scales(expected).items():
        rows = [gradient[name].astype(float).ravel() / scale for gradient in [*gradients, expected]]
        products += numpy.array([[row.dot(other) for other in rows] for row in rows[:-1]])
    factors: numpy.ndarray = numpy.linalg.lstsq(products[:, :-1], products[:, -1], rcond=1e-12)[0]
    return factors


def _finite_or_zero(gradient: Gradient) -> Gradient:
    # A mean over no labels may be NaN. It must not count, as with weight 0.
    if all(numpy.isfinite(array).all() for array in gradient.values()):
        return gradient
    return {name: numpy.zeros_like(array) for name, array in gradient.items()}


def _as_counts(factors: numpy.ndarray, n_examples: int) -> List[str]:
    """Returns the smallest whole numbers in proportion to the factors, or else the factors times ``n_examples``."""
    for total in range(1, 1001):
        counts = numpy.rint(total * factors) + 0  # + 0 turns -0 into 0
        if numpy.abs(total * factors - counts).max() < 0.01:
            return [f"{count:.0f}" for count in counts]
    return [f"{n_examples * factor:.3g}" for factor in factors]


def listed(values: Iterable[object]) -> str:
    """Returns two or more values as a list in words."""
    words = [str(value) for value in values]
    if len(words) > 9:
        words = [*words[:8], f"{len(words) - 8} more"]
    return f"{', '.join(words[:-1])} and {words[-1]}"
