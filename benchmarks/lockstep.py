"""What does it cost to run the micro-batches of a window in lockstep?

An update of each: the whole batch at once (StandardUpdater); AccumulatingUpdater, whose micro-batches each have
statistics of their own (plain); and with ``lockstep='memory'`` and ``lockstep='file'``, which normalize by the
statistics of the whole batch. SGD; all take turns in one process. Times are CPU times of all threads, of which one runs
at a time: medians, of ratios round by round, with quartiles.

Memory is the peak of the resident memory (``VmHWM``) in two updates, above what the process has with the data and the
network. Each is a process of its own, which has warmed up with two examples, and in which the C library is set to give
freed arrays back at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.training.updaters import StandardUpdater
from growth import Growth
from pairs import keep_freed_memory, measure, measure_for, ratios
from peaks import MALLOC, resident_mib, resident_peak
from workloads import (
    NORMALIZED,
    NOT_NORMALIZED,
    Workload,
    convolve_and_normalize,
    describe_machine,
    mean_of_pixels,
)

WHOLE, PLAIN, MEMORY, FILE = "whole batch", "plain micro-batches", "lockstep, memory", "lockstep, file"
LOCKSTEP = {PLAIN: None, MEMORY: "memory", FILE: "file"}
CONTESTANTS = (WHOLE, *LOCKSTEP)
K = 16
ERROR_K = 4


class Job(NamedTuple):
    """A network of so many normalizations and a window."""

    k: int = 8
    normalizations: int = 5

    @property
    def workload(self) -> Workload:
        def make_layers() -> List[Any]:
            blocks = [(convolve_and_normalize(16, 16, 3), F.relu) for _ in range(self.normalizations)]
            return [*(layer for block in blocks for layer in block), mean_of_pixels, L.Linear(16, 10)]

        return Workload(f"{self.normalizations} convolutions", make_layers, (16, 16, 16), 16)


GROWTHS = (
    Growth("k", "micro-batches", "5 normalizations", [Job(k=2**n) for n in range(7)]),
    Growth(
        "normalizations",
        "normalizations",
        "8 micro-batches",
        [Job(normalizations=number) for number in (1, 2, 5, 10, 20, 50)],
    ),
)


class Target(NamedTuple):
    """What is promised: the most that a ratio may be."""

    what: str
    name: str
    reference: str
    most: float
    workloads: Sequence[Workload] = NORMALIZED


TARGETS = (
    Target("peak", FILE, PLAIN, 1.15),
    Target("peak", MEMORY, WHOLE, 0.4),
    Target("time", MEMORY, PLAIN, 1.5),
    Target("time", FILE, PLAIN, 1.5),
    Target("time", MEMORY, WHOLE, 1),
    Target("time", FILE, WHOLE, 1),
    Target("time", MEMORY, PLAIN, 1.03, [NOT_NORMALIZED]),
)


class Cost(NamedTuple):
    """What was measured: the seconds of each update, and peaks in MiB, by contestant."""

    seconds: Dict[str, List[float]]
    peaks: Dict[str, float]

    def ratio(self, target: Target) -> float:
        """Returns the ratio that a target is about."""
        if target.what == "peak":
            return self.peaks[target.name] / self.peaks[target.reference]
        pairs = zip(self.seconds[target.name], self.seconds[target.reference])
        return statistics.median(time / reference for time, reference in pairs)

    def milliseconds(self, name: str) -> float:
        """Returns the median time of an update."""
        return statistics.median(self.seconds[name]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each runs in the first table")
    parser.add_argument("--seconds", type=float, default=10, help="how long the rounds of a point of the plot may take")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"), help="where the plot goes")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # prints what measure_peak asks a child process
    args = parser.parse_args()
    if args.peak_of:
        name, workload_name, k = json.loads(args.peak_of)
        print(peak(name, all_workloads()[workload_name], k))
        return
    keep_freed_memory()
    print(f"# Cost of lockstep\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    costs = print_costs(args.rounds)
    print_targets(costs)
    print_errors()
    plot([(growth, print_growth(growth, args.seconds)) for growth in GROWTHS], args.plot)
    print(f"![Time and peak memory by micro-batches and by normalizations]({args.plot.name})\n")
    print(f"Made by `make bench`: `python benchmarks/lockstep.py --rounds {args.rounds} --seconds {args.seconds:g}`.")


# Updates


def make_updater(name: str, workload: Workload, size: int, k: int) -> Any:
    """Returns the updater of a contestant, with a model, an optimizer and an iterator over one effective batch."""
    optimizer = chainer.optimizers.SGD().setup(make_model(workload))
    dataset = [(x.astype(chainer.get_dtype()), t) for x, t in workload.make_dataset(k * size)]
    iterator = chainer.iterators.SerialIterator(dataset, k * size, shuffle=False)
    if name == WHOLE:
        return StandardUpdater(iterator, optimizer)
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=size, lockstep=LOCKSTEP[name])


def make_model(workload: Workload) -> chainer.Chain:
    """Returns a model in the dtype of the configuration, whose initial values are those of float32."""
    model = workload.make_model()
    with chainer.using_config("dtype", numpy.float32):
        narrow = workload.make_model()
    for param, other in zip(model.params(), narrow.params()):
        param.array[...] = other.array
    return model


def make_contestants(workload: Workload, k: int, names: Sequence[str] = CONTESTANTS) -> Dict[str, Callable[[], None]]:
    """Returns what is timed."""
    return {name: make_updater(name, workload, workload.micro_batch_size, k).update for name in names}


def measure_peak(name: str, workload: Workload, k: int) -> float:
    """Returns the MiB of :func:`peak`, measured in a process of its own. The network is of :func:`all_workloads`."""
    command = [sys.executable, __file__, "--peak-of", json.dumps([name, workload.name, k])]
    child = subprocess.run(command, env={**os.environ, **MALLOC}, stdout=subprocess.PIPE, check=True)
    return float(child.stdout)


def peak(name: str, workload: Workload, k: int) -> float:
    """Returns the MiB that two updates need at their peak."""
    make_updater(name, workload, 1, 2).update()  # allocates what libraries keep
    gc.collect()
    updater = make_updater(name, workload, workload.micro_batch_size, k)
    before = resident_mib()

    def update() -> None:
        updater.update()
        updater.update()

    return resident_peak(update) - before


def all_workloads() -> Dict[str, Workload]:
    """Returns the networks by name."""
    grown = [job.workload for growth in GROWTHS for job in growth.jobs]
    return {workload.name: workload for workload in [*NORMALIZED, NOT_NORMALIZED, *grown]}


# Time and memory of three networks


def print_costs(rounds: int) -> Dict[str, Cost]:
    """Prints the table of costs, and returns them by network."""
    print(f"""
