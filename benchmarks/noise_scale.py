"""What does it cost to estimate the noise scale?

As many updates of AccumulatingUpdater as the interval of GradientNoiseScale has by default, one of which is looked at,
over as many without it: the ratio is that of the mean cost of a window. To see where it comes from, the last column has
the same with an interval of 1, with which each update is looked at.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from typing import Callable, Optional

import chainer_accum
import chainer
from chainer.training import Trainer
from chainer_accum.extensions import GradientNoiseScale
from pairs import measure, ratios
from workloads import WORKLOADS, Workload, describe_machine

WITHOUT, BY_DEFAULT, EACH = "without", "by default", "each update"
INTERVAL = inspect.signature(GradientNoiseScale).parameters["interval"].default


def make_contestant(workload: Workload, k: int, extension: Optional[GradientNoiseScale]) -> Callable[[], None]:
    """Returns a function that makes as many updates as the default interval has."""
    optimizer = chainer.optimizers.SGD().setup(workload.make_model())
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    dataset = workload.make_dataset(k * workload.micro_batch_size)
    iterator = chainer.iterators.SerialIterator(dataset, workload.micro_batch_size, shuffle=False)
    trainer = Trainer(chainer_accum.AccumulatingUpdater(iterator, optimizer, accumulation_steps=k))
    if extension is not None:
        extension.initialize(trainer)

    def make_updates() -> None:
        for _ in range(INTERVAL):
            trainer.updater.update()
            if extension is not None:
                extension(trainer)

    return make_updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="how often each runs")
    parser.add_argument("--accumulation-steps", "-k", type=int, default=16)
    args = parser.parse_args()
    k = args.accumulation_steps
    print(f"# Time of a window with GradientNoiseScale\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"k = {k}, SGD, median of {args.rounds} rounds, the ratios round by round, with quartiles.\n")
    print("| network | micro-batch | window without | with / without | with an interval of 1 / without |")
    print("| --- | --- | --- | --- | --- |")
    for workload in WORKLOADS:
        extensions = {WITHOUT: None, BY_DEFAULT: GradientNoiseScale(), EACH: GradientNoiseScale(interval=1)}
        seconds = measure(
            {name: make_contestant(workload, k, extension) for name, extension in extensions.items()}, args.rounds
        )
        window = statistics.median(seconds[WITHOUT]) / INTERVAL * 1e3
        cells = [ratios(seconds[name], seconds[WITHOUT]) for name in (BY_DEFAULT, EACH)]
        print(f"| {workload.name} | {workload.micro_batch_size} | {window:.1f} ms | {' | '.join(cells)} |", flush=True)
    print(f"\nMade by `make bench`: `python benchmarks/noise_scale.py --rounds {args.rounds} -k {k}`.")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
