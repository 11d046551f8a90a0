"""Surveys the learning rates of one network for real batches of several sizes, and for virtual ones made of small ones.

Each survey is a learning rate range test [1]: the rate grows exponentially from update to update until the loss
diverges. A real batch comes from the iterator as it is, with StandardUpdater; a virtual one is gathered from batches of
the smallest size by AccumulatingUpdater. Initial parameters and the order of examples are the same. The curves of a
pair should coincide, and larger batches should tolerate larger rates. A table and a plot say whether they do; they go
to the folder given by --out, and the results of each survey to a folder of its own in it.

[1] Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, https://arxiv.org/abs/1506.01186
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import LearningRateSurvey
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

# For each size of batch, of the real ones and of the virtual ones.
COLOURS = [("#9ecae1", "#08519c"), ("#fdae6b", "#a63603"), ("#a1d99b", "#006d2c"), ("#bcbddc", "#54278f")]


class DigitNet(chainer.Chain):
    """A small perceptron for images of 8 x 8 pixels. It is smooth, so that rounding stays rounding."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.hidden1 = L.Linear(64, 64)
            self.hidden2 = L.Linear(64, 64)
            self.classes = L.Linear(64, 10)

    def forward(self, images: Any) -> chainer.Variable:
        return self.classes(F.tanh(self.hidden2(F.tanh(self.hidden1(images)))))


class Pair(NamedTuple):
    """The surveys for one size of batch."""

    batch_size: int
    real: LearningRateSurvey
    virtual: LearningRateSurvey


def main() -> None:
    args = parse_args()
    args.device.use()
    pairs = []
    for batch_size in args.batch_sizes:
        print(f"batches of {batch_size}")
        pairs.append(Pair(batch_size, survey(batch_size, False, args), survey(batch_size, True, args)))
    table = make_table(pairs)
    print("\n" + table)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    plot_losses(pairs, args.out / "surveys.png")
    print(f"\nPlot: {args.out / 'surveys.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Surveys learning rates for real and for virtual batches of handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[32, 128, 512], help="each a multiple of the first"
    )
    parser.add_argument("--start", type=float, default=1e-3, help="first learning rate")
    parser.add_argument("--stop", type=float, default=30, help="last learning rate, unless the loss diverges before")
    parser.add_argument("--updates", type=int, default=100, help="updates from the first rate to the last")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and the order of examples")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    if min(args.batch_sizes) < 1 or any(size % args.batch_sizes[0] for size in args.batch_sizes):
        parser.error("--batch-sizes must be positive multiples of the first, of which the virtual batches are made")
    return args


def survey(batch_size: int, is_virtual: bool, args: argparse.Namespace) -> LearningRateSurvey:
    """Surveys a new model, the same for all, with examples in the same order."""
    numpy.random.seed(args.seed)
    optimizer = chainer.optimizers.MomentumSGD().setup(L.Classifier(DigitNet()))
    if is_virtual:
        small = args.batch_sizes[0]
        updater = chainer_accum.AccumulatingUpdater(
            make_iterator(small, args.seed), optimizer, device=args.device, accumulation_steps=batch_size // small
        )
    else:
        updater = StandardUpdater(make_iterator(batch_size, args.seed), optimizer, device=args.device)
    trainer = Trainer(updater, out=str(args.out / f"{'virtual' if is_virtual else 'real'}_{batch_size}"))
    extension = LearningRateSurvey(args.start, args.stop, args.updates)
    trainer.extend(extension)
    trainer.run()
    return extension


def make_iterator(batch_size: int, seed: int) -> SerialIterator:
    """Returns an iterator that gives the examples in the same order whatever the batch size."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(numpy.float32)
    dataset = chainer.datasets.TupleDataset(images, labels.astype(numpy.int32))
    return SerialIterator(dataset, batch_size, order_sampler=ShuffleOrderSampler(numpy.random.RandomState(seed)))


def distances(pair: Pair, attribute: str) -> numpy.ndarray:
    """Returns how far the two curves of a pair are from one another, update by update, until one diverges."""
    real, virtual = getattr(pair.real, attribute), getattr(pair.virtual, attribute)
    length = min(len(real), len(virtual))
    return numpy.abs(numpy.subtract(real[:length], virtual[:length]))


def make_table(pairs: Sequence[Pair]) -> str:
    """Returns a Markdown table with one row per size of batch."""
    rows = [
        [
            "batches of",
            "lowest loss (smoothed)",
            "its rate",
            "real diverges at",
            "virtual diverges at",
            "largest distance of the losses",
            "of the smoothed losses",
        ]
    ]
    for pair in pairs:
        lowest = int(numpy.argmin(pair.real.smoothed_losses))
        rows.append(
            [
                str(pair.batch_size),
                f"{pair.real.smoothed_losses[lowest]:.3f}",
                f"{pair.real.learning_rates[lowest]:.3g}",
                *("-" if each.diverged_at is None else f"{each.diverged_at:.3g}" for each in (pair.real, pair.virtual)),
                *(f"{distances(pair, attribute).max():.2g}" for attribute in ("losses", "smoothed_losses")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths))} |" for row in rows)


def plot_losses(pairs: Sequence[Pair], path: Path) -> None:
    """Draws the smoothed losses of each pair, real broad below virtual fine, and how far the losses are apart."""
    figure = Figure(figsize=(8, 7), constrained_layout=True)
    losses, apart = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for number, pair in enumerate(pairs):
        light, dark = COLOURS[number % len(COLOURS)]
        small = pairs[0].batch_size
        for survey, kind, style in (
            (pair.real, "real", {"color": light, "linewidth": 6}),
            (pair.virtual, f"virtual: {pair.batch_size // small} x {small}", {"color": dark, "linewidth": 1.5}),
        ):
            label = f"batches of {pair.batch_size}, {kind}"
            losses.plot(survey.learning_rates, survey.smoothed_losses, label=label, **style)
        distance = distances(pair, "losses")
        # A logarithmic axis has no place for two losses that are the same.
        rates = numpy.array(pair.real.learning_rates[: len(distance)])
        apart.plot(rates[distance > 0], distance[distance > 0], ".", color=dark)
    losses.set(ylabel="loss, smoothed", title="Surveys of the learning rate, with real and with virtual batches")
    losses.legend()
    apart.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="distance in the loss\n(not smoothed)")
    for axes in (losses, apart):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
