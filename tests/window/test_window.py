"""A window makes the step of the whole batch, whatever its losses, weights and scales are."""

from __future__ import annotations

import contextlib
import weakref

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import optimizers
from chainer_accum._arguments import check_weight
from chainer_accum.accumulation import accumulate
from chainer_accum.window.options import WindowOptions
from chainer_accum.window.window import Window
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, make_model

inputs, labels = chainer.dataset.concat_examples(make_dataset(24))


def set_up(optimizer=None, model=None):
    optimizer = optimizers.MomentumSGD(0.1) if optimizer is None else optimizer
    optimizer.setup(make_model() if model is None else model)
    return optimizer


def split(sizes):
    ends = numpy.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.one_of(st.none(), st.floats(0.5, 1000)))
def test_weighted_means_make_the_step_of_the_whole_batch(sizes, expected_weight):
    whole, accumulated = set_up(), set_up()
    for _ in range(2):
        whole.update(whole.target, inputs[: sum(sizes)], labels[: sum(sizes)])
        window = Window(accumulated, expected_weight=expected_weight)
        for part in split(sizes):
            window.add(accumulated.target, inputs[part], labels[part], weight=part.stop - part.start)
        window.update()
    assert_same_parameters(accumulated.target, whole.target)
    assert_same_optimizer_state(accumulated, whole)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_sums_make_the_step_of_the_whole_batch(sizes):
    class Sum(chainer.Chain):
        def __init__(self):
            super().__init__(classifier=make_model())

        def forward(self, x, t):
            return self.classifier(x, t) * len(x)

    whole, accumulated = set_up(optimizers.SGD(0.01), Sum()), set_up(optimizers.SGD(0.01), Sum())
    whole.update(whole.target, inputs[: sum(sizes)], labels[: sum(sizes)])
    window = Window(accumulated, WindowOptions("sum"))
    for part in split(sizes):
        window.add(accumulated.target, inputs[part], labels[part], weight=part.stop - part.start)
    window.update()
    assert_same_parameters(accumulated.target, whole.target, 1e-5)


@pytest.mark.parametrize("scale", [None, 128.0, 1000.0])
def test_the_loss_scale_is_divided_out_by_the_update_rule(scale):
    scaled, plain = set_up(), set_up()
    if scale is not None:
        scaled.loss_scaling(scale=scale)
    for optimizer in (scaled, plain):
        window = Window(optimizer)
        for part in split([8, 16]):
            window.add(optimizer.target, inputs[part], labels[part], weight=part.stop - part.start)
        window.update()
    assert_same_parameters(scaled.target, plain.target)
    assert {param._loss_scale for param in scaled.target.params()} == {scale}


def test_without_weight_the_gradient_is_zero():
    accumulated, whole = set_up(), set_up()
    no_labels = numpy.full(4, -1, "i")
    window = Window(accumulated)
    accumulated.target(inputs, labels).backward()  # gradients from before the window are no part of it
    window.add(accumulated.target, inputs[:4], no_labels, weight=0)
    window.update()
    whole.update(whole.target, inputs[:4], no_labels)
    assert_same_parameters(accumulated.target, whole.target)
    assert_same_optimizer_state(accumulated, whole)


def test_a_loss_without_weight_may_be_nan():
    optimizer = set_up()
    window = Window(optimizer)
    window.add(optimizer.target, inputs[:4], labels[:4], weight=4)
    window.add(lambda: optimizer.target(inputs[:4], labels[:4]) * numpy.nan, weight=0)
    window.update()
    assert all(numpy.isfinite(param.array).all() for param in optimizer.target.params())


def test_nothing_is_kept_of_a_pass_but_its_gradients():
    optimizer = set_up()
    window = Window(optimizer)
    creators = []

    def lossfun(x, t):
        loss = F.sum(optimizer.target.predictor(x))
        creators.append(weakref.ref(loss.creator_node))
        return loss

    assert window.add(lossfun, inputs, labels)
    assert creators[0]() is None


