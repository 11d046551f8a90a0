"""How does this package compare with the accumulation that others have?

All have the same network, initial parameters, data, SGD, micro-batch, k and one thread: AccumulatingUpdater; Chainer
with what is written by hand; PyTorch by hand, with Accelerate and with Lightning, each as its documentation shows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import numpy
import peers_in_chainer
from pairs import keep_freed_memory, measure, ratios
from peaks import MALLOC, resident_mib, resident_peak
from peers_in_chainer import Contestant, Job, parameters_of
from workloads import DROPOUT_MLP, NORMALIZED_MLP, WORKLOADS, Workload, describe_machine

if importlib.util.find_spec("torch"):
    import peers_in_torch

    FRAMEWORKS = {"Chainer": peers_in_chainer, "PyTorch": peers_in_torch}
else:
    FRAMEWORKS = {"Chainer": peers_in_chainer}

PACKAGES = ("torch", "accelerate", "pytorch_lightning")
OURS = next(iter(peers_in_chainer.CONTESTANTS))
K = 16
MEMORY_STEPS = (1, 4, 16, 64)
MEMORY_WORKLOAD = WORKLOADS[-1]  # most of whose memory is for activations
MIB_TICKS = (10, 20, 50, 100, 200, 500)


class Case(NamedTuple):
    """An effective batch of ``CASE_STEPS`` micro-batches at most: the labels that count in each, and its examples."""

    name: str
    labels: Sequence[int]
    sizes: Sequence[int]


CASE_STEPS = 4
CASES = [
    Case("all alike", labels=(32, 32, 32, 32), sizes=(32, 32, 32, 32)),
    Case("last one short", labels=(32, 32, 32, 9), sizes=(32, 32, 32, 9)),
    Case("data end after 3 of 4", labels=(32, 32, 32), sizes=(32, 32, 32)),
    Case("labels to ignore", labels=(32, 4, 20, 11), sizes=(32, 32, 32, 32)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs=3, default=(40, 15, 8), help="how often each runs, by network")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"), help="where the plot goes")
    parser.add_argument("--peaks-of", help=argparse.SUPPRESS)  # prints what measure_peaks asks a child process
    args = parser.parse_args()
    if args.peaks_of:
        print(json.dumps(peaks(all_contestants()[args.peaks_of])))
        return
    print(f"# Peers, side by side\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}{describe_packages()}.\n")
    for name, make in {**all_contestants(), **peers_in_chainer.LOCKSTEP}.items():
        print(f"- {name}: {' '.join(make.__doc__.split())}")
    times = print_times(args.rounds)
    peaks_by_name = print_peaks()
    print_deviations()
    print_deviations_with_normalization()
    plot(times, peaks_by_name, args.plot)
    print(f"\n![Time over the floor, and peak memory by k]({args.plot.name})\n")
    rounds = " ".join(map(str, args.rounds))
    print(f"Made by `make peers`: `python benchmarks/peers.py --rounds {rounds}`.")


def all_contestants() -> Dict[str, Callable[[Job], Contestant]]:
    """Returns what makes each contestant, by name."""
    return {name: make for module in FRAMEWORKS.values() for name, make in module.CONTESTANTS.items()}


def describe_packages() -> str:
    """Returns the versions of the packages to compare with, and which are missing."""
    text = ""
    for name in PACKAGES:
        version = importlib.metadata.version(name) if importlib.util.find_spec(name) else "is not installed: no row"
        text += f", {name} {version}"
    return text


# Time


def print_times(rounds_by_workload: Sequence[int]) -> Dict[str, List[float]]:
    """Prints the table of times and returns the medians of the ratios by contestant, one for each network."""
    print(f"""
## Time of a window over its framework's floor

