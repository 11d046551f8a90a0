"""The floor of accumulation, and what is timed against it: each with a model, an optimizer and an iterator of its own.

The floor is k bare forward/backward passes, iterator and converter included, and one ``optimizer.update()``: the least
that any accumulation does that makes each gradient and then drops it.
"""

from __future__ import annotations

from typing import Any, Callable, Tuple

import chainer_accum
import chainer
from workloads import Workload


def set_up(workload: Workload, k: int, device: Any = None) -> Tuple[Any, Any]:
    """Returns an optimizer with a model that reports, and an iterator over k micro-batches."""
    optimizer = chainer.optimizers.SGD().setup(workload.make_model())
    if device is not None:
        optimizer.target.to_device(device)
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    dataset = workload.make_dataset(k * workload.micro_batch_size)
    return optimizer, chainer.iterators.SerialIterator(dataset, workload.micro_batch_size, shuffle=False)


def make_floor(optimizer: Any, iterator: Any, k: int, device: Any = None) -> Callable[[], None]:
    """Returns the floor: its update has the gradient of the last micro-batch alone."""

    def floor() -> None:
        for _ in range(k):
            loss = optimizer.target(*chainer.dataset.concat_examples(iterator.next(), device))
            optimizer.target.cleargrads()
            loss.backward()
        optimizer.update()

    return floor


def make_window(optimizer: Any, iterator: Any, k: int, device: Any = None) -> Callable[[], None]:
    """Returns an update of AccumulatingUpdater."""
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, device=device, accumulation_steps=k).update


def make_by_hand(optimizer: Any, iterator: Any, k: int, device: Any = None) -> Callable[[], None]:
    """Returns accumulation as it is written by hand: ``loss / k``, and Chainer adds to ``param.grad``."""

    def by_hand() -> None:
        optimizer.target.cleargrads()
        for _ in range(k):
            loss = optimizer.target(*chainer.dataset.concat_examples(iterator.next(), device)) / k
            loss.backward()
        optimizer.update()

    return by_hand