def test_gradients_stay_after_the_update_for_extensions_to_read():
    optimizer = set_up()
    window = Window(optimizer)
    for part in split([12, 12]):
        window.add(optimizer.target, inputs[part], labels[part], weight=12)
    window.update()
    reference = set_up()
    reference.update(reference.target, inputs, labels)
    for param, expected in zip(optimizer.target.params(), reference.target.params()):
        numpy.testing.assert_allclose(param.grad, expected.grad, atol=1e-7)


def test_parameters_are_as_before_until_the_update():
    optimizer = set_up()
    optimizer.update(optimizer.target, inputs, labels)
    before = optimizer.target.copy(mode="copy")
    t = optimizer.t
    window = Window(optimizer)
    window.add(optimizer.target, inputs, labels)
    assert_same_parameters(optimizer.target, before, 0)
    assert optimizer.t == t


def test_a_failed_backward_pass_spoils_the_window_and_nothing_else():
    class Failure(chainer.FunctionHook):
        def backward_postprocess(self, function, in_data, out_grad):
            if function.label == "LinearFunction":
                raise MemoryError

    optimizer, reference = set_up(), set_up()
    for each in (optimizer, reference):
        each.update(each.target, inputs, labels)
    window = Window(optimizer)
    window.add(optimizer.target, inputs, labels)
    with pytest.raises(MemoryError), Failure():
        window.add(optimizer.target, inputs, labels)
    assert_same_parameters(optimizer.target, reference.target, 0)
    assert_same_optimizer_state(optimizer, reference, 0)
    with pytest.raises(RuntimeError, match="begin a new window"):
        window.add(optimizer.target, inputs, labels)
    with pytest.raises(RuntimeError, match="begin a new window"):
        window.update()
    for each in (optimizer, reference):
        window = Window(each)
        window.add(each.target, inputs[:5], labels[:5])
        window.update()
    assert_same_parameters(optimizer.target, reference.target, 0)


def test_a_failed_forward_pass_leaves_the_window_as_it_was():
    optimizer, reference = set_up(), set_up()
    window = Window(optimizer)
    window.add(optimizer.target, inputs, labels)
    with pytest.raises(chainer.utils.type_check.InvalidType):
        window.add(optimizer.target, inputs[:, :2], labels)
    window.update()
    reference.update(reference.target, inputs, labels)
    assert_same_parameters(optimizer.target, reference.target, 0)


def half_precision_model():
    with chainer.using_config("dtype", numpy.float16):
        model = make_model()
        model(inputs.astype("e"), labels)
    return model


def test_float16_gradients_reach_the_optimizer_in_float16():
    optimizer = set_up(optimizers.SGD(0.1), half_precision_model())
    window = Window(optimizer)
    for part in split([8, 16]):
        window.add(optimizer.target, inputs[part].astype("e"), labels[part], weight=part.stop - part.start)
    window.update()
    reference = set_up(optimizers.SGD(0.1))
    reference.update(reference.target, inputs, labels)
    for param, expected in zip(optimizer.target.params(), reference.target.params()):
        assert param.grad.dtype == param.array.dtype == numpy.float16
        numpy.testing.assert_allclose(param.grad, expected.grad, rtol=2e-2, atol=2e-3)


def test_4096_float16_gradients_of_one_make_4096():
    link = chainer.Link()
    with link.init_scope():
        link.param = chainer.Parameter(numpy.zeros((), numpy.float16))
    optimizer = set_up(optimizers.SGD(1.0), link)
    window = Window(optimizer, WindowOptions("sum"))
    for _ in range(4096):
        window.add(lambda: link.param * 1)
    window.update()
    assert link.param.grad == 4096


def test_an_overflow_in_one_pass_skips_the_window_and_lowers_the_dynamic_scale():
    optimizer = set_up(optimizers.SGD(0.1), half_precision_model())
    optimizer.loss_scaling()
    optimizer.update(optimizer.target, inputs.astype("e"), labels)  # t = 1 and the scale grows to 2
    before, t = optimizer.target.copy(mode="copy"), optimizer.t

    def window_with_a_loss_times(factor):
        window = Window(optimizer)
        window.add(optimizer.target, inputs[:12].astype("e"), labels[:12], weight=12)
        with numpy.errstate(all="ignore"):
            window.add(lambda: F.sum(optimizer.target.predictor(inputs[12:].astype("e"))) * factor, weight=12)
        return window

    with pytest.warns(UserWarning, match="Non finite number found"):
        window_with_a_loss_times(60000.0).update()
    assert_same_parameters(optimizer.target, before, 0)
    assert (optimizer.t, optimizer._loss_scale) == (t + 1, 1.0)
    window_with_a_loss_times(1.0).update()
    for param, old in zip(optimizer.target.params(), before.params()):
        assert (param.array != old.array).any()


