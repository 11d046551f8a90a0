"""Trains one network on handwritten digits three ways that differ only in how many batches an update gathers.

(a) a few: the effective batch is small,
(b) as many as the noise scale [1] suggests, which GradientNoiseScale estimates: from as few as in (a) up to a limit,
(c) as many as that limit.

The learning rate is the same for all. (b) should reach the target accuracy in fewer updates than (a), and with fewer
examples than (c). A table and a plot say whether it does, as medians over several seeds. They go to the folder given by
--out; the log of each training to a folder of its own in it.

[1] McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, https://arxiv.org/abs/1812.06162
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training import Trainer, extensions
from chainer_accum.extensions import Accumulate, GradientNoiseScale
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

TRAINING_SHARE = 0.8
EVERY_UPDATE = 1, "iteration"

Log = List[Dict[str, float]]  # of LogReport: one entry per update


class DigitNet(chainer.Chain):
    """A small perceptron for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.hidden1 = L.Linear(64, 64)
            self.hidden2 = L.Linear(64, 64)
            self.classes = L.Linear(64, 10)

    def forward(self, images: Any) -> chainer.Variable:
        return self.classes(F.tanh(self.hidden2(F.tanh(self.hidden1(images)))))


class Way(NamedTuple):
    """A way to train: the number of accumulation steps at first, and the limit up to which it grows, if it does."""

    name: str
    title: str
    steps: int
    adapt_up_to: Optional[int] = None


def main() -> None:
    args = parse_args()
    args.device.use()
    few, many, size = args.steps, args.adapt_up_to, args.batch_size
    ways = [
        Way("small_batch", f"(a) {few} batches of {size}", few),
        Way("noise_scale", f"(b) {few} to {many} batches of {size}, by the noise scale", few, many),
        Way("large_batch", f"(c) {many} batches of {size}", many),
    ]
    logs = {way: [train(way, seed, args) for seed in range(args.seeds)] for way in ways}
    table = make_table(logs, args.target)
    print("\n" + table)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    plot_trainings(logs, args.target, args.out / "noise_scale.png")
    print(f"\nPlot: {args.out / 'noise_scale.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains on handwritten digits with effective batches that grow with the noise scale.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--updates", type=int, default=120, help="number of updates")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per forward/backward pass")
    parser.add_argument("--steps", type=int, default=2, help="accumulation steps in (a), and in (b) at first")
    parser.add_argument("--adapt-up-to", type=int, default=16, help="most accumulation steps in (b), and those of (c)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--target", type=float, default=0.95, help="validation accuracy that is to be reached")
    parser.add_argument("--seeds", type=int, default=5, help="how many; of initial parameters and order of examples")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    if min(args.updates, args.batch_size, args.seeds) < 1:
        parser.error("--updates, --batch-size and --seeds must be 1 or more")
    if not 2 <= args.steps <= args.adapt_up_to:
        parser.error("--steps must be 2 or more, to estimate from, and --adapt-up-to at least as many")
    return args


def load_datasets() -> Tuple[Any, Any]:
    """Returns the training and the validation dataset, always split in the same way."""
    images, labels = load_digits(return_X_y=True)
    dataset = chainer.datasets.TupleDataset((images / 16).astype(numpy.float32), labels.astype(numpy.int32))
    return chainer.datasets.split_dataset_random(dataset, int(TRAINING_SHARE * len(dataset)), seed=0)


