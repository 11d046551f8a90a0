"""What a window leaves on links, for the next window to go on from."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, Optional, Sequence, Tuple

import chainer
import numpy

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.crossing import OUTSIDE


class RowsOfWindow(chainer.Variable):
    """A Variable that the micro-batches of a window have left, with a row for each example of the window.

    Args:
        array: Its array.
        has_graph (bool): Whether it had a graph, which is gone.

    """

    def __init__(self, array: Array, has_graph: bool) -> None:
        super().__init__(array)
        if has_graph:
            Ended(self)

    @classmethod
    def of(cls, parts: Sequence[RowsOfWindow]) -> RowsOfWindow:
        """Returns the rows of all micro-batches."""
        with device_of(parts[0].array):
            whole = parts[0].xp.concatenate([part.array for part in parts])
        return cls(whole, any(part.creator_node is not None for part in parts))

    def part(self, rows: slice) -> chainer.Variable:
        """Returns some rows, with as much of a graph as there is left."""
        part = chainer.Variable(self.array[rows])
        if self.creator_node is not None:
            Ended(part)
        return part


class Gone:
    """Stands for what the last pass of the last window has left, which no micro-batch must take for its own."""

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "what a link keeps from update to update must have a row for each example when passes run in lockstep, "
            f"got a use of {self.__dict__['name']!r}; keep a Variable of shape (n, d), set it in each pass before it "
            "is used, or set lockstep=None"
        )

    __class__ = property(_refuse)
    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = __setattr__ = __contains__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __neg__ = __abs__ = __pow__ = __rpow__ = __floordiv__ = __mod__ = __array__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __float__ = __int__ = __index__ = _refuse
    __hash__ = object.__hash__


class Ended(chainer.FunctionNode):
    """Stands for the graph of a window that has ended."""

    rank = 0

    def __init__(self, variable: chainer.Variable) -> None:
        self._source = chainer.Variable()
        self.inputs = (self._source.node,)
        self.outputs = (weakref.ref(variable.node),)
        variable.creator_node = self

    def forward(self, inputs: Tuple[Array, ...]) -> NoReturn:
        raise NotImplementedError

    def backward(self, indexes: Tuple[int, ...], grad_outputs: Tuple[Optional[chainer.Variable], ...]) -> NoReturn:
        shape = None if grad_outputs[0] is None else grad_outputs[0].shape
        raise RuntimeError(OUTSIDE.format(shape=shape))


_LARGE: Any = object()
_MOST = 4096
_PLAIN = (bool, int, float, complex, str, bytes, type(None), numpy.generic)


def simple(value: Any) -> Any:
    """Returns what can be compared of a value: plain values and small arrays as they are, or else a placeholder."""
    if isinstance(value, (chainer.Variable, *chainer.get_array_types())):
        array = chainer.as_array(value)
        return array if array is not None and array.size <= _MOST else _LARGE
    return _LARGE if isinstance(value, (list, tuple, dict, set)) else value


def are_same(value: Any, other: Any) -> bool:
    """Returns whether two results of :func:`simple` are the same. Objects of other kinds count as the same."""
    is_array = isinstance(value, chainer.get_array_types())
    if is_array and isinstance(other, type(value)) and value.shape == other.shape:
        with device_of(value):
            return bool(((value == other) | ((value != value) & (other != other))).all())  # NaN is equal to itself
    if is_array or isinstance(value, _PLAIN) or isinstance(other, _PLAIN):
        return not is_array and type(value) is type(other) and (value == other or value != value)
    return type(value) is type(other) and value is not _LARGE
