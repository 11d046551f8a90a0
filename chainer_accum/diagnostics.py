"""check_equivalence: whether the accumulated step of a model is its full-batch step, and if not, why.

That depends on the whole model: on each layer, on the loss, on what the loss is divided by. It cannot be read from the
names of classes, so it is tried out: both steps are made, and if they differ, further steps, each with one suspect out
of the way. Another start of the random generators shows randomness, a second call shows state that is carried, test
mode takes away batch normalization and dropout, float32 takes away the rounding of float16. What is left is linear:
the weights with which the gradients of the micro-batches add up to that of the batch say what the loss is divided by,
and where there are no such weights, something is computed over the whole batch.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.dataset import concat_examples

from chainer_accum._arguments import check_callable, check_choice, check_int, check_weight
from chainer_accum._trials import Gradient, Settings, Trials
from chainer_accum.cached_gradients import CachedGradientUpdater
from chainer_accum.micro_batches import WeightFunc
from chainer_accum.updater import AccumulatingUpdater
from chainer_accum.window import LOSS_REDUCTIONS

# By the size of the narrowest float with which the model computes. What is not rounding is far beyond.
_TOLERANCES = {2: 2e-2, 4: 1e-4, 8: 1e-6}

# A gradient that is zero but for rounding, such as that of a bias before batch normalization, is not to be compared
# with itself: a parameter counts as having at least this share of the largest gradient there is.
_SMALLEST_SHARE = 1e-2


class Cause(NamedTuple):
    """A reason why the accumulated step is not the full-batch step.

    Attributes:
        name (str): ``'batch normalization'``, ``'randomness'``, ``'state'``, ``'float16'``, ``'sum'`` (the loss is a
            sum over examples), ``'mean'`` (it is a mean over examples), ``'normalizer'`` (it is divided by something
            else), ``'comparison'`` (it compares examples), or ``'unknown'``.
        explanation (str): What was found.
        remedy (str): What to set or to change.

    """

    name: str
    explanation: str
    remedy: str


class Equivalence(NamedTuple):
    """What :func:`~chainer_accum.check_equivalence` found.

    It is true if the steps are the same, and prints as its message.

    Attributes:
        is_equivalent (bool): Whether the accumulated step is the full-batch step, within rounding.
        deviation (float): By how much the gradient of :attr:`parameter` deviates: the largest difference of an entry,
            divided by the largest entry of the full-batch gradient of the parameter, or by a hundredth of the largest
            entry there is in any parameter if that is more.
        parameter (str): Name of the parameter whose gradient deviates most.
        tolerance (float): Largest deviation that counts as rounding.
        causes (tuple of Cause): Why the steps differ; empty if they do not.
        message (str): All this in words, with what to set.

    """

    is_equivalent: bool
    deviation: float
    parameter: str
    tolerance: float
    causes: Tuple[Cause, ...]
    message: str

    def __bool__(self) -> bool:
        return self.is_equivalent

    def __repr__(self) -> str:
        return self.message


def check_equivalence(
    model_or_updater: Any,
    batch: Any,
    *,
    converter: Optional[Callable[..., Any]] = None,
    loss_func: Optional[Callable[..., chainer.Variable]] = None,
    micro_batch_size: Optional[int] = None,
    weight_func: Optional[WeightFunc] = None,
    loss_reduction: Optional[str] = None,
) -> Equivalence:
    """Tells whether the accumulated step is the full-batch step for this model, and if not, why.

    The batch is split into micro-batches, not all of one size, and the gradient that
    :class:`~chainer_accum.AccumulatingUpdater` makes of them is compared with that which
    :class:`~chainer.training.updaters.StandardUpdater` makes of the whole batch. All passes run under the current
    configuration, as a training step would, and start from the present state of the model. If the gradients deviate by
    more than rounding, further passes find out why.

    Model, optimizer, iterator, reporter and random generators are afterwards as they were; so are other links that a
    pass used, however it got hold of them. What else a loss function keeps in objects of its own, it keeps.

    .. code-block:: python

        assert check_equivalence(updater, batch)

    Args:
        model_or_updater: Link that returns the loss, or a link with a ``loss_func``; or an
            :class:`~chainer_accum.AccumulatingUpdater`, of which converter, loss function, micro-batch size, weight
            function, loss reduction, input device and loss scale are taken.
        batch (list): Two examples or more, as the iterator would give them. They must fit into memory as one batch.
            Use examples that are as unlike each other as in training: of different lengths, with labels to ignore.
        converter: Converter function. By default, that of the updater, or
            :func:`~chainer.dataset.concat_examples`.
        loss_func: Loss function. By default, that of the updater, or the link.
        micro_batch_size (int): The largest number of examples in a micro-batch. By default, that of the updater, or two
            fifths of the batch. It is less than the batch in any case.
        weight_func: What a micro-batch counts for. By default, that of the updater, or the number of examples.
        loss_reduction (str): ``'mean'`` or ``'sum'``. By default, that of the updater, or ``'mean'``.

    Returns:
        ~chainer_accum.diagnostics.Equivalence: What was found. It is true if the steps are the same.

    Raises:
        TypeError: If an argument is of the wrong type, or the loss is no :class:`~chainer.Variable`.
        RuntimeError: If the loss does not depend on a parameter.
        ValueError: If an argument has an impossible value, there is no parameter to train, the loss is not a scalar, or
            the gradient of the whole batch is zero or not finite.

    """
    settings = _read_settings(model_or_updater, converter, loss_func, micro_batch_size, weight_func, loss_reduction)
    parts = _split(batch, settings.micro_batch_size)
    trials = Trials(settings, batch, parts)
    with trials.undone():
        trials.initialize()
        full, accumulated = trials.full_batch(), trials.accumulated()
        _check_usable(full)
        deviation, parameter = _compare(accumulated, full)
        tolerance = _TOLERANCES[trials.itemsize]
        causes = tuple(_find_causes(trials, full)) if deviation > tolerance else ()
    message = _write_message(deviation, parameter, tolerance, causes, parts)
    return Equivalence(deviation <= tolerance, deviation, parameter, tolerance, causes, message)


def _find_causes(trials: Trials, full: Gradient) -> List[Cause]:
    """Returns the causes, each of which is looked for with those before it out of the way."""
    causes = []
    wide = trials.widened() if trials.itemsize == 2 else None
    if wide is not None:
        if _compare(full, wide)[0] > _TOLERANCES[2]:
            causes.append(_FLOAT16)
        full = wide
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
        wrong = [_HIDDEN]  # what is carried may be a random generator, which gives a micro-batch what is not its own
    if wrong == [_COMPARISON] and trials.itemsize == 2:
        wrong = [_UNKNOWN]  # float16 may be rounded so much that it looks like this
    return causes + wrong or [_UNKNOWN]


def _find_wrong_factors(trials: Trials) -> List[Cause]:
    """Returns what is wrong with the factors of the micro-batches' gradients, or with the loss if none are right."""
    settings, parts = trials.settings, trials.parts
    try:
        full = trials.full_batch()
        _check_usable(full)
        gradients = [_finite_or_zero(trials.single(part)) for part in parts]
    except Exception:  # in test mode, a model may return anything
        return [_HIDDEN]
    if _differs(trials, full, same_random=False):
        return [_HIDDEN]

    def are_right(factors: numpy.ndarray) -> bool:
        total = {name: sum(c * g[name].astype(float) for c, g in zip(factors, gradients)) for name in full}
        return _compare(total, full)[0] <= _TOLERANCES[trials.itemsize]

    counts = numpy.array([len(part) for part in parts])
    if are_right(_factors(settings, parts)):
        return []
    factors = _fit_factors(gradients, full)
    if are_right(numpy.ones(len(parts))) and factors.sum() > 1.5:  # where one gradient is all there is, it is a mean
        return [_SUM]
    if are_right(counts / counts.sum()):
        return [_wrong_for_a_mean(settings)]
    slack = 10 * _TOLERANCES[trials.itemsize]
    if not are_right(factors) or factors.min() < -slack:
        return [_COMPARISON]
    if abs(factors.sum() - 1) > slack:
        return [_neither_mean_nor_sum(factors)]
    return [_wrong_weights(settings, parts, factors)]


