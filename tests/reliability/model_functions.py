"""Functions of parameters that models call without a link between."""

from __future__ import annotations

from typing import Any

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
from model_shapes import IDS, IMAGE, WIDTH


def as_differentiable(h: Any) -> chainer.Variable:
    """Returns a Variable that gets a gradient, without which some functions fail, or give none to their parameters."""
    return h if isinstance(h, chainer.Variable) and h.requires_grad else chainer.Variable(chainer.as_array(h))


def matmul(h: Any, W: Any, b: Any) -> chainer.Variable:
    return F.matmul(h, W) + F.broadcast_to(b, h.shape)


def scale_and_shift(h: Any, scale: Any, shift: Any) -> chainer.Variable:
    return h * F.broadcast_to(scale, h.shape) + F.broadcast_to(F.reshape(shift, (1, 1)), h.shape)


def convolution(h: Any, W: Any, **kwargs: Any) -> chainer.Variable:
    return F.convolution_2d(F.reshape(h, (len(h), *IMAGE)), W, **kwargs)


def deconvolution(h: Any, W: Any, b: Any = None, **kwargs: Any) -> chainer.Variable:
    return F.deconvolution_2d(F.reshape(as_differentiable(h), (len(h), *IMAGE)), W, b, **kwargs)


def linear_with_constants(h: Any, W: Any, b: Any) -> chainer.Variable:
    return F.linear(F.linear(h, W, b.array), chainer.Variable(W.array, requires_grad=False))


def linear_of_constant(h: Any, W: Any) -> chainer.Variable:
    return h + F.linear(numpy.ones_like(chainer.as_array(h)), W)


def linear_with_embedding(h: Any, W: Any) -> chainer.Variable:
    return F.linear(h, F.embed_id(numpy.arange(WIDTH) % IDS, W))


def linear_with_other_backward(h: Any, W: Any) -> chainer.Variable:
    """A linear function whose gradients are scaled by somebody who has replaced its backward."""
    y = F.linear(h, W)
    function = y.creator_node
    if function is None:  # there is no graph
        return y
    backward = function.backward

    def scaled(indexes: Any, grad_outputs: Any) -> Any:
        return [None if grad is None else grad * 0.25 for grad in backward(indexes, grad_outputs)]

    function.backward = scaled
    return y


class _OldStyle(chainer.Function):
    def forward(self, inputs: Any) -> Any:
        return (inputs[0] * inputs[1],)

    def backward(self, inputs: Any, grad_outputs: Any) -> Any:
        return grad_outputs[0] * inputs[1], (grad_outputs[0] * inputs[0]).sum(axis=0)


def old_style(h: Any, W: Any) -> chainer.Variable:
    return _OldStyle()(h, W)
