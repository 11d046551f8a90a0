"""ExponentialMovingAverage: a Trainer extension that averages the parameters over the updates."""

from __future__ import annotations

import copy
from typing import Any, Dict, Iterable, Tuple

import chainer
import numpy
from chainer.training import Trainer, extension

from chainer_accum._arguments import check_bool, check_real
from chainer_accum._devices import Array, device_of
from chainer_accum.state import DeferredSignals


class ExponentialMovingAverage(extension.Extension):
    r"""Trainer extension that keeps an exponential moving average of a model's parameters.

    The averaged model often generalizes better than the trained one. It is a link of its own, for example for an
    :class:`~chainer.training.extensions.Evaluator`:

    .. code-block:: python

        average = ExponentialMovingAverage(model)
        trainer.extend(average)
        trainer.extend(Evaluator(test_iter, average.model), name='average')

    After the first update, the average is a copy of the parameters :math:`\theta`. After each later update, it moves
    towards them: :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta`, where :math:`d` is ``decay``. One
    effective batch is one update, so the decay does not depend on how the batch is split. The average of parameters
    narrower than float32 is kept in float32. Persistent values, such as the running statistics of batch normalization,
    are copied and not averaged.

    Snapshots of the Trainer contain the average. If one without it is loaded with ``strict=False``, the average begins
    with the next update.

    Args:
        target (~chainer.Link): Model to average, which the updater trains. It is copied when the extension is created.
        decay (float): Weight of the previous average, from 0 to less than 1.
        warmup (bool): Whether the average forgets the first updates sooner. In the :math:`t`-th update after the first,
            the decay is then :math:`(1 + t) / (10 + t)`, but at most ``decay``.

    Attributes:
        model (~chainer.Link): Copy of ``target`` whose parameters are the averages.
        num_updates (int): Number of updates so far.

    Raises:
        RuntimeError: If parameters have been added to ``target`` or removed since the extension was created.
        TypeError: If an argument has the wrong type.
        ValueError: If ``decay`` is out of range.

    """

    default_name = "exponential_moving_average"
    priority = extension.PRIORITY_WRITER + 100  # before an Evaluator evaluates the model, and before snapshots
    trigger = 1, "iteration"

    def __init__(self, target: chainer.Link, decay: float = 0.999, *, warmup: bool = False) -> None:
        if not isinstance(target, chainer.Link):
            raise TypeError(f"target must be a Link, got {target!r}; pass the model that the updater trains")
        self._decay = check_real(
            "decay",
            decay,
            lambda value: 0 <= value < 1,
            "a number from 0 to less than 1",
            "use a larger one for a longer average, such as 0.999",
        )
        check_bool("warmup", warmup, "use True to forget the first updates sooner")
        self._has_warmup = warmup
        self._target = target
        self._wide: Dict[str, Array] = {}  # the averages of parameters narrower than float32
        self.model = _copy_without_training(target)
        self.num_updates = 0

    def __call__(self, trainer: Trainer) -> None:
        """Moves the average towards the parameters, and copies the persistent values."""
        decay = self._decay
        if self._has_warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        pairs = list(self._pairs())
        with DeferredSignals():  # so that all averages have seen the same updates
            for averaged, link in zip(self.model.links(), self._target.links()):
                _follow(averaged, link)
            for name, average, param in pairs:
                self._move(name, average, param, decay)
            self.num_updates += 1

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the number of updates and the averaged model, whose values are saved as those of any link."""
        self.num_updates = int(serializer("num_updates", self.num_updates))
        self.model.serialize(serializer["model"])
        for name, average in self.model.namedparams():
            if self.num_updates > 0 and average.is_initialized and _wide_dtype(average) != average.dtype:
                wide = serializer["wide"](name, self._wide.get(name))
                if wide is not None:
                    self._wide[name] = wide

    def _pairs(self) -> Iterable[Tuple[str, chainer.Parameter, chainer.Parameter]]:
        """Returns the name, the average and the current state of each parameter. A shared one is there once."""
        averages, params = dict(self.model.namedparams()), dict(self._target.namedparams())
        if averages.keys() != params.keys():
            raise RuntimeError(
                "target must keep the parameters that it had when the extension was created, got a difference in "
                f"{sorted(averages.keys() ^ params.keys())}; create the extension after the last layer has been added"
            )
        return {id(param): (name, averages[name], param) for name, param in params.items()}.values()

    def _move(self, name: str, average: chainer.Parameter, param: chainer.Parameter, decay: float) -> None:
        """Moves the average of one parameter, or begins it."""
        if not param.is_initialized:
            return
        with device_of(param.array):
            if self.num_updates == 0 or not average.is_initialized:
                average.array = param.array.copy()
                if _wide_dtype(param) != param.dtype:
                    self._wide[name] = param.array.astype(_wide_dtype(param))
                return
            if name in self._wide:
                self._wide[name] = param.device.send(self._wide[name])  # a loaded one is in host memory
            mean = self._wide.get(name, average.array)
            difference = param.array - mean
            difference *= 1 - decay
            mean += difference
            if mean is not average.array:
                average.array[...] = mean


def _wide_dtype(param: chainer.Parameter) -> numpy.dtype[Any]:
    return numpy.promote_types(param.dtype, numpy.float32)


def _copy_without_training(target: chainer.Link) -> chainer.Link:
    """Returns a copy of a link, but not of its gradients, its update rules and the graph of its last pass."""
    memo: Dict[int, object] = {}  # from what is not to be copied to what takes its place
    for param in target.params():
        memo[id(param.update_rule)] = param.update_rule
    for link in target.links():
        memo.update((id(value), copy.copy(value)) for value in vars(link).values() if type(value) is chainer.Variable)
    model = copy.deepcopy(target, memo)
    model.cleargrads()
    for param in model.params():
        param.update_rule = None
    return model


def _follow(averaged: chainer.Link, link: chainer.Link) -> None:
    """Sends a link to the device of another, and copies the persistent values of that one."""
    if averaged.device != link.device:
        averaged.to_device(link.device)
    if link._persistent:
        with chainer.using_device(link.device):
            for name in link._persistent:
                setattr(averaged, name, copy.deepcopy(getattr(link, name)))
                averaged.register_persistent(name)
