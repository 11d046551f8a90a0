"""The training of the digits that is killed and resumed, as a program.

Arguments: the file with the digits; the folder for its results; the store, or ``whole`` for the whole batch; and after
how many updates it is to kill itself, or 0.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import sys
from typing import Any

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TupleDataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

BATCH, EPOCHS, PER_SNAPSHOT = 50, 3, 4


class Block(chainer.Chain):
    def __init__(self, width: int) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(width, width, 3, pad=1, nobias=True)
            self.bn1 = L.BatchNormalization(width)
            self.conv2 = L.Convolution2D(width, width, 3, pad=1, nobias=True)
            self.bn2 = L.BatchNormalization(width)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.dropout(F.relu(self.bn1(self.conv1(x))), 0.2)
        return F.relu(self.bn2(self.conv2(h)) + x)


def make_model() -> L.Classifier:
    return L.Classifier(
        chainer.Sequential(
            L.Convolution2D(1, 8, 3, 2, 1, nobias=True),
            L.BatchNormalization(8),
            F.relu,
            Block(8),
            Block(8),
            lambda x: F.dropout(F.mean(x, axis=(2, 3)), 0.3),
            L.Linear(None, 10),
        )
    )


def make_trainer(digits: str, out: str, store: str) -> Trainer:
    """Returns a Trainer with everything that acts upon a training or reports of it."""
    random.seed(0)
    numpy.random.seed(0)
    with numpy.load(digits) as parts:
        training, validation = (
            TupleDataset(parts[f"{name}_images"], parts[f"{name}_labels"]) for name in ("training", "validation")
        )
    model = make_model()
    optimizer = chainer.optimizers.MomentumSGD(0.05).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.001))
    iterator = SerialIterator(training, BATCH)
    if store == "whole":
        updater: Any = StandardUpdater(iterator, optimizer)
    else:
        updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=18, lockstep=store)
    trainer = Trainer(updater, (EPOCHS, "epoch"), out=out)
    trainer.extend(extensions.Evaluator(SerialIterator(validation, BATCH, repeat=False, shuffle=False), model))
    trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
    trainer.extend(extensions.observe_lr(), trigger=(1, "iteration"))
    trainer.extend(extensions.ExponentialShift("lr", 0.7), trigger=(1, "epoch"))
    trainer.extend(extensions.snapshot(n_retains=2), trigger=(PER_SNAPSHOT, "iteration"))
    trainer.extend(chainer_accum.extensions.KeepRandomState())
    return trainer


def train(digits: str, out: str, store: str, death: int = 0) -> None:
    """Trains to the end, from the latest snapshot if there is one."""
    trainer = make_trainer(digits, out, store)

    def kill(trainer: Trainer) -> None:
        if trainer.updater.iteration == death:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.extend(kill, name="kill", trigger=(1, "iteration"), priority=-2000)
    snapshots = sorted(pathlib.Path(out).glob("snapshot_iter_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    if snapshots:
        print("resumed from", snapshots[-1].name)
        chainer_accum.load_snapshot(snapshots[-1], trainer)
    trainer.run()


if __name__ == "__main__":
    chainer.global_config.dtype = numpy.dtype("float64")
    train(*sys.argv[1:4], int(sys.argv[4]))
