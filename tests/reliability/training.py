"""The training run that is killed: all that has a state is in it, and it says which stage it comes to.

It is small, so that most of its time is spent where a kill could do harm.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import random
from typing import Any, Callable, Dict, List

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import MultiprocessIterator, SerialIterator
from chainer.serializers import save_npz
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

UPDATES_PER_SNAPSHOT = 3
UPDATES = 51  # after which there is a snapshot
# In the order in which a run comes to them: the last three time and again.
STAGES = ("start", "load", "update", "write", "rename")


def make_examples() -> List[Any]:
    generator = numpy.random.RandomState(1)
    return [(generator.standard_normal(5).astype("f"), numpy.int32(generator.randint(3))) for _ in range(40)]


def shuffled(order: numpy.ndarray, position: int) -> numpy.ndarray:
    """Returns the order of the next epoch, which depends on nothing but the last one, as that is in the snapshot."""
    return numpy.random.RandomState(order[0]).permutation(order)


def serial(batch_size: int) -> SerialIterator:
    return SerialIterator(make_examples(), batch_size)


def multiprocess(batch_size: int) -> MultiprocessIterator:
    # It shuffles ahead of training, in a thread of its own. From NumPy's global generator it would draw at no moment
    # that is the same in two runs.
    return MultiprocessIterator(make_examples(), batch_size, n_processes=1, order_sampler=shuffled)


def updater_that_accumulates(make_iterator: Callable[[int], Any], model: chainer.Link) -> Any:
    optimizer = chainer.optimizers.Adam(0.01).setup(model)
    return chainer_accum.AccumulatingUpdater(
        make_iterator(6), optimizer, accumulation_steps=2, micro_batch_size=4, running_statistics="update"
    )


def optimizer_that_accumulates(make_iterator: Callable[[int], Any], model: chainer.Link) -> Any:
    # Four micro-batches make a window and three updates lie between two snapshots: most are taken within a window.
    optimizer = chainer_accum.create_accumulating_optimizer(chainer.optimizers.Adam(0.01), 4).setup(model)
    return StandardUpdater(make_iterator(6), optimizer)


CONFIGURATIONS = {
    "SerialIterator, AccumulatingUpdater": (serial, updater_that_accumulates),
    "SerialIterator, create_accumulating_optimizer": (serial, optimizer_that_accumulates),
    "MultiprocessIterator, AccumulatingUpdater": (multiprocess, updater_that_accumulates),
    "MultiprocessIterator, create_accumulating_optimizer": (multiprocess, optimizer_that_accumulates),
}


def snapshots_in(out: pathlib.Path) -> Dict[int, pathlib.Path]:
    """Returns the snapshots that have been written by iteration, the latest first."""
    by_iteration = {int(path.name.rsplit("_", 1)[1]): path for path in out.glob("snapshot_iter_*")}
    return dict(sorted(by_iteration.items(), reverse=True))


def load_latest(out: pathlib.Path, trainer: Trainer) -> None:
    """Loads the latest snapshot that is sound, if there is one."""
    for path in snapshots_in(out).values():
        try:
            chainer_accum.load_snapshot(path, trainer)
            return
        except ValueError as error:
            print(error)


def train(out: pathlib.Path, configuration: str, connection: Any) -> None:
    """Trains to the end, from the latest snapshot if there is one.

    Before each stage, its name is sent, and the run waits for an answer.

    """
    os.setsid()  # so that the processes of the iterator can be killed as well
    multiprocessing.set_start_method("fork", force=True)  # which they are made with in a program started by hand

    def come_to(stage: str) -> None:
        connection.send(stage)
        connection.recv()

    def save(path: str, target: Any) -> None:
        come_to("write")
        save_npz(path, target)
        come_to("rename")

    come_to("start")
    random.seed(0)
    numpy.random.seed(0)
    model = L.Classifier(chainer.Sequential(L.Linear(None, 8), L.BatchNormalization(8), F.dropout, L.Linear(8, 3)))
    make_iterator, make_updater = CONFIGURATIONS[configuration]
    updater = make_updater(make_iterator, model)
    updater.get_optimizer("main").add_hook(chainer.optimizer_hooks.WeightDecay(0.001))
    trainer = Trainer(updater, (UPDATES, "iteration"), out=str(out))
    trainer.extend(extensions.snapshot(savefun=save, n_retains=3), trigger=(UPDATES_PER_SNAPSHOT, "iteration"))
    trainer.extend(extensions.LogReport(trigger=(1, "epoch")))
    trainer.extend(chainer_accum.extensions.KeepRandomState())
    trainer.extend(
        lambda _: come_to("update"), name="tell", trigger=(1, "iteration"), priority=-2000, call_before_training=True
    )
    come_to("load")
    load_latest(out, trainer)
    trainer.run()
