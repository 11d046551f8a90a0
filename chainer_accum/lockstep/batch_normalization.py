"""Batch normalization in lockstep: each micro-batch is normalized by the mean and variance of the whole window.

The function is given an implementation that takes the statistics of the window instead of computing them, through
Chainer's own extension point. In the backward pass, the gradient of an input depends on sums over the window. So the
implementation keeps the gradient of its output, and the gradient of the input follows when all sums are known.
"""

from __future__ import annotations

import warnings
from typing import Any, List, Optional, Sequence, Tuple, Union

import chainer
import numpy
from chainer.functions.normalization.batch_normalization import BatchNormalization, GeneralBatchNormalizationImpl

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.crossing import Crossing, Gate
from chainer_accum.lockstep.moments import Moments, Moves, expander_of, sum_in_pairs
from chainer_accum.lockstep.store import Kept, MemoryStore
from chainer_accum.lockstep.tape import Tape
from chainer_accum.lockstep.visits import Visit

_NESTED = (
    "the gradient of batch normalization must not be computed in a loss function whose passes run in lockstep, got "
    "backward() or chainer.grad() through it; leave it to the update, or set lockstep=None"
)


class _OfWindow:
    """What all visits of one meeting share: the statistics, and the sums of the backward pass."""

    def __init__(self, moments: Moments, moves: Moves) -> None:
        self.moments = moments
        self.sums: Optional[List[Array]] = None  # of gy and of gy * x_hat
        self._moves = moves
        self._has_moved = False

    def move(self, averages: Tuple[Array, ...], decay: float) -> None:
        """Moves the running averages, when the first pass goes on."""
        if not self._has_moved:
            self._has_moved = True
            for average in averages:
                self._moves.add(average)
            self.moments.move(averages, decay)


class NormalizationVisit(Visit):
    """The part of one micro-batch in a batch normalization.

    Args:
        x: Input array. Only its moments are kept.
        axis (tuple of int): Axes over which the statistics are taken.
        store (MemoryStore): Where to keep gradients.
        gate (Gate): Whether backward passes may run.
        moves (Moves): Where to note the running averages that move.
        of: The link that normalizes, or the running mean, if any.

    """

    name = "batch normalization"

    def __init__(
        self, x: Array, axis: Tuple[int, ...], store: MemoryStore, gate: Gate, moves: Moves, of: object
    ) -> None:
        self.axis = axis
        kept = tuple(size for index, size in enumerate(x.shape) if index not in axis)
        self.of = of
        self.description = f"an input of shape {x.shape}, with statistics of shape {kept}"
        self.key = (self.name, id(of), x.ndim, axis, kept, x.dtype.str)
        self.moments = Moments.of(x, axis)
        self._expander = expander_of(x.ndim, axis)
        self._store = store
        self._gate = gate
        self._moves = moves
        self._input: Union[Crossing, chainer.Variable, None] = None
        self._gy: Optional[Kept] = None
        self._sums: Optional[List[Array]] = None
        self._window = _OfWindow(self.moments, moves)

    def merge(self, visits: Sequence[Visit]) -> None:
        moments = self.moments.copy()
        for visit in visits:
            assert isinstance(visit, NormalizationVisit)
            if visit is not self:
                moments.merge(visit.moments)
        self._window = _OfWindow(moments, self._moves)
        for visit in visits:
            assert isinstance(visit, NormalizationVisit)
            visit._window = self._window

    def enter(self, function: BatchNormalization) -> None:
        """Makes a function normalize by the statistics of the window."""
        implementation = _Implementation(self)
        if self.moments.count == 1:
            function.__class__ = _QuietBatchNormalization
        function._impl_selector = lambda function, inputs: implementation

    def note_inputs(self, tape: Tape, nodes: Sequence[chainer.variable.VariableNode]) -> None:
        """Called with the nodes of the function's inputs."""
        self._input = tape.crossing_of(nodes[0])
        if self._input is None and nodes[0].requires_grad:
            self._input = nodes[0].get_variable_or_none()  # a leaf of the graph, such as a parameter

    def statistics(self, dtype: numpy.dtype) -> Tuple[Array, Array]:
        """Returns the mean and the variance of the window."""
        moments = self._window.moments
        return moments.mean.astype(dtype), moments.variance.astype(dtype)

    def move(self, averages: Tuple[Array, ...], decay: float) -> None:
        """Moves running averages, once for all micro-batches."""
        self._window.move(averages, decay)

    def note_scale(self, gamma: Array, inv_std: Array) -> None:
        """Called in the forward pass with what the gradient of the input is multiplied by."""
        self._gamma, self._inv_std = gamma, inv_std

    def backward(self, gamma: Array, gy: Array, x: Array, mean: Array, inv_std: Array) -> Tuple[Array, ...]:
        """Returns a gradient of zero for the input, and this micro-batch's gradients of gamma and beta."""
        if not self._gate.is_open:
            raise RuntimeError(_NESTED)
        difference = x - mean[self._expander]
        difference *= gy
        sum_gy = sum_in_pairs(gy, self.axis)
        sum_gy_x_hat = sum_in_pairs(difference, self.axis) * inv_std
        self._add(gy, [sum_gy, sum_gy_x_hat])
        xp = chainer.backend.get_array_module(x)
        zero = xp.broadcast_to(xp.zeros((), x.dtype), x.shape)
        return zero, sum_gy_x_hat.astype(gamma.dtype), sum_gy.astype(gamma.dtype)

    def merge_gradients(self, visits: Sequence[Visit]) -> None:
        parts = [visit._sums for visit in visits if isinstance(visit, NormalizationVisit) and visit._sums is not None]
        if parts:
            with device_of(parts[0][0]):
                self._window.sums = [sum(sums[1:], sums[0]) for sums in zip(*parts)]

    def add_gradients(self) -> None:
        sums, source = self._window.sums, self._input
        if sums is None or source is None or not source.requires_grad:
            return
        x = source.get() if isinstance(source, Crossing) else source.array
        with device_of(x):
            dtype = numpy.promote_types(x.dtype, self._gamma.dtype)
            count, expander = self._window.moments.count, self._expander
            mean, _ = self.statistics(dtype)
            sum_gy, sum_gy_x_hat = sums
            gx = x - mean[expander]
            gx *= (self._inv_std * (sum_gy_x_hat / -count)).astype(dtype)[expander]
            gx += (sum_gy / -count).astype(dtype)[expander]
            if self._gy is not None:
                gx += self._gy.get()
                self._gy.free()
            gx *= (self._gamma * self._inv_std).astype(dtype)[expander]
            gx = gx.astype(x.dtype, copy=False)
        self._gy = None
        if isinstance(source, Crossing):
            source.add_grad(gx)
        else:
            chainer.backward([source], [chainer.Variable(gx)])

    def _add(self, gy: Array, sums: List[Array]) -> None:
        """Adds a gradient of the output, of which there is one for each loss after the last meeting."""
        self._sums = sums if self._sums is None else [total + each for total, each in zip(self._sums, sums)]
        if self._input is None or not self._input.requires_grad:
            return
        if self._gy is not None:
            gy = self._gy.get() + gy
            self._gy.free()
        self._gy = self._store.put(gy)