def train(way: Way, seed: int, args: argparse.Namespace) -> Log:
    """Trains a new model, the same for all ways, on examples in the same order."""
    training, validation = load_datasets()
    numpy.random.seed(seed)
    optimizer = chainer.optimizers.MomentumSGD(lr=args.lr).setup(L.Classifier(DigitNet()))
    order_sampler = ShuffleOrderSampler(numpy.random.RandomState(seed))
    iterator = SerialIterator(training, args.batch_size, order_sampler=order_sampler)
    updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device, accumulation_steps=way.steps)
    trainer = Trainer(updater, (args.updates, "iteration"), out=str(args.out / f"{way.name}_{seed}"))
    trainer.extend(Accumulate())  # first, to report the steps of this update, not those of the next
    # The training is short, so it is looked at more often than by default, and the mean forgets faster.
    trainer.extend(GradientNoiseScale(interval=4, smoothing=0.9, adapt_up_to=way.adapt_up_to))
    # One batch: Evaluator takes the mean over batches, in which a smaller last one would count as much as the others.
    whole = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(whole, optimizer.target, device=args.device), trigger=EVERY_UPDATE)
    trainer.extend(extensions.LogReport(trigger=EVERY_UPDATE))
    trainer.run()
    log: Log = trainer.get_extension("LogReport").log
    reached = updates_until(args.target, log)
    print(f"{way.title}, seed {seed}: {reached or 'more'} updates", flush=True)
    return log


def updates_until(target: float, log: Log) -> Optional[int]:
    """Returns the number of the first update after which the validation accuracy is that of the target, if any is."""
    return next((entry["iteration"] for entry in log if entry["validation/main/accuracy"] >= target), None)


def examples_until(target: float, log: Log) -> Optional[int]:
    """Returns how many examples the updates until then had."""
    updates = updates_until(target, log)
    return None if updates is None else sum(entry["effective_batch_size"] for entry in log[:updates])


def make_table(logs: Dict[Way, List[Log]], target: float) -> str:
    """Returns a Markdown table with one row per way."""
    rows = [["way", f"updates until {target:.0%}", "examples until then", "final accuracy", "final steps"]]
    for way, of_way in logs.items():
        finals = [log[-1] for log in of_way]
        rows.append(
            [
                way.title,
                spread([updates_until(target, log) for log in of_way], "{:.0f}"),
                spread([examples_until(target, log) for log in of_way], "{:.0f}"),
                spread([final["validation/main/accuracy"] for final in finals], "{:.2%}"),
                spread([final["accumulation_steps"] for final in finals], "{:.0f}"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    lines = [
        [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[Optional[float]], style: str) -> str:
    """Returns the median, and the lowest and the highest value; ``None``, or "more", is above all others."""
    numbers = [float("inf") if value is None else value for value in values]
    three = [statistics.median_low(numbers), min(numbers), max(numbers)]
    median, low, high = ["more" if number == float("inf") else style.format(number) for number in three]
    return f"{median} ({low}–{high})"


def plot_trainings(logs: Dict[Way, List[Log]], target: float, path: Path) -> None:
    """Draws accuracy, noise scale and steps over updates: the median over seeds, and from the lowest to the highest."""
    figure = Figure(figsize=(8, 9), constrained_layout=True)
    accuracies, noise_scales, steps = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": [1.8, 1.4, 1]})
    for (way, of_way), colour in zip(logs.items(), ("#3182bd", "#e6550d", "#636363")):
        for axes, key, title in (
            (accuracies, "validation/main/accuracy", way.title),
            (noise_scales, "noise_scale", None),
            (steps, "accumulation_steps", None),
        ):
            updates, values = collect(of_way, key)
            axes.plot(updates, numpy.median(values, axis=0), color=colour, label=title)
            axes.fill_between(updates, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    accuracies.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target: {target:.0%}")
    accuracies.set(
        ylim=(0.7, 1),
        ylabel="validation accuracy",
        title=f"Median of {len(of_way)} seeds, and range from lowest to highest",
    )
    accuracies.legend(loc="lower right")
    noise_scales.set(ylabel="noise scale (examples)")
    steps.set(xlabel="updates", ylabel="accumulation steps")
    for axes in (noise_scales, steps):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in (accuracies, noise_scales, steps):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)


def collect(logs: Sequence[Log], key: str) -> Tuple[List[float], numpy.ndarray]:
    """Returns the updates for which all logs have a value, and these values, one row per log."""
    by_update = [{entry["iteration"]: entry[key] for entry in log if key in entry} for log in logs]
    updates = sorted(set.intersection(*map(set, by_update)))
    return updates, numpy.array([[values[update] for update in updates] for values in by_update])


if __name__ == "__main__":
    main()
