"""LockstepWindow: a window whose passes wait for one another wherever a layer looks at the whole batch."""

from __future__ import annotations

import functools
import types
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import chainer
import numpy

from chainer_accum._arguments import check_callable, check_weight
from chainer_accum._devices import are_finite
from chainer_accum.lockstep import Draws, Lockstep, LockstepPolicy, NeedsCare, Pass, checksum, run_alone
from chainer_accum.observations import Reported, reporting_to
from chainer_accum.state import RandomState, captured_by, links_behind
from chainer_accum.window.losses import check_loss, describe
from chainer_accum.window.window import Window

_NOT_FINITE = (
    "{what} is not finite; check the data and the learning rate, or use nonfinite='keep'; lockstep cannot skip a "
    "micro-batch"
)


class _Queued(NamedTuple):
    """A pass that has been added."""

    function: Callable[[], Any]
    weight: float
    num_examples: Optional[int]
    inputs: Sequence[Tuple[Any, Optional[int]]] = ()


class LockstepWindow(Window):
    """Window whose passes run in lockstep, so that its step is that of the whole batch for any layer.

    The passes run in :meth:`run_passes`, or at the latest in :meth:`update`, and what they report arrives then. If
    those of the last window with the same policy did not wait for one another, each runs at once, up to where it has
    to.

    The arguments are those of :class:`Window`. The options must have a lockstep policy.

    """

    _queue: Sequence[_Queued] = ()
    _has_run = False

    @property
    def waits(self) -> bool:  # type: ignore[override]
        return not self._runs_at_once

    def _begin(self) -> None:
        super()._begin()
        if self._norms is not None:
            raise ValueError(
                "gradient norms of micro-batches must not be measured with lockstep, got gradient_norm_interval or "
                "GradientNoiseScale: a micro-batch has no gradient of its own; leave it out, or set lockstep=None"
            )
        assert self._options.lockstep is not None
        self._policy: LockstepPolicy = self._options.lockstep
        self._runs_at_once = self._policy.meets is False
        self._random_state: Optional[RandomState] = None  # before the passes
        self._reports: List[Dict[str, Reported]] = []
        self._lockstep: Optional[Lockstep] = None  # until a pass begins

    def add(self, lossfun: Callable[..., chainer.Variable], *args: Any, weight: float = 1, **kwargs: Any) -> bool:
        """Adds a pass. See :meth:`Window.add`.

        Raises:
            RuntimeError: If the passes of the window have run already.

        """
        self.check_open()
        if self._has_run:
            raise RuntimeError(
                "all micro-batches must be added before the passes run in lockstep, got one after they ran"
            )
        check_callable("lossfun", lossfun, "pass a function that returns the loss, or the model")
        weight = check_weight(weight, "weight")
        num_examples = _count([*args, *kwargs.values()]) if self.num_examples is None else self.num_examples
        self.num_micro_batches += 1
        function = functools.partial(lossfun, *args, **kwargs)
        queued = _Queued(function, weight, num_examples, _snapshot(function))
        self._queue = [*self._queue, queued]
        if self._runs_at_once:
            self.is_open = False  # until the pass waits or has been added
            self._lockstep = self._lockstep or self._begin_lockstep()
            try:
                self._lockstep.start(queued.function, num_examples)
            except NeedsCare:  # earlier passes cannot run again; the next window will take care
                self._policy.draws_carefully, self._policy.meets = True, None
                raise
            if not self._lockstep.is_waiting:
                self._queue = [*self._queue[:-1], queued._replace(function=_done, inputs=())]  # frees its arguments
                self._deliver()
            self.is_open = True
        if self._on_added is not None:
            self._on_added(weight, True)
        return True

    def add_gradients(self, weight: float = 1) -> bool:
        """Refuses gradients of your own backward pass, which cannot run in lockstep."""
        raise ValueError(
            "lockstep must be None for your own backward passes, got a window with lockstep; let window.add run the "
            "passes"
        )

    def run_passes(self) -> None:
        if self._has_run:
            return
        self.is_open = False
        self._has_run = True
        for number, queued in enumerate(self._queue, 1):
            self._check_inputs(number, queued)
        if len(self._queue) == 1 and not self._runs_at_once:
            self._run_alone(self._queue[0])
        else:
            self._run_together()
        self._deliver()
        self._queue = [queued._replace(function=_done, inputs=()) for queued in self._queue]  # frees their arguments
        self._end_lockstep()
        self.is_open = True

    def update(self) -> bool:
        self.check_open()
        self.run_passes()
        if self._checks_gradients() and self.weights and not self._gradients.are_finite():
            self.is_open = False
            raise FloatingPointError(_NOT_FINITE.format(what="the gradient of the window"))
        return super().update()

    def abandon(self, undoes_all: bool = True) -> None:
        self._end_lockstep()
        if self._lockstep is not None and not self.is_done and self._optimizer.t == self._updates:
            self._lockstep.undo()
        super().abandon(undoes_all=True)

    def _begin_lockstep(self) -> Lockstep:
        self._random_state = RandomState()
        is_new = any(not param.is_initialized for param in self._optimizer.target.params())
        draws = Draws(is_new or self._policy.draws_carefully, may_begin=not self._runs_at_once)
        return Lockstep(self._policy, self._all_links(), draws, self._end_of_pass)

    def _all_links(self) -> List[chainer.Link]:
        """Returns the links of the window, and those that its loss functions name."""
        return [*self.links, *links_behind(*[queued.function for queued in self._queue])]

    def _end_lockstep(self) -> None:
        if self._lockstep is not None:
            self._lockstep.end()

    def _check_inputs(self, number: int, queued: _Queued) -> None:
        """Raises RuntimeError unless a pass that has waited still has the inputs that it was added with."""
        if not queued.inputs:
            return
        assert isinstance(queued.function, functools.partial)
        before, after = queued.inputs, _snapshot(queued.function)
        if not all(value is other and known == new for (value, known), (other, new) in zip(before, after)):
            raise RuntimeError(
                "what window.add is given must stay as it is until the end of the block when passes run in lockstep, "
                f"got a variable or an array that has changed since micro-batch {number} was added; pass new arrays as "
                "arguments: window.add(model, x, t), or window.add(lambda x=x, t=t: model(x, t))"
            )

    def _run_alone(self, queued: _Queued) -> None:
        """Runs a single pass, which is the whole batch, as other windows do."""
        reported: Dict[str, Reported] = {}
        on_added, self._on_added = self._on_added, None
        self.is_open, self.num_micro_batches = True, 0
        try:
            add = functools.partial(super().add, queued.function, weight=queued.weight)
            with reporting_to(reported):
                run_alone(self._policy, self._all_links(), add, queued.num_examples)
        finally:
            self._on_added = on_added
        self._reports = [reported]

    def _run_together(self) -> None:
        try:
            lockstep = self._run()
        except NeedsCare:
            self._policy.draws_carefully = True
            self._go_back()
            lockstep = self._run()
        self._policy.meets = lockstep.has_met

    def _go_back(self) -> None:
        """Goes back to before the passes, to run them once more."""
        assert self._lockstep is not None and self._random_state is not None
        self._lockstep.end()
        self._lockstep.undo()
        self._random_state.restore()
        self._begin()
        self.num_micro_batches = len(self._queue)
        self.is_open = False

    def _run(self) -> Lockstep:
        """Runs all passes, or completes those that have begun."""
        self.weights.expect(sum(queued.weight for queued in self._queue))
        lockstep = self._lockstep
        if lockstep is None:
            lockstep = self._lockstep = self._begin_lockstep()
            for queued in self._queue:
                lockstep.start(queued.function, queued.num_examples)
        lockstep.run(self._gradients.adding)
        return lockstep

    def _end_of_pass(self, index: int, ended: Pass) -> None:
        """Runs the backward pass of a loss, up to where the pass last waited."""
        check_loss(ended.loss)
        if self._options.checks_values and self._queue[index].weight > 0 and not are_finite([ended.loss.array]):
            what = f"the loss of micro-batch {index + 1} of the window, {describe(ended.loss)},"
            raise FloatingPointError(_NOT_FINITE.format(what=what))
        assert self._lockstep is not None
        with self._lockstep.backward():
            self._gradients.add_loss(ended.loss, self._queue[index].weight)
        self._reports.append(ended.reported)

    def _deliver(self) -> None:
        """Hands on what the passes have reported."""
        delivered = len(self._queue) - len(self._reports)
        for queued, reported in zip(self._queue[delivered:], self._reports):
            if self._on_reported is not None:
                self._on_reported(reported, queued.weight)
        self._reports = []


