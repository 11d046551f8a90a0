"""Gradients of weights that need not be made: what they would add is added to a sum directly.

The gradient of the weight of a linear function or a convolution is a matrix product, which can be added to a sum while
it is computed; that of an embedding is zero but for the rows that were looked up, which can be added one by one.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional

import chainer
import numpy
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.embed_id import EmbedIDFunction
from chainer.functions.connection.linear import LinearFunction

from chainer_accum._blas import add_matrix_product
from chainer_accum._convolution import add_convolution_weight

WEIGHT = 1  # which input of these functions their weight is


def add_weight_gradient(
    total: Optional[Any], weight: chainer.Parameter, function: chainer.FunctionNode, x: Any, gy: Any
) -> Optional[Any]:
    """Adds the gradient of the weight of a function to a sum, if there is a short way.

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
    # A function that computes its gradient in its own way keeps it, whether it is another class or has been patched.
    if shortcut is None or type(function).backward is not shortcut.backward or any(function.input_layouts):
        return None
    return shortcut.add(total, weight, function, x, gy)


def is_linear(function: chainer.FunctionNode) -> bool:
    """Returns whether the function is Chainer's own linear function."""
    return type(function) is LinearFunction and LinearFunction.backward is _SHORTCUTS[LinearFunction].backward


def sum_dtype(param: chainer.Parameter) -> Any:
    """Returns the dtype in which gradients of a parameter are added up: float32, or its own if that is wider."""
    return numpy.promote_types(param.dtype, numpy.float32)


def _add_linear(total: Optional[Any], weight: chainer.Parameter, function: Any, x: Any, gy: Any) -> Any:
    if total is None:
        return gy.T.dot(x).astype(sum_dtype(weight), copy=False)
    add_matrix_product(total, gy, x)
    return total


def _add_convolution(total: Optional[Any], weight: chainer.Parameter, function: Any, x: Any, gy: Any) -> Optional[Any]:
    if not isinstance(gy, numpy.ndarray) or function.groups > 1:
        return None
    total = _zeros(weight) if total is None else total
    if not (total.flags.c_contiguous and total.dtype == weight.dtype == x.dtype == gy.dtype):
        return None
    stride, pad, dilate = (function.sy, function.sx), (function.ph, function.pw), (function.dy, function.dx)
    add_convolution_weight(total, x, gy, stride, pad, dilate)
    return total


def _add_embedding(total: Optional[Any], weight: chainer.Parameter, function: Any, x: Any, gy: Any) -> Optional[Any]:
    if not isinstance(gy, numpy.ndarray):
        return None
    total = _zeros(weight) if total is None else total
    for index, row in zip(x.ravel(), gy.reshape(x.size, total.shape[1])):
        if index != function.ignore_label:
            total[index] += row
    return total


def _zeros(weight: chainer.Parameter) -> Any:
    return numpy.zeros(weight.shape, sum_dtype(weight))


class _Shortcut(NamedTuple):
    """What takes the part of a backward pass, for the weight."""

    backward: Callable[..., Any]
    add: Callable[[Optional[Any], chainer.Parameter, Any, Any, Any], Optional[Any]]


_SHORTCUTS: Dict[type, _Shortcut] = {
    LinearFunction: _Shortcut(LinearFunction.backward, _add_linear),
    Convolution2DFunction: _Shortcut(Convolution2DFunction.backward, _add_convolution),
    EmbedIDFunction: _Shortcut(EmbedIDFunction.backward, _add_embedding),
}
