"""The sums of a window's gradients, to which each gradient is added as backpropagation produces it.

Chainer would add up gradients in ``param.grad`` by itself: with a graph node, a new array and a rounding in the dtype
of the parameter, for each parameter and pass. To add up the finished gradients of each pass needs no node, but a second
set of gradients, and reads and writes all of them once more. A gradient is cheapest to add as it is made: it is still
in the cache, and gone before the next one is made. And that of some weights need not be made at all; see
:mod:`chainer_accum._weight_gradients`.

So this module steps between Chainer's backward pass and the functions that have a parameter as an input: it adds the
gradients that they return to the sums and returns none of them. What reaches ``param.grad`` by another way, such as
the backward pass that :func:`chainer.functions.forget` runs within the backward pass, is added once the pass is over.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import chainer
import numpy

from chainer_accum._devices import device_of
from chainer_accum._weight_gradients import WEIGHT, add_weight_gradient, is_linear, sum_dtype

_Nodes = Dict[chainer.variable.VariableNode, chainer.Parameter]


class GradientSums:
    """Sums of the gradients of parameters, in float32 or wider.

    They are the parameters of a link, and all others that a backward pass reaches.

    Args:
        target (~chainer.Link): Link that has the parameters.

    """

    def __init__(self, target: chainer.Link) -> None:
        self._target = target
        self._sums: Dict[int, Tuple[chainer.Parameter, Any]] = {}
        self._hook: Optional[_AddToSums] = None

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Context manager in which gradients are added to the sums as ``backward()`` makes them.

        Gradients of the target from before are cleared; those of other parameters stay as they are. If the context
        raises, the sums are of no use any more.

        """
        params = list(self._target.params())
        for param in params:
            param.cleargrad()
        self._hook = hook = _AddToSums(self, {param.node: param for param in params})
        try:
            with hook:
                yield
            self.take_from(params)
            self.take_from(hook.others)
        finally:
            self.end()

    def end(self) -> None:
        """Takes away what a backward pass has left, wherever an interrupt has ended it."""
        if self._hook is not None:
            self._hook.end()
            self._hook = None

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
                grad = grad.astype(sum_dtype(param))  # a copy, which is ours
            if scale != 1:
                grad *= scale
            if total is None:
                self.set(param, grad)
            else:
                total += grad

    def merge(self, other: GradientSums) -> None:
        """Adds other sums, which are not to be used any more."""
        for param, total in other.take():
            if self.get(param) is None:
                self.set(param, total)
            else:
                self.add(param, total)

    def multiply(self, factor: float) -> None:
        """Multiplies all sums by a number."""
        with numpy.errstate(over="ignore", under="ignore"):
            for _, total in self._sums.values():
                with device_of(total):
                    total *= factor

    def get(self, param: chainer.Parameter) -> Optional[Any]:
        """Returns the sum of the gradients of ``param``, or ``None`` if it has had none."""
        entry = self._sums.get(id(param))
        return None if entry is None else entry[1]

    def set(self, param: chainer.Parameter, total: Any) -> None:
        """Sets the sum of the gradients of ``param`` to an array, which it keeps."""
        self._sums[id(param)] = param, total

    def arrays(self, params: Optional[Iterable[chainer.Parameter]] = None) -> List[Any]:
        """Returns the sums, or those of some parameters, each once."""
        entries = self._sums if params is None else {id(param) for param in params} & self._sums.keys()
        return [self._sums[key][1] for key in entries]

    def take(self) -> Iterator[Tuple[chainer.Parameter, Any]]:
        """Returns an iterator over all parameters with a sum, and removes each from here."""
        while self._sums:
            yield self._sums.popitem()[1]

    def serialize(self, serializer: Any) -> None:
        """Serializes the sums of the target under the names of the parameters."""
        params = dict(self._target.namedparams())
        names = None
        if isinstance(serializer, chainer.Serializer):  # as an array, for HDF5 does not take all text
            text = json.dumps([name for name, param in params.items() if self.get(param) is not None])
            names = numpy.frombuffer(text.encode(), numpy.uint8)
        for name in json.loads(bytes(serializer("names", names)).decode()):
            param = params[name]
            total = serializer(name.lstrip("/"), self.get(param))  # in HDF5, a slash would lead to the root
            if total is not None:
                self.set(param, param.device.send(total))

    def __getstate__(self) -> Dict[str, Any]:
        # In a copy, parameters are other objects.
        return {**vars(self), "_sums": list(self._sums.values()), "_hook": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state, _sums={id(param): (param, total) for param, total in state["_sums"]})


