"""However a function with a shortcut is called, the sums are what Chainer adds up by itself."""

from __future__ import annotations

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.functions.connection.linear import LinearFunction
from chainer_accum.window.gradient_sums import GradientSums
from chainer_accum.window.weight_gradients import add_weight_gradient
from hypothesis import assume, given
from hypothesis import strategies as st

INTEGERS = ["i1", "i2", "i4", "i8"]


class Parameters(chainer.Link):
    """Parameters of given shapes and dtypes."""

    def __init__(self, **arrays):
        super().__init__()
        with self.init_scope():
            for name, array in arrays.items():
                setattr(self, name, chainer.Parameter(array))


def sums_of(link, make_loss, passes):
    sums = GradientSums(link)
    for _ in range(passes):
        loss = make_loss()
        with sums.adding():
            loss.backward()
    return {name: sums.get(param) for name, param in link.namedparams()}


def gradients_of(link, make_loss, passes):
    totals = {}
    for _ in range(passes):
        loss = make_loss()
        link.cleargrads()
        loss.backward()
        for name, param in link.namedparams():
            if param.grad is not None:
                totals[name] = totals.get(name, 0) + param.grad.astype("d")
    return totals


def assert_same(link, make_loss, passes=2, tolerance=1e-5):
    expected = gradients_of(link, make_loss, passes)
    actual = sums_of(link, make_loss, passes)
    assert {name for name, total in actual.items() if total is not None} == set(expected)
    for name, total in expected.items():
        scale = abs(total).max(initial=0) or 1.0
        numpy.testing.assert_allclose(actual[name] / scale, total / scale, rtol=0, atol=tolerance, err_msg=name)


def draw(shape, dtype, seed):
    return numpy.random.RandomState(seed).standard_normal(shape).astype(dtype)


# How an input is given: as an array, as a variable with or without a gradient, as a parameter of the model, as
# something that was computed from one, or without a graph.
GIVEN = {
    "array": lambda array, param: array,
    "variable": lambda array, param: chainer.Variable(array),
    "variable without gradient": lambda array, param: chainer.Variable(array, requires_grad=False),
    "parameter": lambda array, param: param,
    "computed": lambda array, param: param * 2,
    "frozen": lambda array, param: F.identity(param.array),
}
given_as = st.sampled_from(sorted(GIVEN))
floats = st.sampled_from(["f", "d"])


@given(
    given_as, st.sampled_from(["parameter", "computed", "frozen", "variable"]), given_as, st.booleans(), floats, floats
)
def test_linear(x_as, weight_as, bias_as, has_bias, dtype, weight_dtype):
    arrays = {"x": draw((4, 3), dtype, 0), "W": draw((5, 3), weight_dtype, 1), "b": draw((5,), dtype, 2)}
    link = Parameters(**arrays)

    def make_loss():
        x, weight, bias = (
            GIVEN[way](arrays[name], getattr(link, name))
            for name, way in (("x", x_as), ("W", weight_as), ("b", bias_as))
        )
        return F.sum(F.linear(x, weight, bias if has_bias else None) ** 2)

    assume(make_loss().creator_node is not None)
    assert_same(link, make_loss)


@given(
    given_as, st.sampled_from(["parameter", "computed", "frozen", "variable"]), given_as, st.booleans(), floats, floats
)
def test_convolution(x_as, weight_as, bias_as, has_bias, dtype, weight_dtype):
    arrays = {"x": draw((2, 3, 5, 5), dtype, 0), "W": draw((4, 3, 2, 2), weight_dtype, 1), "b": draw((4,), dtype, 2)}
    link = Parameters(**arrays)

    def make_loss():
        x, weight, bias = (
            GIVEN[way](arrays[name], getattr(link, name))
            for name, way in (("x", x_as), ("W", weight_as), ("b", bias_as))
        )
        return F.sum(F.convolution_2d(x, weight, bias if has_bias else None, pad=1) ** 2)

    assume(make_loss().creator_node is not None)
    assert_same(link, make_loss)


@given(
    st.sampled_from(["array", "variable", "variable without gradient"]),
    st.sampled_from(["parameter", "computed"]),
    st.sampled_from(INTEGERS),
    st.sampled_from([None, -1, 2]),
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    floats,
)
def test_embedding(ids_as, weight_as, integer, ignore_label, ids, dtype):
    ids = numpy.array([-1 if ignore_label == -1 and index % 3 == 0 else index for index in ids], integer)
    weight = draw((5, 3), dtype, 1)
    link = Parameters(W=weight)

    def make_loss():
        rows = F.embed_id(GIVEN[ids_as](ids, None), GIVEN[weight_as](weight, link.W), ignore_label)
        return F.sum(rows**2)

    assert_same(link, make_loss)


