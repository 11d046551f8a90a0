"""Gradients reach the sums whichever way they reach a parameter, and nothing is left behind."""

from __future__ import annotations

import gc
import weakref

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.functions.connection.linear import LinearFunction
from chainer_accum.window.gradient_sums import GradientSums


def gradients_of(model, losses):
    """Returns the sums of the gradients that Chainer itself makes."""
    sums = {}
    for loss in losses:
        variable = loss(model)
        model.cleargrads()
        variable.backward()
        for name, param in model.namedparams():
            if param.grad is not None:
                sums[name] = sums.get(name, 0) + param.grad.astype("d")
    model.cleargrads()
    return sums


def sums_of(model, losses):
    sums = GradientSums(model)
    for loss in losses:
        variable = loss(model)
        with sums.adding():
            variable.backward()
    return {name: sums.get(param) for name, param in model.namedparams() if sums.get(param) is not None}


class Model(chainer.Chain):
    """Reaches its parameters in every way there is."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.linear = L.Linear(200, 200)
            self.conv = L.Convolution2D(1, 2, 3)
            self.embed = L.EmbedID(5, 200)
            self.scale = chainer.Parameter(numpy.array(0.5, "f"))
            self.a = chainer.Parameter(numpy.ones((200, 200), "f"))
            self.b = chainer.Parameter(numpy.ones((200, 200), "f"))
            self.unused = chainer.Parameter(numpy.ones(3, "f"))


random = numpy.random.RandomState(0)
vectors = random.standard_normal((6, 200)).astype("f")
images = random.standard_normal((3, 1, 6, 6)).astype("f")
pairs_of_images = numpy.tile(images, (1, 2, 1, 1))
one = numpy.array(1.5, "f")


class OldStyle(chainer.Function):
    """A function of Chainer's first kind."""

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        return (inputs[0] * inputs[1],)

    def backward(self, inputs, grad_outputs):
        return grad_outputs[0] * inputs[1], numpy.array((grad_outputs[0] * inputs[0]).sum())


class AllGradients(chainer.FunctionNode):
    """A function that returns the gradients of all inputs, wanted or not."""

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        return (numpy.array(inputs[0] * inputs[1]),)

    def backward(self, indexes, grad_outputs):
        x, w = self.get_retained_inputs()
        return grad_outputs[0] * w, grad_outputs[0] * x


class HalvedLinear(LinearFunction):
    """A linear function with a backward pass of its own."""

    def backward(self, indexes, grad_outputs):
        return [grad * 0.5 for grad in super().backward(indexes, grad_outputs)]


class NegatedLinear(LinearFunction):
    """A linear function with a forward pass of its own and the backward pass of Chainer's."""

    def forward(self, inputs):
        return (-super().forward(inputs)[0],)


def with_backward_of_the_instance(model):
    """Returns a loss of which one function was given a backward pass by hand."""
    function = LinearFunction()
    backward = function.backward
    function.backward = lambda indexes, grad_outputs: [grad * 3 for grad in backward(indexes, grad_outputs)]
    return F.sum(function.apply((vectors, model.linear.W, model.linear.b))[0] ** 2)


class InnerGradient(chainer.FunctionNode):
    """A function whose backward pass asks for the gradient of a parameter in a graph of its own."""

    def __init__(self, model):
        self.model = model

    def forward(self, inputs):
        self.retain_inputs((0,))
        return (numpy.array(inputs[0].sum()),)

    def backward(self, indexes, grad_outputs):
        with chainer.force_backprop_mode():
            inner = F.sum(self.model.linear(vectors) ** 2)
            (grad,) = chainer.grad([inner], [self.model.linear.W])
        return (grad_outputs[0] * grad.array,)


