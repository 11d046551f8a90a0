"""The sums of a window's gradients, each added to where a gradient is born.

Chainer would add up gradients in ``param.grad`` by itself: with a graph node, a new array and a rounding in the dtype
of the parameter, for each parameter and pass. To add up the finished gradients of each pass needs no node, but a second
set of gradients, and reads and writes all of them once more. A gradient is cheapest to add as it is made: it is still
in the cache, and gone before the next one is made. And that of the weight of a linear function, a convolution or an
embedding need not be made at all: a matrix product can be added to a sum while it is computed, and rows one by one.

So this module steps between Chainer's backward pass and the functions that have a parameter as an input: it adds the
gradients that they return to the sums and returns none of them. What reaches ``param.grad`` by another way, such as
the backward pass that :func:`chainer.functions.forget` runs within the backward pass, is added once the pass is over.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.embed_id import EmbedIDFunction
from chainer.functions.connection.linear import LinearFunction

from chainer_accum._blas import add_matrix_product
from chainer_accum._convolution import add_convolution_weight
from chainer_accum._devices import device_of


class GradientSums:
    """Sums of the gradients of all parameters of a link, in float32 or wider.

    Args:
        target (~chainer.Link): Link that has the parameters.

    """

    def __init__(self, target: chainer.Link) -> None:
        self._target = target
        self._sums: Dict[int, Tuple[chainer.Parameter, Any]] = {}

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Returns a context in which gradients are added to the sums as ``backward()`` makes them.

        Gradients from before are cleared. If the context raises, the sums are of no use any more.

        """
        params = list(self._target.params())
        for param in params:
            param.cleargrad()
        if chainer.is_debug():  # so that the checks of the debug mode see each gradient
            yield
        else:
            hook = _AddWhereBorn(self, {param.node: param for param in params})
            try:
                with hook:
                    yield
            finally:
                hook.restore()
        self.take_from(params)

    def take_from(self, params: Iterable[chainer.Parameter], scale: float = 1.0) -> None:
        """Adds the gradients that parameters have, times ``scale``, and clears them."""
        for param in params:
            grad = param.grad
            if grad is not None:
                self.add(param, grad, scale)
                param.cleargrad()

    def add(self, param: chainer.Parameter, grad: Any, scale: float = 1.0) -> None:
        """Adds a gradient, which is only read: it may be the gradient of something else as well."""
        total = self.get(param)
        with device_of(grad):
            if total is None or scale != 1:
                grad = grad.astype(_sum_dtype(grad))  # a copy, which is ours
            if scale != 1:
                grad *= scale
            if total is None:
                self.set(param, grad)
            else:
                total += grad

    def add_linear(self, param: chainer.Parameter, function: LinearFunction, x: Any, gy: Any) -> bool:
        """Adds the gradient of the weight of a linear function, and returns whether it did, as it always does.

        Args:
            param (~chainer.Parameter): The weight.
            function (~chainer.FunctionNode): The function.
            x (:ref:`ndarray`): Its input.
            gy (:ref:`ndarray`): Gradient of its output.

        """
        total = self.get(param)
        if total is None:
            grad = gy.T.dot(x)
            self.set(param, grad.astype(_sum_dtype(grad), copy=False))
        else:
            add_matrix_product(total, gy, x)
        return True

    def add_convolution(self, param: chainer.Parameter, function: Convolution2DFunction, x: Any, gy: Any) -> bool:
        """Adds the gradient of the weight of a convolution, if it can, and returns whether it did."""
        if not isinstance(gy, numpy.ndarray) or function.groups > 1:
            return False
        total = self._get_or_zeros(param)
        if not (total.flags.c_contiguous and total.dtype == param.dtype == x.dtype == gy.dtype):
            return False
        stride, pad, dilate = (function.sy, function.sx), (function.ph, function.pw), (function.dy, function.dx)
        add_convolution_weight(total, x, gy, stride, pad, dilate)
        return True

    def add_embedding(self, param: chainer.Parameter, function: EmbedIDFunction, x: Any, gy: Any) -> bool:
        """Adds the gradient of the rows of a weight that were looked up, if it can, and returns whether it did."""
        if not isinstance(gy, numpy.ndarray):
            return False
        total = self._get_or_zeros(param)
        for index, row in zip(x.ravel(), gy.reshape(x.size, total.shape[1])):
            if index != function.ignore_label:
                total[index] += row
        return True

    def get(self, param: chainer.Parameter) -> Optional[Any]:
        """Returns the sum of the gradients of ``param``, or ``None`` if it has had none."""
        entry = self._sums.get(id(param))
        return None if entry is None else entry[1]

    def set(self, param: chainer.Parameter, total: Any) -> None:
        """Sets the sum of the gradients of ``param`` to an array, which it keeps."""
        self._sums[id(param)] = param, total

    def _get_or_zeros(self, param: chainer.Parameter) -> Any:
        """Returns the sum of the gradients of ``param``, which is on the host."""
        if self.get(param) is None:
            self.set(param, numpy.zeros(param.shape, _sum_dtype(param)))
        return self.get(param)

    def take(self) -> Iterator[Tuple[chainer.Parameter, Any]]:
        """Returns an iterator over all parameters with a sum, and removes each from here."""
        while self._sums:
            yield self._sums.popitem()[1]

    def serialize(self, serializer: Any) -> None:
        """Serializes the sums under the names of the parameters."""
        params = dict(self._target.namedparams())
        names = [name for name, param in params.items() if self.get(param) is not None]
        names = json.loads(serializer("names", json.dumps(names)))
        for name in names:
            param = params[name]
            total = serializer(name, self.get(param))
            if total is not None:
                self.set(param, param.device.send(total))


