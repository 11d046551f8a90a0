"""Training loops: what a loop of your own needs, the one that is written by hand, and the Trainer, done right."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Union

import chainer
from chainer.training import Trainer, extensions

from chainer_accum._arguments import check_callable, check_choice, check_instance, check_int, check_set_up, check_weight
from chainer_accum.batch_statistics import BATCH_STATISTICS
from chainer_accum.distributed import begin_window
from chainer_accum.extensions.accumulate import Accumulate
from chainer_accum.schedules import Steps, make_schedule
from chainer_accum.updater import AccumulatingUpdater
from chainer_accum.window import LOSS_REDUCTIONS, NONFINITE, Window


@contextlib.contextmanager
def accumulate(
    optimizer: Any,
    *,
    loss_reduction: str = "mean",
    expected_weight: Optional[float] = None,
    nonfinite: str = "keep",
    batch_statistics: str = "micro_batch",
) -> Iterator[Window]:
    """Returns a context in which losses are added up, and after which the optimizer updates once.

    This is gradient accumulation for a training loop of your own:

    .. code-block:: python

        with accumulate(optimizer) as window:
            for x, t in micro_batches:
                window.add(model, x, t, weight=len(x))

    The step is that of ``optimizer.update(model, ...)`` with all examples at once. A block that raises or that adds
    nothing changes neither the parameters nor the optimizer.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up with the model.
        loss_reduction (str): ``'mean'`` or ``'sum'``: what the losses are of their examples.
        expected_weight (float): What the weights are likely to add up to. It sets the magnitude of the gradients on
            their way, which matters in float16, not that of the result.
        nonfinite (str): What is done with a micro-batch whose loss or gradient is not finite. ``'keep'`` counts it like
            any other, as Chainer does; ``'skip'`` leaves it out, with its weight and what it did to persistent values;
            ``'raise'`` raises :class:`FloatingPointError`. The last two wait for the device in each pass, and hold a
            second set of gradients. With dynamic loss scaling, a gradient that is not finite is kept, for the optimizer
            to find and to lower the scale.
        batch_statistics (str): When the running averages of :class:`~chainer.links.BatchNormalization` move. With
            ``'micro_batch'``, each forward pass moves them, as in Chainer. With ``'window'``, the update moves them
            once, by the statistics of all that passed through the link in this window, as one forward pass would have.
            What is normalized is still normalized by the statistics of its micro-batch.

    Returns:
        A context manager that returns a :class:`~chainer_accum.window.Window`.

    Raises:
        FloatingPointError: If a micro-batch is not finite and ``nonfinite`` is ``'raise'``.
        ValueError: If the optimizer has not been set up or an option is unknown.

    """
    check_set_up(optimizer, "optimizer")
    check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
    check_choice("nonfinite", nonfinite, NONFINITE)
    check_choice("batch_statistics", batch_statistics, BATCH_STATISTICS)
    if expected_weight is not None and check_weight(expected_weight, "expected_weight") == 0:
        raise ValueError("expected_weight must be positive, got 0; use None to take the first weight")
    window = begin_window(optimizer, loss_reduction, expected_weight, nonfinite, batch_statistics)
    yield window
    if window.micro_batches > 0 or window.is_shared:
        window.update()


def train_model(
    model: chainer.Link,
    optimizer: Any,
    train_iter: Any,
    loss_func: Optional[Callable[..., chainer.Variable]],
    accumulation_steps: Steps,
    num_epochs: int,
    device: Any = None,
) -> List[Dict[str, float]]:
    """Trains a model for some epochs and returns what was observed in each.

    Args:
        model (~chainer.Link): Model to train.
        optimizer (~chainer.Optimizer): Optimizer. If it has not been set up yet, it is set up with the model.
        train_iter (~chainer.dataset.Iterator): Dataset iterator for the training dataset.
        loss_func (callable): Loss function, called with the arrays of a batch; it returns a scalar
            :class:`~chainer.Variable`. If it is ``None``, the model is the loss function.
        accumulation_steps: Number of iterator batches per update, as for :class:`~chainer_accum.AccumulatingUpdater`.
        num_epochs (int): Number of epochs. Training ends earlier if the iterator does.
        device (device specifier): Device to train on. If it is ``None``, the model stays where it is.

    Returns:
        list of dict: For each epoch, ``'epoch'``, counted from 1, the ``'loss'``, and every other scalar that the model
        reported, such as ``'main/accuracy'``: means over the examples of the updates that ended in the epoch.

    Raises:
        ValueError: If the optimizer was set up with another model, or a number is not positive.
        TypeError: If a number is not an int, or another argument is of the wrong type.

    """
    check_int("num_epochs", num_epochs, 1, "give the number of epochs to train for")
    updater = _make_updater(model, optimizer, train_iter, loss_func, accumulation_steps, device)
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    reporter.add_observers("main", model.namedlinks(skipself=True))
    history: List[Dict[str, float]] = []
    summary = chainer.DictSummary()
    while updater.epoch < num_epochs:
        observation: Dict[str, Any] = {}
        try:
            with reporter.scope(observation):
                updater.update()
        except StopIteration:
            break
        weight = updater.effective_batch_size or 1
        summary.add({key: value if isinstance(value, tuple) else (value, weight) for key, value in observation.items()})
        if updater.is_new_epoch:
            means = {key: float(mean) for key, mean in summary.compute_mean().items()}
            history.append({"epoch": updater.epoch, **means})
            summary = chainer.DictSummary()
    return history


def setup_trainer_with_accumulation(
    model: chainer.Link,
    train_iter: Any,
    optimizer: Any,
    loss_func: Optional[Callable[..., chainer.Variable]],
    accumulation_steps: Steps,
    num_epochs: int,
    device: Any = None,
    *,
    out: Union[str, pathlib.Path] = "result",
) -> Trainer:
    """Returns a Trainer that accumulates, logs and shows its progress, ready to be extended and run.

    It has :class:`~chainer.training.extensions.LogReport`, :class:`~chainer.training.extensions.ProgressBar`, which
    counts effective batches, and :class:`~chainer_accum.extensions.Accumulate`. The loss is logged as ``loss``, besides
    what the model reports.

    Args:
        model (~chainer.Link): Model to train.
        train_iter (~chainer.dataset.Iterator): Dataset iterator for the training dataset.
        optimizer (~chainer.Optimizer): Optimizer. If it has not been set up yet, it is set up with the model.
        loss_func (callable): Loss function, called with the arrays of a batch; it returns a scalar
            :class:`~chainer.Variable`. If it is ``None``, the model is the loss function.
        accumulation_steps: Number of iterator batches per update, as for :class:`~chainer_accum.AccumulatingUpdater`.
        num_epochs (int): Number of epochs.
        device (device specifier): Device to train on. If it is ``None``, the model stays where it is.
        out (str): Folder of the log and of what other extensions write.

    Returns:
        ~chainer.training.Trainer: The Trainer.

    Raises:
        ValueError: If the optimizer was set up with another model, or a number is not positive.
        TypeError: If a number is not an int, or another argument is of the wrong type.

    """
    check_int("num_epochs", num_epochs, 1, "give the number of epochs to train for")
    updater = _make_updater(model, optimizer, train_iter, loss_func, accumulation_steps, device)
    trainer = Trainer(updater, (num_epochs, "epoch"), out=str(out))
    trainer.extend(Accumulate())
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.ProgressBar(update_interval=10))
    return trainer


def _make_updater(
    model: chainer.Link, optimizer: Any, train_iter: Any, loss_func: Any, accumulation_steps: Steps, device: Any
) -> AccumulatingUpdater:
    check_instance(optimizer, "optimizer")
    for name, value, method in (("optimizer", optimizer, "setup"), ("train_iter", train_iter, "next")):
        if not callable(getattr(value, method, None)):
            raise TypeError(f"{name} must have the method {method}, got {value!r}; look at the order of the arguments")
    if loss_func is not None:
        check_callable("loss_func", loss_func, "pass a function, or None if the model returns the loss")
    schedule = make_schedule(accumulation_steps)  # a function: with that, the updater always counts examples
    target = getattr(optimizer, "target", None)
    if target is None:
        optimizer.setup(model)
    elif target is not model:
        raise ValueError(
            f"optimizer must be set up with the model, got one set up with another {type(target).__name__}; "
            "call optimizer.setup(model) or pass a new optimizer"
        )
    return AccumulatingUpdater(
        train_iter,
        optimizer,
        device=device,
        loss_func=functools.partial(_report_loss, loss_func or model),
        accumulation_steps=schedule,
    )


def _report_loss(loss_func: Callable[..., chainer.Variable], *args: Any, **kwargs: Any) -> chainer.Variable:
    loss = loss_func(*args, **kwargs)
    chainer.report({"loss": loss})
    return loss
