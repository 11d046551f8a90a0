"""Sharpness-aware minimization (SAM) with batches of 256 in the memory of batches of 32.

SAM takes two gradients per update: one at the parameters, and one a step uphill from there, with which it updates the
parameters themselves. See: Foret et al. 2021, https://arxiv.org/abs/2010.01412. Both are gradients of the whole batch,
so each is a block of ``accumulate`` that leaves the update to this program.
"""

from __future__ import annotations

from typing import Any, Sequence

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TupleDataset, split_dataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater


class SAMUpdater(StandardUpdater):
    """Updater that takes the steps of SAM.

    Args:
        iterator: Dataset iterator.
        optimizer: Optimizer that has been set up with the model.
        micro_batch_size (int): The largest number of examples in one forward/backward pass.
        rho (float): How far uphill the second gradient is taken.

    """

    def __init__(self, iterator: Any, optimizer: Any, micro_batch_size: int, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(iterator, optimizer, **kwargs)
        self.micro_batch_size = micro_batch_size
        self.rho = rho

    def update_core(self) -> None:
        optimizer = self.get_optimizer("main")
        batch = self.get_iterator("main").next()
        window = self.compute_gradient(batch)
        scale = self.rho / window.gradient_norm
        before = [(param, param.array) for param in optimizer.target.params() if param.grad is not None]
        for param, array in before:
            param.array = array + scale * param.grad
        try:
            with chainer.reporter.report_scope({}):  # the loss of the first pass has been reported
                self.compute_gradient(batch)
        finally:
            for param, array in before:
                param.array = array
        optimizer.update()

    def compute_gradient(self, batch: Sequence[Any]) -> Any:
        """Gives the parameters the gradient of the whole batch, and returns the window of its micro-batches."""
        optimizer = self.get_optimizer("main")
        with chainer_accum.accumulate(optimizer, update=False) as window:
            for start in range(0, len(batch), self.micro_batch_size):
                part = batch[start : start + self.micro_batch_size]
                window.add(optimizer.target, *self.converter(part, self.input_device), weight=len(part))
        return window


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
    updater = SAMUpdater(train_iter, optimizer, micro_batch_size=32)

    trainer = Trainer(updater, (10, "epoch"), out="result")
    trainer.extend(extensions.Evaluator(validation_iter, model))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(["epoch", "iteration", "main/loss", "validation/main/accuracy"]))
    trainer.run()


if __name__ == "__main__":
    main()