def _done() -> None:
    """Takes the place of a function that is not needed any more."""


def _count(values: Iterable[Any]) -> Optional[int]:
    """Returns the number of examples, as far as the arguments show it: the length that most arrays have."""
    lengths = [len(value) for value in values if getattr(value, "ndim", 0) > 0]
    return max(lengths, key=lengths.count) if lengths else None


def _inputs_of(function: functools.partial[Any]) -> List[Any]:
    """Returns what a function takes from outside when it is called: arguments, closure and globals."""
    captured = captured_by(function.func) if isinstance(function.func, types.FunctionType) else []
    return [*function.args, *function.keywords.values(), *captured]


def _snapshot(function: functools.partial[Any]) -> List[Tuple[Any, Optional[int]]]:
    """Returns the inputs of a function, with the checksums of arrays in host memory."""
    return [(value, sum(map(checksum, _arrays_in(value)))) for value in _inputs_of(function)]


def _arrays_in(value: Any) -> List[numpy.ndarray]:
    if isinstance(value, (tuple, list)):
        return [array for each in value for array in _arrays_in(each)]
    if isinstance(value, dict):
        return [array for each in value.values() for array in _arrays_in(each)]
    array = chainer.as_array(value)
    return [array] if isinstance(array, numpy.ndarray) and array.dtype != object else []
