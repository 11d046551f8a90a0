"""Does ``micro_batch_size='auto'`` find the fastest size, and does it predict the memory that sizes take?

An effective batch is trained whole, by StandardUpdater, in micro-batches of each power of two, and with
``micro_batch_size='auto'``, once that has made its choice. All take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
from chainer.training.updaters import StandardUpdater
from pairs import measure, ratios
from peaks import MALLOC
from sequences import TAGGERS, count_tokens, length_of, pad
from sequences import make_dataset as make_sequences
from workloads import LSTM, WORKLOADS, Workload, describe_machine, pool

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
MOST_WINDOWS = 8  # of a search
CLOSE = 0.1  # how far a predicted peak may be from the measured one
VGG = Workload(
    "VGG-like, six 3×3 convolutions of 32 to 128 channels, 32×32",
    lambda: [
        *(layer for block in ((3, 32), (32, 64), (64, 128)) for layer in convolve_twice(*block)),
        *(L.Linear(128 * 4 * 4, 256), F.relu, L.Linear(256, 10)),
    ],
    (3, 32, 32),
    32,
)


def convolve_twice(in_channels: int, out_channels: int) -> List[Any]:
    """Returns a block of two convolutions and a pooling."""
    return [
        *(L.Convolution2D(in_channels, out_channels, 3, pad=1), F.relu),
        *(L.Convolution2D(out_channels, out_channels, 3, pad=1), F.relu, pool),
    ]


Peaks = Tuple[float, Optional[float], float]  # of a window: its limit, and the predicted and the measured peak


class Case(NamedTuple):
    """An updater that searches, whose memory is predicted and measured."""

    name: str
    make_updater: Callable[[], Any]


def make_updater(workload: Workload, batch: int, micro_batch_size: Any, updater_class: Optional[Any] = None) -> Any:
    """Returns an updater with a model, an optimizer and an iterator of its own."""
    optimizer = chainer.optimizers.SGD().setup(workload.make_model())
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    iterator = chainer.iterators.SerialIterator(workload.make_dataset(batch), batch, shuffle=False)
    if micro_batch_size is None:
        return StandardUpdater(iterator, optimizer)
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=micro_batch_size)


def make_tagging_updater() -> Any:
    """Returns an updater that searches for the number of tokens with which an encoder is trained."""
    optimizer = chainer.optimizers.SGD().setup(TAGGERS[1].make_model())
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    iterator = chainer.iterators.SerialIterator(make_sequences("lognormal", 256), 256, shuffle=False)
    budget = chainer_accum.TokenBudget("auto", length_of)
    return chainer_accum.AccumulatingUpdater(
        iterator, optimizer, converter=pad, micro_batch_size=budget, weight_func=count_tokens
    )


CASES = [
    *(Case(each.name, lambda each=each: make_updater(each, 2048, "auto")) for each in WORKLOADS),
    *(Case(each.name, lambda each=each: make_updater(each, 512, "auto")) for each in (VGG, LSTM)),
    Case(f"{TAGGERS[1].name}, by tokens", make_tagging_updater),
]


def search(updater: Any) -> List[Dict[str, float]]:
    """Trains until the choice is made, and returns what the windows of the search have reported.

    It ends where memory is no longer reported, so memory must be measurable.

    """
    reports = []
    for _ in range(MOST_WINDOWS + 1):
        observation: Dict[str, float] = {}
        with chainer.get_current_reporter().scope(observation):
            updater.update()
        if "peak_memory" not in observation:
            return reports
        reports.append(observation)
    raise RuntimeError(f"no choice was made in {MOST_WINDOWS} windows")


def report_search(number: int) -> None:
    """Prints the peaks of each window of the search of a case, as JSON: limit, predicted and measured."""
    updater = CASES[number].make_updater()
    keys = ("micro_batch_size", "max_tokens"), ("predicted_peak_memory",), ("peak_memory",)
    reports = [{key: float(report[key]) for key in report if "main" not in key} for report in search(updater)]
    print(json.dumps([[next((report[k] for k in names if k in report), None) for names in keys] for report in reports]))


def print_peaks() -> None:
    """Prints the table of predicted peaks over measured ones, of a process for each case and C library."""
    print(f"""
