"""RecordedArray: views of large arrays that save what is about to be overwritten.

Copying a large array, such as a memory bank, takes as long as many passes, while a pass writes only a few of its rows.
So the passes get a view of the array, which saves only what they overwrite.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy

LARGE = 2**20  # in bytes; larger arrays are recorded rather than copied

# NumPy functions that write to an argument, or pass a view of one to the caller's function.
_WRITERS = {"apply_along_axis", "apply_over_axes", "copyto", "fill_diagonal", "nan_to_num", "piecewise", "place"}
_WRITERS |= {"put", "put_along_axis", "putmask"}
_WRITING_METHODS = {"byteswap", "fill", "itemset", "partition", "put", "resize", "setfield", "sort", "__dlpack__"}
_POINTERS = ("__array_interface__", "__array_struct__", "ctypes", "data", "flat")  # they give access to the memory
_UNSIGNED_OUT = {"concatenate": 2, "dot": 2}  # the position of ``out``; other functions have a signature


class _Entry(NamedTuple):
    """Elements that were overwritten: the position of the view in the array, the key, and the old values."""

    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]
    dtype: numpy.dtype
    key: Any
    old: numpy.ndarray


class Journal:
    """Record of what was overwritten in a C-contiguous array, without a reference to the array.

    Attributes:
        nbytes (int): Number of bytes saved so far, before the whole array is saved.

    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._entries: List[_Entry] = []
        self._copy: Optional[numpy.ndarray] = None  # once the entries would be as large as the array

    @property
    def has_all(self) -> bool:
        """Whether the whole array is saved."""
        return self._copy is not None

    def record(self, array: numpy.ndarray, view: numpy.ndarray, key: Any = ...) -> None:
        """Saves ``view[key]``, which is about to be overwritten, if ``view`` is a view of the array."""
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
        """Saves the whole array, as it was before the first recorded write.

        After that, nothing else needs to be recorded.

        """
        if self._copy is None:
            start = array.copy()
            self._undo(start)
            self._copy = start
            self._entries.clear()

    def undo(self, array: numpy.ndarray) -> None:
        """Restores the array. If interrupted, it can be called again."""
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
    """An array whose writes are recorded in one or more journals.

    Args:
        array (numpy.ndarray): An array for which :func:`can_be_recorded` returns ``True``.

    Attributes:
        array (numpy.ndarray): The array.
        journals (list of Journal): The journals that save what is about to be overwritten.

    """

    def __init__(self, array: numpy.ndarray) -> None:
        self.array = array
        self.journals: List[Journal] = []

    def view(self, array: Optional[numpy.ndarray] = None) -> RecordedArray:
        """Returns a view of the whole array, or of a part, that records writes to it."""
        view = (self.array if array is None else array).view(RecordedArray)
        view.recording = self
        return view

    def record(self, view: numpy.ndarray, key: Any = ...) -> None:
        """Saves ``view[key]`` in each journal."""
        for journal in self.journals:
            journal.record(self.array, view, key)

    def plain(self, view: RecordedArray) -> numpy.ndarray:
        """Returns the plain array behind a view: the array itself, or a part of it."""
        plain = view.view(numpy.ndarray)
        array = self.array
        is_whole = _address(plain) == _address(array) and plain.dtype == array.dtype
        return array if is_whole and (plain.shape, plain.strides) == (array.shape, array.strides) else plain


class RecordedArray(numpy.ndarray):
    """View of an array that records writes to it and to views of it.

    Results that NumPy computes from it are plain arrays. A function that asks for the memory address through an
    attribute is assumed to overwrite everything. But the C interface and :func:`numpy.asarray` bypass the view, so
    writes through them cannot be undone.

    Attributes:
        recording (Recording): The recording to which the view belongs.

    """

    recording: Optional[Recording] = None

    def __array_finalize__(self, array: object) -> None:
        self.recording = getattr(array, "recording", None)

    def __getitem__(self, key: Any) -> Any:
        return _call(numpy.ndarray.__getitem__, (self, key), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        key = _plain(key, [])
        plain = _record(self, key)
        plain[key] = _plain(value, [])

    def __array_ufunc__(self, ufunc: Callable[..., Any], method: str, *inputs: Any, **kwargs: Any) -> Any:
        _record_all(kwargs.get("out"))
        if method == "at":
            _record(inputs[0], _plain(inputs[1], []))
        return _call(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function: Callable[..., Any], types: Iterable[type], args: Any, kwargs: Any) -> Any:
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


def can_be_recorded(array: object) -> bool:
    """Returns whether an array is large, and its views can be located in it."""
    if type(array) is not numpy.ndarray or array.nbytes < LARGE:
        return False
    return bool(array.dtype.kind in "biufc" and array.flags.c_contiguous and array.flags.writeable)


def is_alone(attributes: Dict[str, Any], name: str) -> bool:
    """Returns whether only this attribute refers to an array. Otherwise, writes may bypass the view."""
    if _references(attributes, name) > _ONE_REFERENCE:
        return False
    base = {"": attributes[name].base}
    if base[""] is None:
        return True
    # It may have been reshaped when it was created.
    is_plain = type(base[""]) is numpy.ndarray and base[""].base is None
    return is_plain and _references(base, "") <= _ONE_REFERENCE + 1


def _references(attributes: Dict[str, Any], name: str) -> int:
    return sys.getrefcount(attributes[name])


_ONE_REFERENCE = _references({"": numpy.empty(0)}, "")  # depends on the interpreter


def _address(array: numpy.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _record(array: Any, key: Any = ...) -> Any:
    """Records that an array is about to be written, and returns it as a plain array."""
    if not isinstance(array, RecordedArray):
        return array
    plain = array.view(numpy.ndarray)
    if array.recording is not None:
        array.recording.record(plain, key)
    return plain


def _record_all(values: object) -> None:
    arrays: List[RecordedArray] = []
    _plain(values, arrays)
    for array in arrays:
        _record(array)


def _plain(value: Any, found: List[RecordedArray]) -> Any:
    """Returns a value with plain arrays in place of recorded ones, which are appended to a list."""
    if isinstance(value, RecordedArray):
        found.append(value)
        return value.view(numpy.ndarray)
    if type(value) in (list, tuple):
        return type(value)([_plain(each, found) for each in value])
    if type(value) is dict:
        return {name: _plain(each, found) for name, each in value.items()}
    return value


def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function with plain arrays, and returns its result, with recording views where it shares memory."""
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


def _position_of_output(function: Callable[..., Any]) -> Optional[int]:
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
        _record_all((args[1:], kwargs.get("out")))  # ``out`` is never the first argument of a method
        return _call(method, (self, *args), kwargs)

    return call


def _recording_property(name: str) -> property:
    def get(self: RecordedArray) -> Any:
        plain = _record(self) if name in _POINTERS else self.view(numpy.ndarray)
        return _recorded(getattr(plain, name), [self])

    def set_value(self: RecordedArray, value: Any) -> None:
        setattr(_record(self), name, _plain(value, []))

    return property(get, set_value)


for _name in {name for name in dir(numpy.ndarray) if name[0] != "_"} | {"__dlpack__"}:
    # view() and setflags() apply to the view itself.
    if callable(getattr(numpy.ndarray, _name, None)) and _name not in ("view", "setflags"):
        setattr(RecordedArray, _name, _recording_method(_name))
for _name in ("real", "imag", *_POINTERS):
    setattr(RecordedArray, _name, _recording_property(_name))