class _QuietBatchNormalization(BatchNormalization):
    """Batch normalization of a single value, which is not alone in the window, as Chainer would warn."""

    label = "BatchNormalization"

    def forward(self, inputs: Tuple[Array, ...]) -> Tuple[Array, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return super().forward(inputs)


class _Implementation(GeneralBatchNormalizationImpl):
    """Computes batch normalization for one visit."""

    def __init__(self, visit: NormalizationVisit) -> None:
        self._visit = visit

    def forward(
        self,
        axis: Tuple[int, ...],
        gamma: Array,
        x: Array,
        x_layout: Any,
        xp: Any,
        expander: Any,
        beta: Array,
        eps: float,
        decay: float,
        running_mean: Optional[Array],
        running_var: Optional[Array],
    ) -> Tuple[Any, ...]:
        outcome = super().forward(axis, gamma, x, x_layout, xp, expander, beta, eps, decay, None, None)
        y, y_layout, _, _, mean, var, inv_std, _ = outcome
        self._visit.note_scale(gamma, inv_std)
        if running_mean is not None:
            self._visit.move((running_mean, running_var), decay)
        return y, y_layout, running_mean, running_var, mean, var, inv_std, None

    def get_mean_and_var(
        self, axis: Tuple[int, ...], gamma: Array, x: Array, xp: Any, interm_dtype: numpy.dtype
    ) -> Tuple[Array, Array]:
        return self._visit.statistics(interm_dtype)

    def backward(
        self,
        axis: Tuple[int, ...],
        gamma: Array,
        gy: Array,
        x: Array,
        x_layout: Any,
        xp: Any,
        expander: Any,
        mean: Array,
        inv_std: Array,
        eps: float,
        var: Optional[Array],
        forward_data: Any,
    ) -> Tuple[Optional[Array], ...]:
        gx, ggamma, gbeta = self._visit.backward(gamma, gy, x, mean, inv_std)
        return gx, None, ggamma, gbeta