def test_a_window_is_updated_once():
    optimizer = set_up()
    window = Window(optimizer)
    window.add(optimizer.target, inputs, labels)
    window.update()
    with pytest.raises(RuntimeError, match="begin a new window"):
        window.update()
    with pytest.raises(RuntimeError, match="begin a new window"):
        window.add(optimizer.target, inputs, labels)
    assert optimizer.t == 1


def test_a_parameter_can_be_a_loss():
    link = chainer.Link()
    with link.init_scope():
        link.param = chainer.Parameter(numpy.zeros((), "f"))
    optimizer = set_up(optimizers.SGD(1.0), link)
    optimizer.loss_scaling(scale=8.0)
    window = Window(optimizer)
    window.add(lambda: link.param, weight=1)
    window.add(lambda: link.param * 5, weight=3)
    window.update()
    assert link.param.array == -4


def test_the_loss_scale_is_recorded_on_other_links_too():
    """Their gradients are scaled as well, and their optimizer has to know."""
    optimizer, other = set_up(), L.Linear(5, 5)
    optimizer.loss_scaling(scale=8.0)
    other.cleargrads()
    window = Window(optimizer)
    window.add(lambda: optimizer.target(other(inputs), labels))
    window.update()
    assert other.W._loss_scale == 8.0


def test_accumulate_updates_once_as_the_block_ends():
    accumulated, whole = set_up(), set_up()
    for _ in range(3):
        with accumulate(accumulated) as window:
            for part in split([4, 15, 5]):
                window.add(accumulated.target, inputs[part], labels[part], weight=part.stop - part.start)
            assert accumulated.t == whole.t
        whole.update(whole.target, inputs, labels)
        assert accumulated.t == whole.t
    assert_same_parameters(accumulated.target, whole.target)
    assert_same_optimizer_state(accumulated, whole)


def test_accumulate_with_losses_that_are_sums():
    accumulated, whole = set_up(optimizers.SGD(0.01)), set_up(optimizers.SGD(0.01))
    with accumulate(accumulated, loss_reduction="sum") as window:
        for part in split([4, 20]):
            window.add(lambda x, t: accumulated.target(x, t) * len(x), inputs[part], labels[part])
    whole.update(lambda x, t: whole.target(x, t) * len(x), inputs, labels)
    assert_same_parameters(accumulated.target, whole.target, 1e-5)


@pytest.mark.parametrize("fails", [False, True], ids=["adds nothing", "raises"])
def test_a_block_that_adds_nothing_or_raises_changes_nothing(fails):
    optimizer, reference = set_up(), set_up()
    for each in (optimizer, reference):
        each.update(each.target, inputs, labels)
    with contextlib.suppress(ConnectionError), accumulate(optimizer) as window:
        if fails:
            window.add(optimizer.target, inputs, labels)
            raise ConnectionError
    assert_same_parameters(optimizer.target, reference.target, 0)
    assert_same_optimizer_state(optimizer, reference, 0)


def test_accumulate_refuses_an_optimizer_without_a_model_and_an_unknown_reduction():
    with pytest.raises(ValueError, match="optimizer must be set up with a model, got Adam without one"):
        with accumulate(optimizers.Adam()):
            pass
    with pytest.raises(ValueError, match="loss_reduction must be one of 'mean', 'sum', got 'avg'"):
        with accumulate(set_up(), loss_reduction="avg"):
            pass


@pytest.mark.parametrize("weights", [(1, 1), (4, 20), (3, 0), (0, 3)])
def test_gradients_of_the_caller_are_added_by_weight(weights):
    accumulated, reference = set_up(), set_up()
    accumulated.target.cleargrads()
    window = Window(accumulated)
    for weight, part in zip(weights, split([12, 12])):
        accumulated.target(inputs[part], labels[part]).backward()
        window.add_gradients(weight)  # which clears them
    window.update()
    reference.target.cleargrads()
    for weight, part in zip(weights, split([12, 12])):
        (reference.target(inputs[part], labels[part]) * (weight / sum(weights))).backward()
    reference.update()
    assert_same_parameters(accumulated.target, reference.target)


