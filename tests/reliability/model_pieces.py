"""The pieces of random models: links, and ways of using them, that map 32 numbers per example to 32 others.

What a piece makes of an example does not depend on the others of its batch, so micro-batches are to give the step of
the whole batch.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Optional, Sequence

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import model_functions as functions
import numpy
from model_shapes import IDS, IMAGE, SEQUENCE, WIDTH


def fit(y: chainer.Variable) -> chainer.Variable:
    """Returns values of any shape as so many per example as a piece returns."""
    y = F.reshape(y, (len(y), -1))
    y = F.pad(y, ((0, 0), (0, -y.shape[1] % WIDTH)), "constant")
    return F.sum(F.reshape(y, (len(y), -1, WIDTH)), axis=1)


class Layer(chainer.Chain):
    """A link, or two, between which is a nonlinearity, that sees values in some shape."""

    def __init__(self, *links: chainer.Link, shape: Sequence[int] = (WIDTH,), **kwargs: Any) -> None:
        super().__init__()
        self._shape, self._kwargs = shape, kwargs
        with self.init_scope():
            self.links_in_order = chainer.ChainList(*links)

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        h = F.reshape(h, (len(h), *self._shape))
        for link in self.links_in_order:
            h = F.tanh(link(h, **self._kwargs))
        return fit(h)


class TwoInputs(chainer.Chain):
    """A link that has two inputs."""

    def __init__(self, link: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            self.link = link

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        left, right = F.split_axis(h, 2, axis=1)
        return fit(F.tanh(self.link(left, right)))


class Embedding(chainer.Chain):
    """An embedding of the ids, looked up in one of the ways that there are."""

    def __init__(self, dtype: str = "i4", ignore_label: Optional[int] = None, is_variable: bool = False) -> None:
        super().__init__()
        self._dtype, self._is_variable = dtype, is_variable
        with self.init_scope():
            self.embed = L.EmbedID(IDS, WIDTH, ignore_label=ignore_label)

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        ids = ids.astype(self._dtype)
        return h + F.tanh(F.sum(self.embed(chainer.Variable(ids) if self._is_variable else ids), axis=1))


class Tied(chainer.Chain):
    """Links that have a weight in common, in each way that Chainer has for it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way
        with self.init_scope():
            self.embed = L.EmbedID(WIDTH, WIDTH)
            self.linear = L.Linear(WIDTH, WIDTH)
            if way == "one parameter in two links":
                self.linear.W = self.embed.W
            if way == "one link under two names":
                self.other = self.linear

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        h = h + F.sum(self.embed(ids), axis=1)
        if self._way == "one link under two names":
            h = F.tanh(self.other(h))
        if self._way == "the weight of another link":
            h = F.tanh(F.linear(h, self.embed.W))
        if self._way == "a weight transposed":
            h = F.tanh(F.linear(h, F.transpose(self.embed.W), self.linear.b))
        return F.tanh(self.linear(h))


class Recurrent(chainer.Chain):
    """A recurrent link that sees a short sequence."""

    def __init__(self, link: chainer.Link, num_states: int = 0) -> None:
        super().__init__()
        self._num_states = num_states  # that a stateless link gets and returns
        with self.init_scope():
            self.link = link

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        sequence = F.separate(F.reshape(h, (len(h), *SEQUENCE)), axis=1)
        if self._num_states == 0:
            self.link.reset_state()
            return fit(F.concat([self.link(x) for x in sequence], axis=1))
        states: Any = (None,) * self._num_states
        if self._num_states == 1:
            states = (chainer.Variable(numpy.zeros(sequence[0].shape, h.dtype)),)
        for x in sequence:
            states = self.link(*states, x)
            states = states if isinstance(states, tuple) else (states,)
        return fit(states[-1])


