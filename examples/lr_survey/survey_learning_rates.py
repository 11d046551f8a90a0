"""Surveys the learning rates of one network for real batches of several sizes, and for virtual ones of the same sizes.

Each survey is a learning rate range test [1]: the rate grows exponentially from update to update until the loss
diverges. A real batch is a batch of the iterator, with StandardUpdater. A virtual one is gathered from batches of the
smallest size by AccumulatingUpdater. Initial parameters and the order of examples are the same. The curves of a pair
should coincide, and larger batches should tolerate larger rates. The program writes a table and a plot that show
whether they do, and a folder for each survey with its results.

[1] Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, https://arxiv.org/abs/1506.01186
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, NamedTuple, Sequence

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TupleDataset
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import LearningRateSurvey
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import make_iterator, make_parser, positive, show_table
from handwritten_digits import load_all

# For each batch size, one for real and one for virtual batches.
COLOURS = [("#9ecae1", "#08519c"), ("#fdae6b", "#a63603"), ("#a1d99b", "#006d2c"), ("#bcbddc", "#54278f")]


class Pair(NamedTuple):
    """The surveys for one batch size."""

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
    print()
    show_table([make_row(pair) for pair in pairs], args.out, text_columns=0)
    plot_losses(pairs, args.out / "surveys.png")
    print(f"\nPlot: {args.out / 'surveys.png'}")


def parse_args() -> argparse.Namespace:
    parser = make_parser("Surveys learning rates for real and for virtual batches of handwritten digits.")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[32, 128, 512], help="each a multiple of the first"
    )
    parser.add_argument("--start", type=float, default=1e-3, help="first learning rate")
    parser.add_argument("--stop", type=float, default=30, help="last learning rate, unless the loss diverges before")
    parser.add_argument("--updates", type=positive, default=100, help="updates from the first rate to the last")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and the order of examples")
    args = parser.parse_args()
    if any(size % args.batch_sizes[0] for size in args.batch_sizes):
        parser.error("--batch-sizes must be multiples of the first, of which the virtual batches are made")
    return args


def survey(batch_size: int, is_virtual: bool, args: argparse.Namespace) -> LearningRateSurvey:
    """Surveys a new model. Initial parameters and the order of examples depend on the seed alone."""
    dataset = TupleDataset(*load_all())
    numpy.random.seed(args.seed)
    # Unlike ReLU, tanh is smooth, so rounding errors stay small.
    network = chainer.Sequential(L.Linear(64, 64), F.tanh, L.Linear(64, 64), F.tanh, L.Linear(64, 10))
    optimizer = chainer.optimizers.MomentumSGD().setup(L.Classifier(network))
    if is_virtual:
        small = args.batch_sizes[0]
        iterator, steps = make_iterator(dataset, small, args.seed), batch_size // small
        updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device, accumulation_steps=steps)
    else:
        updater = StandardUpdater(make_iterator(dataset, batch_size, args.seed), optimizer, device=args.device)
    trainer = Trainer(updater, out=str(args.out / f"{'virtual' if is_virtual else 'real'}_{batch_size}"))
    extension = LearningRateSurvey(args.start, args.stop, args.updates)
    trainer.extend(extension)
    trainer.run()
    return extension


def distances(pair: Pair, attribute: str) -> numpy.ndarray:
    """Returns the distance between the two curves of a pair for each update, until one of them diverges."""
    real, virtual = getattr(pair.real, attribute), getattr(pair.virtual, attribute)
    length = min(len(real), len(virtual))
    return numpy.abs(numpy.subtract(real[:length], virtual[:length]))


def make_row(pair: Pair) -> Dict[str, str]:
    real, virtual = pair.real, pair.virtual
    lowest = int(numpy.argmin(real.smoothed_losses))
    return {
        "batches of": str(pair.batch_size),
        "lowest loss (smoothed)": f"{real.smoothed_losses[lowest]:.3f}",
        "its rate": f"{real.learning_rates[lowest]:.3g}",
        "real diverges at": "-" if real.diverged_at is None else f"{real.diverged_at:.3g}",
        "virtual diverges at": "-" if virtual.diverged_at is None else f"{virtual.diverged_at:.3g}",
        "largest distance of the losses": f"{distances(pair, 'losses').max():.2g}",
        "of the smoothed losses": f"{distances(pair, 'smoothed_losses').max():.2g}",
    }


def plot_losses(pairs: Sequence[Pair], path: Path) -> None:
    """Draws the smoothed losses of each pair, virtual over real, and the distances between the losses."""
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
        # A logarithmic axis cannot show a distance of zero.
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