## Time and peak memory

Effective batches of {K} micro-batches. Nothing in the last network looks at the batch. This is known after the
first update, in which all converted micro-batches wait; the peak is of that one. From then on, lockstep takes the
ordinary path.
""")
    heads = ["network", "micro-batch", "", "time", "/ plain", "/ whole batch"]
    heads += ["peak", "/ plain", "/ whole batch"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    costs = {}
    for workload in [*NORMALIZED, NOT_NORMALIZED]:
        names = CONTESTANTS if workload in NORMALIZED else (PLAIN, MEMORY)
        seconds = measure(make_contestants(workload, K, names), rounds, time.process_time)
        peaks = {name: measure_peak(name, workload, K) for name in names}
        costs[workload.name] = Cost(seconds, peaks)
        for name in names:
            cells = [
                *(workload.name, f"{workload.micro_batch_size}", name, f"{statistics.median(seconds[name]):.2f} s"),
                *(ratios(seconds[name], seconds[other]) if other in names else "–" for other in (PLAIN, WHOLE)),
                f"{peaks[name]:.0f} MiB",
                *(f"{peaks[name] / peaks[other]:.2f}" if other in names else "–" for other in (PLAIN, WHOLE)),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    return costs


def print_targets(costs: Dict[str, Cost]) -> None:
    """Prints what is promised, what was measured, and whether the promise is kept."""
    print("\n## Targets\n\n| target | network | measured | kept |\n|" + " --- |" * 4)
    for target in TARGETS:
        for workload in target.workloads:
            ratio = costs[workload.name].ratio(target)
            text = f"{target.what} of {target.name} ≤ {target.most:g} × {target.reference}"
            print(f"| {text} | {workload.name} | {ratio:.3f} | {'yes' if ratio <= target.most else 'no'} |", flush=True)


# Rounding


def print_errors() -> None:
    """Prints how far gradients in float32 are from that of the whole batch in float64."""
    print(f"""
