"""Trains one network on handwritten digits three ways, which should end in the same parameters.

(a) with StandardUpdater and the whole batch at once,
(b) with AccumulatingUpdater, which gathers as many batches of the iterator as make that batch,
(c) with AccumulatingUpdater, which splits that batch.

Seed, initial parameters and the order of examples are the same. A table of what differs and what does not, and a plot
of losses and memory, go to the folder given by --out; the log and snapshot of each way to a folder of its own in it.
"""

from __future__ import annotations

import argparse
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import matplotlib
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

SEED = 0
TRAINING_SHARE = 0.8


# The three ways. All that differs is the updater and, in (b), the size of the iterator's batches.


def full_batch(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(a) Each batch of the iterator is one forward/backward pass and one update."""
    iterator = make_iterator(train, args.batch_size)
    return StandardUpdater(iterator, optimizer, device=args.device)


def gathered(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(b) Each batch of the iterator is one forward/backward pass; several are one update."""
    iterator = make_iterator(train, args.micro_batch_size)
    steps = args.batch_size // args.micro_batch_size
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device, accumulation_steps=steps)


def split(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(c) Each batch of the iterator is several forward/backward passes and one update."""
    iterator = make_iterator(train, args.batch_size)
    size = args.micro_batch_size
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device, micro_batch_size=size)


class DigitNet(chainer.Chain):
    """A small convolutional network for images of 8 x 8 pixels.

    It is smooth, so that rounding, which depends on the size of the arrays, stays rounding. Past the kink of a ReLU it
    may send a gradient another way, and over many updates that grows to a difference one can see.

    """

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 16, ksize=3, pad=1)
            self.conv2 = L.Convolution2D(16, 32, ksize=3, pad=1)
            self.conv3 = L.Convolution2D(32, 32, ksize=3, pad=1)
            self.classes = L.Linear(32 * 4 * 4, 10)

    def forward(self, images: Any) -> chainer.Variable:
        h = F.tanh(self.conv1(images))
        h = F.average_pooling_2d(F.tanh(self.conv2(h)), ksize=2)
        return self.classes(F.tanh(self.conv3(h)))


class Result(NamedTuple):
    """What one way of training led to."""

    title: str
    model: chainer.Chain
    log: List[Dict[str, float]]  # of LogReport: one entry per epoch
    seconds: float
    peak_mib: float


def main() -> None:
    args = parse_args()
    args.device.use()
    matplotlib.use("Agg")  # PlotReport needs no display then
    steps = args.batch_size // args.micro_batch_size
    results = [
        train_one_way(full_batch, f"(a) StandardUpdater, batches of {args.batch_size}", args),
        train_one_way(gathered, f"(b) AccumulatingUpdater, accumulation_steps={steps}", args),
        train_one_way(split, f"(c) AccumulatingUpdater, micro_batch_size={args.micro_batch_size}", args),
    ]
    table = make_table(results)
    print(table)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    plot_comparison(results, args.out / "comparison.png")
    print(f"\nLoss curves and memory: {args.out / 'comparison.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains on handwritten digits with and without gradient accumulation and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epoch", type=int, default=10, help="number of epochs")
    parser.add_argument("--batch-size", type=int, default=256, help="examples per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="examples per forward/backward pass")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    if min(args.epoch, args.batch_size, args.micro_batch_size) < 1:
        parser.error("--epoch, --batch-size and --micro-batch-size must be 1 or more")
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size, for (b) to gather whole batches")
    return args


def load_datasets() -> Tuple[Any, Any]:
    """Returns the training and the validation dataset, always split in the same way."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(numpy.float32).reshape(-1, 1, 8, 8)
    dataset = chainer.datasets.TupleDataset(images, labels.astype(numpy.int32))
    train, validation = chainer.datasets.split_dataset_random(dataset, int(TRAINING_SHARE * len(dataset)), seed=SEED)
    return train, validation


def make_iterator(train: Any, batch_size: int) -> SerialIterator:
    """Returns an iterator that gives the examples in the same order whatever the batch size."""
    order_sampler = ShuffleOrderSampler(numpy.random.RandomState(SEED))
    return SerialIterator(train, batch_size, order_sampler=order_sampler)


def make_optimizer() -> chainer.Optimizer:
    """Returns an optimizer with a new model, whose initial parameters are always the same."""
    numpy.random.seed(SEED)
    return chainer.optimizers.MomentumSGD(lr=0.1).setup(L.Classifier(DigitNet()))


def train_one_way(way: Callable[..., StandardUpdater], title: str, args: argparse.Namespace) -> Result:
    """Trains a new model with the updater that ``way`` makes."""
    print(title)
    train, validation = load_datasets()
    optimizer = make_optimizer()
    updater = way(train, optimizer, args)
    trainer = Trainer(updater, (args.epoch, "epoch"), out=str(args.out / way.__name__))
    extend(trainer, validation, args.device)
    trainer.run()
    print()
    peak_mib = measure_peak_mib(way(train, make_optimizer(), args), args.device)
    return Result(title, optimizer.target, trainer.get_extension("LogReport").log, trainer.elapsed_time, peak_mib)


def extend(trainer: Trainer, validation: Any, device: Any) -> None:
    """Adds the usual extensions, which need to know nothing of accumulation."""
    model = trainer.updater.get_optimizer("main").target
    # One batch: Evaluator takes the mean over batches, in which a smaller last one would count as much as the others.
    iterator = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(iterator, model, device=device))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PlotReport(["main/loss", "validation/main/loss"], x_key="epoch", filename="loss.png"))
    trainer.extend(extensions.snapshot(n_retains=1))
    columns = ["epoch", "iteration", "main/loss", "validation/main/loss", "validation/main/accuracy", "elapsed_time"]
    trainer.extend(extensions.PrintReport(columns))
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=1))


