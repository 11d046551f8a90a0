"""From the first pass to the update of a window, the host reads no value that a device would have to compute first.

What the model reports, its losses and its gradients are arrays that take note when they are made a number, a truth or
text. On a GPU, each of these would wait. The tests in tests/gpu let CuPy find that out, where there is a device.
"""

from __future__ import annotations

from typing import List

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater

from helpers import make_dataset, make_updater, run, serial


class Watched(numpy.ndarray):
    """An array that takes note of what reads its values."""

    reads: List[str] = []


def _noting(name):
    def method(self, *args, **kwargs):
        Watched.reads.append(name)
        return getattr(numpy.ndarray, name)(self, *args, **kwargs)

    return method


READINGS = [f"__{name}__" for name in ("float", "int", "bool", "complex", "index", "array", "format", "repr", "str")]
READINGS += ["item", "tolist", "tobytes"]
for _name in READINGS:
    setattr(Watched, _name, _noting(_name))


class Watch(chainer.FunctionNode):
    """Passes values on as arrays that are watched, and gradients, too."""

    def forward(self, inputs):
        return tuple(array.view(Watched) for array in inputs)

    def backward(self, indexes, grad_outputs):
        return tuple(chainer.Variable(grad.array.view(Watched)) for grad in grad_outputs)


def watch(variable):
    return Watch().apply((variable,))[0]


class Model(chainer.Chain):
    """Reports watched values in all forms, and has a weight with watched gradients."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(5, 8)
            self.norm = L.BatchNormalization(8)
            self.weight = chainer.Parameter(numpy.random.standard_normal((3, 8)).astype("f"))

    def forward(self, x, t):
        h = F.tanh(self.norm(self.first(x)))
        y = F.linear(h, watch(self.weight))
        loss = watch(F.softmax_cross_entropy(y, t))
        total = loss.array * len(t)
        chainer.report({"loss": loss, "accuracy": watch(F.accuracy(y, t))}, self)
        chainer.report({"total": total, "last": loss.array, "own": (loss.array, total)}, self)
        return loss


class Counting(chainer.optimizers.MomentumSGD):
    """Notes what had been read when the update began."""

    read_before = None

    def update(self, lossfun=None, *args, **kwds):
        if lossfun is None:
            self.read_before = list(Watched.reads)
        super().update(lossfun, *args, **kwds)


@pytest.fixture(autouse=True)
def _nothing_read(monkeypatch):
    monkeypatch.setattr(Watched, "reads", [])


@pytest.mark.parametrize("name", READINGS)
def test_what_is_read_is_noted(name):
    array = numpy.array(1).view(Watched)
    getattr(array, name)(*([""] if name == "__format__" else []))
    assert Watched.reads[0] == name


def test_python_reads_by_these_names():
    array = numpy.array(1).view(Watched)
    for read in (float, int, bool, complex, "abc".__getitem__, repr, str, format):
        Watched.reads.clear()
        read(array)
        assert Watched.reads, read


WAYS = {
    "gathered": {"accumulation_steps": 4},
    "split": {"micro_batch_size": 4},
    "gathered and split": {"accumulation_steps": 3, "micro_batch_size": 3},
    "cut short by the end of an epoch": {"accumulation_steps": 4, "epoch_boundary": "flush"},
    "weighted": {"accumulation_steps": 4, "weight_func": lambda batch: sum(t > 0 for _, t in batch)},
    "summed": {"accumulation_steps": 4, "loss_reduction": "sum"},
    "repeatable": {"accumulation_steps": 4, "split_when_out_of_memory": True},
    "prefetched": {"accumulation_steps": 4, "prefetch": True},
    "with running statistics": {"accumulation_steps": 4, "running_statistics": "update"},
    "with a loss scale": {"accumulation_steps": 4, "loss_scale": 128.0},
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("measures_norms", [False, True])
def test_an_updater_reads_nothing_before_the_update(way, measures_norms):
    optimizer = Counting()
    updater = make_updater(
        AccumulatingUpdater,
        serial(make_dataset(46), 10),  # whose windows end with a batch that is smaller, too
        optimizer,
        Model(),
        observation_rules={"main/total": "sum", "main/last": "last"},
        **WAYS[way],
    )
    updater.gradient_norm_interval = 1 if measures_norms else None
    for _ in range(4):
        Watched.reads.clear()
        (step,) = run(updater, 1)
        assert optimizer.read_before == []
        assert Watched.reads == []  # nor does the optimizer
    assert isinstance(optimizer.target.weight.grad, Watched)
    assert isinstance(step.observation["main/last"], Watched)


def train_by_block(optimizer, parts):
    with chainer_accum.accumulate(optimizer) as window:
        for part in parts:
            window.add(optimizer.target, *part, weight=len(part[0]))


def train_by_calls(optimizer, parts):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizer, len(parts))
    for part in parts:
        optimizer.update_weighted(len(part[0]), optimizer.target, *part)


def train_with_gradients(optimizer, parts):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizer, len(parts))
    for part in parts:
        loss = optimizer.target(*part)
        optimizer.target.cleargrads()
        loss.backward()
        optimizer.update_weighted(len(part[0]))


@pytest.mark.parametrize("train", [train_by_block, train_by_calls, train_with_gradients])
def test_a_loop_of_ones_own_reads_nothing_before_the_update(train):
    optimizer = Counting().setup(Model())
    with chainer.Reporter().scope({}):
        chainer.get_current_reporter().add_observer("main", optimizer.target)
        x, t = chainer.dataset.concat_examples(make_dataset(21))
        train(optimizer, [(x[start : start + 6], t[start : start + 6]) for start in range(0, 21, 6)])
    assert optimizer.read_before == []
    assert isinstance(optimizer.target.weight.grad, Watched)


def test_a_weight_that_is_an_array_is_read_once_for_each_micro_batch():
    optimizer = Counting()
    updater = make_updater(
        AccumulatingUpdater,
        serial(make_dataset(), 6),
        optimizer,
        Model(),
        accumulation_steps=4,
        weight_func=lambda batch: numpy.array(float(len(batch))).view(Watched),
    )
    run(updater, 1)
    assert optimizer.read_before == ["__float__"] * 4


def test_to_look_for_values_that_are_not_finite_is_to_read():
    optimizer = Counting()
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(), 6), optimizer, Model(), accumulation_steps=4, nonfinite="skip"
    )
    run(updater, 1)
    assert set(optimizer.read_before) == {"__bool__"}
