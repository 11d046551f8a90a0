"""LockstepWindow: a window whose passes wait for one another wherever a layer looks at the whole batch."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import chainer

from chainer_accum._arguments import check_callable
from chainer_accum.lockstep import (
    Draws,
    Lockstep,
    LockstepPolicy,
    NeedsCare,
    Pass,
    current_pass,
    run_alone,
)
from chainer_accum.observations import Reported, reporting_to
from chainer_accum.state import RandomState, links_behind
from chainer_accum.window.terms import Losses, ReportWeight, Weight, check_given_weight, evaluate, factors_of
from chainer_accum.window.waiting_inputs import Inputs, check_inputs, count_rows, inputs_of
from chainer_accum.window.window import Window

_NOT_FINITE = (
    "{what} is not finite; check the data and the learning rate, or use nonfinite='keep'; lockstep cannot skip a "
    "micro-batch"
)


class _Queued(NamedTuple):
    """A pass that has been added."""

    function: Callable[[], Any]
    weight: Union[float, Callable[[], Any]]
    num_examples: Optional[int]
    inputs: Inputs = ()


class _Evaluated(NamedTuple):
    """What a pass has computed.

    Attributes:
        losses (Losses): Its losses.
        factors: The factor of each loss in the gradient of the window, or ``None`` if the weights give it.
        report_weight: The weight of what it has reported.

    """

    losses: Losses
    factors: Optional[Sequence[float]]
    report_weight: ReportWeight


class LockstepWindow(Window):
    """Window whose passes run in lockstep, so that its step is that of the whole batch for any layer.

    The passes run in :meth:`run_passes`, or at the latest in :meth:`update`, and what they report arrives then. If
    those of the last window with the same policy did not wait for one another, each runs at once, up to where it has
    to. Passes whose loss functions return weights, or are followed by a function that returns one, wait for one another
    at their ends, where the factor of each loss becomes known.

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
        self._left = self._policy.left
        self._random_state: Optional[RandomState] = None  # before the passes
        self._reports: List[Tuple[Dict[str, Reported], ReportWeight]] = []
        self._lockstep: Optional[Lockstep] = None  # until a pass begins

    def add(self, lossfun: Callable[..., Any], *args: Any, weight: Weight = 1, **kwargs: Any) -> bool:
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
        given = check_given_weight(weight)
        num_examples = count_rows([*args, *kwargs.values()]) if self.num_examples is None else self.num_examples
        self.num_micro_batches += 1
        function = functools.partial(lossfun, *args, **kwargs)
        queued = _Queued(function, given, num_examples, inputs_of(function))
        self._queue = [*self._queue, queued]
        if self._runs_at_once:
            self.is_open = False  # until the pass waits or has been added
            self._lockstep = self._lockstep or self._begin_lockstep()
            try:
                self._start(self._lockstep, queued)
            except NeedsCare:  # earlier passes cannot run again; the next window will take care
                self._policy.draws_carefully, self._policy.meets = True, None
                raise
            if not self._lockstep.is_waiting:
                self._queue = [*self._queue[:-1], queued._replace(function=_done, inputs=())]  # frees its arguments
                self._deliver()
            self.is_open = True
        self.report_weight = 1.0 if callable(given) else given  # of what is reported before the passes run
        if self._on_added is not None:
            self._on_added(self.report_weight, True)
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
            check_inputs(number, queued.function, queued.inputs)
        if len(self._queue) == 1 and not self._runs_at_once:
            self._run_alone(self._queue[0])
        else:
            self._run_together()
        self._deliver()
        self._queue = [queued._replace(function=_done, inputs=()) for queued in self._queue]  # frees their arguments
        self._end_lockstep()
        self.is_open = True

    def abandon(self, undoes_all: bool = True) -> None:
        self._end_lockstep()
        super().abandon(undoes_all=True)

    def _complete(self) -> bool:
        self.run_passes()
        if self._checks.look_at_gradients and self._gradients and not self._gradients.are_finite():
            self.is_open = False
            raise FloatingPointError(_NOT_FINITE.format(what="the gradient of the window"))
        return super()._complete()

    def _undo_all(self) -> None:
        if self._lockstep is not None:
            self._lockstep.undo()
        self._policy.left = self._left
        super()._undo_all()

    def _begin_lockstep(self) -> Lockstep:
        self._random_state = RandomState()
        is_new = any(not param.is_initialized for param in self._optimizer.target.params())
        is_first = is_new or self._policy.meets is None
        is_careful = is_new or self._policy.draws_carefully
        draws = Draws(is_careful, may_begin=not self._runs_at_once, may_initialize=is_first)
        return Lockstep(self._policy, self._all_links(), draws, self._end_of_pass)

    def _all_links(self) -> List[chainer.Link]:
        """Returns the links of the window, and those that its loss functions name."""
        return [*self.links, *links_behind(*[queued.function for queued in self._queue])]

    def _end_lockstep(self) -> None:
        if self._lockstep is not None:
            self._lockstep.end()

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
        self._reports = [(reported, self.report_weight)]

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
        self._policy.left = self._left
        self._begin()
        self.num_micro_batches = len(self._queue)
        self.is_open = False

    def _run(self) -> Lockstep:
        """Runs all passes, or completes those that have begun."""
        self.weights.expect(sum(queued.weight for queued in self._queue if not callable(queued.weight)))
        lockstep = self._lockstep
        if lockstep is None:
            lockstep = self._lockstep = self._begin_lockstep()
            for queued in self._queue:
                self._start(lockstep, queued)
        lockstep.run(self._gradients.adding)
        return lockstep

    def _start(self, lockstep: Lockstep, queued: _Queued) -> None:
        lockstep.start(functools.partial(self._evaluate, queued.function, queued.weight), queued.num_examples)

    def _evaluate(self, function: Callable[[], Any], weight: Union[float, Callable[[], Any]]) -> _Evaluated:
        """Computes the losses of a pass, and waits for the others if their weights have not been known before."""
        losses = evaluate(function, weight)
        report_weight = losses.report_weight()  # it looks for the arrays of the losses, which may move while they wait
        factors: Optional[Sequence[float]] = None
        if losses.num_pairs > 0 or callable(weight):
            factors = [1.0] * len(losses.weights)
            current = current_pass()
            if self._options.is_mean and current is not None:
                factors = factors_of(losses, current.gather("the weight", losses.weights))
        return _Evaluated(losses, factors, report_weight)

    def _end_of_pass(self, index: int, ended: Pass) -> None:
        """Runs the backward pass of a loss, up to where the pass last waited."""
        evaluated: _Evaluated = ended.loss
        finding = self._checks.find(evaluated.losses) if evaluated.losses.has_weight else None
        if finding is not None:
            raise FloatingPointError(_NOT_FINITE.format(what=f"micro-batch {index + 1} of the window, {finding},"))
        assert self._lockstep is not None
        with self._lockstep.backward():
            self._gradients.add_losses(evaluated.losses, factors=evaluated.factors)
        self._reports.append((ended.reported, evaluated.report_weight))

    def _deliver(self) -> None:
        """Hands on what the passes have reported."""
        for reported, weight in self._reports:
            if self._on_reported is not None:
                self._on_reported(reported, weight)
        self._reports = []


def _done() -> None:
    """Takes the place of a function that is not needed any more."""