The floor is k = {K} bare forward/backward passes and one update, loading included, in the same framework. All take
turns in one process, in which the C library keeps what is freed; medians of the ratios round by round, with quartiles.
Chainer's models report their loss, and updaters are called as by a Trainer with a LogReport.
""")
    keep_freed_memory()
    columns = [time_workload(workload, rounds) for workload, rounds in zip(WORKLOADS, rounds_by_workload)]
    heads = (f"{w.name}, micro-batch {w.micro_batch_size}, {n} rounds" for w, n in zip(WORKLOADS, rounds_by_workload))
    print(f"| | {' | '.join(heads)} |\n|{' --- |' * (len(WORKLOADS) + 1)}")
    medians = {}
    for framework, module in FRAMEWORKS.items():
        floors = [column[floor_of(framework)] for column in columns]
        print(
            f"| {floor_of(framework)} | {' | '.join(f'{statistics.median(floor) * 1e3:.1f} ms' for floor in floors)} |"
        )
        for name in module.CONTESTANTS:
            pairs = [(column[name], floor) for column, floor in zip(columns, floors)]
            print(f"| {name} | {' | '.join(ratios(*pair) for pair in pairs)} |", flush=True)
            medians[name] = [statistics.median(a / b for a, b in zip(*pair)) for pair in pairs]
    return medians


def time_workload(workload: Any, rounds: int) -> Dict[str, List[float]]:
    """Returns the seconds of each window of all contestants and floors."""
    windows = rounds + 1  # one to warm up
    dataset = workload.make_dataset(K * workload.micro_batch_size) * windows
    job = Job(workload, dataset, workload.micro_batch_size, K)
    makers = {floor_of(framework): module.floor for framework, module in FRAMEWORKS.items()}
    makers.update(all_contestants())
    return measure({name: make(job).window for name, make in makers.items()}, rounds)


def floor_of(framework: str) -> str:
    return f"{framework}'s floor"


# Memory


def print_peaks() -> Dict[str, List[float]]:
    """Prints the table of peaks and returns the MiB by contestant, one for each k."""
    print(f"""
## Peak memory of a window by k

{MEMORY_WORKLOAD.name}, micro-batch {MEMORY_WORKLOAD.micro_batch_size}. MiB of resident memory (`VmHWM`) that a window
needs at its peak, network included, above what the process has with the data alone, so that what NumPy and what PyTorch
allocate count alike. Each row is a process of its own, which has warmed up with one example and goes through k in this
order; the C library is set to give freed arrays back at once.
""")
    print(f"| | {' | '.join(f'k = {k}' for k in MEMORY_STEPS)} |\n|{' --- |' * (len(MEMORY_STEPS) + 1)}")
    peaks_by_name = {}
    for name in all_contestants():
        command = [sys.executable, __file__, "--peaks-of", name]
        child = subprocess.run(command, env={**os.environ, **MALLOC}, stdout=subprocess.PIPE, check=True)
        peaks_by_name[name] = json.loads(child.stdout)
        print(f"| {name} | {' | '.join(f'{peak:.0f}' for peak in peaks_by_name[name])} |", flush=True)
    return peaks_by_name


def peaks(make: Callable[[Job], Contestant]) -> List[float]:
    """Returns the MiB that a window needs at its peak, for each k."""
    size = MEMORY_WORKLOAD.micro_batch_size
    dataset = MEMORY_WORKLOAD.make_dataset(max(MEMORY_STEPS) * size)
    make(Job(MEMORY_WORKLOAD, dataset[:1], 1, 1)).window()  # allocates what libraries keep
    gc.collect()
    before = resident_mib()
    jobs = [Job(MEMORY_WORKLOAD, dataset[: k * size], size, k) for k in MEMORY_STEPS]
    return [resident_peak(make(job).window) - before for job in jobs]


# Correctness


def print_deviations() -> None:
    """Prints the table of deviations."""
    print(f"""
## Deviation from the full-batch step

One step of the small MLP, from {CASE_STEPS} micro-batches at most, against the step that the whole effective batch
makes in float64: the largest difference in any parameter over the largest change in the same array. No step at all has
the deviation 1; what is below 1e-6 is rounding of float32. The loss is a mean over the labels that count. These are
random, so the gradients of the micro-batches differ much; where there is something to learn, a wrong weight does less
harm. The micro-batches are:
""")
    for case in CASES:
        print(
            f"- {case.name}: {', '.join(map(str, case.labels))} labels that count of {', '.join(map(str, case.sizes))}"
        )
    print(f"\n| | {' | '.join(case.name for case in CASES)} | largest |\n|{' --- |' * (len(CASES) + 2)}")
    for name, make in all_contestants().items():
        deviations = [deviation(make, case) for case in CASES]
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in [*deviations, max(deviations)])} |")


def print_deviations_with_normalization() -> None:
    """Prints the table of deviations for networks with something that looks at the batch."""
    print(f"""
## The same with batch normalization

The same for the small MLP with a batch normalization after each of its hidden layers, whose statistics in the whole
batch are those of all examples; and, in the column *dropout*, with dropout as well, whose masks come from NumPy's
generator with the same seed, for micro-batches that are all alike. PyTorch {
        "has other generators, so its rows have no dropout"
        if "PyTorch" in FRAMEWORKS
        else "was not installed when this table was made"
    }.
