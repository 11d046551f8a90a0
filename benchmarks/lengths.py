"""How much time does it save to cut batches by length?

An update of the same sequences of 4 to 200 tokens by each of these, which take turns in one process:

- whole batch: ``StandardUpdater``, which pads to the longest sequence;
- contiguous: ``micro_batch_size`` is the budget over the length of the longest sequence, the largest number with which
  every micro-batch is sure to be within the budget;
- by tokens: ``micro_batch_size=TokenBudget(budget)``;
- by tokens, auto: ``micro_batch_size=TokenBudget('auto')``, once the choice is made;
- 4 batches: four iterator batches that are each cut with ``TokenBudget(budget)``;
- 4 batches, together: the same with ``across_window=True``.

Padding is the share of positions without a token. The peak is the most that NumPy and Python allocate during an update
(``tracemalloc``). The deviation is the largest difference between a parameter and that of the whole batch, after one
update with a learning rate of 1.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any, Dict, List, NamedTuple, Sequence

import chainer_accum
import chainer
import numpy
from auto import search
from chainer.training.updaters import StandardUpdater
from pairs import measure, ratios
from peaks import traced_peak
from sequences import DISTRIBUTIONS, TAGGERS, Tagger, count_tokens, length_of, make_dataset, pad
from workloads import describe_machine

WHOLE, CONTIGUOUS, TOKENS, AUTO = "whole batch", "contiguous", "by tokens", "by tokens, auto"
GATHERED, TOGETHER = "4 batches", "4 batches, together"
BY_TOKENS = (TOKENS, AUTO, GATHERED, TOGETHER)
CONTESTANTS = (WHOLE, CONTIGUOUS, *BY_TOKENS)
NUM_BATCHES = 4


class Target(NamedTuple):
    """What is promised: the most that a measurement may be, and of whom."""

    what: str
    most: float
    names: Sequence[str]


TIME = Target("time / contiguous", 0.35, (TOKENS, AUTO, TOGETHER))
DEVIATIONS = {
    numpy.float32: Target("deviation in float32", 1e-6, BY_TOKENS),
    numpy.float64: Target("deviation in float64", 1e-6, BY_TOKENS),
}


class Padding:
    """A converter that counts the tokens and the positions of what it converts."""

    def __init__(self) -> None:
        self.begin_again()

    def begin_again(self) -> None:
        """Forgets what has been counted."""
        self._tokens = self._positions = 0

    def __call__(self, examples: List[Any], device: Any) -> Any:
        arrays = pad(examples, device)
        self._tokens += count_tokens(examples)
        self._positions += arrays[0].size
        return arrays

    def share(self) -> float:
        """Returns the share of the positions that hold no token."""
        return 1 - self._tokens / self._positions


class Job(NamedTuple):
    """A network, the sequences of a batch, and the largest number of tokens in a micro-batch."""

    tagger: Tagger
    distribution: str
    batch: int
    budget: int

    @property
    def title(self) -> str:
        return f"{self.tagger.name}, {self.distribution}"

    def make_updater(self, name: str, **kwargs: Any) -> Any:
        """Returns the updater of a contestant, with a model, an optimizer and an iterator over the one batch."""
        dataset = make_dataset(self.distribution, self.batch)
        optimizer = chainer.optimizers.SGD().setup(self.tagger.make_model())
        chainer.get_current_reporter().add_observer("main", optimizer.target)
        num_batches = NUM_BATCHES if name in (GATHERED, TOGETHER) else 1
        iterator = chainer.iterators.SerialIterator(dataset, self.batch // num_batches, shuffle=False)
        kwargs = {"converter": pad, **kwargs}
        if name == WHOLE:
            return StandardUpdater(iterator, optimizer, **kwargs)
        budget = functools.partial(chainer_accum.TokenBudget, length_func=length_of)
        sizes = {
            CONTIGUOUS: self.budget // max(map(length_of, dataset)),
            AUTO: budget("auto"),
            TOGETHER: budget(self.budget, across_window=True),
        }
        return chainer_accum.AccumulatingUpdater(
            iterator,
            optimizer,
            accumulation_steps=num_batches,
            micro_batch_size=sizes.get(name, budget(self.budget)),
            weight_func=count_tokens,
            **kwargs,
        )


class Cost(NamedTuple):
    """What a job has cost, by contestant, and how far its steps deviate, by dtype and contestant."""

    seconds: Dict[str, List[float]]
    padding: Dict[str, float]
    peaks: Dict[str, int]
    deviations: Dict[Any, Dict[str, float]]
    max_tokens: int

    def ratio(self, name: str, reference: str) -> float:
        """Returns the median of the ratios of times."""
        pairs = zip(self.seconds[name], self.seconds[reference])
        return statistics.median(time / other for time, other in pairs)


def measure_job(job: Job, rounds: int) -> Cost:
    """Returns what the updates of a job cost."""
    paddings = {name: Padding() for name in CONTESTANTS}
    updaters = {name: job.make_updater(name, converter=paddings[name]) for name in CONTESTANTS}
    search(updaters[AUTO])
    paddings[AUTO].begin_again()
    seconds = measure({name: updater.update for name, updater in updaters.items()}, rounds)
    peaks = {name: traced_peak(updater.update) for name, updater in updaters.items()}
    padding = {name: paddings[name].share() for name in CONTESTANTS}
    deviating = {dtype: deviations(job, dtype) for dtype in DEVIATIONS}
    return Cost(seconds, padding, peaks, deviating, updaters[AUTO].micro_batch_size)


def deviations(job: Job, dtype: Any) -> Dict[str, float]:
    """Returns the largest differences of parameters in a dtype, after one update, from those of the whole batch."""
    with chainer.using_config("dtype", dtype):
        stepped = {name: parameters_after_a_step(job, name) for name in CONTESTANTS}
    pairs = {name: zip(parameters, stepped[WHOLE]) for name, parameters in stepped.items()}
    return {name: max(float(abs(a - b).max()) for a, b in pairs[name]) for name in CONTESTANTS}


def parameters_after_a_step(job: Job, name: str) -> List[numpy.ndarray]:
    """Returns the parameters after the first update with a learning rate of 1."""
    updater = job.make_updater(name)
    optimizer = updater.get_optimizer("main")
    optimizer.lr = 1.0
    updater.update()
    return [param.array for param in optimizer.target.params()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each runs")
    parser.add_argument("--batch", type=int, default=256, help="sequences in the effective batch")
    parser.add_argument("--budget", type=int, default=2048, help="the most tokens in a micro-batch")
    args = parser.parse_args()
    print(f"# Batches cut by length\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(
        f"{args.rounds} rounds, medians of the ratios round by round, with quartiles. Budget: {args.budget} tokens.\n"
    )
    costs = print_costs(args.rounds, args.batch, args.budget)
    print_targets(costs)
    options = f"--rounds {args.rounds} --batch {args.batch} --budget {args.budget}"
    print(f"\nMade by `make bench`: `python benchmarks/lengths.py {options}`.")


def print_costs(rounds: int, batch: int, budget: int) -> Dict[str, Cost]:
    """Prints a row for each job and contestant, and returns what was measured, by job."""
    heads = ["network, lengths", "", "time", "/ contiguous", "/ whole batch", "padding", "peak"]
    heads += [target.what for target in DEVIATIONS.values()]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    costs = {}
    for distribution in DISTRIBUTIONS:
        for tagger in TAGGERS:
            job = Job(tagger, distribution, batch, budget)
            cost = costs[job.title] = measure_job(job, rounds)
            for name in CONTESTANTS:
                cells = [
                    f"{name}: {cost.max_tokens}" if name == AUTO else name,
                    f"{statistics.median(cost.seconds[name]) * 1e3:.0f} ms",
                    *(ratios(cost.seconds[name], cost.seconds[reference]) for reference in (CONTIGUOUS, WHOLE)),
                    f"{100 * cost.padding[name]:.0f} %",
                    f"{cost.peaks[name] / 2**20:.0f} MiB",
                    *(f"{cost.deviations[dtype][name]:.0e}" for dtype in DEVIATIONS),
                ]
                print(f"| {job.title} | {' | '.join(cells)} |", flush=True)
    return costs


def print_targets(costs: Dict[str, Cost]) -> None:
    """Prints what is promised, what was measured, and whether the promise is kept."""
    print("\n## Targets\n\n| target | network, lengths | measured | kept |\n|" + " --- |" * 4)
    for title, cost in costs.items():
        for name in TIME.names:
            print_target(TIME, name, title, f"{cost.ratio(name, CONTIGUOUS):.3f}", cost.ratio(name, CONTIGUOUS))
    for title, cost in costs.items():
        for dtype, target in DEVIATIONS.items():
            most = max(cost.deviations[dtype][name] for name in target.names)
            print_target(target, "all by tokens", title, f"{most:.0e}", most)


def print_target(target: Target, name: str, title: str, text: str, measured: float) -> None:
    """Prints a row of the table of targets."""
    kept = "yes" if measured <= target.most else "no"
    print(f"| {target.what} of {name} ≤ {target.most:g} | {title} | {text} | {kept} |", flush=True)


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
