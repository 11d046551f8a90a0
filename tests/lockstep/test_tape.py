"""A tape records functions, frees their graph, and computes them again: bit for bit, with the same gradients."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum.lockstep.crossing import Gate
from chainer_accum.lockstep.store import FileStore, MemoryStore
from chainer_accum.lockstep.tape import Tape

Values = Sequence[chainer.Variable]


class Recorder(chainer.FunctionHook):
    """Tells a tape of all functions."""

    name = "recorder"

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def forward_preprocess(self, function: Any, in_data: Any) -> None:
        self.tape.begin_function(function, in_data)

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        self.tape.end_function(function)


class Taped:
    """What a tape is used for in lockstep, for one pass.

    Args:
        store (MemoryStore): Where to keep arrays that cross a cut.

    """

    def __init__(self, store: Optional[MemoryStore] = None) -> None:
        self.store = MemoryStore() if store is None else store
        self.gate = Gate()
        self.tape = Tape(self.store, self.gate)
        self.stages: List[Any] = []

    def cut(self) -> None:
        self.stages.append(self.tape.cut())
        self.tape.take_away()
        self.tape.bring_back()

    def run_backward(self, loss: chainer.Variable) -> None:
        self.tape.close()
        self.gate.is_open = True
        loss.backward()
        while self.stages:
            self.stages.pop().run_backward()


def generator() -> numpy.random.RandomState:
    return numpy.random.RandomState(4)


def positive(*shape: int) -> numpy.ndarray:
    return generator().uniform(0.1, 0.9, shape)


def normal(*shape: int) -> numpy.ndarray:
    return generator().standard_normal(shape)


def total(outputs: Values) -> chainer.Variable:
    """Returns a scalar in which every output has another weight."""
    terms = [
        F.sum(F.cast(output, numpy.float64) * (numpy.arange(output.size).reshape(output.shape) % 7 - 2.5))
        for output in outputs
        if output.dtype.kind == "f"
    ]
    return sum(terms[1:], terms[0])


def as_list(returned: Any) -> List[chainer.Variable]:
    if isinstance(returned, chainer.Variable):
        return [returned]
    return [variable for each in returned for variable in as_list(each)]


def values_and_gradients(
    function: Callable[..., Any], arrays: Sequence[numpy.ndarray], taped: Optional[Taped]
) -> Tuple[List[Any], List[Any]]:
    """Returns the values of a function and the gradients of its inputs, with cuts before and after it or without."""
    params = [chainer.Parameter(array.copy()) for array in arrays]
    with Recorder(taped.tape) if taped is not None else contextlib.nullcontext():
        inputs = [F.identity(param) for param in params]
        if taped is not None:
            taped.cut()
        outputs = as_list(function(*inputs))
        del inputs
        if taped is not None:
            taped.cut()
        loss = total(outputs)
    values = [output.array.copy() for output in outputs]
    del outputs
    if taped is None:
        loss.backward()
    else:
        taped.run_backward(loss)
    return values, [param.grad for param in params]


class OldSquare(chainer.Function):
    """An old-style function, which keeps what it computes in an attribute."""

    def forward(self, inputs: Any) -> Any:
        self.retain_inputs(())
        self.doubled = 2 * inputs[0]
        return (inputs[0] ** 2,)

    def backward(self, inputs: Any, grads: Any) -> Any:
        return (self.doubled * grads[0],)


class OldExp(chainer.Function):
    """An old-style function, which retains its output."""

    def forward(self, inputs: Any) -> Any:
        self.retain_outputs((0,))
        return (numpy.exp(inputs[0]),)

    def backward(self, inputs: Any, grads: Any) -> Any:
        return (self.output_data[0] * grads[0],)


class OldSum(chainer.Function):
    """An old-style function of two inputs and two outputs, which retains one input by its default."""

    def forward(self, inputs: Any) -> Any:
        return inputs[0] * inputs[1], inputs[0] + inputs[1]

    def backward(self, inputs: Any, grads: Any) -> Any:
        product, sum_ = (0 if grad is None else grad for grad in grads)
        return product * inputs[1] + sum_, product * inputs[0] + sum_


class Fixed:
    """Links whose parameters are the same at each call."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __call__(self) -> Any:
        numpy.random.seed(0)
        return self._make()


