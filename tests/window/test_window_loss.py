"""A window knows the loss of its micro-batches, which is that of the whole batch."""

from __future__ import annotations

import pickle

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum import accumulate, create_accumulating_optimizer
from chainer import optimizers
from chainer_accum.window.options import WindowOptions
from chainer_accum.window.window import Window
from detectors import make_boxes, set_up, split, summed
from hypothesis import given, settings
from hypothesis import strategies as st

from test_synchronization import Model, Watched

BOXES = make_boxes(24)


def loss_of(name, examples):
    model = set_up().target
    return float(summed(getattr(model, name))(*chainer.dataset.concat_examples(examples)).array)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    name=st.sampled_from(["of_labels", "of_all"]),
    lockstep=st.sampled_from([None, "memory"]),
)
def test_the_loss_of_a_window_is_that_of_the_whole_batch(sizes, name, lockstep):
    optimizer = set_up()
    with accumulate(optimizer, lockstep=lockstep) as window:
        assert window.loss is None
        for arrays in split(BOXES, sizes):
            window.add(getattr(optimizer.target, name), *arrays)
    assert window.loss.shape == () and window.loss.dtype == numpy.float64
    numpy.testing.assert_allclose(window.loss, loss_of(name, BOXES[: sum(sizes)]), rtol=1e-12)


def test_the_loss_is_known_after_each_pass():
    optimizer, seen = set_up(optimizer=optimizers.SGD(0)), []
    with accumulate(optimizer) as window:
        for arrays in split(BOXES, [5, 1, 18]):
            window.add(optimizer.target.of_labels, *arrays)
            seen.append(float(window.loss))
    numpy.testing.assert_allclose(seen, [loss_of("of_labels", BOXES[:end]) for end in (5, 6, 24)], rtol=1e-12)


@pytest.mark.parametrize("weights", [(1, 2, 3), (1e-300, 1e-299, 3e-299), (1e308, 1e308, 1e308), (1, 2.0**40, 0)])
def test_weights_of_any_size_give_the_mean(weights):
    optimizer = set_up()
    window = Window(optimizer)
    for weight, value in zip(weights, (1.0, 2.0, 4.0)):
        window.add(lambda value=value: optimizer.target.of_labels(*split(BOXES, [4])[0])[0] * 0 + value, weight=weight)
    assert float(window.loss) == pytest.approx(numpy.average([1, 2, 4], weights=numpy.array(weights) / max(weights)))


def test_sums_add_up():
    optimizer = set_up()
    window = Window(optimizer, WindowOptions("sum"))
    for value in (1.0, 2.0, 4.0):
        window.add(lambda value=value: chainer.Variable(numpy.array(value, "f")), weight=7)
    assert window.loss == 7 and window.loss.dtype == numpy.float32


def test_skipped_micro_batches_do_not_count():
    optimizer = set_up()
    (arrays,) = split(BOXES, [6])
    with accumulate(optimizer, nonfinite="skip") as window:
        window.add(lambda: chainer.Variable(numpy.array(numpy.inf)), weight=5)
        assert window.loss is None
        window.add(optimizer.target.of_labels, *arrays)
        window.add(lambda: (chainer.Variable(numpy.array(numpy.nan)), 5))
        assert float(window.loss) == pytest.approx(loss_of("of_labels", BOXES[:6]))


def test_float16_losses_are_added_in_a_wider_type():
    window = Window(set_up())
    for _ in range(4096):
        window.add(lambda: chainer.Variable(numpy.array(1, "e")))
    assert window.loss.dtype == numpy.float32 and window.loss == 1


def test_a_loss_that_is_not_said_makes_that_of_the_window_unknown():
    optimizer = set_up()
    (arrays,) = split(BOXES, [6])

    def preset():
        losses = F.softmax_cross_entropy(
            optimizer.target.head(optimizer.target.features(arrays[0])), arrays[1], reduce="no"
        )
        losses.grad = numpy.ones_like(losses.array)
        return losses

    def own(window):
        optimizer.target.of_labels(*arrays)[0].backward()
        window.add_gradients()

    for add in (lambda window: window.add(preset), own):
        window = Window(optimizer)
        add(window)
        assert window.loss is None


def test_the_loss_survives_pickling_within_a_window():
    optimizer = create_accumulating_optimizer(set_up(), 3)
    for arrays in split(BOXES, [5, 7]):
        optimizer.update(optimizer.target.of_all, *arrays)
    copy = pickle.loads(pickle.dumps(optimizer))
    numpy.testing.assert_array_equal(copy._window.loss, optimizer._window.loss)


def test_neither_the_loss_nor_the_gradient_norm_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(Watched, "reads", [])
    optimizer = optimizers.SGD(0.1).setup(Model())
    x, t = numpy.random.standard_normal((8, 5)).astype("f"), numpy.arange(8, dtype="i") % 3
    seen = []
    with chainer.Reporter().scope({}):
        chainer.get_current_reporter().add_observer("main", optimizer.target)
        with accumulate(optimizer, skip_update=lambda window: seen.append(window.gradient_norm) or False) as window:
            for _ in range(2):
                window.add(optimizer.target, x, t, weight=8)
            seen.append(window.loss)
    assert Watched.reads == []
    assert isinstance(seen[0], Watched) and seen[0].shape == ()
    assert seen[1].shape == ()
