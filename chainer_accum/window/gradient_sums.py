"""GradientSums: sums of gradients, to which each gradient is added as backpropagation produces it.

Chainer itself would accumulate in ``param.grad``, at the cost of a graph node, a new array and a rounding in the
parameter's dtype for each parameter and pass. Adding up the finished gradients of each pass needs no node, but a second
set of gradients, all of which are read and written once more. A gradient is cheapest to add when it has just been
computed: it is still in the cache, and is freed before the next one is computed. Some weight gradients need not be
computed at all; see :mod:`chainer_accum.window.weight_gradients`.

So this module intercepts the functions that have a parameter as an input: it adds the gradients that they return to the
sums and passes none of them on to Chainer's backward pass. A gradient that reaches ``param.grad`` in another way, such
as through the nested backward pass of :func:`chainer.functions.forget`, is added after the pass.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any, Container, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import chainer
import numpy

from chainer_accum._devices import Array, device_of
from chainer_accum.window.weight_gradients import WEIGHT, add_weight_gradient, is_linear, sum_dtype

_Nodes = Dict[chainer.variable.VariableNode, chainer.Parameter]


class GradientSums:
    """Sums of the gradients of parameters, in float32 or wider.

    They cover the parameters of a link, and all others that a backward pass reaches.

    Args:
        target (~chainer.Link): Link that has the parameters.

    """

    def __init__(self, target: chainer.Link) -> None:
        self._target = target
        self._sums: Dict[int, Tuple[chainer.Parameter, Array]] = {}
        self._hook: Optional[_AddToSums] = None

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Context manager in which ``backward()`` adds gradients to the sums.

        The target's old gradients are cleared; those of other parameters are kept. If the block raises, the sums are
        invalid.

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
        """Cleans up after a backward pass, wherever it was interrupted."""
        if self._hook is not None:
            self._hook.end()
            self._hook = None

    def take_from(self, params: Iterable[chainer.Parameter], scale: float = 1.0) -> None:
        """Adds the present gradients of parameters, times ``scale``, and clears them."""
        for param in params:
            grad = param.grad
            if grad is not None:
                self.add(param, grad, scale)
                param.cleargrad()

    def add(self, param: chainer.Parameter, grad: Array, scale: float = 1.0) -> None:
        """Adds a gradient, which is only read, since other objects may share it."""
        total = self.get(param)
        with device_of(grad):
            if total is None or scale != 1:
                grad = grad.astype(sum_dtype(param))  # a copy that may be changed
            if scale != 1:
                grad *= scale
            if total is None:
                self.set(param, grad)
            else:
                total += grad

    def merge(self, other: GradientSums) -> None:
        """Adds other sums, which must not be used afterwards."""
        for param, total in other.take():
            if self.get(param) is None:
                self.set(param, total)
            else:
                self.add(param, total)

    def multiply(self, factor: float, only: Optional[Container[int]] = None, factor_of_others: float = 1.0) -> None:
        """Multiplies the sums of the parameters with these ids, or of all, by a number, and others by another one."""
        with numpy.errstate(over="ignore", under="ignore"):  # dynamic loss scaling finds an overflow later
            for key, (_, total) in self._sums.items():
                by = factor if only is None or key in only else factor_of_others
                if by != 1:
                    with device_of(total):
                        total *= by

    def get(self, param: chainer.Parameter) -> Optional[Array]:
        """Returns the sum of the gradients of ``param``, or ``None`` if it has had none."""
        entry = self._sums.get(id(param))
        return None if entry is None else entry[1]

    def set(self, param: chainer.Parameter, total: Array) -> None:
        """Sets the sum of the gradients of ``param`` to an array, without copying it."""
        self._sums[id(param)] = param, total

    def arrays(self, params: Optional[Iterable[chainer.Parameter]] = None) -> List[Array]:
        """Returns all sums, or those of some parameters, each once."""
        entries = self._sums if params is None else {id(param) for param in params} & self._sums.keys()
        return [self._sums[key][1] for key in entries]

    def take(self) -> Iterator[Tuple[chainer.Parameter, Array]]:
        """Yields all parameters with their sums, and removes each."""
        while self._sums:
            yield self._sums.popitem()[1]

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the sums of the target under the names of the parameters."""
        params = dict(self._target.namedparams())
        names = None
        if isinstance(serializer, chainer.Serializer):  # as an array, because HDF5 does not accept every text
            text = json.dumps([name for name, param in params.items() if self.get(param) is not None])
            names = numpy.frombuffer(text.encode(), numpy.uint8)
        for name in json.loads(bytes(serializer("names", names)).decode()):
            param = params[name]
            total = serializer(name.lstrip("/"), self.get(param))  # in HDF5, a leading slash means the root
            if total is not None:
                self.set(param, param.device.send(total))

    def __getstate__(self) -> Dict[str, Any]:
        # In a copy, the parameters have different ids.
        return {**vars(self), "_sums": list(self._sums.values()), "_hook": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state, _sums={id(param): (param, total) for param, total in state["_sums"]})


