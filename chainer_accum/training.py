"""train_model and setup_trainer_with_accumulation: a complete training loop in one call."""

from __future__ import annotations

import difflib
import functools
import inspect
import pathlib
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Union

import chainer
from chainer.training import Trainer, extensions

from chainer_accum._arguments import check_callable, check_instance, check_int
from chainer_accum._devices import DeviceSpec
from chainer_accum.batches import Steps
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
    **options: Any,
) -> List[Dict[str, float]]:
    """Trains a model with gradient accumulation and returns the mean loss and other reported values of each epoch.

    Args:
        model (~chainer.Link): Model to train.
        optimizer (~chainer.Optimizer): Optimizer. If it has not been set up yet, it is set up with the model.
        train_iter (~chainer.dataset.Iterator): Dataset iterator for the training dataset.
        loss_func (callable): Loss function, as for :class:`~chainer_accum.AccumulatingUpdater`, called with the arrays
            of a batch. If ``None``, the model is the loss function.
        accumulation_steps: Number of iterator batches per update, as for :class:`~chainer_accum.AccumulatingUpdater`.
        num_epochs (int): Number of epochs. Training ends earlier if the iterator does.
        device (device specifier): Device to train on. If ``None``, the model stays where it is.
        **options: Other keyword arguments of :class:`~chainer_accum.AccumulatingUpdater`, such as
            ``micro_batch_size=8`` or ``lockstep='memory'``.

    Returns:
        list of dict: One dictionary per epoch. It has ``'epoch'``, counted from 1, ``'loss'``, if the loss function
        returns it as a :class:`~chainer.Variable`, and every other scalar that was reported, such as
        ``'main/accuracy'``. Values are means over the examples of the updates that ended in the epoch. Epochs that end
        within the same update have the same means.

    Raises:
        ValueError: If the optimizer was set up with a different model, or a value is invalid.
        TypeError: If an option is unknown, or an argument has the wrong type.

    """
    check_int("num_epochs", num_epochs, 1, "give the number of epochs to train for")
    _check_options(train_model, options)
    updater = _make_updater(model, optimizer, train_iter, loss_func, accumulation_steps, device, options)
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
    **options: Any,
) -> Trainer:
    """Returns a Trainer that accumulates gradients, writes a log and shows its progress.

    Extend it as needed, then call ``run()``. It has :class:`~chainer.training.extensions.LogReport`,
    :class:`~chainer.training.extensions.ProgressBar`, which counts effective batches, and
    :class:`~chainer_accum.extensions.Accumulate`. If the loss function returns one :class:`~chainer.Variable`, it is
    logged as ``loss``, along with what the model reports.

    Args:
        model (~chainer.Link): Model to train.
        train_iter (~chainer.dataset.Iterator): Dataset iterator for the training dataset.
        optimizer (~chainer.Optimizer): Optimizer. If it has not been set up yet, it is set up with the model.
        loss_func (callable): Loss function, as for :class:`~chainer_accum.AccumulatingUpdater`, called with the arrays
            of a batch. If ``None``, the model is the loss function.
        accumulation_steps: Number of iterator batches per update, as for :class:`~chainer_accum.AccumulatingUpdater`.
        num_epochs (int): Number of epochs.
        device (device specifier): Device to train on. If ``None``, the model stays where it is.
        out (str): Folder for the log and for the output of other extensions.
        **options: Other keyword arguments of :class:`~chainer_accum.AccumulatingUpdater`, such as
            ``micro_batch_size=8`` or ``lockstep='memory'``.

    Returns:
        ~chainer.training.Trainer: The Trainer.

    Raises:
        ValueError: If the optimizer was set up with a different model, or a value is invalid.
        TypeError: If an option is unknown, or an argument has the wrong type.

    """
    check_int("num_epochs", num_epochs, 1, "give the number of epochs to train for")
    _check_options(setup_trainer_with_accumulation, options)
    updater = _make_updater(model, optimizer, train_iter, loss_func, accumulation_steps, device, options)
    trainer = Trainer(updater, (num_epochs, "epoch"), out=str(out))
    trainer.extend(Accumulate())
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.ProgressBar(update_interval=10))
    return trainer


def _check_options(function: Callable[..., Any], options: Collection[str]) -> None:
    """Raises TypeError for an option that the updater does not have."""
    known = {*inspect.signature(AccumulatingUpdater).parameters, *inspect.signature(function).parameters}
    known -= {"iterator", "options"}  # which is train_iter, and the options themselves
    for name in options:
        if name not in known:
            (closest,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise TypeError(
                f"{function.__name__} takes no option {name!r}; did you mean {closest!r}? "
                "It takes the keyword arguments of AccumulatingUpdater"
            )


def _make_updater(
    model: chainer.Link,
    optimizer: chainer.Optimizer,
    train_iter: chainer.dataset.Iterator,
    loss_func: Optional[Callable[..., chainer.Variable]],
    accumulation_steps: Steps,
    device: Optional[DeviceSpec],
    options: Mapping[str, Any],
) -> AccumulatingUpdater:
    check_instance(optimizer, "optimizer")
    for name, value, method in (("optimizer", optimizer, "setup"), ("train_iter", train_iter, "next")):
        if not callable(getattr(value, method, None)):
            raise TypeError(f"{name} must have the method {method}, got {value!r}; check the order of the arguments")
    if loss_func is not None:
        check_callable("loss_func", loss_func, "pass a function, or None if the model returns the loss")
    target = getattr(optimizer, "target", None)
    if target is None:
        optimizer.setup(model)
    elif target is not model:
        raise ValueError(
            f"optimizer must be set up with the model, got one set up with a different {type(target).__name__}; "
            "call optimizer.setup(model) or pass a new optimizer"
        )
    try:
        return AccumulatingUpdater(
            train_iter,
            optimizer,
            device=device,
            loss_func=functools.partial(_report_loss, loss_func or model),
            accumulation_steps=accumulation_steps,
            **options,
        )
    except BaseException:
        if target is None:
            _undo_setup(optimizer)
        raise


def _undo_setup(optimizer: Any) -> None:
    """Lets an optimizer be set up with a model again, since the caller has not set it up."""
    optimizer.target = None


def _report_loss(loss_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns what the loss function returns, and reports the loss, or the sum of the losses."""
    returned = loss_func(*args, **kwargs)
    chainer.report({"loss": total_loss(lambda: returned)})
    return returned