def measure_peak_mib(updater: StandardUpdater, device: Any) -> float:
    """Returns the MiB that updates need at their peak, beside the parameters and the state of the optimizer."""
    updater.update()  # allocates what stays
    if device.xp is numpy:
        tracemalloc.start()
        updater.update()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    else:
        pool = chainer.backends.cuda.memory_pool
        pool.free_all_blocks()
        before = pool.total_bytes()
        updater.update()
        peak = pool.total_bytes() - before
    return peak / 2**20


def largest_difference(model: chainer.Chain, reference: chainer.Chain) -> float:
    """Returns the largest absolute difference between two models' parameters."""
    cpu = chainer.get_device("@numpy")
    expected = {name: cpu.send(param.array) for name, param in reference.namedparams()}
    return max(float(abs(cpu.send(param.array) - expected[name]).max()) for name, param in model.namedparams())


def make_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with one row per result."""
    rows = [["updater", "parameters differ from (a) by", "training loss", "validation accuracy", "peak memory", "time"]]
    for result in results:
        last = result.log[-1]
        rows.append(
            [
                result.title,
                f"{largest_difference(result.model, results[0].model):.2g}",
                f"{last['main/loss']:.6f}",
                f"{last['validation/main/accuracy']:.2%}",
                f"{result.peak_mib:.1f} MiB",
                f"{result.seconds:.1f} s",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    lines = [
        [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_comparison(results: Sequence[Result], path: Path) -> None:
    """Draws loss curves, how they differ, and the peak memory of an update."""
    figure = Figure(figsize=(11, 5.5), constrained_layout=True)
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 2], height_ratios=[3, 1])
    curves = figure.add_subplot(grid[0, 0])
    differences = figure.add_subplot(grid[1, 0], sharex=curves)
    memory = figure.add_subplot(grid[:, 1])
    epochs = [entry["epoch"] for entry in results[0].log]
    reference = numpy.array([entry["main/loss"] for entry in results[0].log])
    # From broad to fine, so that all three can be seen where they coincide.
    styles: List[Dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 9, "marker": "o", "markersize": 15},
        {"color": "#e6550d", "linewidth": 3.5, "marker": "o", "markersize": 8},
        {"color": "black", "linewidth": 1.2, "marker": "x", "markersize": 6},
    ]
    for result, style in zip(results, styles):
        losses = numpy.array([entry["main/loss"] for entry in result.log])
        curves.plot(epochs, losses, label=result.title, **style)
        differences.plot(epochs, losses - reference, **{**style, "linewidth": style["linewidth"] / 2})
    curves.set(yscale="log", ylabel="training loss (mean over the epoch)", title="The same training ...")
    curves.tick_params(labelbottom=False)
    curves.legend(markerscale=0.7)
    differences.set(xlabel="epoch", ylabel="difference from (a)")
    differences.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
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