def test_gradients_that_the_caller_did_not_scale_are_not_divided_by_the_scale():
    scaling, plain = set_up(), set_up()
    scaling.loss_scaling(scale=8.0)
    for optimizer in (scaling, plain):
        window = Window(optimizer)
        optimizer.target(inputs, labels)
        optimizer.target.cleargrads()
        optimizer.target(inputs, labels).backward()
        window.add_gradients()
        window.update()
    assert_same_parameters(scaling.target, plain.target, 0)


def test_hooks_run_once_on_the_gradient_of_the_whole_batch():
    optimizers_ = set_up(), set_up()
    calls = []

    def count(optimizer):
        calls.append([param.grad.copy() for param in optimizer.target.params()])

    for optimizer in optimizers_:
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.05))
        optimizer.add_hook(count, "count", timing="post")
    whole, accumulated = optimizers_
    whole.update(whole.target, inputs, labels)
    window = Window(accumulated)
    for part in split([4, 20]):
        window.add(accumulated.target, inputs[part], labels[part], weight=part.stop - part.start)
    window.update()
    assert len(calls) == 2
    for actual, expected in zip(*calls):
        numpy.testing.assert_allclose(actual, expected, atol=1e-7)
    assert_same_parameters(accumulated.target, whole.target)


def test_a_parameter_that_joins_in_the_middle_of_a_window_is_accumulated():
    def grow(model):
        if not hasattr(model, "late"):
            with model.init_scope():
                model.late = L.Linear(5, 3, initialW=1)

    class Growing(chainer.Chain):
        def forward(self, x, grows):
            if grows:
                grow(self)
            return F.sum(self.late(x)) / len(x) if grows else F.sum(self.first(x)) / len(x)

        def __init__(self):
            super().__init__(first=L.Linear(5, 3, initialW=1))

    accumulated, whole = set_up(model=Growing()), set_up(model=Growing())
    window = Window(accumulated)
    for part, grows in zip(split([4, 4, 8]), [False, True, True]):
        window.add(accumulated.target, inputs[part], grows, weight=part.stop - part.start)
    window.update()
    whole.target(inputs[4:], True)
    whole.target.cleargrads()
    (whole.target(inputs[4:16], True) * 12 / 16).backward()
    numpy.testing.assert_allclose(accumulated.target.late.W.grad, whole.target.late.W.grad, atol=1e-6)
    assert accumulated.target.first.W.grad.any()


@pytest.mark.parametrize(
    "loss, error, message",
    [
        (lambda model: F.softmax(model.predictor(inputs)), ValueError, r"scalar, got a Variable of shape \(24, 3\)"),
        (lambda model: model(inputs, labels).array, TypeError, "chainer.Variable, got ndarray"),
        (lambda model: None, TypeError, "chainer.Variable, got NoneType"),
        (lambda model: chainer.Variable(), ValueError, "shape None"),
    ],
    ids=["no scalar", "array", "nothing", "empty variable"],
)
def test_a_loss_that_is_none_is_refused_and_the_window_goes_on(loss, error, message):
    optimizer, reference = set_up(), set_up()
    window = Window(optimizer)
    with pytest.raises(error, match=message):
        window.add(loss, optimizer.target)
    window.add(optimizer.target, inputs, labels)
    window.update()
    reference.update(reference.target, inputs, labels)
    assert_same_parameters(optimizer.target, reference.target, 0)


@pytest.mark.parametrize(
    "weight, error",
    [(-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("3", TypeError), (None, TypeError)],
)
def test_a_weight_that_is_none_is_refused(weight, error):
    with pytest.raises(error, match="weight must be"):
        check_weight(weight, "weight")


@pytest.mark.parametrize("number", [3, 3.0, numpy.int64(3), numpy.float32(3), numpy.array(3), True, numpy.bool_(True)])
def test_any_real_number_is_a_weight(number):
    weight = check_weight(number, "weight")
    assert weight == number
    assert type(weight) is float
