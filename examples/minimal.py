"""The shortest complete program: a training with batches of 256 in the memory of batches of 32."""

from __future__ import annotations

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TupleDataset, split_dataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions


def main() -> None:
    numpy.random.seed(0)

    # Points in a square. Those inside a circle belong to one class, those outside to the other.
    points = numpy.random.uniform(-1, 1, size=(5120, 2)).astype(numpy.float32)
    classes = (numpy.hypot(points[:, 0], points[:, 1]) < 0.8).astype(numpy.int32)
    train, validation = split_dataset(TupleDataset(points, classes), 4096)
    train_iter = SerialIterator(train, batch_size=256)
    validation_iter = SerialIterator(validation, batch_size=256, repeat=False, shuffle=False)

    model = L.Classifier(chainer.Sequential(L.Linear(2, 64), F.tanh, L.Linear(64, 2)))
    optimizer = chainer.optimizers.Adam(alpha=0.01).setup(model)

    # Without accumulation, this line is: updater = StandardUpdater(train_iter, optimizer)
    updater = chainer_accum.AccumulatingUpdater(train_iter, optimizer, micro_batch_size=32)

    trainer = Trainer(updater, (10, "epoch"), out="result")
    trainer.extend(extensions.Evaluator(validation_iter, model))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(["epoch", "iteration", "main/loss", "validation/main/accuracy"]))
    trainer.run()


if __name__ == "__main__":
    main()
