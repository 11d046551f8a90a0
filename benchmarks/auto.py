"""Does ``micro_batch_size='auto'`` find the fastest size?

An effective batch is trained whole, by StandardUpdater, in micro-batches of each power of two, and with
``micro_batch_size='auto'``, once that has made its choice. All take turns.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, Optional

import chainer_accum
import chainer
from chainer.training.updaters import StandardUpdater
from pairs import measure, ratios
from workloads import WORKLOADS, Workload, describe_machine

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
MOST_WINDOWS = 60


def make_updater(workload: Workload, batch: int, micro_batch_size: Any, updater_class: Optional[Any] = None) -> Any:
    """Returns an updater with a model, an optimizer and an iterator of its own."""
    optimizer = chainer.optimizers.SGD().setup(workload.make_model())
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    iterator = chainer.iterators.SerialIterator(workload.make_dataset(batch), batch, shuffle=False)
    if micro_batch_size is None:
        return StandardUpdater(iterator, optimizer)
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=micro_batch_size)


def tune(updater: Any) -> int:
    """Trains until the choice is made, and returns how many windows it took."""
    observation = {"seconds_per_example": None}
    for window in range(MOST_WINDOWS):
        if window > 1 and "seconds_per_example" not in observation:
            return window
        observation = {}
        with chainer.get_current_reporter().scope(observation):
            updater.update()
    raise RuntimeError(f"no choice was made in {MOST_WINDOWS} windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each runs")
    parser.add_argument("--batch", type=int, default=2048, help="examples in the effective batch")
    args = parser.parse_args()
    print(f"# Time with micro_batch_size='auto'\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"{args.rounds} rounds, medians of the ratios round by round, with quartiles.\n")
    print("| network | whole batch | fastest fixed size | auto, after windows | auto / fastest fixed | auto / whole |")
    print("| --- | --- | --- | --- | --- | --- |")
    details = []
    for workload in WORKLOADS:
        auto = make_updater(workload, args.batch, "auto")
        windows = tune(auto)
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
    print(f"\nMade by `make bench`: `python benchmarks/auto.py --rounds {args.rounds} --batch {args.batch}`.")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
