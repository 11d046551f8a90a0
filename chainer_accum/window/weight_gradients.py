"""Weight gradients that are added to a sum without being computed separately.

The weight gradient of a linear function or a convolution is a matrix product, which can be added to a sum while it is
computed. That of an embedding is zero except for the rows that were looked up, which can be added one by one.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional

import chainer
import numpy
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.embed_id import EmbedIDFunction
from chainer.functions.connection.linear import LinearFunction

from chainer_accum._devices import Array
from chainer_accum.window.blas import add_matrix_product
from chainer_accum.window.convolution import add_convolution_weight

WEIGHT = 1  # the index of the weight among the inputs of these functions


def add_weight_gradient(
    total: Optional[Array], weight: chainer.Parameter, function: chainer.FunctionNode, x: Array, gy: Array
) -> Optional[Array]:
    """Adds the weight gradient of a function to a sum, if there is a shortcut for the function.

    Args:
        total (:ref:`ndarray`): Sum, which may be changed in place, or ``None`` if there is none yet.
        weight (~chainer.Parameter): The weight.
        function (~chainer.FunctionNode): The function.
        x (:ref:`ndarray`): Its first input.
        gy (:ref:`ndarray`): Gradient of its output.

    Returns:
        The sum, or ``None`` if nothing was added.

    """
    shortcut = _SHORTCUTS.get(type(function))
    # No shortcut for a function that computes its gradient differently, as a subclass or because it was patched.
    if shortcut is None or type(function).backward is not shortcut.backward or any(function.input_layouts):
        return None
    return shortcut.add(total, weight, function, x, gy)


def is_linear(function: chainer.FunctionNode) -> bool:
    """Returns whether the function is Chainer's own linear function."""
    return type(function) is LinearFunction and LinearFunction.backward is _SHORTCUTS[LinearFunction].backward


def sum_dtype(param: chainer.Parameter) -> numpy.dtype:
    """Returns the dtype of a parameter's gradient sum: float32, or the dtype of the parameter if that is wider."""
    return numpy.promote_types(param.dtype, numpy.float32)


def _add_linear(
    total: Optional[Array], weight: chainer.Parameter, function: LinearFunction, x: Array, gy: Array
) -> Array:
    if total is None:
        return gy.T.dot(x).astype(sum_dtype(weight), copy=False)
    add_matrix_product(total, gy, x)
    return total


def _add_convolution(
    total: Optional[Array], weight: chainer.Parameter, function: Convolution2DFunction, x: Array, gy: Array
) -> Optional[Array]:
    if not isinstance(gy, numpy.ndarray) or function.groups > 1:
        return None
    total = _zeros(weight) if total is None else total
    if not (total.flags.c_contiguous and total.dtype == weight.dtype == x.dtype == gy.dtype):
        return None
    stride, pad, dilate = (function.sy, function.sx), (function.ph, function.pw), (function.dy, function.dx)
    add_convolution_weight(total, x, gy, stride, pad, dilate)
    return total


def _add_embedding(
    total: Optional[Array], weight: chainer.Parameter, function: EmbedIDFunction, x: Array, gy: Array
) -> Optional[Array]:
    if not isinstance(gy, numpy.ndarray):
        return None
    total = _zeros(weight) if total is None else total
    for index, row in zip(x.ravel(), gy.reshape(x.size, total.shape[1])):
        if index != function.ignore_label:
            total[index] += row
    return total


def _zeros(weight: chainer.Parameter) -> numpy.ndarray:
    return numpy.zeros(weight.shape, sum_dtype(weight))


class _Shortcut(NamedTuple):
    """A replacement for the part of a backward pass that computes the weight gradient."""

    backward: Callable[..., Any]
    add: Callable[[Optional[Array], chainer.Parameter, Any, Array, Array], Optional[Array]]


_SHORTCUTS: Dict[type, _Shortcut] = {
    LinearFunction: _Shortcut(LinearFunction.backward, _add_linear),
    Convolution2DFunction: _Shortcut(Convolution2DFunction.backward, _add_convolution),
    EmbedIDFunction: _Shortcut(EmbedIDFunction.backward, _add_embedding),
}