class _AddToSums(chainer.FunctionHook):
    """Adds the gradients of parameters to the sums right after the function that made them."""

    def __init__(self, sums: GradientSums, params: _Nodes) -> None:
        self.name = f"chainer_accum.GradientSums at {id(self):#x}"  # a window may run within a backward pass
        self._sums = sums
        self._params = params
        self._others: List[Tuple[chainer.Parameter, Optional[chainer.Variable]]] = []
        self._depth = 0
        self._patched: List[chainer.FunctionNode] = []
        self._is_intercepting = not chainer.is_debug()  # or the checks of the debug mode would see no gradient

    @property
    def others(self) -> List[chainer.Parameter]:
        """Parameters that are not the target's, but that the backward pass has reached."""
        return [param for param, _ in self._others]

    def end(self) -> None:
        """Gives everything back. It can be called any number of times."""
        chainer.get_function_hooks().pop(self.name, None)
        self._restore_functions()
        self._is_intercepting = False
        while self._others:
            param, grad = self._others[-1]
            param.grad_var = grad
            self._others.pop()

    def backward_preprocess(self, function: chainer.FunctionNode, in_data: Any, out_grad: Any) -> None:
        self._depth += 1
        has_param = False
        for node in function.inputs:
            if node in self._params or (node.requires_grad and node.creator_node is None and self._meet(node)):
                has_param = True
        # A backward pass within the backward pass wants its gradients for itself, and a function that somebody else has
        # given another backward keeps it: what they leave in param.grad is added in the end.
        if has_param and self._depth == 1 and self._is_intercepting and "backward" not in vars(function):
            self._patched.append(function)
            function.backward = functools.partial(self._backward, function, in_data)

    def backward_postprocess(self, function: chainer.FunctionNode, in_data: Any, out_grad: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_functions()

    def _restore_functions(self) -> None:
        """Gives functions their own ``backward`` again, without which they would keep themselves and the graph alive.

        One that another hook has wrapped meanwhile is left to that hook for now.

        """
        if not self._patched:
            return
        for function in list(self._patched):
            backward = vars(function).get("backward")
            if isinstance(backward, functools.partial) and backward.func == self._backward:
                del function.backward
            if "backward" not in vars(function):
                self._patched.remove(function)

    def _meet(self, node: chainer.variable.VariableNode) -> bool:
        """Takes up a parameter that is not the target's, and returns whether it is one."""
        param = node.get_variable_or_none()
        hooks = [hook for hook in chainer.get_function_hooks().values() if isinstance(hook, _AddToSums)]
        if not isinstance(param, chainer.Parameter) or hooks[-1] is not self:  # or it is that of a window within
            return False
        self._others.append((param, param.grad_var))
        param.cleargrad()
        self._params[node] = param
        return True

    def _backward(
        self,
        function: chainer.FunctionNode,
        in_data: Tuple[Any, ...],
        indexes: Tuple[int, ...],
        grad_outputs: Tuple[Any, ...],
    ) -> Sequence[Optional[chainer.Variable]]:
        """Does what the function's own ``backward`` does, and returns all but what it added to the sums."""
        if not self._is_intercepting:
            return type(function).backward(function, indexes, grad_outputs)  # type: ignore[no-any-return]
        inputs = function.inputs
        found, missing = self._find_in_short_ways(function, in_data, indexes, grad_outputs)
        if missing:
            grads = type(function).backward(function, missing, grad_outputs)
            if len(grads) not in (len(inputs), len(missing)):
                return grads  # type: ignore[no-any-return]  # for Chainer to complain about
            by_input = grads if len(grads) == len(inputs) else dict(zip(missing, grads))
            found.update((index, by_input[index]) for index in missing)
        kept: List[Optional[chainer.Variable]] = [None] * len(inputs)
        for index, grad in found.items():
            param = self._params.get(inputs[index])
            if param is not None and _is_gradient_of(param, grad):
                self._sums.add(param, chainer.as_array(grad))
            elif grad is not None:
                kept[index] = chainer.as_variable(grad)
        return kept

    def _find_in_short_ways(
        self,
        function: chainer.FunctionNode,
        in_data: Tuple[Any, ...],
        indexes: Tuple[int, ...],
        grad_outputs: Tuple[Any, ...],
    ) -> Tuple[Dict[int, Any], Tuple[int, ...]]:
        """Returns gradients by indexes of inputs, ``None`` for one that was added, and what indexes are left."""
        found: Dict[int, Any] = {}
        gy = None if grad_outputs[0] is None else grad_outputs[0].raw_array
        if gy is None:
            return found, indexes
        weight = self._params.get(function.inputs[WEIGHT]) if WEIGHT in indexes else None
        if weight is not None:
            total = add_weight_gradient(self._sums.get(weight), weight, function, in_data[0], gy)
            if total is not None:
                self._sums.set(weight, total)
                found[WEIGHT] = None
        if is_linear(function):  # what is left takes no graph to compute, as Chainer makes one
            if 0 in indexes:
                found[0] = gy.dot(in_data[1]).astype(gy.dtype, copy=False)
            if 2 in indexes:
                found[2] = gy.sum(axis=0)
        return found, tuple(index for index in indexes if index not in found)


def _is_gradient_of(param: chainer.Parameter, grad: Any) -> bool:
    """Returns whether it is what Chainer would take for a gradient; if not, Chainer says what is wrong with it."""
    array = grad.raw_array if isinstance(grad, chainer.Variable) else grad
    return (
        isinstance(array, chainer.get_array_types())
        and getattr(grad, "layout", None) is None
        and (array.dtype, array.shape) == (param.dtype, param.shape)
    )
