"""What does a window cost over the bare passes it is made of?

The floor is k bare forward/backward passes, iterator and converter included, and one ``optimizer.update()``: the least
that any accumulation does that makes each gradient and then drops it. Against it run, in turns, an update of
AccumulatingUpdater, and accumulation as it is written by hand: ``loss / k``, and Chainer adds to ``param.grad``.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Callable, Dict

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
from floor import make_by_hand, make_floor, make_window, set_up
from pairs import measure, ratios
from workloads import WORKLOADS, Workload, describe_machine

FLOOR, WINDOW, BY_HAND = "floor", "AccumulatingUpdater", "by hand"


def make_contestants(workload: Workload, k: int) -> Dict[str, Callable[[], None]]:
    """Returns what is timed: each with a model, an optimizer and an iterator of its own."""
    makers = {FLOOR: make_floor, WINDOW: make_window, BY_HAND: make_by_hand}
    return {name: make(*set_up(workload, k), k) for name, make in makers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="how often each runs")
    parser.add_argument("--accumulation-steps", "-k", type=int, default=16)
    args = parser.parse_args()
    k = args.accumulation_steps
    print(f"# Time of a window over its floor\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"k = {k}, SGD, median of {args.rounds} rounds, the ratios round by round, with quartiles.\n")
    print("| network | micro-batch | floor | AccumulatingUpdater / floor | by hand / floor |")
    print("| --- | --- | --- | --- | --- |")
    for workload in WORKLOADS:
        seconds = measure(make_contestants(workload, k), args.rounds)
        cells = []
        for name in (WINDOW, BY_HAND):
            cells.append(ratios(seconds[name], seconds[FLOOR]))
        floor = statistics.median(seconds[FLOOR]) * 1e3
        print(f"| {workload.name} | {workload.micro_batch_size} | {floor:.1f} ms | {' | '.join(cells)} |", flush=True)
    print(f"\nMade by `make bench`: `python benchmarks/overhead.py --rounds {args.rounds} -k {k}`.")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
