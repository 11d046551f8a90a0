"""What training changes can be put back, and is then trained again as if nothing had happened."""

from __future__ import annotations

import random
from typing import Any, Callable

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.dataset import Iterator
from chainer.iterators import MultiprocessIterator, MultithreadIterator, SerialIterator, ShuffleOrderSampler
from chainer.training.updaters import StandardUpdater
from chainer_accum.state.training_state import TrainingState
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_model,
    make_updater,
    run,
    serial,
)


def assert_leaves_no_trace(make: Callable[[], Any], before: int = 0, between: int = 9, after: int = 9) -> None:
    """Asserts that updates between a state and its restoration make no difference to those after it."""
    results = []
    for updates in (0, between):
        numpy.random.seed(0)
        random.seed(0)
        updater = make()
        run(updater, before)
        updater.finalize()  # as the end of a Trainer does
        state = TrainingState(updater)
        run(updater, updates)
        state.restore()
        steps = run(updater, after)
        updater.finalize()
        results.append((steps, updater.get_optimizer("main")))
    (expected_steps, expected), (steps, optimizer) = results
    assert_same_steps(steps, expected_steps, tolerance=0)
    assert_same_parameters(optimizer.target, expected.target, tolerance=0)
    assert_same_optimizer_state(optimizer, expected, tolerance=0)


def make_random_model() -> L.Classifier:
    """Returns a model with dropout, persistent values, and parameters whose shapes are not known yet."""
    return L.Classifier(
        chainer.Sequential(L.Linear(None, 8), L.BatchNormalization(axis=0), F.relu, F.dropout, L.Linear(None, 3))
    )


@settings(max_examples=12, deadline=None)
@given(
    optimizer_class=st.sampled_from([optimizers.SGD, optimizers.MomentumSGD, optimizers.Adam, optimizers.AdaBound]),
    updater_class=st.sampled_from([StandardUpdater, AccumulatingUpdater]),
    iterator_class=st.sampled_from([SerialIterator, MultithreadIterator]),
    batch_size=st.integers(2, 20),
    before=st.integers(0, 7),
    between=st.integers(0, 12),
)
def test_updates_leave_no_trace(optimizer_class, updater_class, iterator_class, batch_size, before, between):
    def make():
        kwargs = {"accumulation_steps": 2, "micro_batch_size": 7} if updater_class is AccumulatingUpdater else {}
        iterator = iterator_class(make_dataset(), batch_size)
        return make_updater(updater_class, iterator, optimizer_class(), make_random_model(), **kwargs)

    assert_leaves_no_trace(make, before, between)


def test_what_was_not_there_is_gone_again():
    optimizer = optimizers.Adam(alpha=0.1)
    updater = make_updater(AccumulatingUpdater, SerialIterator(make_dataset(), 10), optimizer, make_random_model())
    params = dict(optimizer.target.namedparams())
    shapes = {name: param.array is not None and param.shape for name, param in params.items()}
    attributes = {name: set(vars(link)) for name, link in optimizer.target.namedlinks()}
    assert False in shapes.values()

    state = TrainingState(updater)
    run(updater, 6)
    optimizer.alpha = 1.0
    assert all(param.is_initialized and param.update_rule.state for param in params.values())
    state.restore()

    assert {name: param.array is not None and param.shape for name, param in params.items()} == shapes
    assert {name: set(vars(link)) for name, link in optimizer.target.namedlinks()} == attributes
    assert all(param.update_rule.state is None and param.update_rule.t == 0 for param in params.values())
    assert (optimizer.t, optimizer.epoch, optimizer.alpha) == (0, 0, 0.1)
    assert (updater.iteration, updater.epoch_detail, updater.effective_batch_size) == (0, 0, None)


def test_arrays_stay_the_same_objects():
    updater = make_updater(StandardUpdater, serial(make_dataset(), 10), optimizers.MomentumSGD())
    run(updater, 1)
    params = list(updater.get_optimizer("main").target.params())
    arrays = [(param.array, param.update_rule.state["v"]) for param in params]
    state = TrainingState(updater)
    run(updater, 2)
    for param in params:
        param.array = param.array + 1
    state.restore()
    for param, (array, velocity) in zip(params, arrays):
        assert param.array is array and param.update_rule.state["v"] is velocity


def test_a_state_can_be_restored_again():
    updater = make_updater(StandardUpdater, SerialIterator(make_dataset(), 10), optimizers.Adam(), make_random_model())
    state = TrainingState(updater)
    first = run(updater, 7)
    for _ in range(2):
        state.restore()
        assert_same_steps(run(updater, 7), first, tolerance=0)


def test_numbers_that_are_not_finite_are_overwritten():
    updater = make_updater(StandardUpdater, SerialIterator(make_dataset(), 10), optimizers.Adam(), make_random_model())
    state = TrainingState(updater)
    expected = run(updater, 3)
    state.restore()
    updater.get_optimizer("main").alpha = float("nan")
    assert numpy.isnan(run(updater, 3)[-1].observation["main/loss"].array)
    state.restore()
    assert_same_steps(run(updater, 3), expected, tolerance=0)


