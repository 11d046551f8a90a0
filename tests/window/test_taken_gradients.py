"""Gradients of the caller's own backward pass reach all optimizers, and each counts once."""

from __future__ import annotations

import copy
import gc
import weakref

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import accumulate, create_accumulating_optimizer
from chainer.optimizers import SGD, Adam, MomentumSGD
from chainer_accum.window.taken_gradients import is_taken, keep_for_others, mark_as_taken, take_gradient

from helpers import assert_same_parameters

random = numpy.random.RandomState(0)
inputs = random.standard_normal((24, 5))
labels = random.randint(0, 3, 24).astype("i")


@pytest.fixture(autouse=True)
def _in_float64():
    with chainer.using_config("dtype", numpy.float64):
        yield


class Head(chainer.Chain):
    """A head on a body that it shares with others."""

    def __init__(self, body, seed):
        super().__init__()
        weight = numpy.random.RandomState(seed).standard_normal((3, 8))
        with self.init_scope():
            self.body = body
            self.head = L.Linear(8, 3, initialW=weight, initial_bias=numpy.zeros(3))

    def forward(self, x, t):
        return F.softmax_cross_entropy(self.head(F.tanh(self.body(x))), t)


def make_heads():
    weight = numpy.random.RandomState(0).standard_normal((8, 5))
    body = L.Linear(5, 8, initialW=weight, initial_bias=numpy.zeros(8))
    heads = Head(body, 1), Head(body, 2)
    clear_all(heads)  # Chainer makes parameters with gradients of NaN
    return heads


def clear_all(models):
    for model in models:
        model.cleargrads()


def train(steps, clears, order=(0, 1), make_optimizers=(MomentumSGD, SGD), updates=3):
    """Trains two heads by one backward pass for both, in ``steps`` parts, and returns the heads."""
    models = make_heads()
    optimizers = [make_optimizer(0.1) for make_optimizer in make_optimizers]
    if steps is not None:
        optimizers = [create_accumulating_optimizer(optimizer, steps) for optimizer in optimizers]
    for optimizer, model in zip(optimizers, models):
        optimizer.setup(model)
    size = len(inputs) // (steps or 1)
    for _ in range(updates):
        for start in range(0, len(inputs), size):
            losses = [model(inputs[start : start + size], labels[start : start + size]) for model in models]
            clears(models)
            sum(losses).backward()
            for index in order:
                optimizers[index].update()
    return chainer.ChainList(*models)


