"""Accumulation as users of Chainer have it: by this package, and as it is written by hand."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import chainer_accum
import chainer
import numpy
from chainer.training.updaters import StandardUpdater
from workloads import Workload


class Job(NamedTuple):
    """What is trained with what. The data end after the dataset; some end their last window then."""

    workload: Workload
    dataset: List[Tuple[numpy.ndarray, numpy.int32]]  # examples; the label -1 is to be ignored
    micro_batch_size: int
    k: int
    learning_rate: float = 0.01
    weight_func: Optional[Callable[[Any], Any]] = None  # for those who ask what the loss is a mean over

    def make_model(self) -> chainer.Chain:
        """Returns the classifier, initialised the same at every call, which computes the loss and nothing else."""
        model = self.workload.make_model()
        model.compute_accuracy = False
        return model


class Contestant(NamedTuple):
    """One way of accumulation, set up for a job."""

    window: Callable[[], None]  # makes the next window
    parameters: Callable[[], List[numpy.ndarray]]  # returns them layer by layer, each weight before its bias


def floor(job: Job) -> Contestant:
    """Bare passes, each cleared before its backward pass, and one update."""
    optimizer, iterator = _set_up(job)
    model = optimizer.target

    def window() -> None:
        for x, t in _micro_batches(iterator, job.k):
            loss = model(x, t)
            model.cleargrads()
            loss.backward()
        optimizer.update()

    return _contestant(window, optimizer)


def accumulating_updater(job: Job, lockstep: Optional[str] = None) -> Contestant:
    """``accumulation_steps=k``, and a ``weight_func`` that counts labels where some are to be ignored."""
    optimizer, iterator = _set_up(job)
    updater = chainer_accum.AccumulatingUpdater(
        iterator, optimizer, accumulation_steps=job.k, weight_func=job.weight_func, lockstep=lockstep
    )
    return _contestant(_make_loop(updater, 1), optimizer)


def lockstep(job: Job) -> Contestant:
    """AccumulatingUpdater with ``lockstep='memory'``, in the last table, whose networks look at the whole batch."""
    return accumulating_updater(job, "memory")


def loss_over_k(job: Job) -> Contestant:
    """``loss / k``, and Chainer adds to ``param.grad``."""
    optimizer, iterator = _set_up(job)
    model = optimizer.target

    def window() -> None:
        model.cleargrads()
        for x, t in _micro_batches(iterator, job.k):
            loss = model(x, t) / job.k
            loss.backward()
        optimizer.update()

    return _contestant(window, optimizer)


def sum_of_losses(job: Job) -> Contestant:
    """The mean of the losses that there are, and one backward pass through all of them."""
    optimizer, iterator = _set_up(job)
    model = optimizer.target

    def window() -> None:
        losses = [model(x, t) for x, t in _micro_batches(iterator, job.k)]
        loss = sum(losses) / len(losses)
        model.cleargrads()
        loss.backward()
        optimizer.update()

    return _contestant(window, optimizer)


def update_at_each_kth_call(job: Job) -> Contestant:
    """An updater that passes backward at each call and updates at each k-th, as ESPnet's does.

    What a Trainer does after each call, it does between the micro-batches, too. At the end of the data, what has been
    added waits for an update that does not come.

    """
    optimizer, iterator = _set_up(job)
    return _contestant(_make_loop(_UpdateAtEachKthCall(iterator, optimizer, job.k), job.k), optimizer)


class _UpdateAtEachKthCall(StandardUpdater):
    def __init__(self, iterator: Any, optimizer: Any, k: int) -> None:
        super().__init__(iterator, optimizer)
        self._k = k
        self._calls = 0

    def update_core(self) -> None:
        optimizer = self.get_optimizer("main")
        if self._calls % self._k == 0:
            optimizer.target.cleargrads()
        batch = self.get_iterator("main").next()
        loss = optimizer.target(*self.converter(batch, self.device)) / self._k
        loss.backward()
        self._calls += 1
        if self._calls % self._k == 0:
            optimizer.update()


CONTESTANTS: Dict[str, Callable[[Job], Contestant]] = {
    "chainer_accum, AccumulatingUpdater": accumulating_updater,
    "Chainer, loss / k": loss_over_k,
    "Chainer, losses summed, one backward": sum_of_losses,
    "Chainer, update at each k-th call (ESPnet)": update_at_each_kth_call,
}
LOCKSTEP = {"chainer_accum, AccumulatingUpdater in lockstep": lockstep}  # where something looks at the batch


def parameters_of(model: chainer.Chain) -> List[chainer.Parameter]:
    """Returns the parameters layer by layer, an order that ``params()`` does not keep if functions stand between."""
    layers = (layer for layer in model.predictor if isinstance(layer, chainer.Link))
    params = (getattr(layer, name, None) for layer in layers for name in ("W", "gamma", "b", "beta"))
    return [param for param in params if param is not None]


def _set_up(job: Job) -> Tuple[Any, Any]:
    """Returns an optimizer with a model, and an iterator."""
    optimizer = chainer.optimizers.SGD(lr=job.learning_rate).setup(job.make_model())
    iterator = chainer.iterators.SerialIterator(job.dataset, job.micro_batch_size, repeat=False, shuffle=False)
    return optimizer, iterator


def _micro_batches(iterator: Any, k: int) -> Iterator[Any]:
    """Yields the next k micro-batches, or those that there still are."""
    return map(chainer.dataset.concat_examples, itertools.islice(iterator, k))


def _make_loop(updater: Any, calls: int) -> Callable[[], None]:
    """Returns what calls the updater as a Trainer with a LogReport would, which adds up what each call reports."""
    summary = chainer.reporter.DictSummary()

    def window() -> None:
        for _ in range(calls):
            observation: Dict[str, Any] = {}
            try:
                with chainer.get_current_reporter().scope(observation):
                    updater.update()
            except StopIteration:
                return
            summary.add(observation)

    return window


def _contestant(window: Callable[[], None], optimizer: Any) -> Contestant:
    reporter = chainer.Reporter()  # as in a Trainer, models report to somebody
    reporter.add_observer("main", optimizer.target)

    def reported_window() -> None:
        with reporter.scope({}):
            window()

    return Contestant(reported_window, lambda: [param.array for param in parameters_of(optimizer.target)])
