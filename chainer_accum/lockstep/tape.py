"""Tape: the functions that a pass applies, recorded so that its graph can be cut, freed, and computed again.

A cut ends a stage. The graph so far is freed; what remains of it is a :class:`~chainer_accum.lockstep.stage.Stage`.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import chainer

from chainer_accum._devices import Array
from chainer_accum.lockstep.crossing import NO_GRAPH, OUTSIDE, Crossing, Cut, Gate, checksum
from chainer_accum.lockstep.stage import Record, Stage, copy_of, needs_only_inputs
from chainer_accum.lockstep.store import MemoryStore

OnInputs = Callable[[Sequence[chainer.variable.VariableNode]], None]


class _Application:
    """A function that is being applied, or has been since the last cut."""

    __slots__ = ("template", "function", "config", "in_data", "leaves", "outputs", "on_inputs", "prepare")

    def __init__(
        self,
        function: chainer.FunctionNode,
        config: Dict[str, Any],
        in_data: Tuple[Array, ...],
        on_inputs: Optional[OnInputs],
        prepare: Optional[Callable[[], None]],
    ) -> None:
        self.template = copy_of(function)
        self.function = weakref.ref(function)  # the graph holds it, if anything does
        self.config = config
        self.in_data: Optional[Tuple[Array, ...]] = in_data
        self.leaves: Dict[int, Array] = {}
        self.outputs: Tuple[weakref.ReferenceType[chainer.variable.VariableNode], ...] = ()
        self.on_inputs = on_inputs
        self.prepare = prepare


class Tape:
    """Records the functions of one pass. Its methods are called in the thread of the pass.

    Args:
        store (MemoryStore): Where to keep arrays that cross a cut.
        gate (Gate): Whether backward passes may go through the cuts.

    """

    def __init__(self, store: MemoryStore, gate: Gate) -> None:
        self._store = store
        self._gate = gate
        self._running: List[_Application] = []
        self._last: Optional[_Application] = None  # finished, but Chainer has yet to set its inputs
        self._applied: List[_Application] = []
        self._crossings: Dict[chainer.variable.VariableNode, Crossing] = {}
        self._config: Dict[str, Any] = {}

    @property
    def is_nested(self) -> bool:
        """Whether a function is in its forward pass."""
        return any(application.function() is not None for application in self._running)  # others have raised

    def begin_function(
        self,
        function: chainer.FunctionNode,
        in_data: Tuple[Array, ...],
        on_inputs: Optional[OnInputs] = None,
        prepare: Optional[Callable[[], None]] = None,
    ) -> None:
        """Called before the forward pass of a function.

        Args:
            function (~chainer.FunctionNode): The function.
            in_data (tuple of arrays): Its inputs.
            on_inputs (callable): Called with the nodes of the inputs as soon as they are known.
            prepare (callable): Called before the function is computed again.

        """
        self._settle()
        config = vars(chainer.config._local)
        if config != self._config:
            self._config = dict(config)
        self._running.append(_Application(function, self._config, in_data, on_inputs, prepare))

    def end_function(self, function: chainer.FunctionNode) -> None:
        """Called after the forward pass of a function."""
        while self._running:
            application = self._running.pop()
            if application.function() is function:  # others have raised
                self._last = application
                return

    def cut(self) -> Stage:
        """Ends a stage: replaces the graph by cuts, and returns how to compute it again."""
        self._settle()
        self._notice_unchained()
        numbers: Dict[chainer.variable.VariableNode, int] = {}
        entries: Dict[int, Crossing] = {}
        leaves: Dict[int, chainer.Variable] = {}
        exits: Dict[int, Crossing] = {}
        records = []
        crossings = {node: each for node, each in self._crossings.items() if node.get_variable_or_none() is not None}
        for application in self._applied:
            function = application.function()
            if function is None:  # nothing depends on it any more
                continue
            for index, node in enumerate(function.inputs):
                if node not in numbers:
                    number = numbers[node] = len(numbers)
                    if node in self._crossings:
                        entries[number] = self._crossings[node]
                        entries[number].is_used = True
                    else:
                        leaves[number] = _leaf(node, application.leaves.get(index))
            inputs = tuple(numbers[node] for node in function.inputs)
            outputs: List[Optional[int]] = []
            known = []
            # A function that reads its outputs in a backward pass may have given them new nodes since. An output that
            # has been unchained is a leaf.
            for references in zip(application.outputs, function.outputs):
                found = (reference() for reference in references)
                nodes = [node for node in found if node is not None and node.creator_node is function]
                number = len(numbers)
                numbers.update((node, number) for node in nodes)
                outputs.append(number if nodes else None)
                for node in dict.fromkeys(nodes):
                    variable = node.get_variable_or_none()
                    if variable is not None:
                        if number not in exits:
                            exits[number] = Crossing(self._store, variable.array, variable.requires_grad)
                        crossings[node] = exits[number]
                        known.append((variable.shape, variable.dtype))
            is_known = len(known) == len(outputs) and needs_only_inputs(function) and _has_inputs(function)
            template = copy_of(function, is_applied=True) if is_known else application.template
            record = Record(template, application.config, application.prepare, inputs, tuple(outputs))
            if is_known:
                record = record._replace(known=tuple(known), checksums=_checksums(function))
            records.append(record)
            del function
        for node, crossing in self._crossings.items():
            if node not in crossings and not crossing.is_used:
                crossing.free()
        self._applied = []
        self._crossings = crossings
        for node, crossing in crossings.items():
            variable = node.get_variable_or_none()
            if variable is not None:
                if variable.creator_node is not None:
                    Cut(crossing, self._gate, variable)
                node.data = None  # a function of the stage may have retained it
                variable.array = variable.array
        return Stage(records, entries, leaves, exits, self._gate)

    def take_away(self) -> None:
        """Takes the arrays of all Variables that crossed the last cut out of memory, if the store has them."""
        if self._store.takes_away:
            for node in self._crossings:
                variable = node.get_variable_or_none()
                # A scalar takes no room, and reports of losses are recognized by their arrays.
                if variable is not None and variable.array is not None and variable.array.size > 1:
                    variable.array = None

    def bring_back(self) -> None:
        """Gives all Variables their arrays again."""
        if self._store.takes_away:
            for node, crossing in self._crossings.items():
                variable = node.get_variable_or_none()
                if variable is not None and variable.array is None:
                    variable.array = crossing.get()

    def crossing_of(self, node: chainer.variable.VariableNode) -> Optional[Crossing]:
        """Returns the crossing of a node that has crossed the last cut, and marks it as used."""
        crossing = self._crossings.get(node)
        if crossing is not None:
            crossing.is_used = True
        return crossing

    def enter(self, array: Array, requires_grad: bool) -> Tuple[chainer.Variable, Crossing]:
        """Returns a Variable for an array that comes from outside, as if it had crossed the last cut."""
        variable = chainer.Variable(array, requires_grad=requires_grad)
        crossing = self._crossings[variable.node] = Crossing(self._store, array, requires_grad)
        crossing.is_used = True
        Cut(crossing, self._gate, variable)
        return variable, crossing

    def close(self) -> None:
        """Forgets everything at the end of the pass, except what stages hold."""
        self._settle()
        self._notice_unchained()
        self._applied, self._crossings, self._last = [], {}, None

    def _notice_unchained(self) -> None:
        """Stops gradients at each Variable of an earlier stage that the model has unchained since."""
        for node, crossing in self._crossings.items():
            if node.creator_node is None:
                crossing.unchain()

    def _settle(self) -> None:
        """Notes which inputs of the last function are leaves, now that Chainer has set them."""
        last, self._last = self._last, None
        function = None if last is None else last.function()
        if last is None or function is None or function.inputs is None:  # the last is outside the graph
            return
        assert last.in_data is not None
        for index, node in enumerate(function.inputs):
            if node.creator_node is None:
                last.leaves[index] = last.in_data[index]
        last.in_data = None
        last.outputs = function.outputs
        if last.on_inputs is not None:
            last.on_inputs(function.inputs)
        self._applied.append(last)


def _has_inputs(function: chainer.FunctionNode) -> bool:
    """Returns whether the inputs of a function are still there, or are parameters."""
    return all(node.data is not None or _is_parameter(node) for node in function.inputs)


def _checksums(function: chainer.FunctionNode) -> Tuple[Optional[int], ...]:
    """Returns the checksums of the inputs of a function, except parameters."""
    return tuple(None if node.data is None or _is_parameter(node) else checksum(node.data) for node in function.inputs)


def _is_parameter(node: chainer.variable.VariableNode) -> bool:
    return isinstance(node.get_variable_or_none(), chainer.Parameter)


def _leaf(node: chainer.variable.VariableNode, array: Optional[Array]) -> chainer.Variable:
    """Returns the parameter of a node without creator, or else a Variable with its array."""
    variable = node.get_variable_or_none()
    if isinstance(variable, chainer.Parameter):
        return variable
    if node.creator_node is not None and node.requires_grad:
        raise RuntimeError(OUTSIDE.format(shape=node.shape))
    if variable is not None and variable.array is array:
        return variable  # which may want its gradient
    if array is None:  # it has been unchained since it was used
        array = node.data if variable is None else variable.array
    if array is None:
        raise RuntimeError(NO_GRAPH)
    return chainer.Variable(array, requires_grad=node.requires_grad)