## Predicted memory

For each window of the search: the limit of a micro-batch, and the predicted peak of the resident memory of the process
over the measured one. Nothing is predicted for a window in which the limit grows. A target is kept if all predictions
are within {CLOSE:.0%}. Each row is a process of its own. By default, the C library keeps some of the memory of freed
arrays, and what it keeps cannot be predicted. In the other rows, it gives each array of 64 KiB or more back at once.
""")
    heads = ["network", "freed memory is", *map(str, range(1, MOST_WINDOWS + 1)), "peak", "kept"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for number, case in enumerate(CASES):
        for freed, environment in (("kept", {}), ("given back", MALLOC)):
            windows = peaks_of(number, environment)
            print(f"| {case.name} | {freed} | {' | '.join(cells_of(windows))} |", flush=True)


def peaks_of(number: int, environment: Dict[str, str]) -> List[Peaks]:
    """Returns what :func:`report_search` prints in a process of its own."""
    command = [sys.executable, __file__, "--peaks-of", str(number)]
    child = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
    return json.loads(child.stdout)


def cells_of(windows: List[Peaks]) -> List[str]:
    """Returns the cells of a row: those of the windows, the highest peak, and whether the target is kept."""
    cells = [
        f"{limit:.0f}: {predicted / peak:.2f}" if predicted else f"{limit:.0f}" for limit, predicted, peak in windows
    ]
    cells += [""] * (MOST_WINDOWS - len(cells))
    errors = [abs(predicted / peak - 1) for _, predicted, peak in windows if predicted]
    highest = max(peak for _, _, peak in windows) / 2**20
    return [*cells, f"{highest:.0f} MiB", "yes" if errors and max(errors) <= CLOSE else "no"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each runs")
    parser.add_argument("--batch", type=int, default=2048, help="examples in the effective batch")
    parser.add_argument("--peaks-of", type=int, help="only print the peaks of this case, as JSON")
    args = parser.parse_args()
    if args.peaks_of is not None:
        report_search(args.peaks_of)
        return
    print(f"# Time with micro_batch_size='auto'\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"{args.rounds} rounds, medians of the ratios round by round, with quartiles.\n")
    print("| network | whole batch | fastest fixed size | auto, after windows | auto / fastest fixed | auto / whole |")
    print("| --- | --- | --- | --- | --- | --- |")
    details = []
    for workload in WORKLOADS:
        auto = make_updater(workload, args.batch, "auto")
        windows = len(search(auto))
        contestants = {str(size): make_updater(workload, args.batch, size).update for size in SIZES}
        contestants["whole"] = make_updater(workload, args.batch, None).update
        contestants["auto"] = auto.update
        seconds = measure(contestants, args.rounds)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        best = min(map(str, SIZES), key=lambda size: medians[size])
        cells = [
            f"{medians['whole'] * 1e3:.0f} ms",
            f"{best}: {medians[best] * 1e3:.0f} ms",
            f"{auto.micro_batch_size}, {windows}",
            ratios(seconds["auto"], seconds[best]),
            ratios(seconds["auto"], seconds["whole"]),
        ]
        print(f"| {workload.name} | {' | '.join(cells)} |", flush=True)
        details.append((workload.name, medians))
    print("\nMilliseconds per window by micro-batch size:\n")
    print("| network | " + " | ".join(map(str, SIZES)) + " | whole |")
    print("| --- |" + " --- |" * (len(SIZES) + 1))
    for name, medians in details:
        cells = [f"{medians[column] * 1e3:.0f}" for column in (*map(str, SIZES), "whole")]
        print(f"| {name} | {' | '.join(cells)} |")
    print_peaks()
    print(f"\nMade by `make bench`: `python benchmarks/auto.py --rounds {args.rounds} --batch {args.batch}`.")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
