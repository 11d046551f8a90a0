"""Random networks in lockstep: layers that look at the batch, draw or share, in any order and with any connections."""

from __future__ import annotations

import random
from typing import Any, Callable, Dict, List, NamedTuple

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from chainer_accum.functions import sum_over_batch, whole_batch
from scale import SEED, TIMES

NETWORKS = 200
UPDATES = 2
WIDTH = 6
NUM_EXAMPLES = 40


class Layer(NamedTuple):
    """A layer of a random network: its kind, the layers that it takes its inputs from, and a number to vary it."""

    kind: str
    first: int
    second: int
    number: float


class Network(chainer.Chain):
    """A network of random layers, each of which takes the outputs of two earlier ones."""

    def __init__(self, layers: List[Layer]) -> None:
        super().__init__()
        self._layers = layers
        with self.init_scope():
            self.entrance, self.shared, self.exit = L.Linear(9, WIDTH), L.Linear(WIDTH, WIDTH), L.Linear(WIDTH, 5)
            self.shared_normalization = L.BatchNormalization(WIDTH)
            for index, layer in enumerate(layers):
                if layer.kind in LINKS:
                    setattr(self, f"link{index}", LINKS[layer.kind](layer.number))

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        outputs = [self.entrance(x)]
        for index, layer in enumerate(self._layers):
            x, other = outputs[layer.first], outputs[layer.second]
            outputs.append(KINDS[layer.kind](self, getattr(self, f"link{index}", None), x, other, layer.number))
        loss = F.softmax_cross_entropy(self.exit(outputs[-1] + outputs[len(outputs) // 2]), t)
        chainer.report({"loss": loss}, self)
        return loss


LINKS: Dict[str, Callable[[float], chainer.Link]] = {
    "linear": lambda _: L.Linear(WIDTH, WIDTH),
    "without a graph": lambda _: L.Linear(WIDTH, WIDTH),
    "normalization": lambda number: L.BatchNormalization(WIDTH, use_gamma=number < 0.7, use_beta=number > 0.2),
    "frozen normalization": lambda _: L.BatchNormalization(WIDTH),
    "normalization over more": lambda _: L.BatchNormalization((3,), axis=(0, 2)),
}


def _without_graph(link: Any, x: Any, other: Any) -> chainer.Variable:
    with chainer.no_backprop_mode():
        y = link(x)
    return y + other


def _frozen(link: Any, x: Any) -> chainer.Variable:
    with chainer.using_config("train", False):
        return link(x)  # type: ignore[no-any-return]


def _unchained(x: Any, other: Any) -> chainer.Variable:
    y = F.tanh(x)
    y.unchain()
    return y + other


def _centered(x: Any) -> chainer.Variable:
    total, count = sum_over_batch(F.sum(x, axis=0), chainer.Variable(numpy.full((), len(x), x.dtype)))
    return x - F.broadcast_to(total / F.broadcast_to(count, total.shape), x.shape)


def _attending(x: chainer.Variable) -> chainer.Variable:
    return F.matmul(F.softmax(F.matmul(x, x, transb=True)), x)


# Each takes the network, its own link, two inputs and a number.
KINDS: Dict[str, Callable[..., chainer.Variable]] = {
    "linear": lambda network, link, x, other, number: link(x),
    "shared": lambda network, link, x, other, number: network.shared(x),
    "normalization": lambda network, link, x, other, number: link(x),
    "shared normalization": lambda network, link, x, other, number: network.shared_normalization(x),
    "normalization over more": lambda network, link, x, other, number: link(x.reshape(-1, 3, 2)).reshape(-1, WIDTH),
    "frozen normalization": lambda network, link, x, other, number: _frozen(link, x),
    "dropout": lambda network, link, x, other, number: F.dropout(x, 0.6 * number),
    "noise": lambda network, link, x, other, number: F.gaussian(x, F.tanh(other) - 2),
    "relu": lambda network, link, x, other, number: F.relu(x),
    "sum": lambda network, link, x, other, number: x + other,
    "product": lambda network, link, x, other, number: F.tanh(x) * F.sigmoid(other),
    "parts": lambda network, link, x, other, number: F.concat([*F.split_axis(x, 2, axis=1)[::-1]], axis=1),
    "slices": lambda network, link, x, other, number: F.concat([x[:, :2], other[:, 2:]], axis=1),
    "without a graph": lambda network, link, x, other, number: _without_graph(link, x, other),
    "from an array": lambda network, link, x, other, number: other * numpy.tanh(x.array),
    "unchained": lambda network, link, x, other, number: _unchained(x, other),
    "decision": lambda network, link, x, other, number: x + other if numpy.random.rand() < number else F.tanh(x),
    "centered": lambda network, link, x, other, number: _centered(x),
    "attending": lambda network, link, x, other, number: whole_batch(_attending, F.tanh(x)),
}


def make_layers(generator: random.Random) -> List[Layer]:
    kinds = [*KINDS, "linear", "normalization", "normalization", "dropout"]
    return [
        Layer(generator.choice(kinds), generator.randint(0, index), generator.randint(0, index), generator.random())
        for index in range(generator.randint(2, 14))
    ]


def train(updater_class: Any, layers: List[Layer], **kwargs: Any) -> Dict[str, Any]:
    """Returns parameters, running averages, observations and the next random number after some updates."""
    numpy.random.seed(0)
    x = numpy.random.rand(NUM_EXAMPLES, 9)
    t = numpy.random.randint(0, 5, NUM_EXAMPLES).astype(numpy.int32)
    with chainer.using_config("dtype", numpy.float64):
        network = Network(layers)
        optimizer = chainer.optimizers.SGD(0.01).setup(network)
    iterator = SerialIterator(chainer.datasets.TupleDataset(x, t), NUM_EXAMPLES // 2)
    updater = updater_class(iterator, optimizer, **kwargs)
    reporter = chainer.Reporter()
    reporter.add_observer("main", network)
    values: Dict[str, Any] = {}
    for index in range(UPDATES):
        with reporter:
            reporter.observation = {}
            updater.update()
            values[f"loss {index}"] = chainer.as_array(reporter.observation["main/loss"])
    values.update((name, param.array) for name, param in network.namedparams())
    for name, link in network.namedlinks():
        if isinstance(link, L.BatchNormalization):
            values[f"{name}/mean"], values[f"{name}/variance"] = link.avg_mean, link.avg_var
    values["next number"] = numpy.random.rand()
    return values


@pytest.mark.parametrize("seed", [SEED + part for part in range(4)])
def test_a_random_network_in_lockstep_trains_as_with_the_whole_batch(seed: int, record_property: Any) -> None:
    generator = random.Random(seed)
    for _ in range(NETWORKS // 4 * TIMES):
        layers = make_layers(generator)
        options = {"micro_batch_size": generator.choice([4, 7, 10]), "lockstep": generator.choice(["memory", "file"])}
        expected = train(StandardUpdater, layers)
        actual = train(AccumulatingUpdater, layers, **options)
        for name, value in expected.items():
            message = f"{name} of {layers} with {options}"
            numpy.testing.assert_allclose(actual[name], value, rtol=1e-9, atol=1e-9, err_msg=message)
    record_property("random networks in lockstep", NETWORKS // 4 * TIMES)
