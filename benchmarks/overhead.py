"""What does a window cost over the bare passes it is made of?

The floor is k bare forward/backward passes, iterator and converter included, and one ``optimizer.update()``: the least
that any accumulation does that makes each gradient and then drops it. Against it run, in turns, an update of
AccumulatingUpdater, and accumulation as it is written by hand: ``loss / k``, and Chainer adds to ``param.grad``. The C
library keeps what is freed, so that none of them waits for new memory that another one has given back.

The last column is for those whose batch fits: an update of AccumulatingUpdater with a ``micro_batch_size`` of the whole
batch, which is a window of one pass, over one of StandardUpdater.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, Callable, Dict

import chainer_accum
import chainer
from chainer.training.updaters import StandardUpdater
from floor import make_by_hand, make_floor, make_window, set_up
from pairs import FEWEST_ROUNDS, MOST_ROUNDS, keep_freed_memory, measure_for, ratios
from workloads import LSTM, WORKLOADS, Workload, describe_machine

FLOOR, WINDOW, BY_HAND = "floor", "AccumulatingUpdater", "by hand"
STANDARD, ONE_PASS = "StandardUpdater", "one pass"


def make_contestants(workload: Workload, k: int, device: Any = None) -> Dict[str, Callable[[], None]]:
    """Returns what is timed: each with a model, an optimizer and an iterator of its own."""
    makers = {FLOOR: make_floor, WINDOW: make_window, BY_HAND: make_by_hand}
    return {name: make(*set_up(workload, k, device), k, device) for name, make in makers.items()}


def make_updaters(workload: Workload, updates: int) -> Dict[str, Callable[[], None]]:
    """Returns what is timed with one pass per update: so many updates each."""

    def repeat(update: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(updates):
                update()

        return run

    optimizer, iterator = set_up(workload, updates)
    standard = StandardUpdater(iterator, optimizer)
    optimizer, iterator = set_up(workload, updates)
    size = workload.micro_batch_size
    one_pass = chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=size)
    return {STANDARD: repeat(standard.update), ONE_PASS: repeat(one_pass.update)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50, help="how long the rounds of one comparison may take")
    parser.add_argument("--accumulation-steps", "-k", type=int, default=16)
    args = parser.parse_args()
    k = args.accumulation_steps
    keep_freed_memory()
    print(f"# Time of a window over its floor\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(
        f"k = {k}, SGD, {FEWEST_ROUNDS} to {MOST_ROUNDS} rounds: medians, of ratios round by round, with quartiles.\n"
    )
    heads = ["network", "micro-batch", "rounds", "floor"]
    heads += [f"{WINDOW} / floor", f"{BY_HAND} / floor", f"{ONE_PASS} / {STANDARD}"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for workload in [*WORKLOADS, LSTM]:
        seconds = measure_for(make_contestants(workload, k), args.seconds)
        of_one_pass = measure_for(make_updaters(workload, k), args.seconds)
        cells = [
            workload.name,
            f"{workload.micro_batch_size}",
            f"{len(seconds[FLOOR])}",
            f"{statistics.median(seconds[FLOOR]) * 1e3:.1f} ms",
            *(ratios(seconds[name], seconds[FLOOR]) for name in (WINDOW, BY_HAND)),
            ratios(of_one_pass[ONE_PASS], of_one_pass[STANDARD]),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nMade by `make bench`: `python benchmarks/overhead.py --seconds {args.seconds:g} -k {k}`.")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