@pytest.mark.parametrize("clears", [clear_all, lambda models: None], ids=["cleared", "not cleared"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_two_optimizers_take_the_gradients_of_one_pass(steps, order, clears):
    assert_same_parameters(train(steps, clears, order), train(None, clear_all, order), 1e-12)


@pytest.mark.parametrize("order", ["accumulating first", "accumulating last"])
def test_an_optimizer_that_does_not_accumulate_takes_them_as_well(order):
    def run(wrap):
        models = make_heads()
        first = wrap(SGD(0.1)).setup(models[0])
        second = SGD(0.1).setup(models[1])
        optimizers = [first, second] if order == "accumulating first" else [second, first]
        clear_all(models)
        sum(model(inputs, labels) for model in models).backward()
        grads = [param.grad.copy() for param in models[0].params()]
        for optimizer in optimizers:
            optimizer.update()
        return chainer.ChainList(*models), grads

    wrapped, _ = run(lambda optimizer: create_accumulating_optimizer(optimizer, 1))
    plain, _ = run(lambda optimizer: optimizer)
    assert_same_parameters(wrapped, plain, 1e-12)


def test_a_pass_for_one_optimizer_is_none_for_the_other():
    """As in adversarial training, where each loss has an optimizer of its own."""

    def run(steps):
        models = make_heads()
        optimizers = [SGD(0.1).setup(model) for model in models]
        if steps > 1:
            optimizers = [create_accumulating_optimizer(optimizer, steps) for optimizer in optimizers]
        size = len(inputs) // steps
        for start in range(0, len(inputs), size):
            for optimizer in optimizers:
                loss = optimizer.target(inputs[start : start + size], labels[start : start + size])
                optimizer.target.cleargrads()
                loss.backward()
                optimizer.update()
        return models

    whole, parts = make_heads(), run(2)
    for index, model in enumerate(whole):
        SGD(0.1).setup(model).update(model, inputs, labels)
        numpy.testing.assert_allclose(parts[index].head.W.array, model.head.W.array, rtol=1e-2)
    assert all(numpy.isfinite(model.body.W.array).all() for model in parts)


def test_two_blocks_take_the_gradients_of_one_pass():
    models, reference = make_heads(), make_heads()
    optimizers, others = ([SGD(0.1).setup(model) for model in pair] for pair in (models, reference))
    with accumulate(optimizers[0]) as first, accumulate(optimizers[1]) as second:
        for start in range(0, 24, 8):
            clear_all(models)
            sum(model(inputs[start : start + 8], labels[start : start + 8]) for model in models).backward()
            first.add_gradients()
            second.add_gradients()
    clear_all(reference)
    sum(model(inputs, labels) for model in reference).backward()
    for optimizer in reversed(others):
        optimizer.update()
    assert_same_parameters(chainer.ChainList(*models), chainer.ChainList(*reference), 1e-12)


NO_PASS = "there must be a backward pass before gradients are taken, got none since they were last taken, or none"


def test_a_call_without_a_backward_pass_is_an_error():
    model = make_heads()[0]
    optimizer = create_accumulating_optimizer(SGD(1.0), 3).setup(model)
    model(inputs, labels).backward()
    optimizer.update()
    with pytest.raises(RuntimeError, match=NO_PASS):
        optimizer.update()
    model.cleargrads()
    optimizer.update()  # of a constant, which has no gradient
    assert optimizer.t == 0


def test_the_gradients_that_parameters_are_made_with_are_an_error():
    optimizer = SGD().setup(L.Linear(5, 3))
    with pytest.raises(RuntimeError, match=NO_PASS), accumulate(optimizer) as window:
        window.add_gradients()
    assert optimizer.t == 0


def test_a_parameter_that_a_pass_does_not_reach_has_no_gradient_in_it():
    model = make_heads()[0]
    optimizer = create_accumulating_optimizer(SGD(1.0), 2).setup(model)
    model(inputs, labels).backward()
    grad, before = model.head.W.grad.copy(), model.head.W.array.copy()
    optimizer.update()
    F.sum(model.body(inputs)).backward()
    optimizer.update()
    numpy.testing.assert_allclose(before - model.head.W.array, grad / 2, rtol=1e-12)


@pytest.mark.parametrize("is_reused", [True, False])
def test_gradients_that_are_written_into_the_same_arrays_count(is_reused):
    """As where a local model sends its gradients to a shared one."""
    shared = make_heads()[0]
    local, expected = copy.deepcopy(shared), copy.deepcopy(shared)
    optimizer = create_accumulating_optimizer(SGD(0.1), 4).setup(shared)
    buffers = [numpy.zeros_like(param.array) for param in shared.params()]
    for start in range(0, 24, 6):
        local.cleargrads()
        local(inputs[start : start + 6], labels[start : start + 6]).backward()
        for param, own, buffer in zip(shared.params(), local.params(), buffers):
            buffer[...] = own.grad
            if is_reused or param.grad is None:
                param.grad = buffer
        optimizer.update()
    SGD(0.1).setup(expected).update(expected, inputs, labels)
    assert_same_parameters(shared, expected, 1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: model.copy(mode="copy")])
def test_a_copy_of_a_model_has_gradients_that_are_new(duplicate):
    model, optimizer = make_heads()[0], object.__new__(SGD)
    model(inputs, labels).backward()
    assert take_gradient(model.head.W, optimizer) is model.head.W.grad
    assert take_gradient(model.head.W, optimizer) is None
    assert take_gradient(duplicate(model).head.W, optimizer) is not None


def test_a_deep_copy_within_a_window_knows_what_has_been_taken():
    optimizer = create_accumulating_optimizer(SGD(1.0), 2).setup(make_heads()[0])
    optimizer.target(inputs, labels).backward()
    optimizer.update()
    duplicate = copy.deepcopy(optimizer)
    for each in (optimizer, duplicate):
        each.target(inputs, labels).backward()  # not cleared
        each.update()
        assert each.t == 1
    assert_same_parameters(duplicate.target, optimizer.target, 0)


def test_who_shares_a_parameter_is_known():
    model = make_heads()[0]
    first, second = SGD(), Adam()
    model(inputs, labels).backward()
    param = model.head.W
    take_gradient(param, first)
    assert is_taken(param, first) and not is_taken(param, second)
    take_gradient(param, second)
    assert is_taken(param, second)
    param.grad = param.grad.copy()
    assert not is_taken(param, first)
    mark_as_taken(param, first)
    assert is_taken(param, first) and not is_taken(param, second)


@pytest.mark.parametrize("is_shared", [False, True])
def test_only_what_is_shared_is_kept_for_others(is_shared):
    model = make_heads()[0]
    first, second = SGD(), Adam()
    model(inputs, labels).backward()
    param = model.head.W
    take_gradient(param, first)
    if is_shared:
        take_gradient(param, second)
    grad = param.grad
    put_back = keep_for_others([param], first)
    param.grad = grad + 1
    mark_as_taken(param, first)
    put_back()
    assert (param.grad is grad) == is_shared
    assert is_taken(param, first)
    assert is_taken(param, second) == is_shared


def test_neither_a_parameter_nor_an_optimizer_is_kept_alive():
    model, optimizer = make_heads()[0], SGD()
    model(inputs, labels).backward()
    take_gradient(model.head.W, optimizer)
    references = [weakref.ref(model.head.W), weakref.ref(optimizer), weakref.ref(model.head.W.grad)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
