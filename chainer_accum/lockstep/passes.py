"""Pass: the forward pass of one micro-batch in lockstep, which stops wherever micro-batches meet."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import chainer
import chainer.links as L
from chainer.functions.normalization.batch_normalization import BatchNormalization

from chainer_accum._devices import Array
from chainer_accum.lockstep.batch_normalization import NormalizationVisit
from chainer_accum.lockstep.coroutine import Coroutine
from chainer_accum.lockstep.crossing import Gate
from chainer_accum.lockstep.draws import Draws
from chainer_accum.lockstep.gathering import GatherVisit
from chainer_accum.lockstep.generators import go_to, now
from chainer_accum.lockstep.kinds import axis_of_function, check_exact, looks_at_batch
from chainer_accum.lockstep.link_states import LinkStates, Rows, rows_of
from chainer_accum.lockstep.link_states import State as LinkState
from chainer_accum.lockstep.moments import Moves, axis_of, is_on_host
from chainer_accum.lockstep.random_functions import DrawVisit, check_rows, draw_mask, draws_once, kind_of, may_draw
from chainer_accum.lockstep.stage import Stage
from chainer_accum.lockstep.store import MemoryStore
from chainer_accum.lockstep.tape import Tape
from chainer_accum.lockstep.visits import Visit
from chainer_accum.lockstep.whole_batch import WholeBatchVisit
from chainer_accum.observations import Reported, reporting_to
from chainer_accum.state import hook_tables

_HOOK = "chainer_accum.lockstep"


class Shared:
    """What all passes of a window share.

    Args:
        store (MemoryStore): Where to keep arrays.
        links (LinkStates): Attributes of links that belong to a pass.
        draws (Draws): The random generators.

    """

    def __init__(self, store: MemoryStore, links: LinkStates, draws: Draws) -> None:
        self.store = store
        self.links = links
        self.draws = draws
        self.gate = Gate()
        self.moves = Moves(links)


class Pass:
    """The forward pass of one micro-batch.

    Args:
        shared (Shared): What the passes of the window share.
        function (callable): Loss function without arguments.
        num_examples (int): Number of examples, if known.
        depth (int): Number of lockstep windows around it, of whose passes it is part.

    Attributes:
        depth (int): See the argument.
        loss: What the function returned.
        reported (dict): What it reported.
        stages (list of Stage): What it computed before each meeting.
        visits (list of Visit): Its parts in the meetings.

    """

    def __init__(
        self, shared: Shared, function: Callable[[], Any], num_examples: Optional[int], depth: int = 0
    ) -> None:
        self.depth = depth
        self.loss: Any = None
        self.reported: Dict[str, Reported] = {}
        self.stages: List[Stage] = []
        self.visits: List[Visit] = []
        self._shared = shared
        self._function: Optional[Callable[[], Any]] = function
        self._num_examples = num_examples
        self._tape = Tape(shared.store, shared.gate)
        self._link_state = shared.links.begin_pass(num_examples)
        self._normalization: Optional[Tuple[chainer.Variable, NormalizationVisit]] = None
        self._drawing: Optional[chainer.FunctionNode] = None
        self._coroutine = Coroutine(self._run)

    @property
    def has_ended(self) -> bool:
        """Whether the function has returned."""
        return self._coroutine.has_ended

    def resume(self) -> None:
        """Runs the pass until it meets the others or ends."""
        self._shared.links.give(self._link_state)
        self._shared.draws.begin_pass()
        try:
            self._coroutine.resume()
            self._shared.draws.end_pass(self._num_examples)
        finally:
            self._link_state = self._shared.links.take()

    def take_link_state(self) -> Tuple[LinkState, Rows]:
        """Returns what this pass has set on links, and its rows there, and forgets both."""
        state, self._link_state = self._link_state, []
        self._shared.links.end_pass(state)
        return state, rows_of(state, self._num_examples)

    def end(self) -> None:
        """Ends the pass, wherever it is, and its thread."""
        self._coroutine.end()
        self._function = None
        self._link_state = []

    def meet(self, visit: Visit) -> None:
        """Hands in a visit, and returns when all passes have done so. It is called in the thread of the pass."""
        self._check_not_nested(visit.name)
        self.stages.append(self._tape.cut())
        self.visits.append(visit)
        if isinstance(visit, WholeBatchVisit):
            visit.hand_in(self._tape)
        self._tape.take_away()
        self._coroutine.wait()
        self._tape.bring_back()

    def whole_batch(self, function: Callable[..., Any], inputs: Sequence[Any], is_shared: bool = False) -> Any:
        """Applies a function to the inputs of all micro-batches, and returns the rows of this one, or all."""
        visit = WholeBatchVisit(function, inputs, is_shared)
        self.meet(visit)
        outputs = visit.take_outputs(self._tape)
        return tuple(outputs) if visit.is_tuple else outputs[0]

    def gather(self, name: str, value: Any) -> Sequence[Any]:
        """Hands in a value, and returns those of all micro-batches when they have done so."""
        visit = GatherVisit(name, value)
        self.meet(visit)
        return visit.gathered

    def call_link(self, args: Any) -> None:
        """Called before a link is called.

        A plain batch normalization meets here, when nothing but Variables holds its input, which can then leave memory.

        """
        link = args.link
        self._shared.links.add(link)
        self._shared.draws.look(self._num_examples)
        if not isinstance(link, L.BatchNormalization) or type(link).forward is not L.BatchNormalization.forward:
            return
        x = args.args[0] if args.args else None
        is_normalizing = chainer.config.train and not chainer.config.in_recomputing
        if not self._shared.store.takes_away or not is_normalizing or not isinstance(x, chainer.Variable):
            return
        if x.array is None or x.layout is not None or (link.axis is None and link.avg_mean is None):
            return
        axis = link.axis or axis_of(x.ndim, link.avg_mean.ndim, None)
        self._normalization = x, self._meet_to_normalize(x.array, axis, link)

    def begin_function(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        """Called before a function's forward pass."""
        check_exact(function)
        self._shared.draws.look(self._num_examples)
        on_inputs = prepare = None
        if isinstance(function, BatchNormalization):
            on_inputs = self._normalize(function, in_data)
        elif may_draw(function):
            prepare = self._take_turn(function, in_data)
        self._tape.begin_function(function, in_data, on_inputs, prepare)

    def end_function(self, function: chainer.FunctionNode) -> None:
        """Called after a function's forward pass."""
        self._tape.end_function(function)
        if self._drawing is function:
            self._drawing = None
            self._shared.draws.end_turn()

    def _check_not_nested(self, name: str) -> None:
        if self._tape.is_nested:
            raise RuntimeError(
                f"{name} must not run inside another function when passes run in lockstep, such as "
                "chainer.functions.forget; call it directly: lockstep computes again instead of keeping a graph anyway"
            )

    def _run(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        _add_hooks(self)
        with reporting_to(self.reported):
            self.loss = function()
        self._tape.close()

    def _normalize(self, function: BatchNormalization, in_data: Tuple[Array, ...]) -> Optional[Callable[..., None]]:
        pending, self._normalization = self._normalization, None
        if not looks_at_batch(function, in_data, self._num_examples):
            return None
        if pending is not None and pending[0].array is in_data[0]:
            visit = pending[1]
        else:
            visit = self._meet_to_normalize(in_data[0], axis_of_function(function, in_data), function.running_mean)
        visit.enter(function)
        return functools.partial(visit.note_inputs, self._tape)

    def _meet_to_normalize(self, x: Array, axis: Tuple[int, ...], of: object) -> NormalizationVisit:
        visit = NormalizationVisit(x, axis, self._shared.store, self._shared.gate, self._shared.moves, of)
        self.meet(visit)
        return visit

    def _take_turn(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> Optional[Callable[[], None]]:
        """Waits until this pass may draw, and returns a function that makes the generators draw the same again."""
        if not is_on_host(in_data[0]):
            draw_mask(function, in_data[0])
            return None
        self._check_not_nested(DrawVisit.name)
        self._drawing = function
        draws, is_shared = self._shared.draws, draws_once(function) or self._is_parameter(in_data[0])
        if not is_shared:
            check_rows(function, in_data[0], self._num_examples)
        visit = None
        if not draws.has_turn:
            visit = DrawVisit(function, in_data, draws.is_careful, is_shared)
            self.meet(visit)
        if visit is not None and visit.before is not None:
            go_to(visit.before)
        else:
            draws.begin_turn(kind_of(function), self._num_examples, is_shared)
        return functools.partial(go_to, now())

    def _is_parameter(self, array: Array) -> bool:
        """Returns whether an array is that of a parameter, which is the same for all micro-batches."""
        return any(array is param.array for link in self._shared.links.roots for param in link.params())


class _FunctionHook(chainer.FunctionHook):
    name = _HOOK

    def __init__(self, current: Pass) -> None:
        self.current = current

    def forward_preprocess(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        self.current.begin_function(function, in_data)

    def forward_postprocess(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        self.current.end_function(function)


class _LinkHook(chainer.LinkHook):
    name = _HOOK

    def __init__(self, current: Pass) -> None:
        self._current = current

    def forward_preprocess(self, args: Any) -> None:
        self._current.call_link(args)


def _add_hooks(current: Pass) -> None:
    """Adds the hooks of a pass to those of its thread, before all others, which may measure time."""
    for table, hook in zip(hook_tables(), (_FunctionHook(current), _LinkHook(current))):
        others = dict(table)
        table.clear()
        table[_HOOK] = hook
        table.update(others)


def current_pass() -> Optional[Pass]:
    """Returns the pass that runs in the current thread, if any."""
    hook = chainer.get_function_hooks().get(_HOOK)
    return hook.current if isinstance(hook, _FunctionHook) else None
