"""Trains a classifier of handwritten digits on all ranks of an MPI job, with one all-reduce per effective batch.

    mpiexec -n 2 python examples/chainermn/train_digits.py --accumulation-steps 8

The ranks share each batch, so the effective batch does not depend on their number. At the end, the job prints how much
the parameters of the ranks differ, the number of all-reduces of gradients, and the bytes that they took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainermn.communicators.naive_communicator import NaiveCommunicator
from mpi4py import MPI
from sklearn.datasets import load_digits

SEED = 0
N_TRAINING, N_VALIDATION = 1280, 516  # of 1,797; each number of ranks divides them


class CountingCommunicator(NaiveCommunicator):
    """The communicator for processes without a GPU, with a count of all-reduces and bytes."""

    def __init__(self, mpi_comm: Any) -> None:
        super().__init__(mpi_comm)
        self.all_reduces = 0
        self.bytes = 0

    def multi_node_mean_grad(self, model: chainer.Link, zero_fill: bool = False) -> None:
        self.all_reduces += 1
        self.bytes += sum(param.array.nbytes for param in model.params())
        super().multi_node_mean_grad(model, zero_fill)

    def allreduce(self, x: Any) -> Any:
        self.bytes += x.nbytes
        return super().allreduce(x)


def main() -> None:
    args = parse_args()
    comm = CountingCommunicator(MPI.COMM_WORLD)
    if args.batch_size % comm.size:
        raise SystemExit(f"--batch-size must be a multiple of the {comm.size} ranks, got {args.batch_size}")
    numpy.random.seed(comm.rank)  # each rank has its own initial parameters, which those of the first replace
    model = L.Classifier(chainer.Sequential(L.Linear(None, 256), F.tanh, L.Linear(256, 256), F.tanh, L.Linear(256, 10)))
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.MomentumSGD(lr=0.05), comm).setup(model)
    train, validation = load_datasets()
    iterator = SerialIterator(train, args.batch_size // comm.size, order_sampler=share_of(comm))
    updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, accumulation_steps=args.accumulation_steps)
    trainer = Trainer(updater, (args.epoch, "epoch"), out=str(args.out))
    shard = SerialIterator(validation[comm.rank :: comm.size], N_VALIDATION, repeat=False, shuffle=False)
    trainer.extend(chainermn.create_multi_node_evaluator(extensions.Evaluator(shard, model), comm))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport())
        columns = ["epoch", "iteration", "main/loss", "validation/main/accuracy", "elapsed_time"]
        trainer.extend(extensions.PrintReport(columns))
    trainer.run()
    report(comm, model, trainer, args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains on handwritten digits on all ranks of an MPI job.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epoch", type=int, default=5, help="number of epochs")
    parser.add_argument("--batch-size", type=int, default=32, help="examples per pass of all ranks together")
    parser.add_argument("--accumulation-steps", type=int, default=8, help="passes per update")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    return parser.parse_args()


def load_datasets() -> Tuple[Any, Any]:
    """Returns the training and the validation dataset, the same on all ranks."""
    images, labels = load_digits(return_X_y=True)
    dataset = chainer.datasets.TupleDataset((images / 16).astype(numpy.float32), labels.astype(numpy.int32))
    order = numpy.random.RandomState(SEED).permutation(len(dataset))
    examples = [dataset[i] for i in order]
    return examples[:N_TRAINING], examples[N_TRAINING : N_TRAINING + N_VALIDATION]


def share_of(comm: Any) -> Callable[..., Any]:
    """Returns an order sampler that shuffles in the same way on all ranks and gives each rank its share."""
    random = numpy.random.RandomState(SEED)
    return lambda order, position: random.permutation(N_TRAINING)[comm.rank :: comm.size]


def report(comm: CountingCommunicator, model: chainer.Link, trainer: Trainer, out: Path) -> None:
    parameters = numpy.concatenate([param.array.ravel() for _, param in sorted(model.namedparams())])
    everyones = comm.gather_obj(parameters)
    if comm.rank > 0:
        return
    result: Dict[str, Any] = {
        "ranks": comm.size,
        "updates": trainer.updater.iteration,
        "all_reduces": comm.all_reduces,
        "bytes": comm.bytes,
        "ranks_differ_by": max(float(abs(other - parameters).max()) for other in everyones),
        "accuracy": trainer.get_extension("LogReport").log[-1]["validation/main/accuracy"],
    }
    print(json.dumps(result))
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
    numpy.save(out / "parameters.npy", parameters)


if __name__ == "__main__":
    main()
