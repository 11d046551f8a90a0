"""Functions that draw random numbers: which they are, and where passes wait to draw."""

from __future__ import annotations

import functools
import types
from typing import Any, List, Optional, Sequence, Tuple

import chainer
from chainer.functions.noise.dropout import Dropout
from chainer.functions.noise.simplified_dropconnect import SimplifiedDropconnect

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.generators import State, go_to, now
from chainer_accum.lockstep.stage import copy_of
from chainer_accum.lockstep.visits import Visit

_SETTINGS = (bool, int, float, str)
_NOT_EXAMPLES = (
    "a function that draws random numbers must have the examples along its first axis when passes run in lockstep, got "
    "{label} for an input of shape {shape} and {num} examples; move the axis with F.transpose or F.moveaxis, or set "
    "lockstep=None"
)


class DrawVisit(Visit):
    """The part of one micro-batch where a function draws random numbers."""

    name = "a function that draws random numbers"

    def __init__(
        self, function: chainer.FunctionNode, in_data: Tuple[Array, ...], is_ahead: bool, is_shared: bool
    ) -> None:
        self.description = f"{kind_of(function)}, for an input of shape {in_data[0].shape}"
        self.key = (self.name, kind_of(function), *[array.shape[1:] for array in in_data])
        self.before: Optional[State] = None  # where this pass draws, if all have drawn ahead
        self._is_shared = is_shared
        self._ahead = (copy_of(function), in_data) if is_ahead else None

    def merge(self, visits: Sequence[Visit]) -> None:
        if self._ahead is None:
            return
        start = now()
        for visit in visits:
            assert isinstance(visit, DrawVisit) and visit._ahead is not None
            if self._is_shared:
                go_to(start)
            visit.before = now()
            function, in_data = visit._ahead
            visit._ahead = None
            function.forward(in_data)


def may_draw(function: chainer.FunctionNode) -> bool:
    """Returns whether the forward pass of a function may draw random numbers."""
    kind: Any = type(function.function if isinstance(function, chainer.FunctionAdapter) else function)
    return _mentions_random(kind) and getattr(function, "mask", None) is None  # a mask that was drawn before


def kind_of(function: chainer.FunctionNode) -> str:
    """Returns what a function that draws is, with its settings, such as the ratio of dropout."""
    of = function.function if isinstance(function, chainer.FunctionAdapter) else function
    settings = [f"{name}={value!r}" for name, value in sorted(vars(of).items()) if isinstance(value, _SETTINGS)]
    return f"{function.label}({', '.join(settings)})"


def check_rows(function: chainer.FunctionNode, x: Array, num_examples: Optional[int]) -> None:
    """Raises RuntimeError unless a function that draws may have the examples along its first axis."""
    if num_examples is not None and (x.ndim == 0 or x.shape[0] % num_examples != 0):
        raise RuntimeError(_NOT_EXAMPLES.format(label=function.label, shape=x.shape, num=num_examples))


def draws_once(function: chainer.FunctionNode) -> bool:
    """Returns whether a function that draws does so once for the whole batch."""
    return isinstance(function, SimplifiedDropconnect) and not function.use_batchwise_mask


def draw_mask(function: chainer.FunctionNode, x: Array) -> None:
    """Draws the mask of dropout ahead, so that it is kept and not drawn again.

    The state of a device's generator cannot be read.

    """
    if isinstance(function, Dropout):
        with device_of(x):
            flags = chainer.backend.get_array_module(x).random.random_sample(x.shape) >= function.dropout_ratio
            function.mask = flags * x.dtype.type(1 / (1 - function.dropout_ratio))


@functools.lru_cache(maxsize=None)
def _mentions_random(kind: Any) -> bool:
    """Returns whether a method of a class mentions a random generator."""
    methods: List[types.FunctionType] = []
    for base in kind.__mro__:
        if base is not chainer.FunctionNode and base is not chainer.Function:
            methods += [each for each in vars(base).values() if isinstance(each, types.FunctionType)]
    names = {name for method in methods for name in method.__code__.co_names}
    return any(part in name for name in names for part in ("random", "sampler"))
