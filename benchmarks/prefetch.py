"""What does ``prefetch=True`` save where loading takes as long as computing?

The converter waits, as for a disk, for as long as a forward/backward pass takes, and then converts. With k
micro-batches in a window, all but the first wait can be hidden behind the passes, so at best (k + 1) / 2k of the time
remains. The last column is what it costs where there is nothing to wait for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable

import chainer_accum
import chainer
from pairs import measure, ratios
from workloads import WORKLOADS, Workload, describe_machine


def make_update(workload: Workload, k: int, wait: float, prefetch: bool) -> Callable[[], None]:
    """Returns an update whose converter waits for so many seconds before each micro-batch."""

    def converter(batch: Any, device: Any) -> Any:
        time.sleep(wait)
        return chainer.dataset.concat_examples(batch, device)

    optimizer = chainer.optimizers.SGD().setup(workload.make_model())
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    dataset = workload.make_dataset(k * workload.micro_batch_size)
    iterator = chainer.iterators.SerialIterator(dataset, workload.micro_batch_size, shuffle=False)
    updater = chainer_accum.AccumulatingUpdater(
        iterator,
        optimizer,
        converter=converter if wait else chainer.dataset.concat_examples,
        accumulation_steps=k,
        prefetch=prefetch,
    )
    return updater.update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how often each runs")
    parser.add_argument("--accumulation-steps", "-k", type=int, default=8)
    args = parser.parse_args()
    k = args.accumulation_steps
    print(f"# Time with prefetch=True\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"k = {k}, median of the ratios of {args.rounds} rounds, with quartiles; at best {(k + 1) / (2 * k):.3f}.\n")
    print("| network | pass | time with / without, waiting as long as a pass | with / without, not waiting |")
    print("| --- | --- | --- | --- |")
    for workload in WORKLOADS:
        alone = measure({"window": make_update(workload, k, 0, False)}, args.rounds)["window"]
        wait = statistics.median(alone) / k
        cells = []
        for seconds in (wait, 0.0):
            contestants = {str(prefetch): make_update(workload, k, seconds, prefetch) for prefetch in (False, True)}
            times = measure(contestants, args.rounds)
            cells.append(ratios(times["True"], times["False"]))
        print(f"| {workload.name} | {wait * 1e3:.1f} ms | {' | '.join(cells)} |", flush=True)
    print(f"\nMade by `make bench`: `python benchmarks/prefetch.py --rounds {args.rounds} -k {k}`.")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
