"""Trains one network on handwritten digits four ways that differ only in learning rate and effective batch.

(a)  small batches and a constant learning rate,
(b)  large effective batches, with a learning rate that is larger by the same factor after a gradual warm-up [1],
(a') small batches and a learning rate that is halved at certain epochs,
(c)  a constant learning rate and effective batches that are doubled where (a') halves the learning rate [2].

(b) should do about as well as (a), and (c) as (a'), with fewer updates. The program writes a table and a plot that show
whether they do, and a folder for each with its log.

[1] Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, https://arxiv.org/abs/1706.02677
[2] Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size", ICLR 2018, https://arxiv.org/abs/1711.00489
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
import numpy
from chainer.datasets import TupleDataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer.training.triggers import ManualScheduleTrigger
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import make_iterator, make_parser, positive, show_table
from handwritten_digits import load_split

GROWTH = 2  # factor by which the effective batch grows in (c) and the learning rate shrinks in (a')

# The four ways. They differ only in the extensions that set the number of accumulation steps and the learning rate.


def small_batch(trainer: Trainer, args: argparse.Namespace) -> None:
    """(a) Each batch of the iterator is an update, and the learning rate is constant."""
    trainer.extend(chainer_accum.extensions.Accumulate(1))


def large_batch(trainer: Trainer, args: argparse.Namespace) -> None:
    """(b) Several batches are an update, and the learning rate grows by that number in a warm-up."""
    trainer.extend(chainer_accum.extensions.Accumulate(args.steps))
    # WarmupShift counts updates, of which an epoch has fewer than it has batches.
    epoch_size = len(trainer.updater.get_iterator("main").dataset)
    warmup_updates = max(1, round(args.warmup * epoch_size / (args.batch_size * args.steps)))
    trainer.extend(extensions.WarmupShift("lr", args.lr, warmup_updates, args.lr * args.steps))


def decaying_rate(trainer: Trainer, args: argparse.Namespace) -> None:
    """(a') Each batch of the iterator is an update, and the learning rate shrinks."""
    trainer.extend(chainer_accum.extensions.Accumulate(1))
    trainer.extend(extensions.ExponentialShift("lr", 1 / GROWTH), trigger=ManualScheduleTrigger(args.grow_at, "epoch"))


def growing_batch(trainer: Trainer, args: argparse.Namespace) -> None:
    """(c) The number of batches per update grows, and the learning rate is constant."""
    schedule = {epoch: GROWTH**times for times, epoch in enumerate([0, *args.grow_at])}
    trainer.extend(chainer_accum.extensions.Accumulate(schedule))


class DigitNet(chainer.Chain):
    """A small convolutional network for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 8, ksize=3, pad=1)
            self.conv2 = L.Convolution2D(8, 16, ksize=3, pad=1)
            self.classes = L.Linear(16 * 2 * 2, 10)

    def forward(self, images: Any) -> chainer.Variable:
        h = F.average_pooling_2d(F.tanh(self.conv1(images)), ksize=2)
        return self.classes(F.average_pooling_2d(F.tanh(self.conv2(h)), ksize=2))


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    updates: int
    log: List[Dict[str, float]]  # the log of LogReport, one entry per epoch


def main() -> None:
    args = parse_args()
    args.device.use()
    largest = args.batch_size * args.steps
    grown = args.batch_size * GROWTH ** len(args.grow_at)
    results = [
        train_one_way(small_batch, f"(a)  batches of {args.batch_size}, constant rate", args),
        train_one_way(large_batch, f"(b)  batches of {largest}, rate x {args.steps} after warm-up", args),
        train_one_way(decaying_rate, f"(a') batches of {args.batch_size}, decaying rate", args),
        train_one_way(growing_batch, f"(c)  batches of {args.batch_size} to {grown}, constant rate", args),
    ]
    show_table([make_row(result) for result in results], args.out)
    plot_schedules(results, args.out / "schedules.png")
    print(f"\nPlot: {args.out / 'schedules.png'}")


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains on handwritten digits with learning rates and effective batches that go together.")
    parser.add_argument("--epoch", type=positive, default=12, help="number of epochs")
    parser.add_argument("--batch-size", type=positive, default=32, help="examples per forward/backward pass")
    parser.add_argument("--steps", type=positive, default=8, help="accumulation steps per update in (b)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate, for updates with a single batch")
    parser.add_argument("--warmup", type=float, default=3, help="epochs of warm-up in (b)")
    parser.add_argument(
        "--grow-at", type=positive, nargs="+", default=[6, 8, 10], help="epochs at which (c) grows and (a') decays"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and the order of examples")
    args = parser.parse_args()
    if args.grow_at != sorted(set(args.grow_at)):
        parser.error("--grow-at must be epochs in ascending order")
    return args


def train_one_way(way: Callable[..., None], title: str, args: argparse.Namespace) -> Result:
    """Trains a new model. Initial parameters and the order of examples depend on the seed alone."""
    print(title)
    train, validation = (TupleDataset(*part) for part in load_split())
    numpy.random.seed(args.seed)
    optimizer = chainer.optimizers.MomentumSGD(lr=args.lr).setup(L.Classifier(DigitNet()))
    iterator = make_iterator(train, args.batch_size, args.seed)
    updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device)
    trainer = Trainer(updater, (args.epoch, "epoch"), out=str(args.out / way.__name__))
    way(trainer, args)
    extend(trainer, validation, args.device)
    trainer.run()
    print()
    return Result(title, updater.iteration, trainer.get_extension("LogReport").log)


def extend(trainer: Trainer, validation: Any, device: Any) -> None:
    """Adds the usual extensions."""
    model = trainer.updater.get_optimizer("main").target
    # A single batch: Evaluator averages over batches, and a smaller last batch would count as much as the others.
    iterator = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(iterator, model, device=device))
    trainer.extend(extensions.observe_lr())
    trainer.extend(extensions.LogReport())
    columns = ["epoch", "iteration", "accumulation_steps", "effective_batch_size", "lr"]
    columns += ["main/loss", "validation/main/accuracy"]
    trainer.extend(extensions.PrintReport(columns))
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=10))


def make_row(result: Result) -> Dict[str, str]:
    last = result.log[-1]
    return {
        "way": result.title,
        "updates": str(result.updates),
        "training loss": f"{last['main/loss']:.4f}",
        "validation loss": f"{last['validation/main/loss']:.4f}",
        "validation accuracy": f"{last['validation/main/accuracy']:.2%}",
    }


def plot_schedules(results: Sequence[Result], path: Path) -> None:
    """Draws loss, learning rate and effective batch over epochs."""
    figure = Figure(figsize=(8, 8), constrained_layout=True)
    losses, rates, batches = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": [2.2, 1, 1]})
    # Ways that belong together have one colour: a broad line below, a fine one on top.
    styles: List[Dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 5},
        {"color": "#08519c", "linewidth": 1.5},
        {"color": "#fdae6b", "linewidth": 5},
        {"color": "#a63603", "linewidth": 1.5},
    ]
    for result, style in zip(results, styles):
        epochs = [entry["epoch"] for entry in result.log]
        losses.plot(epochs, [entry["main/loss"] for entry in result.log], label=result.title, **style)
        for axes, key in ((rates, "lr"), (batches, "effective_batch_size")):
            values = [entry[key] for entry in result.log]
            axes.step(
                [0, *epochs], values[:1] + values, where="pre", **style
            )  # an entry describes the epoch that ends there
    losses.set(
        yscale="log", ylabel="training loss (mean over the epoch)", title="Learning rate and effective batch, four ways"
    )
    losses.legend()
    rates.set(ylabel="learning rate")
    batches.set(xlabel="epoch", ylabel="examples per update")
    for axes, key in ((rates, "lr"), (batches, "effective_batch_size")):
        axes.set_yscale("log", base=2)
        axes.set_yticks(sorted({result.log[-1][key] for result in results}))  # where the ways end
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in (losses, rates, batches):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
