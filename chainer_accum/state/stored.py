"""Stored: objects that can go back to what they were.

A failed window is undone, an encoder runs twice from the same state, and a survey leaves no trace. Each of these stores
objects, also those that turn up during the passes, and restores them. The subclasses differ in what they store of an
object: :class:`PersistentValues` what passes change, :class:`TrainingState` what training changes.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Callable, Dict, Iterator, List, Optional

import chainer
from chainer.backends import cuda

from chainer_accum._devices import Array, device_of
from chainer_accum.state.random_state import RandomState
from chainer_accum.state.touched_links import Touches


class Stored:
    """Stored objects, each as it was when it was added.

    A subclass defines :meth:`_store`, which adds the object to ``_known``, and to ``_undo`` a function that restores
    it.

    """

    _looks_for_parameters = False  # whether backward passes change what is stored of a parameter
    _is_on_host = False  # whether arrays are copied to host memory

    def __init__(self) -> None:
        self._known: Dict[int, object] = {}  # by id, which is unique while the object is referred to
        self._undo: List[Callable[[], None]] = []
        self._touches: Optional[Touches] = None  # only inside following(), since it refers to this object

    @property
    def links(self) -> List[chainer.Link]:
        """The links that were added or found, with all links below them."""
        return [known for known in self._known.values() if isinstance(known, chainer.Link)]

    def add(self, value: object) -> None:
        """Stores an object, unless it is known. A :class:`RandomState` is restored to what it has stored."""
        if id(value) in self._known:
            return
        if isinstance(value, RandomState):
            self._undo.append(value.restore)
            self._known[id(value)] = value
        else:
            self._store(value)

    @contextlib.contextmanager
    def following(self, links: bool = True, functions: bool = True) -> Iterator[None]:
        """Context manager for passes that stores further links, running averages and parameters before they change.

        Blocks of several objects may be nested. :meth:`restore` ends the block of its own object.

        Args:
            links (bool): Whether to watch the links that are called, which takes about two microseconds per call.
            functions (bool): Whether to watch functions as well, which takes about two microseconds per call.
                Otherwise, running averages go unnoticed if they belong to no known or called link.

        """
        try:
            self._touches = Touches(self._known, self.add, links, functions, self._looks_for_parameters)
            self._begin_following(self._touches)
            yield
        finally:
            try:
                self._end_following()
            except BaseException:  # interrupted
                self._end_following()
                raise

    def restore(self) -> None:
        """Restores everything in place. It can be called any number of times, also after an interrupted call."""
        try:
            self._restore()
        except BaseException:  # interrupted; do not leave it half restored
            self._restore()
            raise

    def _store(self, value: object) -> None:
        raise NotImplementedError

    def _store_array(self, array: Array) -> None:
        """Stores the content of an array, unless it cannot be written."""
        if getattr(getattr(array, "flags", None), "writeable", True):
            with device_of(array):
                content = array.get() if self._is_on_host and isinstance(array, cuda.ndarray) else array.copy()
            self._undo.append(functools.partial(_write, array, content))
        self._known[id(array)] = array

    def _begin_following(self, touches: Touches) -> None:
        touches.begin()

    def _end_following(self) -> None:
        if self._touches is not None:
            self._touches.end()
            self._touches = None

    def _restore(self) -> None:
        self._end_following()
        for undo in self._undo:
            undo()


def _write(array: Array, content: Array) -> None:
    with device_of(array):
        array[...] = chainer.backend.get_array_module(array).asarray(content)