class Sequences(chainer.Chain):
    """A recurrent link that sees sequences of different lengths."""

    def __init__(self, link: chainer.Link, num_states: int) -> None:
        super().__init__()
        self._num_states = num_states
        with self.init_scope():
            self.link = link

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        lengths = 1 + ids[:, 0] % SEQUENCE[0]
        rows = F.separate(F.reshape(h, (len(h), *SEQUENCE)), axis=0)
        last_state = self.link(*[None] * self._num_states, [row[:n] for row, n in zip(rows, lengths)])[0]
        return fit(F.transpose(last_state, (1, 0, 2)))


class Functional(chainer.Chain):
    """Parameters that a function uses without a link between."""

    def __init__(self, function: Callable[..., chainer.Variable], **shapes: Sequence[int]) -> None:
        super().__init__()
        self._function, self._names = function, list(shapes)
        with self.init_scope():
            for name, shape in shapes.items():
                setattr(self, name, chainer.Parameter(chainer.initializers.Normal(0.3), shape))

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        return F.tanh(fit(self._function(h, *[getattr(self, name) for name in self._names])))


def _images(link: Callable[[], chainer.Link], shape: Sequence[int] = IMAGE) -> Callable[[], chainer.Chain]:
    return lambda: Layer(link(), shape=shape)


def _convolutions() -> Dict[str, Callable[[], chainer.Chain]]:
    return {
        "Convolution2D": _images(lambda: L.Convolution2D(2, 2, 3, pad=1)),
        "Convolution2D, lazy": _images(lambda: L.Convolution2D(None, 3, 2)),
        "Convolution2D, stride and pad": _images(lambda: L.Convolution2D(2, 3, (3, 2), stride=(2, 1), pad=(1, 0))),
        "Convolution2D, groups": _images(lambda: L.Convolution2D(2, 4, 3, pad=1, groups=2)),
        "Convolution2D, dilate": _images(lambda: L.Convolution2D(2, 3, 2, pad=1, dilate=2, nobias=True)),
        "Convolution2D, 1 x 1": _images(lambda: L.Convolution2D(2, 3, 1)),
        "convolution_2d, cover_all": lambda: Functional(
            functools.partial(functions.convolution, stride=3, pad=1, cover_all=True), W=(3, 2, 2, 2)
        ),
        "Convolution1D": _images(lambda: L.Convolution1D(4, 3, 3, pad=1), SEQUENCE),
        "DilatedConvolution2D": _images(lambda: L.DilatedConvolution2D(2, 3, 2, pad=1, dilate=2)),
        "DepthwiseConvolution2D": _images(lambda: L.DepthwiseConvolution2D(2, 2, 3, pad=1)),
        "MLPConvolution2D": _images(lambda: L.MLPConvolution2D(2, (3, 2), 2)),
        "LocalConvolution2D": _images(lambda: L.LocalConvolution2D(2, 3, 4, 2)),
        "deconvolution_2d": lambda: Functional(
            functools.partial(functions.deconvolution, stride=2, pad=1), W=(2, 3, 3, 3), b=(3,)
        ),
        "deconvolution_2d, groups": lambda: Functional(
            functools.partial(functions.deconvolution, groups=2), W=(2, 2, 2, 2)
        ),
    }


def _recurrent() -> Dict[str, Callable[[], chainer.Chain]]:
    width = SEQUENCE[1]
    return {
        "LSTM": lambda: Recurrent(L.LSTM(width, width)),
        "LSTM, lazy": lambda: Recurrent(L.LSTM(None, width)),
        "StatelessLSTM": lambda: Recurrent(L.StatelessLSTM(width, width), 2),
        "StatefulPeepholeLSTM": lambda: Recurrent(L.StatefulPeepholeLSTM(width, width)),
        "GRU": lambda: Recurrent(L.GRU(width, width)),
        "StatelessGRU": lambda: Recurrent(L.StatelessGRU(width, width), 1),
        "StatefulMGU": lambda: Recurrent(L.StatefulMGU(width, width)),
        "NStepLSTM": lambda: Sequences(L.NStepLSTM(1, width, width, 0), 2),
        "NStepBiLSTM": lambda: Sequences(L.NStepBiLSTM(1, width, width, 0), 2),
        "NStepGRU": lambda: Sequences(L.NStepGRU(1, width, width, 0), 1),
        "NStepRNNTanh": lambda: Sequences(L.NStepRNNTanh(1, width, width, 0), 1),
    }


