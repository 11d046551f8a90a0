"""Weights of any size give the mean, and no pass has a larger factor than it must."""

from __future__ import annotations

import math
from fractions import Fraction

import chainer_accum  # noqa: F401
import chainer
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, accumulate, create_accumulating_optimizer
from chainer_accum.window.weighting import Weights
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_dataset, make_updater, serial

finite = st.floats(0, allow_infinity=False, allow_nan=False, exclude_min=True)


def sum_up(weights, values, expected=None):
    """Returns the weighted mean as a window computes it, and the factor that each value had."""
    sums, total, factors = Weights(expected), 0.0, []
    for weight, value in zip(weights, values):
        total *= sums.make_room(weight)
        factors.append(sums.factor(weight))
        total += factors[-1] * value
        sums.add(weight)
    return total * sums.correction(), factors


@given(st.lists(st.tuples(finite, st.floats(-1, 1)), min_size=1, max_size=8), st.one_of(st.none(), finite))
def test_the_mean_is_right_for_all_finite_weights(pairs, expected):
    weights, values = zip(*pairs)
    mean, factors = sum_up(weights, values, expected)
    exact = sum(Fraction(w) * Fraction(v) for w, v in pairs) / sum(map(Fraction, weights))
    assert math.isclose(mean, exact, rel_tol=1e-9, abs_tol=1e-9)
    assert max(factors) <= 4  # more than 1 only where the sum of the weights is beyond all floats


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20))
def test_no_factor_is_larger_than_in_the_weights_so_far(weights):
    _, factors = sum_up(weights, [0.0] * len(weights))
    for number, factor in enumerate(factors, 1):
        assert factor <= weights[number - 1] / sum(weights[:number]) * (1 + 1e-12)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(0, 30))
def test_a_larger_divisor_changes_no_bit(weights, doublings):
    values = numpy.random.RandomState(0).standard_normal(len(weights)).astype("f")
    expected = float(sum(weights))
    mean, _ = sum_up(weights, values, expected)
    assert sum_up(weights, values, expected * 2.0**doublings)[0] == mean


def test_an_absurd_expectation_does_not_make_gradients_vanish():
    sums = Weights(1.0)
    sums.expect(1e300)
    sums.make_room(1.0)
    assert sums.factor(1.0) > 1e-15


class Batches:
    """An iterator over given batches."""

    is_new_epoch, epoch, epoch_detail = False, 0, 0.0

    def __init__(self, batches):
        self._batches = iter(batches)

    def next(self):
        return next(self._batches)


def make_recorder():
    """Returns a model, a loss function, and a list of the initial gradients of its losses, for each example."""
    model, seen = L.Classifier(L.Linear(5, 3)), []
    model.compute_accuracy = False

    def loss_func(x, t):
        loss = model(x, t)
        backward = loss.backward
        loss.backward = lambda **kwargs: (seen.append(float(loss.grad) / len(x)), backward(**kwargs))
        return loss

    return model, loss_func, seen


def two_windows_of_an_updater(optimizer, loss_func, batches):
    kwargs = {"loss_func": loss_func, "accumulation_steps": len(batches)}
    updater = AccumulatingUpdater(Batches(batches * 2), optimizer, **kwargs)
    updater.update()
    updater.update()


def two_blocks(optimizer, loss_func, batches):
    for _ in range(2):
        with accumulate(optimizer, expected_weight=sum(map(len, batches))) as window:
            for batch in batches:
                window.add(loss_func, *chainer.dataset.concat_examples(batch), weight=len(batch))


def two_windows_of_a_wrapped_optimizer(optimizer, loss_func, batches):
    wrapped = create_accumulating_optimizer(optimizer, len(batches))
    for batch in batches * 2:
        wrapped.update_weighted(len(batch), loss_func, *chainer.dataset.concat_examples(batch))


@pytest.mark.parametrize("run", [two_windows_of_an_updater, two_blocks, two_windows_of_a_wrapped_optimizer])
@pytest.mark.parametrize("sizes", [(1, 30, 30), (30, 1, 1), (3, 40, 5, 5), (2, 2, 2, 2)])
def test_no_gradient_is_larger_than_in_the_whole_batch_once_windows_are_known(run, sizes):
    model, loss_func, seen = make_recorder()
    ends = numpy.cumsum(sizes)
    data = make_dataset(sum(sizes))
    run(chainer.optimizers.SGD(0.1).setup(model), loss_func, [data[end - size : end] for size, end in zip(sizes, ends)])
    assert len(seen) == 2 * len(sizes)
    assert max(seen[len(sizes) :]) <= 1 / sum(sizes) * (1 + 1e-6)


def test_gradients_of_a_split_batch_are_as_large_as_in_the_whole_batch():
    model, loss_func, seen = make_recorder()
    optimizer = chainer.optimizers.SGD(0.1)
    kwargs = {"loss_func": loss_func, "micro_batch_size": 5}
    make_updater(AccumulatingUpdater, serial(make_dataset(17), 17), optimizer, model, **kwargs).update()
    numpy.testing.assert_allclose(seen, [1 / 17] * 4, rtol=1e-6)