class _Recurrent(chainer.Chain):
    """Remembers the batches that it has seen."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.lstm = L.LSTM(5, 4)
            self.last = L.Linear(4, 3)
        self.sizes = []
        self.labels = (set(), numpy.zeros(()))
        self.itself = [self]

    def forward(self, x, t):
        self.sizes.append(len(x))
        labels, examples = self.labels
        labels.update(t.tolist())
        examples += len(x)
        loss = F.softmax_cross_entropy(self.last(self.lstm(x)), t)
        self.lstm.h.unchain_backward()
        chainer.report({"loss": loss, "batches": len(self.sizes)}, self)
        chainer.report({"labels": len(labels), "examples": examples.copy()}, self)
        return loss


@pytest.mark.parametrize("before", [0, 2])
def test_what_a_model_remembers_is_put_back(before):
    def make():
        return make_updater(StandardUpdater, serial(make_dataset(4), 1), optimizers.SGD(), _Recurrent())

    assert_leaves_no_trace(make, before)


class _Sampler:
    """An order sampler that is not derived from Chainer's."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, order, position):
        if not isinstance(self.generator, random.Random):
            return self.generator.permutation(len(order))
        return numpy.array(self.generator.sample(range(len(order)), len(order)))


def _shuffle_in_place(order, position):
    numpy.random.shuffle(order)
    return order


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: ShuffleOrderSampler(numpy.random.RandomState(1)),
        lambda: _Sampler(numpy.random.default_rng(1)),
        lambda: _Sampler(random.Random(1)),
        lambda: _shuffle_in_place,
    ],
)
@pytest.mark.parametrize("iterator_class", [SerialIterator, MultithreadIterator])
def test_generators_of_order_samplers_and_initializers_are_put_back(make_sampler, iterator_class):
    def make():  # the initializers of the model have generators of their own
        iterator = iterator_class(make_dataset(), 20, order_sampler=make_sampler())
        return make_updater(AccumulatingUpdater, iterator, optimizers.SGD(), make_model(), accumulation_steps=2)

    assert_leaves_no_trace(make)


@pytest.mark.parametrize("before", [0, 2, 4])
def test_a_wrapped_optimizer_and_its_window_are_put_back(before):
    def make():
        optimizer = chainer_accum.create_accumulating_optimizer(optimizers.Adam(), 4)
        return make_updater(StandardUpdater, SerialIterator(make_dataset(), 10), optimizer, make_random_model())

    assert_leaves_no_trace(make, before)


def test_a_dynamic_loss_scale_is_put_back():
    def make():
        updater = make_updater(StandardUpdater, SerialIterator(make_dataset(), 10), optimizers.SGD())
        updater.get_optimizer("main").loss_scaling()
        return updater

    assert_leaves_no_trace(make, before=2)
    updater = make()
    state = TrainingState(updater)
    run(updater, 3)
    assert updater.get_optimizer("main")._loss_scale > 1
    state.restore()
    assert updater.get_optimizer("main")._loss_scale == 1


class _TwoModels(StandardUpdater):
    """Updates two models, and counts in an attribute of its own."""

    def __init__(self, iterator):
        optimizers_by_name = {name: optimizers.Adam().setup(make_model()) for name in ("main", "other")}
        super().__init__(iterator, optimizers_by_name)
        self.counts = {"updates": [0]}

    def update_core(self):
        x, t = self.converter(self.get_iterator("main").next())
        self.counts["updates"][0] += 1
        for optimizer in self.get_all_optimizers().values():
            predictor = optimizer.target.predictor
            optimizer.update(lambda predictor: F.softmax_cross_entropy(predictor(x), t), predictor)


def test_all_optimizers_and_the_attributes_of_an_updater_are_put_back():
    updater = _TwoModels(SerialIterator(make_dataset(), 10))
    state = TrainingState(updater)
    run(updater, 3)
    other = updater.get_optimizer("other")
    assert (other.t, updater.counts) == (3, {"updates": [3]})
    state.restore()
    assert (other.t, updater.counts) == (0, {"updates": [0]})
    assert other.target.predictor[0].W.array is None
    assert_leaves_no_trace(lambda: _TwoModels(SerialIterator(make_dataset(), 10)))


def test_datasets_are_left_alone():
    dataset = numpy.zeros((20, 5), numpy.float32)
    updater = make_updater(StandardUpdater, serial(dataset, 10), optimizers.SGD())
    state = TrainingState(updater)
    dataset[:] = 1
    state.restore()
    assert (dataset == 1).all()


def test_arrays_that_cannot_be_written_are_left_alone():
    model = make_model()
    model.add_persistent("constant", numpy.broadcast_to(numpy.float32(2), 3))
    updater = make_updater(StandardUpdater, serial(make_dataset(), 10), optimizers.SGD(), model)
    TrainingState(updater).restore()
    assert (model.constant == 2).all()


def test_a_multiprocess_iterator_is_put_back():
    iterator = MultiprocessIterator(make_dataset(), 10, n_processes=1, order_sampler=_Sampler(random.Random(1)))
    updater = make_updater(StandardUpdater, iterator, optimizers.SGD())
    try:
        state = TrainingState(updater)
        first = run(updater, 3)
        state.restore()
        assert_same_steps(run(updater, 3), first, tolerance=0)
    finally:
        updater.finalize()


class _Endless(Iterator):
    epoch, epoch_detail, previous_epoch_detail, is_new_epoch = 0, 0.0, None, False

    def next(self):
        return make_dataset(10)

    __next__ = next


class _NoIterator:
    next = __next__ = _Endless.next


@pytest.mark.parametrize("iterator", [_Endless(), _NoIterator()])
def test_an_iterator_that_cannot_be_serialized_is_an_error(iterator):
    updater = make_updater(AccumulatingUpdater, iterator, optimizers.SGD())
    with pytest.raises(TypeError, match="iterator must be serializable to be restored, got _.*; give it a method"):
        TrainingState(updater)
