"""Large arrays that are written to through views which remember what they overwrite.

A copy of a memory bank takes as long as many passes, and a pass writes a few of its rows. So instead of the array, the
passes are given a view of it. It saves what is about to be overwritten, and nothing else.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy

LARGE = 2**20  # bytes from which an array is recorded rather than copied

# Functions of NumPy that write to an argument, or that hand a view of one to a function of the caller's.
_WRITERS = {"apply_along_axis", "apply_over_axes", "copyto", "fill_diagonal", "nan_to_num", "piecewise", "place"}
_WRITERS |= {"put", "put_along_axis", "putmask"}
_WRITING_METHODS = {"byteswap", "fill", "itemset", "partition", "put", "resize", "setfield", "sort", "__dlpack__"}
# What gives others a way to the memory.
_POINTERS = ("__array_interface__", "__array_struct__", "ctypes", "data", "flat")
_UNSIGNED_OUT = {"concatenate": 2, "dot": 2}  # where these take ``out``; others have a signature to ask


class _Entry(NamedTuple):
    """What was overwritten: where the view lies in the array, which of its elements, and what they were."""

    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]
    dtype: Any
    key: Any
    old: Any


class Journal:
    """How to undo what has been written to a C-contiguous array, without holding the array itself.

    Attributes:
        nbytes (int): The bytes that are saved, until all are.

    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._entries: List[_Entry] = []
        self._copy: Any = None  # of the whole array, once the entries would be as large

    @property
    def has_all(self) -> bool:
        """Whether the whole array is saved."""
        return self._copy is not None

    def record(self, array: numpy.ndarray, view: numpy.ndarray, key: Any = ...) -> None:
        """Saves ``view[key]``, where the view is one of the array, and about to be written to there."""
        if self._copy is not None or not numpy.may_share_memory(view, array):
            return
        old = view[key]
        if self.nbytes + old.nbytes >= array.nbytes:
            self.record_all(array)
            return
        offset = _address(view) - _address(array)
        key = copy.deepcopy(key)
        self._entries.append(_Entry(offset, view.shape, view.strides, view.dtype, key, numpy.array(old)))
        self.nbytes += old.nbytes

    def record_all(self, array: numpy.ndarray) -> None:
        """Saves the whole array, as it was before anything was recorded. Nothing has to be recorded any more."""
        if self._copy is None:
            start = array.copy()
            self._undo(start)
            self._copy = start
            self._entries.clear()

    def undo(self, array: numpy.ndarray) -> None:
        """Gives the array what it had. If that is interrupted, it can be called again."""
        if self._copy is not None:
            array[...] = self._copy
            return
        self._undo(array)
        self._entries.clear()
        self.nbytes = 0

    def _undo(self, array: numpy.ndarray) -> None:
        for entry in reversed(self._entries):
            view: Any = numpy.ndarray(entry.shape, entry.dtype, array, entry.offset, entry.strides)
            view[entry.key] = entry.old


class Recording:
    """An array that is recorded, for one journal or several at a time.

    Args:
        array (numpy.ndarray): An array for which :func:`can_be_recorded`.

    Attributes:
        array (numpy.ndarray): The array.
        journals (list of Journal): Where to save what is about to be overwritten.

    """

    def __init__(self, array: numpy.ndarray) -> None:
        self.array = array
        self.journals: List[Journal] = []

    def view(self, array: Optional[numpy.ndarray] = None) -> RecordedArray:
        """Returns a view that records what is written to it, of the whole array or of a part."""
        view = (self.array if array is None else array).view(RecordedArray)
        view.recording = self
        return view

    def record(self, view: numpy.ndarray, key: Any = ...) -> None:
        """Saves ``view[key]`` in each journal."""
        for journal in self.journals:
            journal.record(self.array, view, key)

    def plain(self, view: RecordedArray) -> numpy.ndarray:
        """Returns what a view is a view of: the array itself, or a part of it."""
        plain = view.view(numpy.ndarray)
        array = self.array
        is_whole = _address(plain) == _address(array) and plain.dtype == array.dtype
        return array if is_whole and (plain.shape, plain.strides) == (array.shape, array.strides) else plain


