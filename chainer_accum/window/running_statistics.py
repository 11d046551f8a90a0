"""RunningStatistics: running averages of batch normalization that move once per window, not once per micro-batch.

Batch normalization moves its running averages during the forward pass, by the mean and variance of its input. With
micro-batches, this happens too often, and with statistics of too few examples. So while a pass runs, each function that
normalizes a batch gets temporary arrays and a decay of 0, and leaves its statistics in these arrays. This works no
matter who calls the function: a link, a subclass with an input of its own, or the user. The statistics of all
micro-batches are merged into those of the window, which move the running averages.
"""

from __future__ import annotations

import contextlib
import sys
from types import CodeType, FrameType
from typing import ContextManager, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import chainer
import chainer.links as L
import numpy
from chainer.functions.normalization.batch_normalization import BatchNormalization
from chainer.functions.normalization.batch_renormalization import BatchRenormalizationFunction

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep import Moments
from chainer_accum.state import PersistentValues

# The position of a call, as the chain of calls from the pass, and how often it was called there before.
_Call = Tuple[Tuple[Tuple[CodeType, int], ...], int]


class _Loan:
    """Temporary arrays in place of a function's running averages.

    Args:
        function: The function that normalizes.
        names (tuple of str): Names of its attributes for the running mean and variance.

    """

    def __init__(
        self, function: Union[BatchNormalization, BatchRenormalizationFunction], names: Tuple[str, str]
    ) -> None:
        self.function = function
        self._names = names
        self.averages = tuple(getattr(function, name) for name in names)
        self.decay = function.decay

    def begin(self) -> None:
        """Replaces the running averages by copies, since some functions also normalize by their values."""
        for name, average in zip(self._names, self.averages):
            with device_of(average):
                setattr(self.function, name, average.copy())
        self.function.decay = 0.0

    def end(self) -> Tuple[Array, Array]:
        """Restores the running averages, and returns the mean and the variance that the function computed."""
        mean, variance = (getattr(self.function, name) for name in self._names)
        for name, own in zip((*self._names, "decay"), (*self.averages, self.decay)):
            setattr(self.function, name, own)
        return mean, variance


class _Move(NamedTuple):
    """A single move of running averages."""

    averages: Tuple[Array, ...]
    decay: float
    moments: Moments


Moves = Dict[int, Dict[_Call, _Move]]  # by id of the running mean


