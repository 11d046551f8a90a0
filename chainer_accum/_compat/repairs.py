"""What of Chainer 7.8.1 fails on newer versions of NumPy and SciPy, although all that it looks up is there.

Each entry of :data:`REPAIRS` has a call that works on the stack that Chainer was made for. Where the call fails, one
name in Chainer is replaced, and the results are those of that stack. Where it works, Chainer is left as it is, as it is
everywhere if the environment variable ``CHAINER_ACCUM_COMPAT=0`` is set.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any, Callable, NamedTuple, Type

import chainer.functions as F
import numpy
from chainer.dataset import convert
from chainer.distributions import categorical
from chainer.functions.array import pad_sequence
from chainer.functions.math import basic_math, sparse_matmul
from chainer.utils import CooMatrix

from chainer_accum._compat.names import is_switched_off


class Repair(NamedTuple):
    """A call that fails on newer stacks, and the name in Chainer whose replacement lets it work."""

    what: str
    why: str
    call: Callable[[], Any]
    error: Type[Exception]
    owner: Any
    name: str
    replace: Callable[[Any], Any]


def repair_chainer() -> None:
    """Replaces what fails, unless ``CHAINER_ACCUM_COMPAT=0``."""
    if is_switched_off():
        return
    for repair in REPAIRS:
        if is_needed(repair):
            setattr(repair.owner, repair.name, repair.replace(getattr(repair.owner, repair.name)))


def is_needed(repair: Repair) -> bool:
    """Returns whether the call fails, for the reason that the repair is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 1.24 to 1.26 warn of what NumPy 2 refuses
        try:
            repair.call()
        except Exception as error:  # such as a RuntimeError where there is no SciPy
            return isinstance(error, repair.error)
    return False


def _meshgrid_is_a_list(module: Any) -> Any:
    def meshgrid(*args: Any, **kwargs: Any) -> Any:
        return list(numpy.meshgrid(*args, **kwargs))

    return types.SimpleNamespace(**{**vars(module), "meshgrid": meshgrid})


def _forward_wraps_around(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, xs: Any) -> Any:
        try:
            return forward(self, xs)
        except OverflowError:
            self.padding = _as_array(self.padding)
            return forward(self, xs)

    return wrapper


def _wraps_around(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(array: Any, number: Any) -> Any:
        try:
            return function(array, number)
        except OverflowError:
            return function(array, _as_array(number))

    return wrapper


def _as_array(number: Any) -> Any:
    # From an array, another takes what is outside of the range of its type, and takes it modulo that range.
    return numpy.array(int(number))


def _multiplies_float32(matmul: Any) -> Any:
    # SciPy took float16 to float32 by itself. The dtype of the result is among the other arguments.
    @functools.wraps(matmul)
    def wrapper(data: Any, *args: Any) -> Any:
        return matmul(data.astype(numpy.float32) if data.dtype == numpy.float16 else data, *args)

    return wrapper


ZERO = numpy.zeros(1, numpy.int32)
BYTES = [numpy.zeros(1, numpy.uint8), numpy.zeros(2, numpy.uint8)]
HALF = numpy.ones((1, 1), numpy.float16)

REFUSED = "NumPy 2.0 refuses a Python int outside of the range of the type, which was taken modulo that range before"

REPAIRS = [
    Repair(
        what="Categorical.log_prob",
        why="numpy.meshgrid returns a tuple since NumPy 2.0, and log_prob adds a list to it",
        call=lambda: categorical.Categorical(p=numpy.ones((1, 1), numpy.float32)).log_prob(ZERO),
        error=TypeError,
        owner=categorical,
        name="numpy",
        replace=_meshgrid_is_a_list,
    ),
    Repair(
        what="F.pad_sequence of integers with a padding outside of their range, such as -1 for unsigned ones",
        why=REFUSED,
        call=lambda: F.pad_sequence(BYTES, padding=-1),
        error=OverflowError,
        owner=pad_sequence.PadSequence,
        name="forward",
        replace=_forward_wraps_around,
    ),
    Repair(
        what="concat_examples of integers with such a padding",
        why="NumPy 2.1 refuses such an int in numpy.full as well",
        call=lambda: convert.concat_examples(BYTES, padding=-1),
        error=OverflowError,
        owner=convert,
        name="_concat_arrays_with_padding",
        replace=_wraps_around,
    ),
    Repair(
        what="a Variable of integers and such a constant, as in x - 1, which adds -1, and x * -1 for unsigned ones",
        why=REFUSED,
        call=lambda: basic_math.add(BYTES[0], -1),
        error=OverflowError,
        owner=basic_math,
        name="_preprocess_const",
        replace=_wraps_around,
    ),
    Repair(
        what="F.sparse_matmul of float16",
        why="SciPy 1.15 refuses sparse matrices of float16",
        call=lambda: F.sparse_matmul(CooMatrix(HALF[0], ZERO, ZERO, (1, 1)), HALF),
        error=ValueError,
        owner=sparse_matmul,
        name="_coo_matmul_cpu",
        replace=_multiplies_float32,
    ),
]
