"""Trains one network on handwritten digits three ways that differ only in how many batches an update gathers.

(a) a few: the effective batch is small,
(b) as many as the noise scale [1] suggests, which GradientNoiseScale estimates: from as few as (a) up to a limit,
(c) as many as that limit.

The learning rate is the same for all. (b) should reach the target accuracy in fewer updates than (a), and with fewer
examples than (c). The program writes a table and a plot that show whether it does, as medians over several seeds, and a
folder for each training with its log.

[1] McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, https://arxiv.org/abs/1812.06162
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TupleDataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer_accum.extensions import Accumulate, GradientNoiseScale
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import make_iterator, make_parser, positive, show_table
from handwritten_digits import load_split

EVERY_UPDATE = 1, "iteration"

Log = List[Dict[str, float]]  # the log of LogReport, one entry per update


class Way(NamedTuple):
    """A way to train: the initial number of accumulation steps, and the limit if the number grows."""

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
    print()
    show_table([make_row(way, logs[way], args.target) for way in ways], args.out)
    plot_trainings(logs, args.target, args.out / "noise_scale.png")
    print(f"\nPlot: {args.out / 'noise_scale.png'}")


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains on handwritten digits with effective batches that grow with the noise scale.")
    parser.add_argument("--updates", type=positive, default=120, help="number of updates")
    parser.add_argument("--batch-size", type=positive, default=8, help="examples per forward/backward pass")
    parser.add_argument("--steps", type=positive, default=2, help="accumulation steps in (a), and in (b) at first")
    parser.add_argument(
        "--adapt-up-to", type=positive, default=16, help="most accumulation steps in (b), and those of (c)"
    )
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--target", type=float, default=0.95, help="validation accuracy that is to be reached")
    parser.add_argument(
        "--seeds", type=positive, default=5, help="how many; of initial parameters and order of examples"
    )
    args = parser.parse_args()
    if not 2 <= args.steps <= args.adapt_up_to:
        parser.error("--steps must be 2 or more, to estimate from, and --adapt-up-to at least as many")
    return args


def train(way: Way, seed: int, args: argparse.Namespace) -> Log:
    """Trains a new model. Initial parameters and the order of examples depend on the seed alone."""
    training, validation = (TupleDataset(*part) for part in load_split())
    numpy.random.seed(seed)
    network = chainer.Sequential(L.Linear(64, 64), F.tanh, L.Linear(64, 64), F.tanh, L.Linear(64, 10))
    optimizer = chainer.optimizers.MomentumSGD(lr=args.lr).setup(L.Classifier(network))
    iterator = make_iterator(training, args.batch_size, seed)
    updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, device=args.device, accumulation_steps=way.steps)
    trainer = Trainer(updater, (args.updates, "iteration"), out=str(args.out / f"{way.name}_{seed}"))
    trainer.extend(Accumulate())  # before GradientNoiseScale, which sets the steps of the next update
    # The training is short, so the estimates are more frequent than by default, and their mean adapts faster.
    trainer.extend(GradientNoiseScale(interval=4, smoothing=0.9, adapt_up_to=way.adapt_up_to))
    # A single batch: Evaluator averages over batches, and a smaller last batch would count as much as the others.
    whole = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(whole, optimizer.target, device=args.device), trigger=EVERY_UPDATE)
    trainer.extend(extensions.LogReport(trigger=EVERY_UPDATE))
    trainer.run()
    log: Log = trainer.get_extension("LogReport").log
    reached = updates_until(args.target, log)
    print(f"{way.title}, seed {seed}: {reached or 'more'} updates", flush=True)
    return log


def updates_until(target: float, log: Log) -> Optional[int]:
    """Returns the first update after which the validation accuracy reaches the target, or ``None``."""
    return next((entry["iteration"] for entry in log if entry["validation/main/accuracy"] >= target), None)


def examples_until(target: float, log: Log) -> Optional[int]:
    """Returns the number of examples up to that update, or ``None``."""
    updates = updates_until(target, log)
    return None if updates is None else sum(entry["effective_batch_size"] for entry in log[:updates])


def make_row(way: Way, logs: Sequence[Log], target: float) -> Dict[str, str]:
    finals = [log[-1] for log in logs]
    return {
        "way": way.title,
        f"updates until {target:.0%}": spread([updates_until(target, log) for log in logs], "{:.0f}"),
        "examples until then": spread([examples_until(target, log) for log in logs], "{:.0f}"),
        "final accuracy": spread([final["validation/main/accuracy"] for final in finals], "{:.2%}"),
        "final steps": spread([final["accumulation_steps"] for final in finals], "{:.0f}"),
    }


def spread(values: Sequence[Optional[float]], style: str) -> str:
    """Returns the median with the lowest and the highest value. ``None`` exceeds all others, and is shown as "more"."""
    numbers = [float("inf") if value is None else value for value in values]
    three = [statistics.median_low(numbers), min(numbers), max(numbers)]
    median, low, high = ["more" if number == float("inf") else style.format(number) for number in three]
    return f"{median} ({low}–{high})"


def plot_trainings(logs: Dict[Way, List[Log]], target: float, path: Path) -> None:
    """Draws accuracy, noise scale and steps over updates: the median over seeds, and the range."""
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
    """Returns the updates for which all logs have a value, and the values, one row per log."""
    by_update = [{entry["iteration"]: entry[key] for entry in log if key in entry} for log in logs]
    updates = sorted(set.intersection(*map(set, by_update)))
    return updates, numpy.array([[values[update] for update in updates] for values in by_update])


if __name__ == "__main__":
    main()
