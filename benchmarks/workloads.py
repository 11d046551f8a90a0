"""The networks and the data that the benchmarks share."""

from __future__ import annotations

import os
import platform
from typing import Any, Callable, List, NamedTuple, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy


class Workload(NamedTuple):
    """A network, the shape of one example of its input, and the micro-batch to train it with."""

    name: str
    layers: Callable[[], List[Any]]
    shape: Tuple[int, ...]
    micro_batch_size: int

    def make_model(self) -> chainer.Chain:
        """Returns a classifier with this network, initialised the same at every call."""
        numpy.random.seed(0)
        return L.Classifier(chainer.Sequential(*self.layers()))

    def make_dataset(self, size: int) -> List[Tuple[numpy.ndarray, numpy.int32]]:
        """Returns ``size`` random examples."""
        random = numpy.random.RandomState(0)
        inputs = random.standard_normal((size, *self.shape)).astype(numpy.float32)
        return list(zip(inputs, random.randint(10, size=size).astype(numpy.int32)))


def pool(x: chainer.Variable) -> chainer.Variable:
    """Halves height and width."""
    return F.max_pooling_2d(x, 2)


WORKLOADS = [
    Workload(
        "small MLP, 64-256-256-10",
        lambda: [L.Linear(64, 256), F.relu, L.Linear(256, 256), F.relu, L.Linear(256, 10)],
        (64,),
        32,
    ),
    Workload(
        "large MLP, 784-1000-1000-10",
        lambda: [L.Linear(784, 1000), F.relu, L.Linear(1000, 1000), F.relu, L.Linear(1000, 10)],
        (784,),
        64,
    ),
    Workload(
        "CNN, two 3×3 convolutions of 16 and 32 channels, 28×28",
        lambda: [
            *(L.Convolution2D(1, 16, 3, pad=1), F.relu, pool),
            *(L.Convolution2D(16, 32, 3, pad=1), F.relu, pool),
            L.Linear(32 * 7 * 7, 10),
        ],
        (1, 28, 28),
        32,
    ),
]


class Unrolled(chainer.Chain):
    """An LSTM that reads a sequence step by step and returns its last output."""

    def __init__(self, in_size: int, units: int) -> None:
        super().__init__()
        with self.init_scope():
            self.lstm = L.StatelessLSTM(in_size, units)

    def forward(self, x: numpy.ndarray) -> chainer.Variable:
        c = h = None
        for step in range(x.shape[1]):
            c, h = self.lstm(c, h, x[:, step])
        return h


# Whose weights are used in each of its steps.
LSTM = Workload("LSTM of 256 units, 20 steps", lambda: [Unrolled(64, 256), L.Linear(256, 10)], (20, 64), 16)


def describe_machine() -> str:
    """Returns one line about the machine and the packages."""
    cpu = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    return (
        f"{os.cpu_count()} × {cpu}, {os.environ.get('OMP_NUM_THREADS', 'any number of')} BLAS thread(s); "
        f"Python {platform.python_version()}, NumPy {numpy.__version__}, "
        f"Chainer {chainer.__version__}, chainer_accum {chainer_accum.__version__}"
    )