def _wrong_for_a_mean(settings: Settings) -> Cause:
    remedies = ["Set loss_reduction='mean'."] if settings.loss_reduction == "sum" else []
    remedies += ["Leave weight_func out."] if settings.weight_func else []
    return Cause("mean", "The loss is a mean over examples.", " ".join(remedies))


def _neither_mean_nor_sum(factors: numpy.ndarray) -> Cause:
    return Cause(
        "normalizer",
        "The loss is neither a mean nor a sum: the gradients of the micro-batches add up to that of the batch if they "
        f"are multiplied by {_listed(f'{factor:.3g}' for factor in factors)}.",
        "Return a mean, or return a sum and set loss_reduction='sum'.",
    )


def _wrong_weights(settings: Settings, parts: Sequence[Any], factors: numpy.ndarray) -> Cause:
    counts = [len(part) for part in parts]
    instead = ""
    if settings.weight_func:
        instead = f", not like {_listed(f'{weight:g}' for weight in _weights(settings, parts))}"
    return Cause(
        "normalizer",
        f"The loss is a mean over something other than examples: micro-batches of {_listed(counts)} examples count "
        f"like {_listed(_as_counts(factors, sum(counts)))}{instead}.",
        "Set weight_func to a function that returns what the loss of a micro-batch is divided by, such as its number "
        "of tokens or of labels that are not ignored."
        + (" Set loss_reduction='mean'." if settings.loss_reduction == "sum" else ""),
    )


