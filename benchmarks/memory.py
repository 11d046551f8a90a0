"""Does the memory of an update stay that of one micro-batch, however many there are?

The peak of the bytes that NumPy and Python allocate during training updates (``tracemalloc``), with model, optimizer
state and gradients, without the data set: for AccumulatingUpdater with k micro-batches, over StandardUpdater with a
batch of the size of one micro-batch, which is the least there can be. To see what is saved, the last column has
StandardUpdater with the whole effective batch over the same.
"""

from __future__ import annotations

import argparse
import functools

import chainer_accum
import chainer
from chainer.training.updaters import StandardUpdater
from peaks import peak
from workloads import LSTM, WORKLOADS, describe_machine

STEPS = (1, 4, 16, 64)
PASSES = 2 * max(STEPS)  # in all, whatever k is: the peak of more passes may be higher by chance


def main() -> None:
    print(f"# Peak memory of an update by k\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}. {PASSES} forward/backward passes each.\n")
    ks = " | ".join(f"k = {k}" for k in STEPS)
    print(f"| network | micro-batch | optimizer | StandardUpdater | {ks} | whole batch, k = {STEPS[-1]} |")
    print("| --- " * (5 + len(STEPS)) + "|")
    for workload in [*WORKLOADS, LSTM]:
        size = workload.micro_batch_size
        for optimizer_class in (chainer.optimizers.SGD, chainer.optimizers.Adam):
            measure = functools.partial(peak, workload, optimizer_class)
            measure(StandardUpdater, size, size)  # imports and caches what the first update needs
            examples = PASSES * size
            floor = measure(StandardUpdater, size, examples)
            peaks = [measure(chainer_accum.AccumulatingUpdater, size, examples, accumulation_steps=k) for k in STEPS]
            peaks.append(measure(StandardUpdater, size * STEPS[-1], examples))
            ratios = " | ".join(f"{bytes_ / floor:.3f}" for bytes_ in peaks)
            print(
                f"| {workload.name} | {size} | {optimizer_class.__name__} | {floor / 1e6:.1f} MB | {ratios} |",
                flush=True,
            )
    print("\nMade by `make bench`: `python benchmarks/memory.py`.")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
