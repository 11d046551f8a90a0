"""The networks and the data that the benchmarks share."""

from __future__ import annotations

import functools
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


class Residual(chainer.Chain):
    """Two convolutions with batch normalization and a way around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        with self.init_scope():
            self.first = convolve_and_normalize(in_channels, out_channels, 3, stride)
            self.second = convolve_and_normalize(out_channels, out_channels, 3)
            if in_channels != out_channels:
                self.projection = convolve_and_normalize(in_channels, out_channels, 1, stride)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        y = self.second(F.relu(self.first(x)))
        return F.relu(y + (self.projection(x) if hasattr(self, "projection") else x))


def convolve_and_normalize(in_channels: int, out_channels: int, ksize: int, stride: int = 1) -> chainer.Sequential:
    """Returns a convolution and a batch normalization."""
    convolution = L.Convolution2D(in_channels, out_channels, ksize, stride, ksize // 2, nobias=True)
    return chainer.Sequential(convolution, L.BatchNormalization(out_channels))


def mean_of_pixels(x: chainer.Variable) -> chainer.Variable:
    """Averages over height and width."""
    return F.average(x, axis=(2, 3))


def normalized_mlp(*dropout: Callable[..., Any]) -> List[Any]:
    """Returns the layers of the small MLP with batch normalizations, and with dropout if it is given."""
    layers: List[Any] = []
    for in_size in (64, 256):
        layers += [L.Linear(in_size, 256, nobias=True), L.BatchNormalization(256), F.relu, *dropout]
    return [*layers, L.Linear(256, 10)]


NORMALIZED_MLP = Workload("small MLP with batch normalization", normalized_mlp, (64,), 32)
DROPOUT_MLP = Workload(
    "small MLP with batch normalization and dropout", functools.partial(normalized_mlp, F.dropout), (64,), 32
)


NORMALIZED = [
    Workload(
        "CNN, four 3×3 convolutions of 32 and 64 channels, 32×32",
        lambda: [
            *(convolve_and_normalize(3, 32, 3), F.relu, convolve_and_normalize(32, 32, 3), F.relu, pool),
            *(convolve_and_normalize(32, 64, 3), F.relu, convolve_and_normalize(64, 64, 3), F.relu, mean_of_pixels),
            L.Linear(64, 10),
        ],
        (3, 32, 32),
        32,
    ),
    Workload(
        "residual network, 9 convolutions of 16 to 64 channels, 32×32",
        lambda: [
            *(convolve_and_normalize(3, 16, 3), F.relu, Residual(16, 16), Residual(16, 32, 2), Residual(32, 64, 2)),
            *(mean_of_pixels, L.Linear(64, 10)),
        ],
        (3, 32, 32),
        32,
    ),
]
# The first of them without its normalizations.
NOT_NORMALIZED = Workload(
    "the CNN without normalization",
    lambda: [
        *(L.Convolution2D(3, 32, 3, pad=1), F.relu, L.Convolution2D(32, 32, 3, pad=1), F.relu, pool),
        *(L.Convolution2D(32, 64, 3, pad=1), F.relu, L.Convolution2D(64, 64, 3, pad=1), F.relu, mean_of_pixels),
        L.Linear(64, 10),
    ],
    (3, 32, 32),
    32,
)


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