LOSSES = {
    "linear": lambda model: F.sum(model.linear(vectors) ** 2),
    "one parameter used three times": lambda model: F.sum(model.linear(model.linear(model.linear(vectors))) ** 2),
    "convolution": lambda model: F.sum(model.conv(images) ** 2),
    "convolution in groups": lambda model: F.sum(
        F.convolution_2d(numpy.tile(images, (1, 2, 1, 1)), model.conv.W, groups=2) ** 2
    ),
    "convolution of no images": lambda model: F.sum(model.conv(images[:0]) ** 2),
    "filter of a convolution that is computed": lambda model: F.sum(F.convolution_2d(images, model.conv.W * 2) ** 2),
    "filter of a convolution that is an image, too": lambda model: F.sum(
        F.convolution_2d(model.conv.W, model.conv.W) ** 2
    ),
    "deconvolution": lambda model: F.sum(F.deconvolution_2d(chainer.Variable(pairs_of_images), model.conv.W) ** 2),
    "convolution of many dimensions": lambda model: F.sum(F.convolution_nd(images, model.conv.W) ** 2),
    "embedding": lambda model: F.sum(model.embed(numpy.array([0, 1, 1], "i")) ** 2),
    "embedding that ignores a label": lambda model: F.sum(
        (F.embed_id(numpy.array([[0, -1], [4, 0]], "i"), model.embed.W, ignore_label=-1) + 1) ** 2
    ),
    "embedding that is computed": lambda model: F.sum(F.embed_id(numpy.array([3, 3], "i"), model.embed.W * 2) ** 2),
    "embedding that is read in two ways": lambda model: F.sum(
        F.linear(model.embed(numpy.array([0, 1, 1], "i")), model.embed.W) ** 2
    ),
    "zero-dimensional parameter": lambda model: F.sum(vectors * F.broadcast_to(model.scale, vectors.shape)),
    "gradients that are one array": lambda model: F.sum((model.a + model.b) ** 2),
    "gradient that is read-only": lambda model: F.sum(model.a),
    "gradient that is broadcast into a matrix product": lambda model: F.sum(F.linear(vectors, model.a)),
    "two parameters in one function": lambda model: F.sum(model.a * model.b),
    "linear with a backward of its own": lambda model: F.sum(HalvedLinear().apply((vectors, model.a))[0] ** 2),
    "linear with a forward of its own": lambda model: F.sum(NegatedLinear().apply((vectors, model.a))[0] ** 2),
    "backward of the instance": with_backward_of_the_instance,
    "weight that is computed": lambda model: F.sum(F.linear(vectors, model.a * 2) ** 2),
    "input that is a parameter": lambda model: F.sum(F.linear(model.a, model.b) ** 2),
    "forget": lambda model: F.sum(F.forget(lambda x: model.linear(x) * F.sum(model.a), vectors) ** 2),
    "forget and not": lambda model: F.sum(F.forget(model.linear, vectors) + model.linear(vectors)),
    "old-style function": lambda model: F.sum(OldStyle()(model.a, model.scale)),
    "gradients of all inputs, wanted or not": lambda model: F.sum(AllGradients().apply((one, model.scale))[0]),
    "gradient within a backward pass": lambda model: InnerGradient(model).apply((model.linear.W * 2,))[0],
    "loss that is a parameter": lambda model: model.scale,
    "matrix product over two batch axes": lambda model: F.sum(
        model.linear(vectors.reshape(2, 3, 200), n_batch_axes=2) ** 2
    ),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_the_sums_are_those_of_chainer(name, debug):
    model = Model()
    losses = [LOSSES[name], lambda model: LOSSES[name](model) * 3, LOSSES[name], LOSSES["linear"]]
    with chainer.using_config("debug", debug):
        expected = gradients_of(model, losses)
        actual = sums_of(model, losses)
    assert actual.keys() == expected.keys() >= {"/linear/W", "/linear/b"}
    assert_close(actual, expected)


def assert_close(sums, expected):
    for key, grad in expected.items():
        numpy.testing.assert_allclose(sums[key], grad, rtol=1e-5, atol=1e-5 * abs(grad).max(), err_msg=key)


def test_gradients_of_other_links_are_added_up_as_well():
    model, other = Model(), L.Linear(200, 200)
    other.cleargrads()
    before = other.W.grad = numpy.ones_like(other.W.array)
    sums = GradientSums(model)
    loss = F.sum(model.linear(other(vectors)))
    with sums.adding():
        loss.backward()
    assert other.W.grad is before
    other.cleargrads()
    F.sum(model.linear(other(vectors))).backward()
    numpy.testing.assert_allclose(sums.get(other.W), other.W.grad, rtol=1e-6)
    assert other.W.grad.any()


def test_a_sum_that_lies_in_memory_by_columns_is_added_to():
    by_columns = [
        lambda model: F.sum(F.transpose(model.conv.W) ** 2 * numpy.arange(18, dtype="f").reshape(3, 3, 1, 2)),
        lambda model: F.sum(F.transpose(model.linear.W) ** 2 * numpy.arange(200, dtype="f")),
    ]
    model = Model()
    for first, then in zip(by_columns, ("convolution", "linear")):
        sums = sums_of(model, [first])
        assert [total.flags.c_contiguous for total in sums.values()] == [False]
        losses = [first, LOSSES[then], LOSSES[then]]
        assert_close(sums_of(model, losses), gradients_of(model, losses))


def test_float16_gradients_are_added_in_float32():
    param = chainer.Parameter(numpy.zeros(1, numpy.float16))
    link = chainer.Link()
    with link.init_scope():
        link.param = param
    sums = GradientSums(link)
    one = numpy.ones(1, numpy.float16)
    for _ in range(4096):
        sums.add(param, one)
    assert sums.get(param).dtype == numpy.float32
    assert sums.get(param)[0] == 4096


def test_a_backward_that_was_replaced_in_chainer_is_called(monkeypatch):
    backward = LinearFunction.backward
    calls = []

    def counting(self, indexes, grad_outputs):
        calls.append(indexes)
        return backward(self, indexes, grad_outputs)

    monkeypatch.setattr(LinearFunction, "backward", counting)
    sums_of(Model(), [LOSSES["linear"]] * 2)
    assert calls == [(1, 2)] * 2


@pytest.mark.parametrize(
    "name, node",
    [
        ("linear", "LinearGradWeight"),
        ("gradient that is broadcast into a matrix product", "LinearGradWeight"),
        ("convolution", "Convolution2DGradW"),
        ("embedding", "EmbedIDGrad"),
    ],
)
def test_no_array_is_made_for_the_gradient_of_a_weight(name, node):
    def nodes(make):
        made = []

        class Spy(chainer.FunctionHook):
            def forward_postprocess(self, function, in_data):
                made.append(function.label)

        with Spy():
            make(Model(), [LOSSES[name]] * 3)
        return made

    assert nodes(gradients_of).count(node) == 3
    assert node not in nodes(sums_of)


def test_a_gradient_is_never_written_to():
    grads = []

    class Spy(chainer.FunctionHook):
        def backward_postprocess(self, function, in_data, out_grad):
            grads.extend((grad, grad.copy()) for grad in out_grad if grad is not None)

    model = Model()
    with Spy():
        sums_of(model, [LOSSES["gradients that are one array"]] * 3)
    assert grads
    for grad, copy in grads:
        numpy.testing.assert_array_equal(grad, copy)


def linear_loss():
    """Returns a model, a loss, and the linear function between them."""
    model = Model()
    loss = LOSSES["linear"](model)
    model.cleargrads()
    function = loss.creator_node.inputs[0].creator_node.inputs[0].creator_node
    assert function.label == "LinearFunction"
    return model, loss, function


@pytest.fixture
def _without_garbage_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_garbage_collector")
def test_a_graph_is_gone_without_the_garbage_collector():
    model, loss, function = linear_loss()
    with GradientSums(model).adding():
        loss.backward()
    function = weakref.ref(function)
    assert function() is not None
    del loss
    assert function() is None


def test_a_backward_pass_that_fails_leaves_functions_as_they_were():
    class Failure(chainer.FunctionHook):
        def backward_postprocess(self, function, in_data, out_grad):
            if function.label == "LinearFunction":
                raise ConnectionError

    model, loss, function = linear_loss()
    with pytest.raises(ConnectionError), Failure(), GradientSums(model).adding():
        loss.backward()
    assert "backward" not in vars(function)
    assert not chainer.get_function_hooks()


@pytest.mark.usefixtures("_without_garbage_collector")
def test_sums_are_gone_without_the_garbage_collector():
    model, loss, _ = linear_loss()
    sums = GradientSums(model)
    with sums.adding():
        loss.backward()
    total = weakref.ref(sums.get(model.linear.W))
    assert total() is not None
    del sums
    assert total() is None


def test_hooks_of_the_user_run_as_before():
    timer = chainer.function_hooks.TimerHook()
    model = Model()
    with timer:
        sums_of(model, [LOSSES["linear"]])
    assert {"LinearFunction", "PowVarConst", "Sum"} <= {name for name, _ in timer.call_history}
    assert not chainer.get_function_hooks()