def _elementwise() -> Dict[str, Callable[[], chainer.Chain]]:
    return {
        "LayerNormalization": lambda: Layer(L.LayerNormalization(WIDTH)),
        "LayerNormalization, lazy": lambda: Layer(L.LayerNormalization()),
        "GroupNormalization": _images(lambda: L.GroupNormalization(2)),
        "Maxout": lambda: Layer(L.Maxout(WIDTH, 20, 2)),
        "Highway": lambda: Layer(L.Highway(WIDTH, activate=F.tanh)),
        "Scale": lambda: Layer(L.Scale(1, (WIDTH,), bias_term=True)),
        "Bias": lambda: Layer(L.Bias(1, (WIDTH,))),
        "PReLU": lambda: Layer(L.PReLU((WIDTH,))),
        "Swish": lambda: Layer(L.Swish((WIDTH,))),
        "Bilinear": lambda: TwoInputs(L.Bilinear(WIDTH // 2, WIDTH // 2, 6)),
        "Bilinear, nobias": lambda: TwoInputs(L.Bilinear(WIDTH // 2, WIDTH // 2, 3, nobias=True)),
        "old-style function": lambda: Functional(functions.old_style, W=(WIDTH,)),
        "scalars": lambda: Functional(functions.scale_and_shift, scale=(), shift=(1,)),
    }


PIECES: Dict[str, Callable[[], chainer.Chain]] = {
    "Linear": lambda: Layer(L.Linear(WIDTH, WIDTH)),
    "Linear, lazy, nobias": lambda: Layer(L.Linear(None, 20, nobias=True)),
    "Linear, two batch axes": lambda: Layer(L.Linear(SEQUENCE[1], 5), shape=SEQUENCE, n_batch_axes=2),
    "Linear, wide": lambda: Layer(L.Linear(WIDTH, 1024), L.Linear(1024, WIDTH)),
    "Linear, one column": lambda: Layer(L.Linear(WIDTH, 1)),
    "linear, constant bias and weight": lambda: Functional(
        functions.linear_with_constants, W=(WIDTH, WIDTH), b=(WIDTH,)
    ),
    "linear of a constant": lambda: Functional(functions.linear_of_constant, W=(WIDTH, WIDTH)),
    "linear with a weight from embed_id": lambda: Functional(functions.linear_with_embedding, W=(IDS, WIDTH)),
    "linear, backward replaced": lambda: Functional(functions.linear_with_other_backward, W=(WIDTH, WIDTH)),
    "matmul": lambda: Functional(functions.matmul, W=(WIDTH, WIDTH), b=(WIDTH,)),
    "EmbedID": Embedding,
    "EmbedID, ids are a Variable": lambda: Embedding(is_variable=True),
    "EmbedID, int64, ignore_label": lambda: Embedding("i8", ignore_label=0),
    "EmbedID, int8": lambda: Embedding("i1"),
    "EmbedID, int16 Variable, ignore_label": lambda: Embedding("i2", ignore_label=1, is_variable=True),
    **{
        f"tied: {way}": functools.partial(Tied, way)
        for way in (
            "one parameter in two links",
            "one link under two names",
            "the weight of another link",
            "a weight transposed",
        )
    },
    **_convolutions(),
    **_recurrent(),
    **_elementwise(),
}
NAMES: List[str] = list(PIECES)
# Chainer has these in float32 only.
FLOAT32 = {"Bilinear", "Bilinear, nobias"}
# Chainer cannot differentiate the gradient of these once more.
NOT_TWICE = {"StatelessGRU", "StatefulMGU", "GroupNormalization", "PReLU", "Swish", "old-style function", *FLOAT32}
