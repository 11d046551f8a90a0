"""Lockstep: passes that wait for one another, and their backward passes, stage by stage."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, Iterable, Iterator, List, Optional

import chainer

from chainer_accum.lockstep.draws import Draws
from chainer_accum.lockstep.generators import go_to, now
from chainer_accum.lockstep.link_states import Left, LinkStates, Rows, State, rows_of
from chainer_accum.lockstep.passes import Pass, Shared, current_pass
from chainer_accum.lockstep.store import StoreSpec, check_store, make_store
from chainer_accum.lockstep.visits import Visit, other_layers

_DEEPEST = 20


class LockstepPolicy:
    """How the passes of windows run in lockstep. One object serves all windows of an updater.

    Args:
        store: Where to keep arrays that cross a cut: ``'memory'``, ``'host'``, ``'file'`` or a folder.

    Attributes:
        store: See the argument.
        draws_carefully (bool): Whether passes draw random numbers outside of functions in a way that needs care.
        left (list): What the last window has left on links, and has no rows to be told apart by.
        meets (bool): Whether the passes of the last window had to wait for one another, or ``None`` before it.

    """

    def __init__(self, store: StoreSpec) -> None:
        self.store = store
        self.draws_carefully = False
        self.meets: Optional[bool] = None
        self.left: Left = []


def make_lockstep_policy(lockstep: StoreSpec) -> Optional[LockstepPolicy]:
    """Returns the policy for the argument ``lockstep``, or ``None`` for ``None``.

    Raises:
        TypeError: If the argument is of another type.
        ValueError: If there is no such folder.

    """
    check_store(lockstep)
    return None if lockstep is None else LockstepPolicy(lockstep)


def run_alone(
    policy: LockstepPolicy,
    links: Iterable[Optional[chainer.Link]],
    function: Callable[[], Any],
    num_examples: Optional[int],
) -> None:
    """Runs a single pass, which is the whole batch and meets no other.

    It finds on links what the last window has left to it, and leaves its own rows there for the next.

    Args:
        policy (LockstepPolicy): What is known from earlier windows.
        links: Links that the pass uses. Items may be ``None``.
        function (callable): Runs the pass, without arguments.
        num_examples (int): Number of examples, if known.

    """
    states = LinkStates(links, policy.left)
    states.give(states.begin_pass(num_examples))
    try:
        function()
    finally:
        state = states.take()
    policy.left = states.leave(state, [rows_of(state, num_examples)])


class Lockstep:
    """The passes of a window, which run in lockstep.

    Each runs at once, up to where it has to wait for the others. If none waits, they run one after the other. Call
    :meth:`end` in any case.

    Args:
        policy (LockstepPolicy): Where to keep arrays that cross a cut, and what is known from earlier windows.
        links: Links that the passes use. Items may be ``None``.
        draws (Draws): The order of random numbers.
        on_end (callable): Function called with each :class:`Pass` that has ended, before the next one goes on. It runs
            the backward pass of the loss, inside :meth:`backward`.

    Attributes:
        has_met (bool): Whether the passes have had to wait for one another.

    """

    def __init__(
        self,
        policy: LockstepPolicy,
        links: Iterable[Optional[chainer.Link]],
        draws: Draws,
        on_end: Callable[[int, Pass], None],
    ) -> None:
        self._shared = Shared(make_store(policy.store), LinkStates(links, policy.left), draws)
        self._policy = policy
        outer = current_pass()
        self._depth = 0 if outer is None else outer.depth + 1
        if self._depth > _DEEPEST:
            raise RecursionError("windows in lockstep must not be nested endlessly, got a loss function that updates")
        self.has_met = False
        self._passes: List[Pass] = []
        self._last_state: State = []
        self._rows: List[Rows] = []
        self._on_end = on_end

    @property
    def is_waiting(self) -> bool:
        """Whether passes wait for one another."""
        return any(not each.has_ended for each in self._passes)

    def start(self, function: Callable[[], Any], num_examples: Optional[int] = None) -> None:
        """Begins a pass, and runs it until it waits or ends.

        Args:
            function (callable): Loss function without arguments.
            num_examples (int): Number of examples of the pass, if known.

        """
        self._passes.append(Pass(self._shared, function, num_examples, self._depth))
        self._resume(len(self._passes) - 1)

    def run(self, adding: Callable[[], ContextManager[None]]) -> None:
        """Runs all passes to their end, and then the backward passes of all stages but the last.

        Args:
            adding (callable): Returns a context manager in which backward passes add gradients.

        """
        passes = self._passes
        while self.is_waiting:
            self._meet()
            for index in range(len(passes)):
                self._resume(index)
        self._shared.draws.end_segment()
        self._policy.left = self._shared.links.leave(self._last_state, self._rows)
        if passes:
            self._run_backward(adding)

    def _run_backward(self, adding: Callable[[], ContextManager[None]]) -> None:
        passes, random_state = self._passes, now()
        try:
            for index in reversed(range(len(passes[0].stages))):
                with adding(), self.backward():
                    passes[0].visits[index].merge_gradients([each.visits[index] for each in passes])
                    for each in passes:
                        each.visits.pop().add_gradients()
                        each.stages.pop().run_backward()
        finally:
            go_to(random_state)  # functions have drawn again

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Context manager in which backward passes go through the cuts."""
        self._shared.gate.is_open = True
        try:
            yield
        finally:
            self._shared.gate.is_open = False

    def end(self) -> None:
        """Ends all passes and their threads, and frees what they kept. It can be called any number of times."""
        for each in self._passes:
            each.end()
        self._passes = []
        self._on_end = _do_nothing  # it may refer to the owner of this object
        self._shared.store.close()

    def undo(self) -> None:
        """Undoes what the passes have changed on links, and the moves of running averages."""
        self._shared.links.take()
        self._shared.moves.undo()

    def _resume(self, index: int) -> None:
        current = self._passes[index]
        self._last_state = []  # of a pass that is not the last one, whose graph it may hold
        current.resume()
        if current.has_ended:
            self._on_end(index, current)
            current.loss, current.reported = None, {}
            self._last_state, rows = current.take_link_state()
            self._rows.append(rows)

    def _meet(self) -> None:
        """Lets all passes meet.

        Raises:
            RuntimeError: If they are at different meetings.

        """
        self.has_met = True
        visits = [None if each.has_ended else each.visits[-1] for each in self._passes]
        first = visits[0]
        for number, visit in enumerate(visits, 1):
            if (visit and visit.key) != (first and first.key):
                raise other_layers(self._describe(first), self._describe(visit), number)
        assert first is not None
        self._shared.draws.begin_segment()
        first.merge([visit for visit in visits if visit is not None])

    def _describe(self, visit: Optional[Visit]) -> str:
        if visit is None:
            return "the end"
        name = self._shared.links.name_of(visit.of)
        return f"{visit.name}{name and f' {name}'} of {visit.description}"


def _do_nothing(index: int, ended: Pass) -> None:
    pass