_FLOAT16 = Cause(
    "float16",
    "The gradient in float16 is not that in float32: it is so small, or so large, that float16 rounds it.",
    "Use loss scaling, as with optimizer.loss_scaling(), or compute in float32.",
)
_STATE = Cause(
    "state",
    "The same batch has another gradient when it is passed once more, so something is carried from one call to the "
    "next, such as the state of a recurrent layer or of a random generator of its own.",
    "Begin each call afresh, as with reset_state(), or carry the state of each micro-batch by itself.",
)
_RANDOMNESS = Cause(
    "randomness",
    "The loss draws random numbers, as with dropout, and a micro-batch draws others than the batch.",
    "Nothing has to be set: the step is as random as before.",
)
_BATCH_NORMALIZATION = Cause(
    "batch normalization",
    "Batch normalization normalizes each micro-batch by its own statistics.",
    "Use group normalization, or micro-batches that are large enough for their statistics.",
)
_SUM = Cause("sum", "The loss is a sum over examples.", "Set loss_reduction='sum'.")
_COMPARISON = Cause(
    "comparison",
    "No weights make the gradients of the micro-batches add up to that of the batch: something is computed over all "
    "examples of the batch, such as a loss that compares one example with another.",
    "Use CachedGradientUpdater for a loss that compares what an encoder returns, an optimizer hook for regularization, "
    "or a loss to which each example contributes by itself.",
)
_AGREEABLE = {_FLOAT16, _STATE, _RANDOMNESS, _BATCH_NORMALIZATION}  # with these out of the way, the steps may agree
_HIDDEN = Cause(
    "unknown",
    "Other causes could not be looked for: there is no loss in test mode, or it is another one at each call.",
    "Check again without what was found, as with a dropout ratio of 0.",
)
_UNKNOWN = Cause(
    "unknown",
    "No cause was found, so it may be rounding that the network amplifies.",
    "Check again with wider floats: with these, rounding all but vanishes.",
)


def _differs(trials: Trials, full: Gradient, **kwargs: bool) -> bool:
    """Returns whether the gradient of the whole batch is another one when it is computed once more."""
    return _compare(trials.full_batch(**kwargs), full)[0] > _TOLERANCES[trials.itemsize]


def _compare(actual: Gradient, expected: Gradient) -> Tuple[float, str]:
    """Returns the largest deviation and the name of its parameter."""
    deviations = {}
    for name, scale in _scales(expected).items():
        deviation = _largest(actual[name].astype(float) - expected[name]) / scale
        deviations[name] = math.inf if math.isnan(deviation) else deviation
    parameter = max(deviations, key=lambda name: deviations[name])
    return deviations[parameter], parameter


def _scales(gradient: Gradient) -> Dict[str, float]:
    """Returns by what the deviation of each parameter's gradient is divided."""
    sizes = {name: _largest(array) for name, array in gradient.items()}
    return {name: max(size, _SMALLEST_SHARE * max(sizes.values())) for name, size in sizes.items()}


def _factors(settings: Settings, parts: Sequence[Any]) -> numpy.ndarray:
    """Returns what the gradient of each micro-batch is multiplied by in the accumulated step."""
    weights = numpy.array(_weights(settings, parts))
    if settings.loss_reduction == "sum":
        return (weights > 0).astype(float)
    return weights / (weights.sum() or 1)


def _weights(settings: Settings, parts: Sequence[Any]) -> List[float]:
    weight_func = settings.weight_func or len
    return [check_weight(weight_func(part), "the value of weight_func") for part in parts]


def _fit_factors(gradients: Sequence[Gradient], expected: Gradient) -> numpy.ndarray:
    """Returns the factors with which the gradients add up to the expected one, by least squares."""
    products = numpy.zeros((len(gradients), len(gradients) + 1))
    for name, scale in _scales(expected).items():
        rows = [gradient[name].astype(float).ravel() / scale for gradient in [*gradients, expected]]
        products += numpy.array([[row.dot(other) for other in rows] for row in rows[:-1]])
    factors: numpy.ndarray = numpy.linalg.lstsq(products[:, :-1], products[:, -1], rcond=1e-12)[0]
    return factors


def _largest(gradient: numpy.ndarray) -> float:
    return float(numpy.abs(gradient).max(initial=0))


def _finite_or_zero(gradient: Gradient) -> Gradient:
    # A mean over no labels may be NaN. It is to count for nothing, which is what weight 0 makes of it.
    if all(numpy.isfinite(array).all() for array in gradient.values()):
        return gradient
    return {name: numpy.zeros_like(array) for name, array in gradient.items()}