class _Collector(chainer.FunctionHook):
    """Function hook that collects the moves of running averages, by average and by call."""

    def __init__(self, is_collecting: bool = True) -> None:
        self.name = f"chainer_accum.RunningStatistics at {id(self):#x}"  # windows may be nested
        self._moves: Moves = {}
        self._is_collecting = is_collecting
        self._pass: Optional[FrameType] = None
        self._loan: Optional[_Loan] = None

    def __enter__(self) -> Moves:
        self._pass = sys._getframe(1)
        super().__enter__()
        return self._moves

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Removes the hook, wherever it was interrupted."""
        chainer.get_function_hooks().pop(self.name, None)
        self._pass = self._loan = None

    def forward_preprocess(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        self._loan = None
        if self._is_collecting and _collectors()[-1] is self:  # what runs in an inner window belongs to that window
            self._loan = _make_loan(function)
            if self._loan is not None:
                self._loan.begin()

    def forward_postprocess(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        loan, self._loan = self._loan, None
        if loan is None:
            return
        mean, variance = loan.end()
        with device_of(mean):
            count = in_data[0].size // mean.size
            # The function computes the unbiased estimate; merging needs the variance of the values themselves.
            moments = Moments(count, mean.astype(numpy.float64), variance.astype(numpy.float64) * ((count - 1) / count))
        moves = self._moves.setdefault(id(loan.averages[0]), {})
        site, times = self._site(), 0
        while (site, times) in moves:
            times += 1
        moves[site, times] = _Move(loan.averages, loan.decay, moments)

    def _site(self) -> Tuple[Tuple[CodeType, int], ...]:
        """Returns the calls that lead from the pass to this point, outermost first."""
        calls = []
        frame: Optional[FrameType] = sys._getframe(1)
        while frame is not None and frame is not self._pass:
            calls.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return tuple(reversed(calls))


class RunningStatistics:
    """The batch statistics of a window, for all functions that normalize batches and keep running averages.

    These are :func:`~chainer.functions.batch_normalization` and :func:`~chainer.functions.batch_renormalization`. The
    inputs of the same call with the same averages count as one batch over all micro-batches. So a link that is called
    twice in a pass moves its averages twice.

    Args:
        target (~chainer.Link): Model, whose links may count how often they have been fine-tuned.
        is_collecting (bool): Whether to collect at all. If not, running averages move as usual.

    """

    def __init__(self, target: chainer.Link, is_collecting: bool) -> None:
        self._is_collecting = is_collecting
        links = target.links() if is_collecting else ()
        self._counts = [(link, link.N) for link in links if isinstance(link, L.BatchNormalization)]
        self._moves: Moves = {}
        self._collector: Optional[_Collector] = None

    def collecting(self) -> ContextManager[Moves]:
        """Context manager in which running averages do not move. It yields the moves that they would have made."""
        if self._is_collecting:
            self._collector = _Collector()
        elif _collectors():  # those of an outer window, which must not see the passes of this one
            self._collector = _Collector(is_collecting=False)
        return self._collector or contextlib.nullcontext({})

    def add(self, moves: Moves) -> None:
        """Adds the moves collected from one micro-batch."""
        for averages, new in moves.items():
            known = self._moves.setdefault(averages, {})
            for call, move in new.items():
                if call in known:
                    known[call].moments.merge(move.moments)
            if not new.keys() <= known.keys():
                calls = _in_order(list(known), list(new))
                self._moves[averages] = {call: known.get(call) or new[call] for call in calls}

    def update(self, stored: Sequence[PersistentValues]) -> None:
        """Moves the running averages, once for each call, after they have been stored."""
        finetuned = {id(link.avg_mean): (link, count) for link, count in self._counts if link.N != count}
        for link, count in finetuned.values():
            link.N = count
        for averages, decay, moments in [move for moves in self._moves.values() for move in moves.values()]:
            if id(averages[0]) in finetuned:
                link = finetuned[id(averages[0])][0]
                link.N += 1
                decay = 1.0 - 1.0 / link.N
            for average in averages:
                for each in stored:
                    each.add(average)
            moments.move(averages, decay)
        self._moves.clear()

    def end(self) -> None:
        """Cleans up after an interrupted pass."""
        if self._collector is not None:
            self._collector.end()


def _in_order(known: List[_Call], new: List[_Call]) -> List[_Call]:
    """Returns calls in the order in which a pass that makes all of them would make them.

    A pass gives the order of the calls that it makes. Calls that it does not order are sorted by their position in the
    program.

    """
    order = list(known)
    for index, call in enumerate(new):
        if call in order:
            continue
        later = [order.index(other) for other in new[index + 1 :] if other in order]
        if index > 0:
            order.insert(order.index(new[index - 1]) + 1, call)
        elif later:
            order.insert(min(later), call)
        else:
            order.insert(sum(_place(other) < _place(call) for other in order), call)
    return order


def _place(call: _Call) -> Tuple[List[int], int]:
    site, times = call
    return [line for _, line in site], times


def _collectors() -> List[_Collector]:
    return [hook for hook in chainer.get_function_hooks().values() if isinstance(hook, _Collector)]


def _make_loan(function: chainer.FunctionNode) -> Optional[_Loan]:
    if isinstance(function, BatchNormalization) and function.running_mean is not None:
        return _Loan(function, ("running_mean", "running_var"))
    old = getattr(function, "function", None)  # an old-style function; Chainer has one such function left
    if isinstance(old, BatchRenormalizationFunction) and old.update_statistics:
        return _Loan(old, ("_running_mean", "_running_var"))
    return None
