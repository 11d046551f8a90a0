"""Trains a network with batch normalization and dropout four ways, three of which end in the same parameters.

(a) with StandardUpdater and the whole batch at once,
(b) with AccumulatingUpdater and micro-batches in lockstep, which keeps what they need later in memory,
(c) the same, but what they need later waits in a temporary file,
(d) with AccumulatingUpdater and micro-batches that pass through the network one after the other.

Seed, initial parameters and the order of examples are the same. The program writes a table that compares the four, a
plot of their losses and memory, and a folder for each with its log and snapshot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import matplotlib
import numpy
from chainer.datasets import TupleDataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_iterator, make_parser, measure_peak_mib, positive, show_table
from handwritten_digits import load_split

SEED = 0
EXPLANATION = """
In (b) and (c), the micro-batches wait for one another at batch normalization and dropout. They have the statistics and
the masks of the whole batch, so only rounding differs from (a). In (d), each micro-batch is normalized by its own mean
and variance and draws its own masks, so the training differs.
"""


# The four ways. They differ only in the updater.


def full_batch(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(a) Each batch of the iterator is one forward/backward pass and one update."""
    return StandardUpdater(make_iterator(train, args.batch_size), optimizer, device=args.device)


def lockstep_memory(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(b) Each batch is split, and the parts wait for one another at batch normalization and dropout."""
    return split(train, optimizer, args, lockstep="memory")


def lockstep_file(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(c) The same, with a temporary file for what waits."""
    return split(train, optimizer, args, lockstep="file")


def alone(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(d) Each batch is split, and each part is normalized by itself."""
    return split(train, optimizer, args)


def split(train: Any, optimizer: Any, args: argparse.Namespace, **kwargs: Any) -> StandardUpdater:
    iterator = make_iterator(train, args.batch_size)
    size = args.micro_batch_size
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device, micro_batch_size=size, **kwargs)


class DigitNet(chainer.Chain):
    """A small convolutional network for images of 8 x 8 pixels, with batch normalization and dropout.

    It uses tanh, which is smooth, so rounding errors stay small. With ReLU, a rounding error can move a value across
    the kink and change its gradient, and over many updates the difference becomes visible.

    """

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 16, ksize=3, pad=1, nobias=True)
            self.norm1 = L.BatchNormalization(16)
            self.conv2 = L.Convolution2D(16, 32, ksize=3, pad=1, nobias=True)
            self.norm2 = L.BatchNormalization(32)
            self.conv3 = L.Convolution2D(32, 32, ksize=3, pad=1, nobias=True)
            self.norm3 = L.BatchNormalization(32)
            self.classes = L.Linear(32 * 4 * 4, 10)

    def forward(self, images: Any) -> chainer.Variable:
        h = F.tanh(self.norm1(self.conv1(images)))
        h = F.average_pooling_2d(F.tanh(self.norm2(self.conv2(h))), ksize=2)
        h = F.tanh(self.norm3(self.conv3(F.dropout(h, ratio=0.25))))
        return self.classes(F.dropout(h, ratio=0.5))


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    model: chainer.Chain
    log: List[Dict[str, float]]  # the log of LogReport, one entry per epoch
    seconds: float
    peak_mib: float


def main() -> None:
    args = parse_args()
    args.device.use()
    matplotlib.use("Agg")  # lets PlotReport work without a display
    size = args.micro_batch_size
    print(f"Four trainings of a network with batch normalization and dropout, {args.batch_size} examples per update:\n")
    results = [
        train_one_way(full_batch, "(a) StandardUpdater, the whole batch", args),
        train_one_way(lockstep_memory, f"(b) micro_batch_size={size}, lockstep='memory'", args),
        train_one_way(lockstep_file, f"(c) micro_batch_size={size}, lockstep='file'", args),
        train_one_way(alone, f"(d) micro_batch_size={size}", args),
    ]
    show_table([make_row(result, results[0]) for result in results], args.out)
    plot_comparison(results, args.out / "comparison.png")
    print(EXPLANATION)
    print(f"Loss curves and memory: {args.out / 'comparison.png'}")


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains on handwritten digits with whole batches and with micro-batches, and compares.")
    parser.add_argument("--epoch", type=positive, default=6, help="number of epochs")
    parser.add_argument("--batch-size", type=positive, default=256, help="examples per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=positive, default=32, help="examples per forward/backward pass")
    return parser.parse_args()


def make_optimizer() -> chainer.Optimizer:
    """Returns an optimizer with a new model, which always has the same initial parameters."""
    numpy.random.seed(SEED)
    return chainer.optimizers.MomentumSGD(lr=0.1).setup(L.Classifier(DigitNet()))


def train_one_way(way: Callable[..., StandardUpdater], title: str, args: argparse.Namespace) -> Result:
    """Trains a new model with the updater that ``way`` makes."""
    print(title)
    train, validation = (TupleDataset(*part) for part in load_split())
    optimizer = make_optimizer()
    updater = way(train, optimizer, args)
    trainer = Trainer(updater, (args.epoch, "epoch"), out=str(args.out / way.__name__))
    extend(trainer, validation, args.device)
    trainer.run()
    print()
    peak_mib = measure_peak_mib(way(train, make_optimizer(), args).update, args.device)
    return Result(title, optimizer.target, trainer.get_extension("LogReport").log, trainer.elapsed_time, peak_mib)


def extend(trainer: Trainer, validation: Any, device: Any) -> None:
    """Adds the usual extensions. None of them knows about accumulation."""
    model = trainer.updater.get_optimizer("main").target
    # A single batch: Evaluator averages over batches, and a smaller last batch would count as much as the others.
    iterator = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(iterator, model, device=device))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PlotReport(["main/loss", "validation/main/loss"], x_key="epoch", filename="loss.png"))
    trainer.extend(extensions.snapshot(n_retains=1))
    columns = ["epoch", "iteration", "main/loss", "validation/main/loss", "validation/main/accuracy", "elapsed_time"]
    trainer.extend(extensions.PrintReport(columns))
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=1))


def make_row(result: Result, reference: Result) -> Dict[str, str]:
    last = result.log[-1]
    return {
        "updater": result.title,
        "parameters differ from (a) by": f"{largest_difference(result.model, reference.model):.2g}",
        "training loss": f"{last['main/loss']:.6f}",
        "validation accuracy": f"{last['validation/main/accuracy']:.2%}",
        "peak memory": f"{result.peak_mib:.1f} MiB",
        "time": f"{result.seconds:.1f} s",
    }


def plot_comparison(results: Sequence[Result], path: Path) -> None:
    """Draws the loss curves, how far they are from (a), and the peak memory of an update."""
    figure = Figure(figsize=(11, 5.5), constrained_layout=True)
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 2], height_ratios=[2, 1])
    curves = figure.add_subplot(grid[0, 0])
    differences = figure.add_subplot(grid[1, 0], sharex=curves)
    memory = figure.add_subplot(grid[:, 1])
    epochs = [entry["epoch"] for entry in results[0].log]
    reference = numpy.array([entry["main/loss"] for entry in results[0].log])
    # From broad to fine, so that all are visible where they coincide.
    styles: List[Dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 9, "marker": "o", "markersize": 15},
        {"color": "#e6550d", "linewidth": 3.5, "marker": "o", "markersize": 8},
        {"color": "black", "linewidth": 1.2, "marker": "x", "markersize": 6},
        {"color": "#31a354", "linewidth": 1.5, "marker": "s", "markersize": 5, "linestyle": "--"},
    ]
    for result, style in zip(results, styles):
        losses = numpy.array([entry["main/loss"] for entry in result.log])
        curves.plot(epochs, losses, label=result.title, **style)
        if result is not results[0]:
            differences.plot(epochs, abs(losses - reference), **{**style, "linewidth": style["linewidth"] / 2})
    curves.set(yscale="log", ylabel="training loss (mean over the epoch)", title="The same training in lockstep ...")
    curves.tick_params(labelbottom=False)
    curves.legend(markerscale=0.7)
    differences.set(yscale="log", xlabel="epoch", ylabel="distance from (a)")
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    names = [result.title.split()[0] for result in results]
    bars = memory.bar(names, [result.peak_mib for result in results], color=[style["color"] for style in styles])
    for bar, result in zip(bars, results):
        position = (bar.get_x() + bar.get_width() / 2, bar.get_height())
        memory.annotate(f"{result.peak_mib:.1f} MiB", position, (0, 4), textcoords="offset points", ha="center")
    memory.set(ylabel="peak memory of an update (MiB)", title="... in a fraction of the memory")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
