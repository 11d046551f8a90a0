"""Peak memory: the most that NumPy and Python have allocated at a time (``tracemalloc``)."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any, Type

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
from workloads import Workload


def peak(
    workload: Workload, optimizer_class: Any, updater_class: Type[Any], batch_size: int, examples: int, **kwargs: Any
) -> int:
    """Returns the peak, in bytes, of training with so many examples, without what the examples themselves take."""
    dataset = workload.make_dataset(examples)
    gc.collect()
    tracemalloc.start()
    try:
        optimizer = optimizer_class().setup(workload.make_model())
        iterator = chainer.iterators.SerialIterator(dataset, batch_size, shuffle=False)
        updater = updater_class(iterator, optimizer, **kwargs)
        while iterator.epoch == 0:
            updater.update()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