class RecordedArray(numpy.ndarray):
    """A view of an array that records what is written to it, or to a view of it.

    What NumPy computes from it is a plain array. A function that asks for the address of the memory by an attribute is
    taken to overwrite everything. But neither the C interface nor :func:`numpy.asarray` asks the view, so what is
    written that way cannot be undone.

    Attributes:
        recording (Recording): What it is a view of.

    """

    recording: Optional[Recording] = None

    def __array_finalize__(self, array: Any) -> None:
        self.recording = getattr(array, "recording", None)

    def __getitem__(self, key: Any) -> Any:
        return _call(numpy.ndarray.__getitem__, (self, key), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        key = _plain(key, [])
        plain = _record(self, key)
        plain[key] = _plain(value, [])

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        _record_all(kwargs.get("out"))
        if method == "at":
            _record(inputs[0], _plain(inputs[1], []))
        return _call(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        is_known = (function.__module__ or "").split(".")[0] == "numpy" and function.__name__ not in _WRITERS
        output = kwargs.get("out")
        if not is_known:
            _record_all((args, kwargs))
        elif output is None and any(isinstance(each, RecordedArray) for each in args[1:]):
            position = _position_of_output(function)
            output = args[position] if position is not None and position < len(args) else None
        _record_all(output)
        return _call(function, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(numpy.ndarray).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.view(numpy.ndarray).__deepcopy__(memo)

    def __copy__(self) -> Any:
        return self.view(numpy.ndarray).copy()

    def __repr__(self) -> str:
        return repr(self.view(numpy.ndarray))


def can_be_recorded(array: Any) -> bool:
    """Returns whether an array is large, and such that its views can be found in it."""
    if type(array) is not numpy.ndarray or array.nbytes < LARGE:
        return False
    return bool(array.dtype.kind in "biufc" and array.flags.c_contiguous and array.flags.writeable)


def is_alone(attributes: Dict[str, Any], name: str) -> bool:
    """Returns whether nothing but this attribute refers to an array, or else writes may not go through the view."""
    if _references(attributes, name) > _ONE_REFERENCE:
        return False
    base = {"": attributes[name].base}
    if base[""] is None:
        return True
    # It was reshaped, perhaps, as it was made.
    is_plain = type(base[""]) is numpy.ndarray and base[""].base is None
    return is_plain and _references(base, "") <= _ONE_REFERENCE + 1


def _references(attributes: Dict[str, Any], name: str) -> int:
    return sys.getrefcount(attributes[name])


_ONE_REFERENCE = _references({"": numpy.empty(0)}, "")  # which depends on the interpreter


def _address(array: numpy.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _record(array: Any, key: Any = ...) -> Any:
    """Records that an array is about to be written to, and returns it as a plain one."""
    if not isinstance(array, RecordedArray):
        return array
    plain = array.view(numpy.ndarray)
    if array.recording is not None:
        array.recording.record(plain, key)
    return plain


def _record_all(values: Any) -> None:
    arrays: List[RecordedArray] = []
    _plain(values, arrays)
    for array in arrays:
        _record(array)


def _plain(value: Any, found: List[RecordedArray]) -> Any:
    """Returns a value with plain arrays in place of those that record, which are added to a list."""
    if isinstance(value, RecordedArray):
        found.append(value)
        return value.view(numpy.ndarray)
    if type(value) in (list, tuple):
        return type(value)([_plain(each, found) for each in value])
    if type(value) is dict:
        return {name: _plain(each, found) for name, each in value.items()}
    return value


def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function with plain arrays, and returns its result, with views that record where it shares memory."""
    found: List[RecordedArray] = []
    args, kwargs = _plain(args, found), _plain(kwargs, found)
    return _recorded(function(*args, **kwargs), found)


def _recorded(result: Any, arrays: List[RecordedArray]) -> Any:
    if isinstance(result, numpy.ndarray):
        for array in arrays:
            if array.recording is not None and numpy.may_share_memory(result, array.recording.array):
                return array.recording.view(result)
        return result
    if type(result) in (list, tuple):
        return type(result)([_recorded(each, arrays) for each in result])
    return result


def _position_of_output(function: Any) -> Optional[int]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return _UNSIGNED_OUT.get(function.__name__)
    names = [each.name for each in parameters if each.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return names.index("out") if "out" in names else None


def _recording_method(name: str) -> Callable[..., Any]:
    method = getattr(numpy.ndarray, name)

    def call(self: RecordedArray, *args: Any, **kwargs: Any) -> Any:
        if name in _WRITING_METHODS:
            _record(self)
        _record_all((args[1:], kwargs.get("out")))  # where methods take ``out``, it is never the first
        return _call(method, (self, *args), kwargs)

    return call


def _recording_property(name: str) -> Any:
    def get(self: RecordedArray) -> Any:
        plain = _record(self) if name in _POINTERS else self.view(numpy.ndarray)
        return _recorded(getattr(plain, name), [self])

    def set_value(self: RecordedArray, value: Any) -> None:
        setattr(_record(self), name, _plain(value, []))

    return property(get, set_value)


for _name in {name for name in dir(numpy.ndarray) if name[0] != "_"} | {"__dlpack__"}:
    # By view() and setflags(), the view itself is meant.
    if callable(getattr(numpy.ndarray, _name, None)) and _name not in ("view", "setflags"):
        setattr(RecordedArray, _name, _recording_method(_name))
for _name in ("real", "imag", *_POINTERS):
    setattr(RecordedArray, _name, _recording_property(_name))