## Rounding

The gradient in float32, against that of the whole batch in float64: the largest difference in any parameter over the
largest gradient in the same array, of the array where it is largest. Batches of {ERROR_K} micro-batches.
Rounding that moves a value across zero at a ReLU, or past another one at a pooling, sends a gradient elsewhere, so that
the error jumps.
""")
    names = (WHOLE, MEMORY, FILE, PLAIN)
    print(f"| network | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for workload in NORMALIZED:
        cells = [f"{error:.1e}" for error in errors(workload, ERROR_K, names).values()]
        print(f"| {workload.name} | {' | '.join(cells)} |", flush=True)
    print()


def errors(workload: Workload, k: int, names: Sequence[str]) -> Dict[str, float]:
    """Returns the errors of contestants."""
    with chainer.using_config("dtype", numpy.float64):
        exact = gradients(WHOLE, workload, k)
    result = {}
    for name in names:
        pairs = [(grad, exact[param]) for param, grad in gradients(name, workload, k).items()]
        result[name] = max(float(abs(grad - other).max() / abs(other).max()) for grad, other in pairs)
    return result


def gradients(name: str, workload: Workload, k: int) -> Dict[str, numpy.ndarray]:
    """Returns the gradient that an update of a contestant gives to the optimizer, in the dtype of the configuration."""
    taken: Dict[str, numpy.ndarray] = {}

    def take(optimizer: chainer.Optimizer) -> None:
        taken.update((path, param.grad.copy()) for path, param in optimizer.target.namedparams())

    updater = make_updater(name, workload, workload.micro_batch_size, k)
    updater.get_optimizer("main").add_hook(take, "take", timing="pre")
    updater.update()
    return taken


# By micro-batches, by normalizations


def print_growth(growth: Growth, seconds: float) -> List[Cost]:
    """Prints a row for each job as soon as it is measured, and returns what was measured."""
    print(f"## By {growth.title}\n")
    print(f"{growth.others}, micro-batches of {growth.jobs[0].workload.micro_batch_size}.\n")
    heads = [growth.title, "rounds", *(f"{name}, time" for name in CONTESTANTS)]
    heads += [*(f"{name} / plain" for name in (MEMORY, FILE)), *(f"{name}, peak" for name in CONTESTANTS)]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    costs = []
    for job in growth.jobs:
        measured = measure_for(make_contestants(job.workload, job.k), seconds, time.process_time)
        peaks = {name: measure_peak(name, job.workload, job.k) for name in CONTESTANTS}
        cost = Cost(measured, peaks)
        costs.append(cost)
        cells = [
            *(f"{getattr(job, growth.name)}", f"{len(measured[PLAIN])}"),
            *(f"{cost.milliseconds(name):,.0f} ms" for name in CONTESTANTS),
            *(ratios(measured[name], measured[PLAIN]) for name in (MEMORY, FILE)),
            *(f"{peaks[name]:.1f} MiB" for name in CONTESTANTS),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print()
    return costs


def plot(grown: Sequence[Tuple[Growth, Sequence[Cost]]], path: Path) -> None:
    """Plots the time of an update and the peaks, on logarithmic axes: one column for each that grows."""
    from matplotlib.figure import Figure

    styles = {
        WHOLE: {"color": "tab:blue", "linestyle": "--"},
        PLAIN: {"color": "tab:orange", "linewidth": 4},
        MEMORY: {"color": "tab:green"},
        FILE: {"color": "black"},
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    rows = figure.subplots(2, len(grown), squeeze=False)
    for column, (growth, costs) in enumerate(grown):
        times, peaks = (row[column] for row in rows)
        values = [getattr(job, growth.name) for job in growth.jobs]
        for name, style in styles.items():
            times.plot(values, [cost.milliseconds(name) for cost in costs], marker="o", label=name, **style)
            peaks.plot(values, [cost.peaks[name] for cost in costs], marker="o", label=name, **style)
        times.set(title=growth.others, ylabel="time of an update in ms")
        peaks.set(ylabel="peak memory in MiB")
        for axes in (times, peaks):
            axes.set(xscale="log", yscale="log", xlabel=growth.title)
            axes.set_xticks(values, values)
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.minorticks_off()
            axes.grid(color="0.9")
        times.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
