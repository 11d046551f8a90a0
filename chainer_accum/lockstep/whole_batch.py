"""WholeBatchVisit: a function of the inputs of all micro-batches put together.

The graph of that function alone is kept until the backward pass, which runs when the gradients of its outputs have
arrived from all micro-batches.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import chainer

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.crossing import Crossing
from chainer_accum.lockstep.tape import Tape
from chainer_accum.lockstep.visits import Visit

_Function = Callable[..., Any]


class WholeBatchVisit(Visit):
    """The part of one micro-batch in a function of the whole batch.

    Args:
        function (callable): The function.
        inputs: Variables and arrays of this micro-batch, with one row per example, or whatever is concatenated.
        is_shared (bool): Whether each micro-batch gets all that the function returns, instead of its rows.

    """

    name = "whole_batch"

    def __init__(self, function: _Function, inputs: Sequence[Any], is_shared: bool = False) -> None:
        for value in inputs:
            if not isinstance(value, (chainer.Variable, *chainer.get_array_types())):
                raise TypeError(f"the inputs of whole_batch must be Variables or arrays, got {type(value).__name__}")
        arrays = [chainer.as_array(value) for value in inputs]
        if not arrays or any(array.ndim == 0 for array in arrays):
            raise ValueError(
                f"the inputs of whole_batch must have rows, got {'a scalar' if arrays else 'none'}; hand in arrays of "
                "shape (n, ...)"
            )
        self.description = f"inputs of shapes {', '.join(str(array.shape) for array in arrays)}"
        self.key = (self.name, len(arrays), *[(array.shape[1:], array.dtype.str) for array in arrays])
        self._function = function
        self._is_shared = is_shared
        self._config = dict(vars(chainer.config._local))
        self._are_variables = [isinstance(value, chainer.Variable) for value in inputs]
        self._requires_grad = [getattr(value, "requires_grad", False) for value in inputs]
        self._nodes = [value.node if isinstance(value, chainer.Variable) else None for value in inputs]
        self._arrays = arrays
        self._crossings: List[Optional[Crossing]] = []
        self._rows: List[Array] = []
        self._entered: List[Crossing] = []
        self._whole: Optional[_Whole] = None
        self.is_tuple = False

    def hand_in(self, tape: Tape) -> None:
        """Called when the tape has been cut."""
        self._crossings = [None if node is None else tape.crossing_of(node) for node in self._nodes]
        self._nodes = []

    def merge(self, visits: Sequence[Visit]) -> None:
        parts = [visit for visit in visits if isinstance(visit, WholeBatchVisit)]
        self._whole = _Whole(parts)
        for part in parts:
            part._whole = self._whole
            part._arrays = []
        self._whole.run(self._function, self._config)

    def take_outputs(self, tape: Tape) -> List[chainer.Variable]:
        """Returns the rows of this micro-batch, as Variables of its pass."""
        assert self._whole is not None
        self.is_tuple = self._whole.is_tuple
        outputs = []
        has_graph = chainer.config.enable_backprop
        for array, requires_grad in zip(self._rows, self._whole.outputs_require_grad):
            if has_graph:
                variable, crossing = tape.enter(array, requires_grad)
                self._entered.append(crossing)
            else:
                variable = chainer.Variable(array, requires_grad=requires_grad)
            outputs.append(variable)
        self._rows = []
        return outputs

    def merge_gradients(self, visits: Sequence[Visit]) -> None:
        assert self._whole is not None
        self._whole.run_backward()

    def add_gradients(self) -> None:
        assert self._whole is not None
        for index, crossing in enumerate(self._crossings):
            grad = self._whole.input_grad(index, self)
            if crossing is not None and grad is not None:
                crossing.add_grad(grad)


class _Whole:
    """The function of the whole batch, with its graph."""

    def __init__(self, parts: Sequence[WholeBatchVisit]) -> None:
        self._parts = parts
        self.is_tuple = False
        self.outputs_require_grad: List[bool] = []
        first = parts[0]
        self._inputs: List[Any] = []
        self._slices: List[Dict[int, slice]] = []
        for index, is_variable in enumerate(first._are_variables):
            arrays = [part._arrays[index] for part in parts]
            with device_of(arrays[0]):
                whole = chainer.backend.get_array_module(arrays[0]).concatenate(arrays)
            ends = list(itertools.accumulate(map(len, arrays)))
            self._slices.append({id(part): slice(start, end) for part, start, end in zip(parts, [0, *ends], ends)})
            requires_grad = any(part._requires_grad[index] for part in parts)
            self._inputs.append(chainer.Variable(whole, requires_grad=requires_grad) if is_variable else whole)

    def run(self, function: _Function, config: Dict[str, Any]) -> None:
        """Applies the function, and gives each visit its rows."""
        local = vars(chainer.config._local)
        before = dict(local)
        try:
            local.update(config)
            returned = function(*self._inputs)
        finally:
            local.clear()
            local.update(before)
        self.is_tuple = isinstance(returned, tuple)
        self._outputs: Tuple[chainer.Variable, ...] = tuple(
            chainer.as_variable(each) for each in (returned if isinstance(returned, tuple) else (returned,))
        )
        self.outputs_require_grad = [output.requires_grad for output in self._outputs]
        rows = self._slices[0]
        num_rows = max(each.stop for each in rows.values())
        for output in self._outputs:
            if not self._is_whole(output) and len(output) != num_rows:
                raise ValueError(
                    "the function of whole_batch must return one row for each row of its first input, or a scalar, "
                    f"got shape {output.shape} for {num_rows} rows"
                )
            for part in self._parts:
                part._rows.append(output.array if self._is_whole(output) else output.array[rows[id(part)]])

    def run_backward(self) -> None:
        """Propagates the gradients that have arrived at the outputs to the inputs, and to parameters."""
        outputs, grads = [], []
        rows = self._slices[0]
        for index, output in enumerate(self._outputs):
            arrived = {id(part): part._entered[index].get_grad() for part in self._parts if part._entered}
            if all(grad is None for grad in arrived.values()):
                continue
            with device_of(output.array):
                total = output.xp.zeros_like(output.array)
                for key, grad in arrived.items():
                    if grad is not None and self._is_whole(output):
                        total += grad
                    elif grad is not None:
                        total[rows[key]] += grad
            outputs.append(output)
            grads.append(chainer.Variable(total))
        self._outputs = ()
        if outputs:
            chainer.backward(outputs, grads)

    def input_grad(self, index: int, part: WholeBatchVisit) -> Optional[Array]:
        """Returns the gradient of an input of one visit."""
        whole = self._inputs[index]
        grad = whole.grad if isinstance(whole, chainer.Variable) else None
        return None if grad is None else grad[self._slices[index][id(part)]]

    def _is_whole(self, output: chainer.Variable) -> bool:
        """Returns whether each micro-batch gets the whole output."""
        return self._parts[0]._is_shared or output.ndim == 0