""")
    print(f"| | {' | '.join(case.name for case in CASES)} | dropout |\n|{' --- |' * (len(CASES) + 2)}")
    in_chainer = {**peers_in_chainer.LOCKSTEP, **peers_in_chainer.CONTESTANTS}
    for name, make in {**in_chainer, **all_contestants()}.items():
        deviations = deviations_with_normalization(make, name in in_chainer)
        print(f"| {name} | {' | '.join('–' if value is None else f'{value:.1e}' for value in deviations)} |")


def deviations_with_normalization(make: Callable[[Job], Contestant], has_dropout: bool) -> List[Optional[float]]:
    """Returns the deviations in all cases, and with dropout if the contestant draws as Chainer does."""
    deviations: List[Optional[float]] = [deviation(make, case, NORMALIZED_MLP) for case in CASES]
    return [*deviations, deviation(make, CASES[0], DROPOUT_MLP) if has_dropout else None]


def deviation(make: Callable[[Job], Contestant], case: Case, workload: Workload = WORKLOADS[0]) -> float:
    """Returns the largest deviation of a step, relative to the change of the parameters of the same array."""
    # A large step, so that what is measured is the rounding of the gradient, not that of the parameters it is added to.
    job = Job(workload, make_case(case), max(case.sizes), CASE_STEPS, learning_rate=16.0, weight_func=count_labels)
    initial = [param.array.astype(numpy.float64) for param in parameters_of(job.make_model())]
    contestant = make(job)
    contestant.window()
    steps = [after - before for after, before in zip(contestant.parameters(), initial)]
    references = [after - before for after, before in zip(full_batch_step(job), initial)]
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(steps, references))


def make_case(case: Case) -> List[Any]:
    """Returns the examples, of which in each micro-batch the first labels count and the others are -1."""
    examples = iter(WORKLOADS[0].make_dataset(sum(case.sizes)))
    return [
        (x, t if number < labels else numpy.int32(-1))
        for labels, size in zip(case.labels, case.sizes)
        for number, (x, t) in zip(range(size), examples)
    ]


def count_labels(micro_batch: Any) -> int:
    """Returns what the loss is divided by."""
    return sum(t != -1 for _, t in micro_batch)


def full_batch_step(job: Job) -> List[numpy.ndarray]:
    """Returns the parameters after one step with all examples at once, computed in float64."""
    model = job.make_model()
    for param in model.params():
        param.array = param.array.astype(numpy.float64)
    optimizer = chainer.optimizers.SGD(lr=job.learning_rate).setup(model)
    inputs, labels = chainer.dataset.concat_examples(job.dataset)
    optimizer.update(model, inputs.astype(numpy.float64), labels)
    return [param.array for param in parameters_of(model)]


# Plot


def plot(times: Dict[str, List[float]], peaks_by_name: Dict[str, List[float]], path: Path) -> None:
    """Plots bars of the times over the floor, and lines of the peaks by k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.5), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    rows = numpy.arange(len(times))
    for number, workload in enumerate(WORKLOADS):
        ratios_of_workload = [medians[number] for medians in times.values()]
        bars.barh(rows + (number - 1) * 0.27, ratios_of_workload, 0.25, label=workload.name)
    bars.axvline(1, color="black", linewidth=1)
    bars.set_yticks(rows, list(times))
    bars.invert_yaxis()
    bars.set_xlabel(f"time of a window of k = {K} / floor of the same framework")
    bars.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.4, 1))
    for name, peak in peaks_by_name.items():
        style = {"color": "black", "linewidth": 4} if name == OURS else {"linewidth": 1.3}
        if name not in peers_in_chainer.CONTESTANTS:
            style["linestyle"] = "--"
        lines.plot(MEMORY_STEPS, peak, marker="o", markersize=4, label=name, **style)
    lines.set_xscale("log", base=2)
    lines.set_yscale("log")
    lines.set_xticks(MEMORY_STEPS, MEMORY_STEPS)
    lines.set_yticks(MIB_TICKS, MIB_TICKS)
    lines.minorticks_off()
    lines.set_xlabel(f"k, micro-batches of {MEMORY_WORKLOAD.micro_batch_size} examples per window, CNN")
    lines.set_ylabel("peak memory of a window in MiB")
    lines.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.42, 1), ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
