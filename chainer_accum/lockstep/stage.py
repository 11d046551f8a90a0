"""Stage: what a pass computed between two cuts, so that it can be computed again and gradients can go through it.

A stage has a copy of each function's node as the model made it, without anything that its forward pass left in it, such
as masks. Applied again in order, the copies give the same values bit for bit, and a graph.

The arrays of Variables that are alive at a cut cross it. Each is represented by a
:class:`~chainer_accum.lockstep.crossing.Crossing`.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import chainer
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.convolution_nd import ConvolutionND
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.connection.deconvolution_nd import DeconvolutionND
from chainer.functions.connection.linear import LinearFunction

from chainer_accum._devices import Array
from chainer_accum.lockstep.crossing import Crossing, Cut, Gate, checksum

NOT_REPEATABLE = (
    "{} must return the same values when it is computed again from the same inputs, got different ones; functions must "
    "not change their inputs, count calls or use a random generator of their own; draw from numpy.random, or set "
    "lockstep=None"
)


class Record(NamedTuple):
    """A function of a stage. Values are denoted by numbers, since the nodes are gone.

    Attributes:
        template (~chainer.FunctionNode): Copy of the function, which is copied again to be applied.
        config (dict): The configuration of the thread.
        prepare (callable): Called before the function is applied, if given.
        inputs (tuple of int): Its inputs.
        outputs (tuple of int): Its outputs, or ``None`` for one that nothing has used.
        last_uses (tuple of int): The values that are not used after it.
        known (tuple): Shape and dtype of each output, if they need not be computed.
        checksums (tuple): Checksums of inputs, if outputs are not computed, or ``None`` for one not to be checked.

    """

    template: chainer.FunctionNode
    config: Dict[str, Any]
    prepare: Optional[Callable[[], None]]
    inputs: Tuple[int, ...]
    outputs: Tuple[Optional[int], ...]
    last_uses: Tuple[int, ...] = ()
    known: Optional[Tuple[Tuple[Tuple[int, ...], Any], ...]] = None
    checksums: Tuple[Optional[int], ...] = ()


class Stage:
    """What a pass computed between two cuts.

    Args:
        records: The functions, in order.
        entries: The arrays from earlier stages that are used, by number.
        leaves: Parameters and other Variables that are used, by number.
        exits: The arrays that cross the cut at the end, by number.
        gate (Gate): Whether backward passes may go through the cuts.

    """

    def __init__(
        self,
        records: Sequence[Record],
        entries: Dict[int, Crossing],
        leaves: Dict[int, chainer.Variable],
        exits: Dict[int, Crossing],
        gate: Gate,
    ) -> None:
        self._records: Sequence[Record] = _completed(records, exits)
        self._entries = entries
        self._leaves = leaves
        self._exits = exits
        self._gate = gate

    def run_backward(self) -> None:
        """Computes the stage again, and propagates the gradients of its exits to its entries and to parameters.

        Raises:
            RuntimeError: If an exit has another value now.

        """
        if any(exit_.get_grad() is not None for exit_ in self._exits.values()):
            outputs = self._replay()
            grads = []
            for number in outputs:
                grad = self._exits[number].get_grad()
                grads.append(None if grad is None else chainer.Variable(grad))
                self._exits[number].free()
            chainer.backward(list(outputs.values()), grads)
        self.free()

    def free(self) -> None:
        """Frees everything that the stage holds."""
        for exit_ in self._exits.values():
            exit_.free()
        self._records, self._entries, self._leaves, self._exits = (), {}, {}, {}

    def _replay(self) -> Dict[int, chainer.Variable]:
        """Applies all functions again, and returns the exits that have a gradient."""
        values: Dict[int, Any] = dict(self._leaves)
        for number, entry in self._entries.items():
            values[number] = chainer.Variable(entry.get(), requires_grad=entry.requires_grad)
            Cut(entry, self._gate, values[number])
        local = vars(chainer.config._local)
        before = dict(local)
        outputs = {}
        try:
            for record in self._records:
                local.clear()
                local.update(record.config)
                if record.prepare is not None:
                    record.prepare()
                results = _apply(record, [values[number] for number in record.inputs])
                for output, result in zip(record.outputs, results):
                    if output is None:
                        continue
                    values[output] = result
                    exit_ = self._exits.get(output)
                    if exit_ is None:
                        continue
                    if record.known is None and not exit_.is_same(result.array):
                        raise RuntimeError(NOT_REPEATABLE.format(self._name()))
                    if exit_.get_grad() is not None:
                        outputs[output] = result
                    if not exit_.requires_grad:  # it may have been unchained in a later stage
                        values[output] = chainer.Variable(result.array, requires_grad=False)
                del results
                for used in record.last_uses:
                    values.pop(used, None)
        finally:
            local.clear()
            local.update(before)
        return outputs

    def _name(self) -> str:
        names = list(dict.fromkeys(record.template.label for record in self._records))
        return names[0] if len(names) == 1 else f"each of {', '.join(names)}"


# The backward passes of these need their inputs, and nothing that is computed in the forward pass.
_NEED_ONLY_INPUTS = (Convolution2DFunction, ConvolutionND, Deconvolution2DFunction, DeconvolutionND, LinearFunction)


def needs_only_inputs(function: chainer.FunctionNode) -> bool:
    """Returns whether the backward pass of a function that was applied needs nothing from its forward pass."""
    return type(function) in _NEED_ONLY_INPUTS


def _apply(record: Record, inputs: Sequence[Any]) -> Tuple[chainer.Variable, ...]:
    """Applies a function again."""
    function = copy_of(record.template)
    known = record.known
    if known is None:
        return function.apply(inputs)

    def forward(inputs: Tuple[Array, ...]) -> Tuple[Array, ...]:
        if any(expected is not None and expected != checksum(each) for expected, each in zip(record.checksums, inputs)):
            raise RuntimeError(NOT_REPEATABLE.format(f"what comes before {function.label}"))
        function.retain_inputs((0, 1))
        xp = chainer.backend.get_array_module(*inputs)
        return tuple(xp.broadcast_to(xp.zeros((), dtype), shape) for shape, dtype in known)

    function.forward = forward  # type: ignore[method-assign]
    try:
        return function.apply(inputs)
    finally:
        del function.forward  # which refers to the function


def _completed(records: Sequence[Record], exits: Dict[int, Crossing]) -> Sequence[Record]:
    """Returns records with their last uses, which compute their outputs if these are used in the stage."""
    seen = set(exits)
    used = {number for record in records for number in record.inputs}
    completed = []
    for record in reversed(records):
        last = [number for number in {*record.inputs, *record.outputs} if number is not None and number not in seen]
        seen.update(last)
        known = None if used.intersection(record.outputs) else record.known
        completed.append(record._replace(last_uses=tuple(last), known=known))
    return completed[::-1]


def copy_of(function: chainer.FunctionNode, is_applied: bool = False) -> chainer.FunctionNode:
    """Returns a copy of a function node that can be applied.

    Args:
        function (~chainer.FunctionNode): Function node.
        is_applied (bool): Whether it has been applied already.

    """
    duplicate = copy.copy(function)
    if is_applied:
        for name in ("inputs", "outputs", "_input_indexes_to_retain", "_output_indexes_to_retain", "_output_layouts"):
            vars(duplicate).pop(name, None)
    if isinstance(function, chainer.FunctionAdapter) and isinstance(duplicate, chainer.FunctionAdapter):
        old = copy.copy(function.function)  # an old-style function, which has only a weak reference to its node
        old._node = weakref.ref(duplicate)
        duplicate._function = old
    return duplicate