class _AddToSums(chainer.FunctionHook):
    """Function hook that adds the gradients of parameters to the sums right after they are computed."""

    def __init__(self, sums: GradientSums, params: _Nodes) -> None:
        self.name = f"chainer_accum.GradientSums at {id(self):#x}"  # a window may run inside a backward pass
        self._sums = sums
        self._params = params
        self._others: List[Tuple[chainer.Parameter, Optional[chainer.Variable]]] = []
        self._depth = 0
        self._patched: List[chainer.FunctionNode] = []
        self._is_intercepting = not chainer.is_debug()  # the checks of debug mode need the gradients

    @property
    def others(self) -> List[chainer.Parameter]:
        """Parameters outside the target that the backward pass has reached."""
        return [param for param, _ in self._others]

    def end(self) -> None:
        """Restores everything. It can be called any number of times."""
        chainer.get_function_hooks().pop(self.name, None)
        self._restore_functions()
        self._is_intercepting = False
        while self._others:
            param, grad = self._others[-1]
            param.grad_var = grad
            self._others.pop()

    def backward_preprocess(
        self, function: chainer.FunctionNode, in_data: Tuple[Array, ...], out_grad: Tuple[Optional[Array], ...]
    ) -> None:
        self._depth += 1
        has_param = False
        for node in function.inputs:
            if node in self._params or (node.requires_grad and node.creator_node is None and self._meet(node)):
                has_param = True
        # A nested backward pass needs its own gradients, and a function whose backward someone else has replaced keeps
        # the replacement. What they leave in param.grad is added at the end.
        if has_param and self._depth == 1 and self._is_intercepting and "backward" not in vars(function):
            self._patched.append(function)
            function.backward = functools.partial(  # type: ignore[method-assign]
                self._backward, function, in_data
            )

    def backward_postprocess(
        self, function: chainer.FunctionNode, in_data: Tuple[Array, ...], out_grad: Tuple[Optional[Array], ...]
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_functions()

    def _restore_functions(self) -> None:
        """Restores the functions' own ``backward``, because otherwise reference cycles would keep the graph alive.

        A function that another hook has wrapped in the meantime is left to that hook for now.

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
        """Registers the node's parameter if it is outside the target, and returns whether it is such a parameter."""
        param = node.get_variable_or_none()
        hooks = [hook for hook in chainer.get_function_hooks().values() if isinstance(hook, _AddToSums)]
        if not isinstance(param, chainer.Parameter) or hooks[-1] is not self:  # an inner window handles it
            return False
        self._others.append((param, param.grad_var))
        param.cleargrad()
        self._params[node] = param
        return True

    def _backward(
        self,
        function: chainer.FunctionNode,
        in_data: Tuple[Array, ...],
        indexes: Tuple[int, ...],
        grad_outputs: Tuple[Optional[chainer.Variable], ...],
    ) -> Sequence[Optional[chainer.Variable]]:
        """Replaces the function's own ``backward``: adds gradients to the sums and returns the others."""
        if not self._is_intercepting:
            return type(function).backward(function, indexes, grad_outputs)
        inputs = function.inputs
        found, missing = self._find_in_short_ways(function, in_data, indexes, grad_outputs)
        if missing:
            grads = type(function).backward(function, missing, grad_outputs)
            if len(grads) not in (len(inputs), len(missing)):
                return grads  # Chainer raises the error
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
        in_data: Tuple[Array, ...],
        indexes: Tuple[int, ...],
        grad_outputs: Tuple[Optional[chainer.Variable], ...],
    ) -> Tuple[Dict[int, Union[chainer.Variable, Array, None]], Tuple[int, ...]]:
        """Returns gradients by input index, ``None`` for one already added, and the indexes that are left."""
        found: Dict[int, Union[chainer.Variable, Array, None]] = {}
        gy = None if grad_outputs[0] is None else grad_outputs[0].raw_array
        if gy is None:
            return found, indexes
        weight = self._params.get(function.inputs[WEIGHT]) if WEIGHT in indexes else None
        if weight is not None:
            total = add_weight_gradient(self._sums.get(weight), weight, function, in_data[0], gy)
            if total is not None:
                self._sums.set(weight, total)
                found[WEIGHT] = None
        if is_linear(function):  # the rest needs no graph, which Chainer would build
            if 0 in indexes:
                found[0] = gy.dot(in_data[1]).astype(gy.dtype, copy=False)
            if 2 in indexes:
                found[2] = gy.sum(axis=0)
        return found, tuple(index for index in indexes if index not in found)


def _is_gradient_of(param: chainer.Parameter, grad: Union[chainer.Variable, Array, None]) -> bool:
    """Returns whether Chainer would accept the gradient. If not, Chainer raises the error."""
    array = grad.raw_array if isinstance(grad, chainer.Variable) else grad
    return (
        isinstance(array, chainer.get_array_types())
        and getattr(grad, "layout", None) is None
        and (array.dtype, array.shape) == (param.dtype, param.shape)
    )
