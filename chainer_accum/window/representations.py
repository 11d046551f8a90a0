"""Representations: the outputs of an encoder for the examples of a window, and their gradients.

A loss that compares examples is a function of these representations. Concatenated, they receive the gradient of that
loss. Then each micro-batch is encoded again, and propagates its part of the gradient to the parameters.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import chainer
import numpy

from chainer_accum._devices import Array, device_of

_Name = Union[str, int]
_Value = Union[chainer.Variable, Array]

_NO_REPLAY = (
    "encoder must return the same when it is called again with the same examples and random state, got something else; "
    "draw random numbers only from the global generators of random, numpy.random and cupy.random (for dropout, set "
    "chainer.config.use_cudnn = 'never'), and keep no state between calls except persistent values of the model"
)


class Representations:
    """The concatenated outputs of the encoder for all micro-batches, and their gradients after the loss has been added.

    Args:
        parts: The output for each micro-batch, by name. The Variables in it receive gradients.
        order: Positions in the window of the examples in the micro-batches, or nothing if they are in order.

    """

    def __init__(self, parts: Sequence[Dict[_Name, _Value]], order: Sequence[int]) -> None:
        self._whole: Dict[_Name, _Value] = {}
        self._rows: Dict[_Name, List[Any]] = {}  # slices, or arrays of indices
        self._differences: List[Array] = []  # whether each replayed output differs, as values on their device
        for name, first in parts[0].items():
            arrays = [chainer.as_array(part[name]) for part in parts]
            ends = numpy.cumsum([len(array) for array in arrays]).tolist()
            self._rows[name] = [slice(start, end) for start, end in zip([0, *ends], ends)]
            with device_of(arrays[0]):
                whole = chainer.backend.get_array_module(arrays[0]).concatenate(arrays)
                if order:
                    whole = self._put_in_order(name, whole, order)
            self._whole[name] = chainer.Variable(whole) if isinstance(first, chainer.Variable) else whole

    @property
    def has_gradient(self) -> bool:
        """Whether the loss depends on the output of the encoder."""
        return any(variable.grad is not None for variable in self._variables().values())

    def compare(self, loss_func: Callable[..., chainer.Variable]) -> chainer.Variable:
        """Returns the loss of all micro-batches together."""
        args = [value for name, value in self._whole.items() if isinstance(name, int)]
        loss = loss_func(*args, **{name: value for name, value in self._whole.items() if isinstance(name, str)})
        for variable in self._variables().values():
            variable.cleargrad()  # the loss function may have run a backward pass; parameters are cleared as well
        return loss

    def replay(self, index: int, encode: Callable[[], Any]) -> chainer.Variable:
        """Encodes a micro-batch again and returns a scalar whose backward pass starts from the cached gradients."""
        encoded = by_name(encode())
        outputs, grads = [], []
        for name, whole in self._variables().items():
            output, rows = encoded[name], self._rows[name][index]
            if output.shape != whole.array[rows].shape:
                raise RuntimeError(_NO_REPLAY)
            self._differences.append(_differs(output.array, whole.array[rows]))
            if whole.grad is not None:
                outputs.append(output)
                grads.append(whole.grad[rows])
        (scalar,) = _GivenGradients(grads).apply(outputs)
        return scalar

    def check_replay(self) -> None:
        """Raises RuntimeError unless the encoder returned the same values both times."""
        if any(map(bool, self._differences)):
            raise RuntimeError(_NO_REPLAY)

    def _put_in_order(self, name: _Name, rows: Array, order: Sequence[int]) -> Array:
        """Returns the rows as the examples are in the window, because a loss may depend on their order."""
        if len(rows) != len(order):
            raise ValueError(
                "encoder must return one row per example if the examples are sorted or grouped, got "
                f"{len(rows)} rows for {len(order)} examples; return several values for an example as a tuple"
            )
        positions = chainer.backend.get_array_module(rows).array(order)
        whole = rows.copy()
        whole[positions] = rows
        self._rows[name] = [positions[each] for each in self._rows[name]]
        return whole

    def _variables(self) -> Dict[_Name, chainer.Variable]:
        return {name: value for name, value in self._whole.items() if isinstance(value, chainer.Variable)}


class _GivenGradients(chainer.FunctionNode):
    """A scalar of value 0 whose backward pass gives the inputs the given gradients.

    The gradient of the scalar is ignored: it is the loss scale, which the given gradients already include.

    """

    def __init__(self, grads: Sequence[Array]) -> None:
        self._grads = grads

    def forward(self, inputs: Tuple[Array, ...]) -> Tuple[Array, ...]:
        xp = chainer.backend.get_array_module(*inputs)
        return (xp.zeros((), inputs[0].dtype),)

    def backward(
        self, indexes: Tuple[int, ...], grad_outputs: Tuple[Optional[chainer.Variable], ...]
    ) -> Tuple[chainer.Variable, ...]:
        return tuple(chainer.Variable(self._grads[index]) for index in indexes)


def by_name(encoded: Any) -> Dict[_Name, _Value]:
    """Returns the output of an encoder by the names or positions of the loss function's arguments."""
    by_name: Dict[_Name, _Value] = encoded if isinstance(encoded, dict) else {0: encoded}
    if isinstance(encoded, tuple):
        by_name = dict(enumerate(encoded))
    types = ", ".join(type(value).__name__ for value in by_name.values())
    if not all(isinstance(value, (chainer.Variable, *chainer.get_array_types())) for value in by_name.values()):
        raise TypeError(f"encoder must return Variables and arrays, got {types}; return a tuple or a dict of them")
    if any(value.ndim == 0 for value in by_name.values()):
        raise ValueError("encoder must return one row per example, got a scalar; compute means in loss_func")
    if not any(isinstance(value, chainer.Variable) for value in by_name.values()):
        raise TypeError(f"encoder must return a Variable, got {types}; return the representations with their graph")
    return by_name


def copies_of(encoded: Dict[_Name, _Value]) -> Dict[_Name, _Value]:
    """Returns copies, because an array may be a view that keeps a larger array alive."""
    copies = {}
    for name, value in encoded.items():
        with device_of(chainer.as_array(value)):
            array = chainer.as_array(value).copy()
        copies[name] = chainer.Variable(array) if isinstance(value, chainer.Variable) else array
    return copies


def _differs(array: Array, expected: Array) -> Array:
    """Returns whether two arrays differ by more than the order of additions can explain, as a value on their device.

    Values that are not finite do not count as different: loss scaling finds them.

    """
    if array.size == 0 or array.dtype.kind != "f":
        return False
    with device_of(array), numpy.errstate(invalid="ignore"):
        return abs(array - expected).max() > float(numpy.finfo(array.dtype).eps) ** 0.5 * abs(expected).max()
