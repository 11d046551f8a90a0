"""Crossing: an array that crosses a cut of a graph, which is kept in a store, and its gradient."""

from __future__ import annotations

import weakref
from typing import NoReturn, Optional, Tuple

import chainer
import numpy

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.store import Kept, MemoryStore

NO_GRAPH = (
    "a loss function must not go back through the graph when passes run in lockstep, got backward(), chainer.grad() or "
    "unchain_backward() that reaches a layer where micro-batches wait for one another, where the graph is cut; stop it "
    "before with unchain(), or set lockstep=None"
)

OUTSIDE = (
    "a loss function must compute its loss itself when passes run in lockstep, got a Variable of shape {shape} with a "
    "graph from before the pass; compute it in the loss function, cut its graph with unchain() or reset_state(), or "
    "set lockstep=None"
)


_COLUMNS = 256


class Gate:
    """Whether backward passes may go through cuts. One object is shared by all tapes of a window."""

    is_open = False


class Crossing:
    """An array that a pass computes before a cut and uses after it, and its gradient.

    Args:
        store (MemoryStore): Where to keep the array and the gradient.
        array: The array.
        requires_grad (bool): Whether its gradient is of interest.

    Attributes:
        requires_grad (bool): See the argument.
        is_used (bool): Whether something after the cut uses the array.

    """

    def __init__(self, store: MemoryStore, array: Array, requires_grad: bool) -> None:
        self.requires_grad = requires_grad
        self.is_used = False
        self._store = store
        self._kept: Optional[Kept] = store.put(array)
        self._grad: Optional[Kept] = None

    def get(self) -> Array:
        """Returns the array."""
        assert self._kept is not None, "the array was freed"
        return self._kept.get()

    def is_same(self, array: Array) -> bool:
        """Returns whether an array has the same bits, or the array has been freed since nothing uses it."""
        return self._kept is None or _are_same(array, self._kept.get())

    def get_grad(self) -> Optional[Array]:
        """Returns the gradient, or ``None`` if there is none."""
        return None if self._grad is None else self._grad.get()

    def add_grad(self, grad: Array) -> None:
        """Adds a gradient. It is only read, since other objects may share it."""
        if _is_zero(grad) or not self.requires_grad:
            return
        if self._grad is not None:
            with device_of(grad):
                grad = self._grad.get() + grad
            self._grad.free()
        self._grad = self._store.put(grad)

    def unchain(self) -> None:
        """Stops gradients here."""
        self.requires_grad = False

    def free(self) -> None:
        """Frees the array and the gradient."""
        for kept in (self._kept, self._grad):
            if kept is not None:
                kept.free()
        self._kept = self._grad = None


class Cut(chainer.FunctionNode):
    """Stands for the function that has computed an array before a cut. Its backward pass collects the gradient.

    Args:
        crossing (Crossing): The array.
        gate (Gate): Whether backward passes may go through.
        variable (~chainer.Variable): Variable that has the array. The cut becomes its creator.

    """

    def __init__(self, crossing: Crossing, gate: Gate, variable: chainer.Variable) -> None:
        self._crossing = crossing
        self._gate = gate
        self._source = chainer.Variable()
        self.outputs = (weakref.ref(variable.node),)
        self.rank = variable.rank - 1
        variable.creator_node = self

    @property
    def inputs(self) -> Tuple[chainer.variable.VariableNode, ...]:  # type: ignore[override]
        if not self._gate.is_open:
            raise RuntimeError(NO_GRAPH)
        return (self._source.node,) if self._crossing.requires_grad else ()

    def forward(self, inputs: Tuple[Array, ...]) -> NoReturn:
        raise NotImplementedError

    def backward(
        self, indexes: Tuple[int, ...], grad_outputs: Tuple[Optional[chainer.Variable], ...]
    ) -> Tuple[None, ...]:
        (grad,) = grad_outputs
        if grad is not None:
            self._crossing.add_grad(grad.array)
        return (None,)


def _are_same(array: Array, other: Array) -> bool:
    """Returns whether two arrays have the same bits, where NaN counts as equal to itself."""
    if array is other:
        return True
    if array.shape != other.shape or array.dtype != other.dtype:
        return False
    with device_of(array):
        if isinstance(array, numpy.ndarray) and array.dtype.itemsize in (2, 4, 8) and array.dtype.kind == "f":
            kind = f"u{array.dtype.itemsize}"  # integers are compared faster, and NaN is equal to itself
            array, other = array.view(kind), other.view(kind)
        return bool((array == other).all())


def _is_zero(grad: Array) -> bool:
    """Returns whether a gradient is one zero that is spread over a shape, as far as this is known at once."""
    return isinstance(grad, numpy.ndarray) and grad.size > 1 and not any(grad.strides) and not grad.flat[0]


def checksum(array: Array) -> int:
    """Returns a number that hardly ever is the same for arrays that differ. This waits for a device."""
    with device_of(array):
        xp = chainer.backend.get_array_module(array)
        flat = array.ravel()
        if flat.nbytes % 8 == 0:
            flat = flat.view(numpy.uint64)
        elif flat.dtype.itemsize in (2, 4):
            flat = flat.view(f"u{flat.dtype.itemsize}")
        length = flat.size - flat.size % _COLUMNS
        table = flat[:length].reshape(-1, _COLUMNS)
        total = 0
        for part in (table.sum(axis=0, dtype=numpy.uint64), table.sum(axis=1, dtype=numpy.uint64), flat[length:]):
            # Odd factors, so that the order counts.
            factors = 2 * xp.arange(part.size, dtype=numpy.uint64) + numpy.uint64(1)
            total = total * 31 + int((part.astype(numpy.uint64) * factors).sum())
        return total
