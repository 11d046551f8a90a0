"""check_equivalence: tests whether the accumulated step of a model equals its full-batch step, and if not, why.

The answer depends on the whole model: on each layer, on the loss, and on what the loss is divided by. Class names do
not tell, so both steps are run and compared. If they differ, further steps follow, each of which excludes one possible
cause. Different random numbers reveal randomness; a second call reveals state; test mode excludes batch normalization
and dropout; float32 excludes the rounding of float16. What remains is linear: the weights with which the gradients of
the micro-batches add up to that of the batch show what the loss is divided by. If they add up only when all of them are
padded like the batch, the model reads padding. If no such weights exist, something is computed over the whole batch.
"""

from __future__ import annotations

import reprlib
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import chainer
from chainer.dataset import concat_examples

from chainer_accum._arguments import check_callable, check_int
from chainer_accum.batches import WeightFunc
from chainer_accum.cached_gradients import CachedGradientUpdater
from chainer_accum.diagnostics.causes import AGREEABLE, Cause, find_causes, listed
from chainer_accum.diagnostics.comparison import TOLERANCES, check_usable, compare
from chainer_accum.diagnostics.trials import Settings, Trials
from chainer_accum.lockstep import StoreSpec, make_lockstep_policy
from chainer_accum.updater import AccumulatingUpdater
from chainer_accum.window import WindowOptions


class Equivalence(NamedTuple):
    """The result of :func:`~chainer_accum.check_equivalence`.

    It is true if the steps are equal, and prints as its message.

    Attributes:
        is_equivalent (bool): Whether the accumulated step equals the full-batch step up to rounding.
        deviation (float): The deviation of the gradient of :attr:`parameter`: the largest difference of an entry,
            divided by the largest entry of that parameter's full-batch gradient, or by a hundredth of the largest entry
            of any parameter if that is larger.
        parameter (str): Name of the parameter whose gradient deviates most.
        tolerance (float): Largest deviation that counts as rounding.
        causes (tuple of Cause): Why the steps differ; empty if they do not.
        message (str): The result in words, with what to set.
        is_equivalent_in_lockstep (bool): Whether the step is the same in lockstep. ``None`` if this was not tried: the
            steps are equal without it, or ran in lockstep already.

    """

    is_equivalent: bool
    deviation: float
    parameter: str
    tolerance: float
    causes: Tuple[Cause, ...]
    message: str
    is_equivalent_in_lockstep: Optional[bool] = None

    def __bool__(self) -> bool:
        return self.is_equivalent

    def __repr__(self) -> str:
        return self.message


def check_equivalence(
    model_or_updater: Union[chainer.Link, AccumulatingUpdater],
    batch: Any,
    *,
    converter: Optional[Callable[..., Any]] = None,
    loss_func: Optional[Callable[..., chainer.Variable]] = None,
    micro_batch_size: Optional[int] = None,
    weight_func: Optional[WeightFunc] = None,
    loss_reduction: Optional[str] = None,
    lockstep: StoreSpec = None,
) -> Equivalence:
    """Tests whether the accumulated step of a model equals its full-batch step, and if not, finds out why.

    The batch is split into micro-batches of different sizes. The gradient that
    :class:`~chainer_accum.AccumulatingUpdater` computes from them is compared with the gradient that
    :class:`~chainer.training.updaters.StandardUpdater` computes from the whole batch. All passes run under the current
    configuration, as in training, and start from the current state of the model. If the gradients deviate by more than
    rounding, further passes find out why.

    Afterwards, the model, the optimizer, the iterator, the reporter, the random generators and all other links that a
    pass used are restored. Changes that a loss function makes to other objects of its own remain.

    .. code-block:: python

        assert check_equivalence(updater, batch)

    Args:
        model_or_updater: Link that returns the loss; or any link, with a ``loss_func``; or an
            :class:`~chainer_accum.AccumulatingUpdater`, which supplies converter, loss function, micro-batch size,
            weight function, loss reduction, lockstep, input device and loss scale.
        batch (list): Two or more examples, as returned by the iterator. They must fit in memory as one batch. Use
            examples as diverse as in training: of different lengths, with labels to ignore.
        converter: Converter function. By default, that of the updater, or :func:`~chainer.dataset.concat_examples`.
        loss_func: Loss function. By default, that of the updater, or the link.
        micro_batch_size (int): The largest number of examples in a micro-batch. By default, that of the updater, or two
            fifths of the batch. It is always less than the batch.
        weight_func: Function that returns the weight of a micro-batch. By default, that of the updater, or the number
            of examples.
        loss_reduction (str): ``'mean'`` or ``'sum'``. By default, that of the updater, or ``'mean'``.
        lockstep: Where micro-batches in lockstep keep what they need, such as ``'memory'``. By default, that of the
            updater, or ``None``: not in lockstep. If the steps differ then, the result says whether lockstep would make
            them equal.

    Returns:
        ~chainer_accum.diagnostics.Equivalence: The result. It is true if the steps are equal.

    Raises:
        TypeError: If an argument has the wrong type, or the loss is not a :class:`~chainer.Variable`.
        RuntimeError: If the loss does not depend on a parameter.
        ValueError: If an argument has an invalid value, there is no parameter to train, the loss is not a scalar, or
            the gradient of the whole batch is zero or not finite.

    """
    settings = _read_settings(
        model_or_updater, converter, loss_func, micro_batch_size, weight_func, loss_reduction, lockstep
    )
    parts = _split(batch, settings.micro_batch_size)
    trials = Trials(settings, batch, parts)
    with trials.undone():
        trials.initialize()
        full, accumulated = trials.full_batch(), trials.accumulated()
        check_usable(full)
        deviation, parameter = compare(accumulated, full)
        tolerance = TOLERANCES[trials.itemsize]
        causes = tuple(find_causes(trials, full)) if deviation > tolerance else ()
        is_open = deviation > tolerance and settings.lockstep is None
        in_lockstep = _is_equal_in_lockstep(trials, tolerance) if is_open else None
    message = _write_message(deviation, parameter, tolerance, causes, parts)
    if in_lockstep:
        message += "\nWith lockstep='memory', the steps are the same."
    return Equivalence(deviation <= tolerance, deviation, parameter, tolerance, causes, message, in_lockstep)