def sequences(x: chainer.Variable) -> List[chainer.Variable]:
    """Returns three sequences of another length each."""
    return [x[0], x[1, :2], x[2, :1]]


def n_step(make: Callable[[], Any], is_lstm: bool = False) -> Callable[..., Any]:
    def call(x: chainer.Variable) -> Any:
        layer = Fixed(make)()
        returned = layer(None, None, sequences(x)) if is_lstm else layer(None, sequences(x))
        return [*returned[:-1], *returned[-1]]

    return call


def link(make: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *inputs: Fixed(make)()(*inputs)


def drop(x: chainer.Variable) -> chainer.Variable:
    return F.dropout(x, mask=numpy.arange(x.size).reshape(x.shape) % 3 * 0.5)


def t(*labels: int) -> numpy.ndarray:
    return numpy.array(labels, "i")


IMAGE, MATRIX, VECTOR = (2, 3, 6, 6), (3, 4), (5,)
UNARY = (
    "absolute ceil clipped_relu cos cosh crelu cumprod cumsum elu erf erfc exp expm1 fix flatten floor hard_sigmoid "
    "identity leaky_relu log log10 log1p log2 log_ndtr log_softmax logsumexp max mean min ndtr normalize prod relu "
    "relu6 rsqrt selu sigmoid sign sin sinh softmax softplus sqrt square sum tan tanh transpose average"
).split()
CASES: Dict[str, Tuple[Callable[..., Any], Sequence[numpy.ndarray]]] = {
    **{name: (getattr(F, name), [positive(*MATRIX)]) for name in UNARY},
    "arccos, arcsin, arctan": (lambda x: [F.arccos(x), F.arcsin(x), F.arctan(x)], [positive(*MATRIX)]),
    "arctan2": (F.arctan2, [normal(*MATRIX), positive(*MATRIX)]),
    "operators": (lambda x, y: (x + y) * (x - 2) / (y + 3) - (-x) ** 2 + abs(y), [normal(*MATRIX), positive(*MATRIX)]),
    "power": (lambda x, y: x**y + 2**x, [positive(*MATRIX), positive(*MATRIX)]),
    "broadcasting": (lambda x, y: x * y + F.broadcast_to(y, x.shape), [normal(*MATRIX), normal(1, 4)]),
    "add of many": (lambda x, y: F.add(x, y, x), [normal(*MATRIX), normal(*MATRIX)]),
    "maximum, minimum": (lambda x, y: [F.maximum(x, y), F.minimum(x, y)], [normal(*MATRIX), positive(*MATRIX)]),
    "where": (lambda x, y: F.where(x.array > 0, x, y), [normal(*MATRIX), positive(*MATRIX)]),
    "clip": (lambda x: F.clip(x, -0.5, 0.5), [normal(*MATRIX)]),
    "fmod": (F.fmod, [normal(*MATRIX), positive(*MATRIX)]),
    "linear interpolation": (F.linear_interpolate, [positive(*MATRIX), normal(*MATRIX), normal(*MATRIX)]),
    "matmul": (F.matmul, [normal(2, 3, 4), normal(2, 4, 5)]),
    "tensordot": (lambda x, y: F.tensordot(x, y, axes=1), [normal(2, 3, 4), normal(4, 5)]),
    "einsum": (lambda x, y: F.einsum("ij,kj->ik", x, y), [normal(3, 4), normal(5, 4)]),
    "inv, det": (lambda x: [F.inv(x), F.det(x)], [normal(4, 4)]),
    "batch inv and det": (lambda x: [F.batch_inv(x), F.batch_det(x)], [normal(2, 3, 3)]),
    "fft": (lambda x, y: list(F.fft((x, y))), [normal(2, 8), normal(2, 8)]),
    "argmax": (lambda x: [x * 2, F.argmax(x, axis=1)], [normal(*MATRIX)]),
    "maximum over axes": (lambda x: [F.max(x, axis=1), F.min(x, axis=0, keepdims=True)], [normal(*MATRIX)]),
    "sum over axes": (lambda x: [F.sum(x, (0, 2)), F.mean(x, 1)], [normal(*IMAGE)]),
    "scale, bias": (lambda x, y: F.bias(F.scale(x, y), y), [normal(*IMAGE), normal(3)]),
    "batch_l2_norm_squared": (F.batch_l2_norm_squared, [normal(*MATRIX)]),
    "bilinear": (F.bilinear, [each.astype("f") for each in (normal(3, 4), normal(3, 5), normal(4, 5, 2))]),
    # Shapes.
    "reshape": (lambda x: F.reshape(x, (6, 2)), [normal(*MATRIX)]),
    "views of one array": (lambda x: [x[:, 1:], x[::2], F.transpose(x), x], [normal(*MATRIX)]),
    "get_item": (lambda x: [x[1], x[[0, 2, 0]], x[x.array > 0]], [normal(*MATRIX)]),
    "concat, stack": (lambda x, y: [F.concat([x, y, x]), F.stack([x, y])], [normal(*MATRIX), normal(*MATRIX)]),
    "hstack, vstack, dstack": (lambda x: [F.hstack([x, x]), F.vstack([x, x]), F.dstack([x, x])], [normal(*MATRIX)]),
    "split, separate": (lambda x: [*F.split_axis(x, 2, 1), *F.separate(x)], [normal(*MATRIX)]),
    "part of what is split": (lambda x: F.split_axis(x, 2, 1)[1], [normal(*MATRIX)]),
    "expand_dims, squeeze": (lambda x: F.squeeze(F.expand_dims(x, 1), 1), [normal(*MATRIX)]),
    "swapaxes, moveaxis, rollaxis": (
        lambda x: [F.swapaxes(x, 1, 2), F.moveaxis(x, 0, 2), F.rollaxis(x, 2)],
        [normal(*IMAGE)],
    ),
    "tile, repeat": (lambda x: [F.tile(x, (2, 1)), F.repeat(x, 2, 1)], [normal(*MATRIX)]),
    "pad": (lambda x: F.pad(x, 1, "constant"), [normal(*MATRIX)]),
    "pad_sequence": (lambda x: F.pad_sequence(sequences(x)), [normal(3, 4, 2)]),
    "permutate": (lambda x: F.permutate(x, t(2, 0, 1)), [normal(*MATRIX)]),
    "select_item": (lambda x: F.select_item(x, t(1, 0, 3)), [normal(*MATRIX)]),
    "scatter_add": (lambda x, y: F.scatter_add(x, ([0, 0, 1],), y), [normal(*MATRIX), normal(3, 4)]),
    "depth2space, space2depth": (lambda x: F.depth2space(F.space2depth(x, 2), 2), [normal(2, 4, 6, 6)]),
    "diagonal": (F.diagonal, [normal(4, 4)]),
    "flips": (lambda x: [F.fliplr(x), F.flipud(x), F.flip(x, 0)], [normal(*MATRIX)]),
    "as_strided": (lambda x: F.as_strided(x, (2, 2), (1, 1)), [normal(*VECTOR)]),
    "cast, copy": (lambda x: [F.cast(x, "f"), F.copy(x, -1)], [normal(*MATRIX)]),
    "transpose_sequence": (lambda x: F.transpose_sequence(sequences(x)), [normal(3, 4, 2)]),
    "resize_images": (lambda x: F.resize_images(x, (4, 9)), [normal(*IMAGE).astype("f")]),
    "im2col": (lambda x: F.im2col(x, 3, 2, 1), [normal(*IMAGE)]),
    # Activations.
    "maxout, prelu": (lambda x, w: [F.maxout(x, 2), F.prelu(x, w)], [normal(3, 4), normal(4)]),
    "swish": (F.swish, [normal(3, 4), normal(4)]),
    "softmax of an axis": (lambda x: F.softmax(x, axis=2), [normal(*IMAGE)]),
    # Connections.
    "linear": (F.linear, [normal(3, 4), normal(5, 4), normal(5)]),
    "linear of images": (lambda x, w: F.linear(x, w), [normal(*IMAGE), normal(5, 108)]),
    "convolution": (lambda x, w, b: F.convolution_2d(x, w, b, 2, 1), [normal(*IMAGE), normal(4, 3, 3, 3), normal(4)]),
    "grouped convolution": (
        lambda x, w: F.convolution_2d(x, w, groups=3, dilate=2),
        [normal(*IMAGE), normal(3, 1, 3, 3)],
    ),
    "deconvolution": (lambda x, w: F.deconvolution_2d(x, w, None, 2, 1), [normal(*IMAGE), normal(3, 4, 4, 4)]),
    "convolution of any dimensions": (lambda x, w: F.convolution_nd(x, w), [normal(2, 3, 6), normal(4, 3, 3)]),
    "deconvolution of any dimensions": (lambda x, w: F.deconvolution_nd(x, w), [normal(2, 3, 6), normal(3, 4, 3)]),
    "depthwise convolution": (F.depthwise_convolution_2d, [normal(*IMAGE), normal(2, 3, 3, 3)]),
    "dilated convolution": (
        lambda x, w: F.dilated_convolution_2d(x, w, dilate=2),
        [normal(*IMAGE), normal(4, 3, 3, 3)],
    ),
    "local convolution": (F.local_convolution_2d, [normal(*IMAGE), normal(2, 4, 4, 3, 3, 3)]),
    "deformable convolution": (
        lambda x, w, d: F.deformable_convolution_2d_sampler(x, d, w),
        [normal(*IMAGE), normal(4, 3, 3, 3), 0.1 * normal(2, 18, 4, 4)],
    ),
    "shift": (F.shift, [normal(2, 9, 6, 6)]),
    "embed_id": (lambda w: F.embed_id(t(1, 0, 1, -1), w, ignore_label=-1), [normal(3, 4)]),
    # Pooling.
    "max and average pooling": (
        lambda x: [F.max_pooling_2d(x, 2), F.average_pooling_2d(x, 3, 1, 1)],
        [normal(*IMAGE)],
    ),
    "pooling of any dimensions": (
        lambda x: [F.max_pooling_nd(x, 2), F.average_pooling_nd(x, 2, pad_value=None)],
        [normal(2, 3, 8)],
    ),
    "pooling with indexes": (lambda x: F.max_pooling_2d(x, 2, return_indices=True)[0], [normal(*IMAGE)]),
    "unpooling": (lambda x: F.unpooling_2d(x, 2), [normal(2, 3, 3, 3)]),
    "spatial pyramid pooling": (lambda x: F.spatial_pyramid_pooling_2d(x, 2, "max"), [normal(*IMAGE)]),
    "pooling of regions": (
        lambda x: [
            F.roi_pooling_2d(x, numpy.array([[0, 0, 0, 4, 4], [1, 1, 1, 5, 5]], "f"), 2, 2, 1.0),
            F.roi_average_align_2d(x, numpy.array([[0, 0, 4, 4]], "f"), t(1), 2, 1.0, 1),
            F.roi_max_align_2d(x, numpy.array([[0, 0, 4, 4]], "f"), t(1), 2, 1.0, 1),
        ],
        [normal(*IMAGE).astype("f")],
    ),
    "spatial transformer": (
        lambda x, theta: F.spatial_transformer_sampler(x, F.spatial_transformer_grid(theta, (4, 4))),
        [normal(*IMAGE), normal(2, 2, 3)],
    ),
    # Normalizations of examples.
    "layer normalization": (F.layer_normalization, [normal(3, 4), normal(4), normal(4)]),
    "group normalization": (lambda x, g, b: F.group_normalization(x, 2, g, b), [normal(2, 4, 3), normal(4), normal(4)]),
    "local response normalization": (F.local_response_normalization, [normal(*IMAGE)]),
    "fixed batch normalization": (
        lambda x, g, b: F.fixed_batch_normalization(x, g, b, numpy.zeros(4), numpy.ones(4)),
        [normal(3, 4), normal(4), normal(4)],
    ),
    "dropout with a mask": (drop, [normal(*MATRIX)]),
    # Losses.
    "softmax_cross_entropy": (lambda x: F.softmax_cross_entropy(x, t(0, 3, -1)), [normal(*MATRIX)]),
    "softmax_cross_entropy of each example": (
        lambda x: F.softmax_cross_entropy(x, t(0, 3, 1), class_weight=positive(4), reduce="no"),
        [normal(*MATRIX)],
    ),
    "sigmoid_cross_entropy": (
        lambda x: F.sigmoid_cross_entropy(x, t(*[0, 1, 1, 0] * 3).reshape(3, 4)),
        [normal(*MATRIX)],
    ),
    "squared and absolute errors": (
        lambda x, y: [F.mean_squared_error(x, y), F.mean_absolute_error(x, y), F.huber_loss(x, y, 0.3)],
        [normal(*MATRIX), positive(*MATRIX)],
    ),
    "hinge": (lambda x: F.hinge(x, t(0, 3, 1)), [normal(*MATRIX)]),
    "contrastive, triplet": (
        lambda x, y: [F.contrastive(x, y, t(0, 1, 1)), F.triplet(x, y, x * y)],
        [normal(*MATRIX), positive(*MATRIX)],
    ),
    "cross covariance, decov": (
        lambda x, y: [F.cross_covariance(x, y), F.decov(x)],
        [normal(*MATRIX), positive(*MATRIX)],
    ),
    "Kullback-Leibler": (F.gaussian_kl_divergence, [normal(*MATRIX), positive(*MATRIX)]),
    "negative log likelihoods": (
        lambda x, y: [F.gaussian_nll(x, y, x), F.bernoulli_nll(F.sigmoid(x), y)],
        [normal(*MATRIX), positive(*MATRIX)],
    ),
    "connectionist temporal classification": (
        lambda x: F.connectionist_temporal_classification(F.separate(x), t(1, 2, 1, 3).reshape(2, 2), 0),
        [normal(5, 2, 4)],
    ),
    "conditional random field": (
        lambda cost, x: F.crf1d(cost, list(F.separate(x)), [t(0, 1), t(1, 2), t(2, 0)]),
        [normal(3, 3), normal(3, 2, 3)],
    ),
    "hierarchical softmax": (
        link(lambda: lambda x: L.BinaryHierarchicalSoftmax(4, ((0, 1), (2, 3)))(x, t(0, 3, 1))),
        [normal(*MATRIX)],
    ),
    # Recurrent layers.
    "lstm": (F.lstm, [normal(3, 2), normal(3, 8)]),
    "slstm": (F.slstm, [normal(3, 2), normal(3, 2), normal(3, 8), normal(3, 8)]),
    "tree_lstm": (F.tree_lstm, [normal(3, 2), normal(3, 2), normal(3, 10)]),
    "NStepLSTM": (n_step(lambda: L.NStepLSTM(2, 3, 4, 0.0), True), [normal(3, 4, 3)]),
    "NStepBiLSTM": (n_step(lambda: L.NStepBiLSTM(1, 3, 4, 0.0), True), [normal(3, 4, 3)]),
    "NStepGRU": (n_step(lambda: L.NStepGRU(2, 3, 4, 0.0)), [normal(3, 4, 3)]),
    "NStepBiGRU": (n_step(lambda: L.NStepBiGRU(1, 3, 4, 0.0)), [normal(3, 4, 3)]),
    "NStepRNNTanh": (n_step(lambda: L.NStepRNNTanh(2, 3, 4, 0.0)), [normal(3, 4, 3)]),
    "NStepBiRNNReLU": (n_step(lambda: L.NStepBiRNNReLU(1, 3, 4, 0.0)), [normal(3, 4, 3)]),
    # Functions in functions, and old-style ones.
    "forget": (lambda x: F.forget(lambda y: F.tanh(F.exp(y) * y), x), [normal(*MATRIX)]),
    "forget of two": (lambda x, y: F.forget(lambda a, b: (a * b, F.exp(a)), x, y), [normal(*MATRIX), normal(*MATRIX)]),
    "old-style function": (lambda x: OldSquare()(x), [normal(*MATRIX)]),
    "old-style function that retains its output": (lambda x: OldExp()(x), [normal(*MATRIX)]),
    "old-style function of two": (lambda x, y: OldSum()(x, y), [normal(*MATRIX), normal(*MATRIX)]),
    "one old-style function twice": (lambda x: [OldSquare()(OldSquare()(x))], [normal(*MATRIX)]),
    # Graphs.
    "diamond": (lambda x: F.exp(x) * F.tanh(F.exp(x)) + x, [normal(*MATRIX)]),
    "input that is returned": (lambda x: [x, x * 2], [normal(*MATRIX)]),
    "result that nothing uses": (lambda x: [F.tanh(x), F.exp(F.relu(x))][0], [normal(*MATRIX)]),
    "constant result": (lambda x: [x * 1, chainer.Variable(normal(2))], [normal(*MATRIX)]),
    "unchained": (lambda x: x * F.exp(x).array + F.tanh(x), [normal(*MATRIX)]),
    "scalar": (lambda x: F.sum(x) * F.exp(F.mean(x)), [normal(*MATRIX)]),
    "no rows": (lambda x: F.tanh(x[:0]), [normal(*MATRIX)]),
    "float32": (lambda x: F.tanh(F.linear(x, x)), [normal(*MATRIX).astype("f")]),
    "float16": (lambda x: F.tanh(F.linear(x, x)), [normal(*MATRIX).astype("e")]),
    "not a number": (lambda x: F.log(F.relu(x) - 0.1) * 2, [normal(*MATRIX)]),
}


@pytest.mark.parametrize("store", [MemoryStore, lambda: FileStore(None)], ids=["memory", "file"])
@pytest.mark.parametrize("name", CASES)
def test_a_function_is_computed_again_with_the_same_gradients(name: str, store: Callable[[], MemoryStore]) -> None:
    function, arrays = CASES[name]
    with numpy.errstate(all="ignore"), contextlib.closing(store()) as opened:
        expected_values, expected_gradients = values_and_gradients(function, arrays, None)
        values, gradients = values_and_gradients(function, arrays, Taped(opened))
    assert len(values) == len(expected_values)
    for actual, expected in zip(values, expected_values):
        numpy.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(gradients, expected_gradients):
        if expected is None:
            assert actual is None or not actual.any()
        else:  # those of several uses may be added in another order
            numpy.testing.assert_allclose(actual, expected, rtol=20 * numpy.finfo(actual.dtype).eps)


@contextlib.contextmanager
def recording(taped: Taped) -> Iterator[None]:
    with Recorder(taped.tape):
        yield


def test_the_graph_before_a_cut_is_freed() -> None:
    taped, x = Taped(), chainer.Parameter(normal(3, 4))
    with recording(taped):
        h = F.exp(x)
        middle = weakref.ref(h.node)
        y = F.tanh(h)
        del h
        assert middle() is not None
        taped.cut()
        assert middle() is None
    assert y.creator is not None


def test_only_what_is_alive_crosses_a_cut() -> None:
    kept = []

    class Store(MemoryStore):
        def put(self, array: Any) -> Any:
            kept.append(array)
            return super().put(array)

    taped, x = Taped(Store()), chainer.Parameter(normal(3, 4))
    with recording(taped):
        y = F.tanh(F.exp(x))
        taped.cut()
        assert [each is y.array for each in kept] == [True]
        z = F.sum(F.relu(y))
        del y
        taped.cut()
        assert [each is z.array for each in kept[1:]] == [True]
        loss = z * 2
    taped.run_backward(loss)
    assert x.grad is not None


def test_a_value_is_carried_over_several_cuts() -> None:
    array = normal(3, 4)

    def run(taped: Optional[Taped]) -> Any:
        x = chainer.Parameter(array)
        with recording(taped) if taped is not None else contextlib.nullcontext():
            skip = F.exp(x)
            h = skip
            for _ in range(4):
                if taped is not None:
                    taped.cut()
                h = F.tanh(h) * 0.5 + skip * h
            loss = F.sum(h * skip)
            del h, skip
        taped.run_backward(loss) if taped is not None else loss.backward()
        return x.grad

    numpy.testing.assert_allclose(run(Taped()), run(None), rtol=1e-13)


def test_a_stage_without_a_gradient_is_not_computed_again() -> None:
    calls = []

    class Counting(chainer.FunctionNode):
        def forward(self, inputs: Any) -> Any:
            calls.append(1)
            return (inputs[0] * 2,)

        def backward(self, indexes: Any, grads: Any) -> Any:
            return (grads[0] * 2,)

    taped, x = Taped(), chainer.Parameter(normal(3, 4))
    with recording(taped):
        y = Counting().apply((x,))[0]
        taped.cut()
        loss = F.sum(y.array + F.tanh(x))
        del y
    taped.run_backward(loss)
    assert len(calls) == 1


def test_an_input_is_read_as_it_was_when_the_model_gave_it_to_the_function() -> None:
    taped, x, array = Taped(), chainer.Parameter(numpy.ones(3)), numpy.full(3, 2.0)
    with recording(taped):
        y = x * chainer.Variable(array)
        taped.cut()
        loss = F.sum(y * y)
    taped.run_backward(loss)
    numpy.testing.assert_array_equal(x.grad, [8, 8, 8])


def test_the_configuration_of_each_function_is_that_of_the_pass() -> None:
    seen = []

    class Asking(chainer.FunctionNode):
        def forward(self, inputs: Any) -> Any:
            seen.append((chainer.config.train, chainer.config.mine))
            return (inputs[0] * 1,)

        def backward(self, indexes: Any, grads: Any) -> Any:
            return grads

    taped, x = Taped(), chainer.Parameter(normal(3))
    with recording(taped):
        with chainer.using_config("train", False), chainer.using_config("mine", 1):
            y = Asking().apply((x,))[0]
        with chainer.using_config("mine", 2):
            y = Asking().apply((y,))[0]
        taped.cut()
        loss = F.sum(y)
    before = dict(vars(chainer.config._local))
    taped.run_backward(loss)
    assert seen == [(False, 1), (True, 2)] * 2
    assert vars(chainer.config._local) == before


class InPlace(chainer.FunctionNode):
    """Changes its input."""

    def forward(self, inputs: Any) -> Any:
        inputs[0][...] += 1
        return (inputs[0] * 2,)

    def backward(self, indexes: Any, grads: Any) -> Any:
        return (grads[0] * 2,)


class OfItsOwnGenerator(InPlace):
    """Draws from a generator that is not the global one."""

    generator = numpy.random.RandomState(0)

    def forward(self, inputs: Any) -> Any:
        return (inputs[0] * self.generator.uniform(size=inputs[0].shape),)


class WithCounter(InPlace):
    """Counts its calls in its class."""

    calls = 0

    def forward(self, inputs: Any) -> Any:
        WithCounter.calls += 1
        return (inputs[0] / WithCounter.calls,)


@pytest.mark.parametrize("function", [InPlace, OfItsOwnGenerator, WithCounter])
@pytest.mark.parametrize("store", [MemoryStore, lambda: FileStore(None)], ids=["memory", "file"])
def test_a_function_that_gives_other_values_is_named(function: Any, store: Callable[[], MemoryStore]) -> None:
    with contextlib.closing(store()) as opened:
        taped, x = Taped(opened), chainer.Parameter(numpy.ones(3))
        with recording(taped):
            y = function().apply((F.identity(x) if function is not InPlace else x,))[0]
            taped.cut()
            loss = F.sum(y)
        with pytest.raises(RuntimeError, match=f"{function.__name__}.* must return the same values when it is comp"):
            taped.run_backward(loss)


def test_an_array_that_is_changed_after_the_pass_has_computed_with_it_is_found() -> None:
    taped, x, array = Taped(), chainer.Parameter(numpy.ones(3)), numpy.full(3, 2.0)
    with recording(taped):
        y = F.exp(x * chainer.Variable(array))
        taped.cut()
        array *= 2
        loss = F.sum(y)
    with pytest.raises(RuntimeError, match="must return the same values when it is computed again"):
        taped.run_backward(loss)


def test_an_output_that_is_changed_in_place_is_found() -> None:
    taped, x = Taped(), chainer.Parameter(numpy.ones(3))
    with recording(taped):
        y = F.exp(x)
        y.array *= 2
        taped.cut()
        loss = F.sum(y)
    with pytest.raises(RuntimeError, match="exp must return the same values when it is computed again"):
        taped.run_backward(loss)


def test_not_a_number_is_the_same_as_itself() -> None:
    taped, x = Taped(), chainer.Parameter(numpy.array([-1.0, 0, 1]))
    with recording(taped), numpy.errstate(all="ignore"):
        y = F.log(x)
        taped.cut()
        loss = F.sum(F.where(numpy.array([False, False, True]), y, numpy.zeros(3)))
        taped.run_backward(loss)
    assert x.grad[2] == 1


@pytest.mark.parametrize(
    "go_back",
    [
        lambda y, x: F.sum(y).backward(),
        lambda y, x: chainer.grad([F.sum(y)], [x]),
        lambda y, x: F.sum(y).unchain_backward(),
        lambda y, x: chainer.grad([y], [x], grad_outputs=[y]),
    ],
)
def test_a_closed_gate_lets_no_gradient_through(go_back: Callable[..., Any]) -> None:
    taped, x = Taped(), chainer.Parameter(normal(3))
    with recording(taped):
        y = F.exp(x)
        taped.cut()
        with pytest.raises(RuntimeError, match="a loss function must not go back through the graph"):
            go_back(F.tanh(y), x)


def test_after_a_cut_there_may_be_gradients_within_one_stage() -> None:
    array = normal(3)

    def run(taped: Optional[Taped]) -> Any:
        x = chainer.Parameter(array)
        with recording(taped) if taped is not None else contextlib.nullcontext():
            h = F.exp(x)
            y = F.tanh(h) * h
            (gradient,) = chainer.grad([F.sum(y)], [h], enable_double_backprop=True)
            loss = F.sum(gradient**2 * y)
            if taped is not None:
                del h, y, gradient
                taped.cut()
            loss = loss * 2
        taped.run_backward(loss) if taped is not None else loss.backward()
        return x.grad

    numpy.testing.assert_allclose(run(Taped()), run(None), rtol=1e-12)


def test_unchaining_before_a_cut_stops_the_gradient() -> None:
    taped, x = Taped(), chainer.Parameter(normal(3))
    with recording(taped):
        y = F.exp(x)
        y.unchain()
        z = F.tanh(x) * y
        taped.cut()
        loss = F.sum(z)
    values = numpy.exp(x.array) * (1 - numpy.tanh(x.array) ** 2)
    taped.run_backward(loss)
    numpy.testing.assert_allclose(x.grad, values, rtol=1e-12)


def test_a_function_that_raises_leaves_the_tape_usable() -> None:
    taped, x = Taped(), chainer.Parameter(normal(3))

    class Failing(InPlace):
        def forward(self, inputs: Any) -> Any:
            raise ConnectionError

    with recording(taped):
        with pytest.raises(ConnectionError):
            Failing().apply((x,))
        y = F.exp(x)
        taped.cut()
        loss = F.sum(y)
    taped.run_backward(loss)
    numpy.testing.assert_array_equal(x.grad, numpy.exp(x.array))


def test_everything_is_freed_at_the_end() -> None:
    taped, x = Taped(), chainer.Parameter(normal(300))
    with recording(taped):
        y = F.exp(x)
        array = weakref.ref(y.array)
        taped.cut()
        loss = F.sum(F.tanh(y))
        del y
    taped.run_backward(loss)
    del loss
    assert array() is None
