"""How does the cost of an example grow with k, with the micro-batch and with the parameters?

One of the three grows at a time. Times are those of an update of AccumulatingUpdater and of its floor, which is k bare
forward/backward passes, iterator and converter included, and one ``optimizer.update()``. They take turns, and the C
library keeps what is freed. Memory is the peak that ``tracemalloc`` sees in two windows, without the data set: of
AccumulatingUpdater; of StandardUpdater at the micro-batch size, which is the floor of memory; and of StandardUpdater
with the whole effective batch.

The networks are MLPs, and the micro-batch is small unless it is what grows. So a pass is short, and what a window adds
to it shows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.training.updaters import StandardUpdater
from floor import make_floor, make_window, set_up
from pairs import FEWEST_ROUNDS, MOST_ROUNDS, keep_freed_memory, measure_for, ratios
from peaks import peak
from workloads import Workload, describe_machine

FLOOR, WINDOW = "floor", "AccumulatingUpdater"
AT_SIZE, WHOLE = "StandardUpdater, micro-batch", "StandardUpdater, whole batch"


class Job(NamedTuple):
    """What one row is about: an MLP of this width and a window."""

    width: int = 256
    micro_batch_size: int = 8
    k: int = 4

    @property
    def workload(self) -> Workload:
        def make_layers() -> List[Any]:
            sizes = (64, self.width), (self.width, self.width), (self.width, 10)
            first, second, last = (L.Linear(*size, initialW=draw_weights) for size in sizes)
            return [first, F.relu, second, F.relu, last]

        return Workload(f"MLP 64-{self.width}-{self.width}-10", make_layers, (64,), self.micro_batch_size)

    @property
    def examples(self) -> int:
        return self.k * self.micro_batch_size

    @property
    def parameters(self) -> int:
        return (64 + 1) * self.width + (self.width + 1) * self.width + (self.width + 1) * 10


class Growth(NamedTuple):
    """What grows, and what does not."""

    name: str  # of what grows, in a job
    title: str
    others: str
    jobs: Sequence[Job]


GROWTHS = (
    Growth("k", "k", "MLP 64-256-256-10, micro-batches of 8", [Job(k=4**n) for n in range(6)]),
    Growth(
        "micro_batch_size",
        "examples per micro-batch",
        "MLP 64-256-256-10, k = 4",
        [Job(micro_batch_size=4**n) for n in range(7)],
    ),
    Growth(
        "parameters",
        "parameters",
        "MLPs 64-n-n-10, k = 4, micro-batches of 8",
        [Job(width=width) for width in (70, 281, 963, 3125, 9963)],
    ),
)


class Cost(NamedTuple):
    """What was measured for a job."""

    job: Job
    seconds: Dict[str, List[float]]  # of each window
    peaks: Dict[str, int]  # in bytes

    def microseconds(self, name: str) -> float:
        """Returns the median time per example."""
        return statistics.median(self.seconds[name]) / self.job.examples * 1e6


def draw_weights(array: numpy.ndarray) -> None:
    """Initialises weights in place: Chainer draws them in float64, and that would be the peak of a large network."""
    numpy.random.default_rng(0).standard_normal(dtype=numpy.float32, out=array)
    array /= numpy.float32(array.shape[1] ** 0.5)


def measure_time(job: Job, seconds: float) -> Dict[str, List[float]]:
    """Returns the seconds of each window, from as many rounds as take about ``seconds``."""
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        makers = {FLOOR: make_floor, WINDOW: make_window}
        contestants = {name: make(*set_up(job.workload, job.k), job.k) for name, make in makers.items()}
        return measure_for(contestants, seconds)


def measure_peaks(job: Job) -> Dict[str, int]:
    """Returns the peaks in bytes."""
    sgd, size = chainer.optimizers.SGD, job.micro_batch_size
    few = 2 * min(job.k, 16) * size  # later updates are like these
    return {
        WINDOW: peak(
            job.workload, sgd, chainer_accum.AccumulatingUpdater, size, 2 * job.examples, accumulation_steps=job.k
        ),
        AT_SIZE: peak(job.workload, sgd, StandardUpdater, size, few),
        WHOLE: peak(job.workload, sgd, StandardUpdater, job.examples, 2 * job.examples),
    }


def print_table(growth: Growth, seconds: float) -> List[Cost]:
    """Prints a row for each job as soon as it is measured, and returns what was measured."""
    print(f"## By {growth.title}\n\n{growth.others}.\n")
    print(
        f"| {growth.title} | rounds | floor, µs/example | window, µs/example | window / floor "
        f"| window, peak | per example | {AT_SIZE}, peak | {WHOLE}, peak |\n|{' --- |' * 9}"
    )
    costs = []
    for job in growth.jobs:
        cost = Cost(job, measure_time(job, seconds), measure_peaks(job))
        costs.append(cost)
        cells = [
            f"{getattr(job, growth.name):,}",
            f"{len(cost.seconds[FLOOR])}",
            *(f"{cost.microseconds(name):.1f}" for name in (FLOOR, WINDOW)),
            ratios(cost.seconds[WINDOW], cost.seconds[FLOOR]),
            f"{cost.peaks[WINDOW] / 1e6:.3f} MB",
            f"{cost.peaks[WINDOW] / job.examples / 1e3:.2f} kB",
            *(f"{cost.peaks[name] / 1e6:.3f} MB" for name in (AT_SIZE, WHOLE)),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return costs


def plot(growth: Growth, costs: Sequence[Cost], path: Path) -> None:
    """Plots the time per example and the peaks, with their floors, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    styles = {
        WINDOW: {"color": "black", "linewidth": 4, "markersize": 9},
        FLOOR: {"color": "tab:orange", "linewidth": 1.3, "markersize": 4},
        AT_SIZE: {"color": "tab:orange", "linewidth": 1.3, "markersize": 4},
        WHOLE: {"color": "tab:blue", "linewidth": 1.3, "markersize": 4, "linestyle": "--"},
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    times, peaks = figure.subplots(1, 2)
    values = [getattr(cost.job, growth.name) for cost in costs]
    for name in (WINDOW, FLOOR):
        times.plot(values, [cost.microseconds(name) for cost in costs], marker="o", label=name, **styles[name])
    for name in (WINDOW, AT_SIZE, WHOLE):
        peaks.plot(values, [cost.peaks[name] / 1e6 for cost in costs], marker="o", label=name, **styles[name])
    times.set_ylabel("time per example in µs")
    peaks.set_ylabel("peak memory in MB")
    for axes in (times, peaks):
        axes.set(xscale="log", yscale="log", xlabel=growth.title)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high / 10), high * 2)  # so that what is flat looks flat
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.legend()
    figure.suptitle(growth.others)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6, help="how long the rounds of one row may take")
    parser.add_argument("--plots", type=Path, default=Path(__file__).parent, help="where the plots go")
    args = parser.parse_args()
    keep_freed_memory()
    measure_peaks(Job(width=1))  # imports and caches what the first updates need
    print(f"# Cost of an example as work grows\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"SGD, medians of {FEWEST_ROUNDS} to {MOST_ROUNDS} rounds, the ratios round by round, with quartiles.\n")
    for growth in GROWTHS:
        costs = print_table(growth, args.seconds)
        path = args.plots / f"growth_{growth.name}.png"
        plot(growth, costs, path)
        print(f"\n![Time per example, and peak memory, by {growth.title}]({path.name})\n")
    print(f"Made by `make bench`: `python benchmarks/growth.py --seconds {args.seconds:g}`.")


if __name__ == "__main__":
    main()
