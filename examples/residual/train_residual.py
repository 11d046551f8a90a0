"""Trains a residual network in micro-batches whose batch normalization is exactly that of the whole batch.

The network is trained three times: with whole batches, with micro-batches in lockstep, and with micro-batches alone. It
computes in float64, so what is not exact stands out from rounding. The program writes a table that compares the three.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, NamedTuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.training.updaters import StandardUpdater

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_iterator, make_parser, measure_peak_mib, positive, show_table
from handwritten_digits import Digits, load_split

SEED = 0


class Block(chainer.Chain):
    """Two convolutions and a connection that skips them, with a projection if the size changes."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(n_in, n_out, 3, stride, 1, nobias=True)
            self.norm1 = L.BatchNormalization(n_out)
            self.conv2 = L.Convolution2D(n_out, n_out, 3, 1, 1, nobias=True)
            self.norm2 = L.BatchNormalization(n_out)
            if n_in != n_out:
                self.projection = L.Convolution2D(n_in, n_out, 1, stride, nobias=True)
                self.projection_norm = L.BatchNormalization(n_out)

    def forward(self, x: Any) -> chainer.Variable:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        skipped = self.projection_norm(self.projection(x)) if hasattr(self, "projection") else x
        return F.relu(h + skipped)


class ResidualNet(chainer.Chain):
    """Four blocks, with 11 batch normalizations in all, and dropout before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.blocks = chainer.Sequential(Block(1, 8), Block(8, 8), Block(8, 16, 2), Block(16, 16))
            self.classes = L.Linear(16, 10)

    def forward(self, images: Any) -> chainer.Variable:
        return self.classes(F.dropout(F.mean(self.blocks(images), axis=(2, 3))))


class Result(NamedTuple):
    """The outcome of one training."""

    title: str
    model: L.Classifier
    peak_mib: float


def main() -> None:
    args = parse_args()
    args.device.use()
    size = args.micro_batch_size
    with chainer.using_config("dtype", numpy.float64):
        results = [
            train("whole batch", args),
            train(f"micro-batches of {size}, lockstep={args.lockstep!r}", args, lockstep=args.lockstep),
            train(f"micro-batches of {size}", args, lockstep=None),
        ]
        show_table([make_row(result, results[0]) for result in results], args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains a residual network on handwritten digits with and without lockstep and compares.")
    parser.add_argument("--epoch", type=positive, default=5, help="number of epochs")
    parser.add_argument("--batch-size", type=positive, default=128, help="examples per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=positive, default=16, help="examples per forward/backward pass")
    parser.add_argument("--lockstep", default="file", help="where arrays wait: memory, host, file or a folder")
    return parser.parse_args()


def train(title: str, args: argparse.Namespace, **options: Any) -> Result:
    """Trains a new model, which always has the same initial parameters. Only the updater differs."""
    updater = make_updater(args, **options)
    while updater.epoch < args.epoch:
        updater.update()
    peak_mib = measure_peak_mib(make_updater(args, **options).update, args.device)
    return Result(title, updater.get_optimizer("main").target.to_device("@numpy"), peak_mib)


def make_updater(args: argparse.Namespace, **options: Any) -> StandardUpdater:
    numpy.random.seed(SEED)
    optimizer = chainer.optimizers.MomentumSGD(lr=0.05).setup(L.Classifier(ResidualNet()))
    training, _ = load_split()
    iterator = make_iterator(chainer.datasets.TupleDataset(*in_float64(training)), args.batch_size)
    if not options:
        return StandardUpdater(iterator, optimizer, device=args.device)
    return chainer_accum.AccumulatingUpdater(
        iterator, optimizer, device=args.device, micro_batch_size=args.micro_batch_size, **options
    )


def in_float64(digits: Digits) -> Digits:
    return digits._replace(images=digits.images.astype(numpy.float64))


def make_row(result: Result, whole: Result) -> Dict[str, str]:
    _, validation = load_split()
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        result.model(*in_float64(validation))
    return {
        "batch": result.title,
        "parameters differ by": f"{largest_difference(result.model, whole.model):.2g}",
        "running averages differ by": f"{difference_of_averages(result.model, whole.model):.2g}",
        "validation accuracy": f"{float(result.model.accuracy.array):.2%}",
        "peak memory": f"{result.peak_mib:.1f} MiB",
    }


def difference_of_averages(model: chainer.Link, reference: chainer.Link) -> float:
    """Returns the largest absolute difference between the running averages of two models."""
    return max(
        float(abs(getattr(link, name) - getattr(other, name)).max())
        for link, other in zip(model.links(), reference.links())
        if isinstance(link, L.BatchNormalization)
        for name in ("avg_mean", "avg_var")
    )


if __name__ == "__main__":
    main()