def test_a_weight_may_be_both_inputs():
    link = Parameters(W=draw((3, 3), "f", 0))
    assert_same(link, lambda: F.sum(F.linear(link.W, link.W) ** 2))
    link = Parameters(W=draw((2, 2, 2, 2), "f", 0))
    assert_same(link, lambda: F.sum(F.convolution_2d(link.W, link.W, pad=1) ** 2))


def test_an_input_of_no_examples_adds_nothing():
    link = Parameters(W=draw((4, 3), "f", 0))
    assert_same(link, lambda: F.sum(F.linear(numpy.zeros((0, 3), "f"), link.W)))


class Binary(LinearFunction):
    """A linear function that overrides its forward pass, whose gradient is that of Chainer's."""

    def forward(self, inputs):
        return super().forward((inputs[0], numpy.sign(inputs[1])))


class Halved(LinearFunction):
    """One that overrides its backward pass."""

    def backward(self, indexes, grad_outputs):
        return [grad * 0.5 for grad in super().backward(indexes, grad_outputs)]


class Decorated(LinearFunction):
    """One that wraps the backward pass of the instance."""

    def __init__(self):
        super().__init__()
        backward = self.backward
        self.backward = lambda indexes, grads: [grad * 3 for grad in backward(indexes, grads)]


@pytest.mark.parametrize("function", [Binary, Halved, Decorated])
def test_a_subclass_computes_its_gradient_itself(function):
    link = Parameters(W=draw((4, 3), "f", 0))
    x = draw((2, 3), "f", 1)
    assert_same(link, lambda: F.sum(function().apply((x, link.W))[0] ** 2))
    assert add_weight_gradient(None, link.W, function(), x, draw((2, 4), "f", 2)) is None


def test_a_patched_backward_pass_is_not_bypassed(monkeypatch):
    own = LinearFunction.backward
    monkeypatch.setattr(
        LinearFunction, "backward", lambda self, indexes, grads: [grad * 2 for grad in own(self, indexes, grads)]
    )
    link = Parameters(W=draw((4, 3), "f", 0))
    x = draw((2, 3), "f", 1)
    assert_same(link, lambda: F.sum(F.linear(x, link.W) ** 2))


class Doubling(chainer.FunctionHook):
    """A hook that wraps the backward pass of each function for as long as that runs."""

    name = "Doubling"

    def backward_preprocess(self, function, in_data, out_grad):
        backward = function.backward
        function.backward = lambda indexes, grads: [
            None if grad is None else grad * 2 for grad in backward(indexes, grads)
        ]

    def backward_postprocess(self, function, in_data, out_grad):
        del function.backward


@pytest.mark.parametrize("is_outer", [True, False])
def test_a_hook_may_wrap_the_backward_pass(is_outer):
    link = Parameters(W=draw((4, 3), "f", 0))
    x = chainer.Variable(draw((2, 3), "f", 1))

    def run(sums):
        loss = F.sum(F.linear(x, link.W))
        with sums.adding():
            if is_outer:
                loss.backward()
            else:
                with Doubling():
                    loss.backward()
        return loss

    sums = GradientSums(link)
    if is_outer:
        with Doubling():
            run(sums)
    else:
        run(sums)
    loss = F.sum(F.linear(x, link.W))
    link.cleargrads()
    with Doubling():
        loss.backward()
    assert sums.get(link.W) is not None
    if is_outer:  # one that comes later sees only what is not added yet
        numpy.testing.assert_allclose(sums.get(link.W), link.W.grad, rtol=1e-6)


class Narrowing(chainer.FunctionNode):
    """A function that returns a gradient in another dtype, or shape, than its input has."""

    def __init__(self, change):
        self._change = change

    def forward(self, inputs):
        return (numpy.asarray(inputs[0].sum()),)

    def backward(self, indexes, grad_outputs):
        return (self._change(grad_outputs[0]),)


@pytest.mark.parametrize(
    "change",
    [lambda gy: F.cast(F.broadcast_to(gy, (3,)), "f"), lambda gy: F.broadcast_to(gy, (2,))],
    ids=["dtype", "shape"],
)
def test_a_gradient_that_chainer_refuses_is_refused(change):
    link = Parameters(W=draw((3,), "d", 0))
    errors = []
    for context in (GradientSums(link).adding, chainer.no_backprop_mode):
        loss = Narrowing(change).apply((link.W,))[0]
        with pytest.raises((TypeError, ValueError)) as caught, context():
            loss.backward()
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