def _sum_dtype(grad: Any) -> Any:
    return numpy.promote_types(grad.dtype, numpy.float32)


# What adds the gradient of a weight, by the backward passes whose part it takes: Chainer's own, not what replaces them.
_SHORTCUTS: Dict[Any, Callable[..., bool]] = {
    LinearFunction.backward: GradientSums.add_linear,
    Convolution2DFunction.backward: GradientSums.add_convolution,
    EmbedIDFunction.backward: GradientSums.add_embedding,
}
_LINEAR_BACKWARD = LinearFunction.backward


class _AddWhereBorn(chainer.FunctionHook):
    """Adds the gradients of parameters to the sums right after the function that made them."""

    name = "chainer_accum.GradientSums"

    def __init__(self, sums: GradientSums, params: Dict[chainer.variable.VariableNode, chainer.Parameter]) -> None:
        self._sums = sums
        self._params = params
        self._depth = 0
        self._function: Optional[chainer.FunctionNode] = None

    def backward_preprocess(self, function: chainer.FunctionNode, in_data: Any, out_grad: Any) -> None:
        self._depth += 1
        # A backward pass within the backward pass wants its gradients for itself, and a function that somebody else has
        # given another backward keeps it: what they leave in param.grad is added in the end.
        if (
            self._depth == 1
            and not self._params.keys().isdisjoint(function.inputs)
            and "backward" not in vars(function)
        ):
            self._function = function
            function.backward = functools.partial(self._backward, function, in_data)

    def backward_postprocess(self, function: chainer.FunctionNode, in_data: Any, out_grad: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.restore()

    def restore(self) -> None:
        """Gives the function its own ``backward`` again, without which it would keep itself and its graph alive."""
        if self._function is not None:
            del self._function.backward
            self._function = None

    def _backward(
        self,
        function: chainer.FunctionNode,
        in_data: Tuple[Any, ...],
        indexes: Tuple[int, ...],
        grad_outputs: Tuple[Any, ...],
    ) -> Sequence[Optional[chainer.Variable]]:
        inputs = function.inputs
        found = self._take_shortcut(function, in_data, indexes, grad_outputs)
        indexes = tuple(index for index in indexes if index not in found)
        if indexes:
            grads = type(function).backward(function, indexes, grad_outputs)
            if len(grads) not in (len(inputs), len(indexes)):
                return grads  # type: ignore[no-any-return]  # for Chainer to complain about
            found.update(zip(range(len(inputs)) if len(grads) == len(inputs) else indexes, grads))
        kept: List[Optional[chainer.Variable]] = [None] * len(inputs)
        for index, grad in found.items():
            if grad is None:
                continue
            param = self._params.get(inputs[index])
            if param is None:
                kept[index] = chainer.as_variable(grad)
            else:
                self._sums.add(param, chainer.as_array(grad))
        return kept

    def _take_shortcut(
        self,
        function: chainer.FunctionNode,
        in_data: Tuple[Any, ...],
        indexes: Tuple[int, ...],
        grad_outputs: Tuple[Any, ...],
    ) -> Dict[int, Any]:
        """Returns gradients that it finds in a shorter way, by indexes of inputs, or ``None`` for one that it added."""
        backward = type(function).backward
        found: Dict[int, Any] = {}
        add = _SHORTCUTS.get(backward)
        if add is None:
            return found
        gy = grad_outputs[0].array
        weight = self._params.get(function.inputs[1])
        if weight is not None and add(self._sums, weight, function, in_data[0], gy):
            found[1] = None
        if backward is _LINEAR_BACKWARD:  # what is left takes no graph to compute, as Chainer makes one
            if 0 in indexes:
                found[0] = gy.dot(in_data[1]).astype(gy.dtype, copy=False)
            if 2 in indexes:
                found[2] = gy.sum(axis=0)
        return found
