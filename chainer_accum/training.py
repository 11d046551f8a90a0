"""train_model and setup_trainer_with_accumulation: a complete training loop in one call."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, Callable, Dict, List, Optional, Union

import chainer
from chainer.training import Trainer, extensions

from chainer_accum._arguments import check_callable, check_instance, check_int
from chainer_accum._devices import DeviceSpec
from chainer_accum.batches import Schedule, Steps
from chainer_accum.extensions.accumulate import Accumulate
from chainer_accum.observations import Reported
from chainer_accum.updater import AccumulatingUpdater
from chainer_accum.window import total_loss


def train_model(
    model: chainer.Link,
    optimizer: chainer.Optimizer,
    train_iter: chainer.dataset.Iterator,
    loss_func: Optional[Callable[..., chainer.Variable]],
    accumulation_steps: Steps,
    num_epochs: int,
    device: Optional[DeviceSpec] = None,
) -> List[Dict[str, float]]:
    """Trains a model with gradient accumulation and returns the mean loss and other reported values of each epoch.

    Args:
        model (~chainer.Link): Model to train.
        optimizer (~chainer.Optimizer): Optimizer. If it has not been set up yet, it is set up with the model.
        train_iter (~chainer.dataset.Iterator): Dataset iterator for the training dataset.
        loss_func (callable): Loss function, called with the arrays of a batch; it returns a scalar
            :class:`~chainer.Variable`. If ``None``, the model is the loss function.
        accumulation_steps: Number of iterator batches per update, as for :class:`~chainer_accum.AccumulatingUpdater`.
        num_epochs (int): Number of epochs. Training ends earlier if the iterator does.
        device (device specifier): Device to train on. If ``None``, the model stays where it is.

    Returns:
        list of dict: One dictionary per epoch. It has ``'epoch'``, counted from 1, ``'loss'``, and every other scalar
        that the model reported, such as ``'main/accuracy'``. Values are means over the examples of the updates that
        ended in the epoch. Epochs that end within the same update have the same means.

    Raises:
        ValueError: If the optimizer was set up with a different model, or a number is not positive.
        TypeError: If a number is not an int, or another argument has the wrong type.

    """
    check_int("num_epochs", num_epochs, 1, "give the number of epochs to train for")
    updater = _make_updater(model, optimizer, train_iter, loss_func, accumulation_steps, device)
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    reporter.add_observers("main", model.namedlinks(skipself=True))
    history: List[Dict[str, float]] = []
    summary = chainer.DictSummary()
    while updater.epoch < num_epochs:
        epoch = updater.epoch
        observation: Dict[str, Reported] = {}
        try:
            with reporter.scope(observation):
                updater.update()
        except StopIteration:
            break
        weight = updater.effective_batch_size or 1
        summary.add({key: value if isinstance(value, tuple) else (value, weight) for key, value in observation.items()})
        if updater.is_new_epoch:
            means = {key: float(mean) for key, mean in summary.compute_mean().items()}
            history += [{"epoch": ended, **means} for ended in range(epoch + 1, updater.epoch + 1)]
            summary = chainer.DictSummary()
    return history


def setup_trainer_with_accumulation(
    model: chainer.Link,
    train_iter: chainer.dataset.Iterator,
    optimizer: chainer.Optimizer,
    loss_func: Optional[Callable[..., chainer.Variable]],
    accumulation_steps: Steps,
    num_epochs: int,
    device: Optional[DeviceSpec] = None,
    *,
    out: Union[str, pathlib.Path] = "result",
) -> Trainer:
    """Returns a Trainer that accumulates gradients, writes a log and shows its progress.

    Extend it as needed, then call ``run()``. It has :class:`~chainer.training.extensions.LogReport`,
    :class:`~chainer.training.extensions.ProgressBar`, which counts effective batches, and
    :class:`~chainer_accum.extensions.Accumulate`. The loss is logged as ``loss``, along with what the model reports.

    Args:
        model (~chainer.Link): Model to train.
        train_iter (~chainer.dataset.Iterator): Dataset iterator for the training dataset.
        optimizer (~chainer.Optimizer): Optimizer. If it has not been set up yet, it is set up with the model.
        loss_func (callable): Loss function, called with the arrays of a batch; it returns a scalar
            :class:`~chainer.Variable`. If ``None``, the model is the loss function.
        accumulation_steps: Number of iterator batches per update, as for :class:`~chainer_accum.AccumulatingUpdater`.
        num_epochs (int): Number of epochs.
        device (device specifier): Device to train on. If ``None``, the model stays where it is.
        out (str): Folder for the log and for the output of other extensions.

    Returns:
        ~chainer.training.Trainer: The Trainer.

    Raises:
        ValueError: If the optimizer was set up with a different model, or a number is not positive.
        TypeError: If a number is not an int, or another argument has the wrong type.

    """
    check_int("num_epochs", num_epochs, 1, "give the number of epochs to train for")
    updater = _make_updater(model, optimizer, train_iter, loss_func, accumulation_steps, device)
    trainer = Trainer(updater, (num_epochs, "epoch"), out=str(out))
    trainer.extend(Accumulate())
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.ProgressBar(update_interval=10))
    return trainer


def _make_updater(
    model: chainer.Link,
    optimizer: chainer.Optimizer,
    train_iter: chainer.dataset.Iterator,
    loss_func: Optional[Callable[..., chainer.Variable]],
    accumulation_steps: Steps,
    device: Optional[DeviceSpec],
) -> AccumulatingUpdater:
    check_instance(optimizer, "optimizer")
    for name, value, method in (("optimizer", optimizer, "setup"), ("train_iter", train_iter, "next")):
        if not callable(getattr(value, method, None)):
            raise TypeError(f"{name} must have the method {method}, got {value!r}; check the order of the arguments")
    if loss_func is not None:
        check_callable("loss_func", loss_func, "pass a function, or None if the model returns the loss")
    Schedule(accumulation_steps)  # raises if it is invalid, before the optimizer is set up
    target = getattr(optimizer, "target", None)
    if target is None:
        optimizer.setup(model)
    elif target is not model:
        raise ValueError(
            f"optimizer must be set up with the model, got one set up with a different {type(target).__name__}; "
            "call optimizer.setup(model) or pass a new optimizer"
        )
    return AccumulatingUpdater(
        train_iter,
        optimizer,
        device=device,
        loss_func=functools.partial(_report_loss, loss_func or model),
        accumulation_steps=accumulation_steps,
    )


def _report_loss(loss_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    returned = loss_func(*args, **kwargs)
    chainer.report({"loss": total_loss(lambda: returned)})
    return returned
