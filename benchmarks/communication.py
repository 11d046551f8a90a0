"""What does an effective batch cost on several ranks, and what would it on a cluster?

Three ways to train on k micro-batches per rank run in turns: AccumulatingUpdater, whose ranks add up their gradients
once; ChainerMN alone with an update, and an all-reduce, after each micro-batch, which is k updates instead of one; and
ChainerMN alone (k = 1) with the whole effective batch in one pass, if it fits.

A model predicts the first two from the latency and the bandwidth of an all-reduce, ``latency + bytes / bandwidth``, and
from the times of a pass, of k passes and of the optimizer's step. Each is measured by itself. Passes are over when the
slowest rank is done with them: ranks that meet after each pass wait for one another k times as often.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable, Dict, NamedTuple, Tuple

import chainer_accum
import chainer
import chainermn
import mpi4py.MPI
import numpy
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from pairs import measure
from workloads import WORKLOADS, Workload, describe_machine

K = 1, 4, 16
SIZES = tuple(4**n for n in range(5, 12))  # of the arrays with which an all-reduce is measured, in bytes
ACCUMULATED, EACH, WHOLE = "one all-reduce", "k all-reduces", "whole batch"
PASS, PASSES, STEP = "pass", "passes", "step"

# Networks between machines: bits per second, and seconds from one machine to the next.
CLUSTER_RANKS = 16
CLUSTERS = {"1 Gbit/s, 50 µs": (1e9, 50e-6), "10 Gbit/s, 20 µs": (1e10, 20e-6), "100 Gbit/s, 2 µs": (1e11, 2e-6)}
CLUSTER_K = 4, 16, 64


class Costs(NamedTuple):
    """What updates are made of, in seconds and bytes."""

    one_pass: float  # until the slowest rank is done
    passes: float  # k of them, until the slowest rank is done
    step: float  # of the optimizer
    arrays: int  # the naive communicator adds up each parameter by itself
    bytes: int


class Network(NamedTuple):
    """What an all-reduce takes, in seconds and bytes per second."""

    latency: float
    bandwidth: float

    def all_reduce(self, costs: Costs) -> float:
        return costs.arrays * self.latency + costs.bytes / self.bandwidth


def predict(costs: Costs, network: Network, k: int) -> Dict[str, float]:
    """Returns the seconds of k passes with one update, whose weights are an all-reduce more, and with k updates."""
    communication = network.all_reduce(costs)
    return {
        ACCUMULATED: costs.passes + network.latency + communication + costs.step,
        EACH: k * (costs.one_pass + communication + costs.step),
    }


def ring(bits_per_second: float, latency: float, ranks: int) -> Network:
    """Returns what an all-reduce takes that sends parts of the array around a ring of machines, twice."""
    hops = 2 * (ranks - 1)
    return Network(hops * latency, bits_per_second / 8 * ranks / hops)


def measure_network(comm: Any, rounds: int) -> Tuple[Network, Dict[int, float]]:
    """Returns the latency and the bandwidth that fit best, by relative error, and the seconds by bytes."""
    seconds = {}
    for size in SIZES:
        array = numpy.zeros(size // 4, numpy.float32)
        seconds[size] = median_seconds(lambda array=array: comm._multi_node_mean(None, array), rounds, comm)
    weights = 1 / numpy.array(list(seconds.values()))
    terms = numpy.array([[1, size] for size in SIZES]) * weights[:, None]
    (latency, seconds_per_byte), *_ = numpy.linalg.lstsq(terms, numpy.ones(len(SIZES)), rcond=None)
    return Network(float(latency), float(1 / seconds_per_byte)), seconds


def median_seconds(run: Callable[[], Any], rounds: int, comm: Any) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        comm.mpi_comm.Barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_contestants(comm: Any, workload: Workload, k: int) -> Dict[str, Callable[[], None]]:
    def make_updater(updater_class: Any, batch_size: int, **kwargs: Any) -> Any:
        optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(), comm).setup(workload.make_model())
        chainer.get_current_reporter().add_observer("main", optimizer.target)
        iterator = SerialIterator(workload.make_dataset(k * workload.micro_batch_size), batch_size, shuffle=False)
        return updater_class(iterator, optimizer, **kwargs)

    def run_passes(number: int) -> None:
        for _ in range(number):
            loss = bare.target(*chainer.dataset.concat_examples(iterator.next()))
            bare.target.cleargrads()
            loss.backward()
        comm.mpi_comm.Barrier()

    size = workload.micro_batch_size
    accumulated = make_updater(chainer_accum.AccumulatingUpdater, size, accumulation_steps=k)
    each = make_updater(StandardUpdater, size)
    whole = make_updater(StandardUpdater, k * size)
    bare = chainer.optimizers.SGD().setup(workload.make_model())
    chainer.get_current_reporter().add_observer("main", bare.target)
    iterator = SerialIterator(workload.make_dataset(size), size, shuffle=False)
    return {
        ACCUMULATED: accumulated.update,
        EACH: lambda: [each.update() for _ in range(k)],
        WHOLE: whole.update,
        PASS: lambda: run_passes(1),
        PASSES: lambda: run_passes(k),
        STEP: lambda: bare.update(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="how often each runs")
    args = parser.parse_args()
    comm = chainermn.create_communicator("naive")
    lines = [f"# Communication and time of an effective batch\n\n{__doc__.strip()}\n"]
    mpi = f"{mpi4py.MPI.Get_library_version().split()[0]}, mpi4py {mpi4py.__version__}"
    lines.append(f"Machine: {describe_machine()}; {comm.size} ranks, {mpi}.\n")
    network, seconds = measure_network(comm, 10 * args.rounds)
    lines += ["## The all-reduce, measured and fitted\n", "| bytes | measured | fitted |", "| --- | --- | --- |"]
    for size, measured in seconds.items():
        fitted = network.latency + size / network.bandwidth
        lines.append(f"| {size:,} | {measured * 1e6:.0f} µs | {fitted * 1e6:.0f} µs |")
    lines.append(f"\nLatency {network.latency * 1e6:.0f} µs, bandwidth {network.bandwidth / 1e9:.2f} GB/s.\n")
    lines.append("## Time per effective batch, measured and predicted\n")
    lines.append(f"SGD, median of {args.rounds} rounds, in ms; in brackets, what the model predicts.\n")
    lines.append(f"| network | gradients | k | {ACCUMULATED} | {EACH} | saved | {WHOLE} (k = 1) |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    costs = {}
    for workload in WORKLOADS[:2]:  # whose gradients are large for what there is to compute
        params = list(workload.make_model().params(include_uninit=False))
        n_bytes = sum(param.array.nbytes for param in params)
        for k in K:
            times = measure(make_contestants(comm, workload, k), args.rounds)
            medians = {name: statistics.median(seconds) for name, seconds in times.items()}
            costs[workload.name] = Costs(medians[PASS], medians[PASSES], medians[STEP], len(params), n_bytes)
            lines.append(make_row(workload.name, costs[workload.name], network, k, medians))
    lines += make_cluster_table(costs)
    command = f"mpiexec -n {comm.size} python benchmarks/communication.py --rounds {args.rounds}"
    lines.append(f"\nMade by `make bench-mpi`: `{command}`.")
    if comm.rank == 0:
        print("\n".join(lines))


def make_row(name: str, costs: Costs, network: Network, k: int, measured: Dict[str, float]) -> str:
    predicted = predict(costs, network, k)
    cells = [f"{measured[way] * 1e3:.1f} ({predicted[way] * 1e3:.1f})" for way in (ACCUMULATED, EACH)]
    saved, saved_by_model = (1 - seconds[ACCUMULATED] / seconds[EACH] for seconds in (measured, predicted))
    cells += [f"{saved:.0%} ({saved_by_model:.0%})", f"{measured[WHOLE] * 1e3:.1f}"]
    return f"| {name} | {costs.bytes / 1e6:.2f} MB | {k} | {' | '.join(cells)} |"


def make_cluster_table(costs: Dict[str, Costs]) -> list:
    lines = [f"\n## What the model predicts for a cluster of {CLUSTER_RANKS} machines\n"]
    lines.append(
        "How many times faster the same examples are trained on with one all-reduce than with k, if a pass takes what "
        "it takes here on every machine, and the gradients go around a ring as one array. Not measured.\n"
    )
    lines.append(f"| network | interconnect | {' | '.join(f'k = {k}' for k in CLUSTER_K)} |")
    lines.append("| --- | --- |" + " --- |" * len(CLUSTER_K))
    for name, each in costs.items():
        for interconnect, (bits_per_second, latency) in CLUSTERS.items():
            network = ring(bits_per_second, latency, CLUSTER_RANKS)
            gains = []
            for k in CLUSTER_K:
                one_pass = each.passes / K[-1]
                predicted = predict(each._replace(one_pass=one_pass, passes=k * one_pass, arrays=1), network, k)
                gains.append(f"{predicted[EACH] / predicted[ACCUMULATED]:.2f}")
            lines.append(f"| {name} | {interconnect} | {' | '.join(gains)} |")
    return lines


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
