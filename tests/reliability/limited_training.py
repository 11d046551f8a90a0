"""A training run in a process that may have only so much memory."""

from __future__ import annotations

import contextlib
import pathlib
import resource
import warnings
from typing import Any, Dict, Iterator, Optional

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator
from chainer.serializers import DictionarySerializer

EXAMPLES = 1024
LITTLE = 32 * 2**20
# By how the effective batch is formed: batch size and arguments. All of it at once takes more than any limit.
WAYS: Dict[str, Dict[str, Any]] = {
    "split": {"batch_size": EXAMPLES, "micro_batch_size": EXAMPLES},
    "gathered": {"batch_size": EXAMPLES // 2, "accumulation_steps": 2, "split_when_out_of_memory": True},
}


def make_updater(batch_size: int, **kwargs: Any) -> chainer_accum.AccumulatingUpdater:
    random = numpy.random.RandomState(0)
    examples = [(random.standard_normal(64).astype("f"), numpy.int32(i % 10)) for i in range(EXAMPLES)]
    initial = [chainer.initializers.LeCunNormal(rng=numpy.random.RandomState(seed)) for seed in range(2)]
    model = L.Classifier(
        chainer.Sequential(
            L.Linear(64, 4096, initialW=initial[0]),
            L.BatchNormalization(4096, use_gamma=False, use_beta=False),
            F.dropout,
            L.Linear(4096, 10, initialW=initial[1]),
        )
    )
    optimizer = chainer.optimizers.MomentumSGD(0.1).setup(model)
    chainer.config.train = False  # so that nothing depends on how a batch is split
    model(*chainer.dataset.concat_examples(examples[:8]))  # what is loaded late is loaded now
    iterator = SerialIterator(examples, batch_size, shuffle=False)
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, **kwargs)


@contextlib.contextmanager
def limited_to(additional: Optional[int]) -> Iterator[None]:
    """Returns a context in which the process may take so many bytes of memory more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if additional is not None:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + additional, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def save(path: pathlib.Path, updater: Any, **others: Any) -> None:
    serializer = DictionarySerializer()
    updater.serialize(serializer["updater"])
    numpy.savez(str(path), **serializer.target, **others)


def train_within(limit: Optional[int], way: str, path: pathlib.Path) -> None:
    """Makes two updates, and saves the updater and what the micro-batch size is lowered to."""
    updater = make_updater(**WAYS[way])
    with limited_to(limit), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(2):
            updater.update()
    save(path, updater, size=updater.micro_batch_size or 0)


def run_out_and_go_on(way: str, path: pathlib.Path) -> None:
    """Fails for want of memory while there is too little for a single example, and makes two updates later."""
    updater = make_updater(**{**WAYS[way], "batch_size": 16})  # few, as they will be taken one by one

    def loss_func(x: Any, t: Any) -> chainer.Variable:
        numpy.ones(2 * LITTLE, "b")  # as a function with a workspace
        return updater.get_optimizer("main").target(x, t)

    updater.loss_func = loss_func
    save(path.with_suffix(".before.npz"), updater)
    message = ""
    with limited_to(LITTLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            updater.update()
        except MemoryError as error:
            message = str(error)
    save(path.with_suffix(".failed.npz"), updater, message=message)
    for _ in range(2):
        updater.update()
    save(path, updater)
