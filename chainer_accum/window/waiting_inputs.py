"""The inputs of a pass that waits: they must not change until it runs."""

from __future__ import annotations

import functools
import types
from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

import chainer
import numpy

from chainer_accum.lockstep import checksum
from chainer_accum.state import captured_by

# Values, each with the checksum of its arrays in host memory.
Inputs = Sequence[Tuple[Any, int]]


def inputs_of(function: Callable[..., Any]) -> Inputs:
    """Returns what a function takes from outside when it is called: arguments, closure and globals."""
    if not isinstance(function, functools.partial):
        return ()
    captured = captured_by(function.func) if isinstance(function.func, types.FunctionType) else []
    values = [*function.args, *function.keywords.values(), *captured]
    return [(value, sum(map(checksum, _arrays_in(value)))) for value in values]


def check_inputs(number: int, function: Callable[..., Any], inputs: Inputs) -> None:
    """Raises RuntimeError unless a pass still has its inputs. It is micro-batch ``number``, counted from 1."""
    if not all(value is other and known == new for (value, known), (other, new) in zip(inputs, inputs_of(function))):
        raise RuntimeError(
            "what window.add is given must stay as it is until the end of the block when passes run in lockstep, "
            f"got a variable or an array that has changed since micro-batch {number} was added; pass new arrays as "
            "arguments: window.add(model, x, t), or window.add(lambda x=x, t=t: model(x, t))"
        )


def count_rows(values: Iterable[Any]) -> Optional[int]:
    """Returns the number of examples, as far as the arguments show it: the length that most arrays have."""
    lengths = [len(value) for value in values if getattr(value, "ndim", 0) > 0]
    return max(lengths, key=lengths.count) if lengths else None


def _arrays_in(value: Any) -> List[numpy.ndarray]:
    if isinstance(value, (tuple, list)):
        return [array for each in value for array in _arrays_in(each)]
    if isinstance(value, dict):
        return [array for each in value.values() for array in _arrays_in(each)]
    array = chainer.as_array(value)
    return [array] if isinstance(array, numpy.ndarray) and array.dtype != object else []