def _is_equal_in_lockstep(trials: Trials, tolerance: float) -> bool:
    try:
        return compare(trials.in_lockstep(), trials.full_batch())[0] <= tolerance
    except Exception:  # lockstep refuses what it cannot make exact
        return False


def _read_settings(
    model_or_updater: object,
    converter: Optional[Callable[..., Any]],
    loss_func: Optional[Callable[..., chainer.Variable]],
    micro_batch_size: Optional[int],
    weight_func: Optional[WeightFunc],
    loss_reduction: Optional[str],
    lockstep: StoreSpec,
) -> Settings:
    for name, value in (("converter", converter), ("loss_func", loss_func), ("weight_func", weight_func)):
        if value is not None:
            check_callable(name, value)
    if micro_batch_size is not None:
        micro_batch_size = check_int("micro_batch_size", micro_batch_size, 1, "use None for two fifths of the batch")
    if loss_reduction is not None:
        WindowOptions(loss_reduction).checked()
    make_lockstep_policy(lockstep)  # raises if there is no such store
    if isinstance(model_or_updater, CachedGradientUpdater):
        raise TypeError(
            "model_or_updater must not be a CachedGradientUpdater, whose loss is that of the whole batch; compare its "
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
            updater.lockstep if lockstep is None else lockstep,
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
        lockstep,
    )


def _split(batch: Sequence[Any], micro_batch_size: Optional[int]) -> List[Sequence[Any]]:
    """Returns micro-batches. With three or more examples, the last micro-batch is smaller than the first."""
    if not hasattr(batch, "__len__") or isinstance(batch, (tuple, dict, str)):
        raise TypeError(
            f"batch must be a list of examples, got {reprlib.repr(batch)}; pass what iterator.next() returns"
        )
    size = len(batch)
    if size < 2:
        raise ValueError(f"batch must have two or more examples, got {size}; pass as many as in an effective batch")
    # Sizes never grow: a stateful recurrent layer cannot take more examples than in the call before.
    step = min(micro_batch_size or -(-2 * size // 5), size - 1)
    ends = list(range(step, size, step))
    if size % step == 0 and step > 1:
        ends.append(size - step // 2)
    return [batch[start:end] for start, end in zip([0, *ends], [*ends, size])]


def _write_message(
    deviation: float, parameter: str, tolerance: float, causes: Sequence[Cause], parts: Sequence[Sequence[Any]]
) -> str:
    verdict = "is not" if deviation > tolerance else "is"
    lines = [
        f"The accumulated step {verdict} the full-batch step: with micro-batches of {listed(map(len, parts))} "
        f"examples, the gradient of {parameter} deviates by {deviation:.2g} of its largest entry; up to {tolerance:g} "
        "is rounding."
    ]
    lines += [f"- {cause.name}: {cause.explanation} {cause.remedy}" for cause in causes]
    if causes and set(causes) <= AGREEABLE:
        lines.append("Apart from that, the steps are the same.")
    return "\n".join(lines)