def _read_settings(
    model_or_updater: Any,
    converter: Any,
    loss_func: Any,
    micro_batch_size: Any,
    weight_func: Any,
    loss_reduction: Any,
) -> Settings:
    for name, value in (("converter", converter), ("loss_func", loss_func), ("weight_func", weight_func)):
        if value is not None:
            check_callable(name, value)
    if micro_batch_size is not None:
        micro_batch_size = check_int("micro_batch_size", micro_batch_size, 1, "use None for two fifths of the batch")
    if loss_reduction is not None:
        check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
    if isinstance(model_or_updater, CachedGradientUpdater):
        raise TypeError(
            "model_or_updater must not be a CachedGradientUpdater, whose loss is not one of micro-batches; compare its "
            "parameters after an update with those of StandardUpdater"
        )
    if isinstance(model_or_updater, AccumulatingUpdater):
        updater = model_or_updater
        optimizer = updater.get_optimizer("main")
        return Settings(
            optimizer.target,
            converter or updater.converter,
            loss_func or updater.loss_func,
            micro_batch_size or updater.micro_batch_size,
            weight_func or updater.weight_func,
            loss_reduction or updater.loss_reduction,
            updater.input_device,
            optimizer._loss_scale,
        )
    if not isinstance(model_or_updater, chainer.Link):
        raise TypeError(
            f"model_or_updater must be a Link or an AccumulatingUpdater, got {model_or_updater!r}; "
            "pass the model, and the loss function as loss_func"
        )
    return Settings(
        model_or_updater,
        converter or concat_examples,
        loss_func,
        micro_batch_size,
        weight_func,
        loss_reduction or "mean",
        model_or_updater.device,
        None,
    )


def _split(batch: Any, micro_batch_size: Optional[int]) -> List[Any]:
    """Returns micro-batches, the last of which is smaller than the first if there are three examples or more."""
    if not hasattr(batch, "__len__") or isinstance(batch, (tuple, dict, str)):
        raise TypeError(
            f"batch must be a list of examples, got {reprlib.repr(batch)}; pass what iterator.next() returns"
        )
    size = len(batch)
    if size < 2:
        raise ValueError(f"batch must have two examples or more, got {size}; pass as many as make an effective batch")
    # They never grow: a stateful recurrent layer would not take more examples than it had in the call before.
    step = min(micro_batch_size or -(-2 * size // 5), size - 1)
    ends = list(range(step, size, step))
    if size % step == 0 and step > 1:
        ends.append(size - step // 2)
    return [batch[start:end] for start, end in zip([0, *ends], [*ends, size])]


def _check_usable(full: Gradient) -> None:
    for name, gradient in full.items():
        wrong = gradient[~numpy.isfinite(gradient)]
        if wrong.size > 0:
            raise ValueError(
                f"the gradient of the whole batch must be finite, got {wrong[0]} for {name}; "
                "pass a batch with a finite loss, and use a smaller loss scale if there is one"
            )
    if not any(gradient.any() for gradient in full.values()):
        raise ValueError(
            "the gradient of the whole batch must not be zero, got zero for all parameters; "
            "pass examples with something to learn from, and use loss scaling in float16"
        )


def _as_counts(factors: numpy.ndarray, n_examples: int) -> List[str]:
    """Returns factors as the smallest whole numbers of which they are the shares, or else as shares of examples."""
    for total in range(1, 1001):
        counts = numpy.rint(total * factors) + 0  # which makes -0 0
        if numpy.abs(total * factors - counts).max() < 0.01:
            return [f"{count:.0f}" for count in counts]
    return [f"{n_examples * factor:.3g}" for factor in factors]


def _write_message(
    deviation: float, parameter: str, tolerance: float, causes: Sequence[Cause], parts: Sequence[Any]
) -> str:
    verdict = "is not" if deviation > tolerance else "is"
    lines = [
        f"The accumulated step {verdict} the full-batch step: with micro-batches of {_listed(map(len, parts))} "
        f"examples, the gradient of {parameter} deviates by {deviation:.2g} of its largest entry; up to {tolerance:g} "
        "is rounding."
    ]
    lines += [f"- {cause.name}: {cause.explanation} {cause.remedy}" for cause in causes]
    if causes and set(causes) <= _AGREEABLE:
        lines.append("Apart from that, the steps are the same.")
    return "\n".join(lines)


def _listed(values: Any) -> str:
    words = [str(value) for value in values]
    if len(words) > 9:
        words = [*words[:8], f"{len(words) - 8} more"]
    return f"{', '.join(words[:-1])} and {words[-1]}"
