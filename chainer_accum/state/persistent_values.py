"""PersistentValues: stores the persistent values of links, such as running averages, and restores them.

A forward pass changes persistent values, and the changes of an abandoned pass must be undone.
"""

from __future__ import annotations

import weakref
from typing import Any, Dict, Iterable, List, Optional, Tuple

import chainer
import numpy

from chainer_accum._devices import Array
from chainer_accum.state.random_state import RandomState
from chainer_accum.state.recorded_arrays import Journal, RecordedArray, Recording, can_be_recorded, is_alone
from chainer_accum.state.stored import Stored
from chainer_accum.state.touched_links import Touches


class PersistentValues(Stored):
    """Stored persistent values and other state of links and all links below them.

    Other state means the variables and arrays to which attributes of a link refer, such as those of a recurrent layer.
    Parameters are not restored.

    Persistent arrays are copied, except large ones in host memory. For these, writes are recorded, but only inside
    :meth:`following`, where the attribute is a view of the array, a :class:`RecordedArray`. If something else refers to
    a large array as well, it is copied when the block begins.

    Args:
        links: Links whose values to store. Items may be ``None``.
        has_state (bool): Whether other state is restored as well, such as that of recurrent layers.

    """

    def __init__(self, links: Iterable[Optional[chainer.Link]], has_state: bool = True) -> None:
        super().__init__()
        self._has_state = has_state
        self._large: List[_LargeValue] = []
        for root in links:
            for link in () if root is None else root.links():
                if id(link) not in self._known:
                    self._store_link(link)

    @property
    def has_large_arrays(self) -> bool:
        """Whether there are arrays that can be restored only after passes inside :meth:`following`."""
        return bool(self._large)

    def checkpoint(self) -> PersistentValues:
        """Returns the current state of everything that is stored, including what was found later."""
        checkpoint = PersistentValues((), self._has_state)
        for known in self._known.values():
            checkpoint.add(known.checkpoint() if isinstance(known, RandomState) else known)
        return checkpoint

    def _store(self, value: object) -> None:
        if isinstance(value, chainer.get_array_types()) and not isinstance(value, RecordedArray):
            self._store_array(value)
        elif isinstance(value, chainer.Link):
            self._store_link(value)

    def _store_link(self, link: chainer.Link) -> None:
        attributes = _Attributes(link, self._has_state)
        for name in attributes.persistent:
            array: Array = attributes.contents.get(name)
            recording = array.recording if isinstance(array, RecordedArray) else None
            whole = None if recording is None else recording.array
            if whole is not None and (array.shape, array.strides) != (whole.shape, whole.strides):
                self._store_array(array)  # a part of an array that an outer context records
            elif whole is not None or can_be_recorded(array):
                attributes.contents[name] = _ELSEWHERE
                value = _LargeValue(link, name, array if whole is None else whole)
                self._large.append(value)
                self._undo.append(value.restore)
                if self._touches is not None:
                    del array, recording, whole  # value.follow() counts references
                    value.follow()
            elif id(array) not in self._known:
                self._store(array)
        self._undo.append(attributes.restore)
        self._known[id(link)] = link

    def _begin_following(self, touches: Touches) -> None:
        super()._begin_following(touches)
        for value in self._large:
            value.follow()

    def _end_following(self) -> None:
        for value in self._large:
            value.unfollow(self.links)
        super()._end_following()


_VARIABLE = chainer.Variable
_ELSEWHERE: Any = object()  # placeholder for an attribute that is stored elsewhere


class _Attributes:
    """The attributes of a link, as far as they are restored. One object is created per link and window."""

    __slots__ = ("link", "contents", "persistent", "_has_state", "_variables", "_hooks")

    def __init__(self, link: chainer.Link, has_state: bool) -> None:
        self.link = link
        self._has_state = has_state
        self.contents: Dict[str, Any] = vars(link).copy()
        # Chainer can list parameters, but has no public way to list persistent values.
        self.persistent = tuple(link._persistent)
        # For example, the loss of the previous pass, whose graph must not be kept.
        self._variables: List[Tuple[str, weakref.ref[chainer.Variable], Array, bool]] = []
        if _VARIABLE in map(type, self.contents.values()):
            for name, value in self.contents.items():
                if type(value) is _VARIABLE and value.creator_node is not None:
                    self._variables.append((name, weakref.ref(value), value.array, value.requires_grad))
                    self.contents[name] = _ELSEWHERE
        # The link's own hooks, which may mark it as initialized.
        hooks = self.contents.get("_local_link_hooks")
        self._hooks = [(vars(hook), dict(vars(hook))) for hook in hooks.values()] if hooks else []

    def restore(self) -> None:
        link, attributes = self.link, vars(self.link)
        for name in attributes.keys() - self.contents.keys() if self._has_state else ():
            if name in link._persistent or _is_state(attributes[name]):
                delattr(link, name)
                for actual, contents in self._hooks:
                    actual.update(contents)
        # A link that is still to be initialized determines its shape from its other attributes.
        is_lazy = any(self.contents.get(name) is None for name in self.persistent)
        for name, value in self.contents.items():
            is_state = self._has_state and _is_state(value) and _is_state(attributes.get(name))
            goes_back = is_lazy or name in self.persistent or is_state
            if goes_back and value is not _ELSEWHERE:
                attributes[name] = value
        for name, reference, array, requires_grad in self._variables:
            variable = reference()
            is_gone = variable is None
            attributes[name] = chainer.Variable(array, requires_grad=requires_grad) if is_gone else variable


def _is_state(value: object) -> bool:
    return value is None or isinstance(value, (chainer.Variable, *chainer.get_array_types()))


class _LargeValue:
    """A persistent value that is recorded instead of copied, if possible."""

    def __init__(self, link: chainer.Link, name: str, array: numpy.ndarray) -> None:
        self._link = link
        self._name = name
        # Between passes, a weak reference. A strong one would keep others from recording the array.
        self._reference = weakref.ref(array)
        self._array: Optional[numpy.ndarray] = None
        self._journal = Journal()
        self._recording: Optional[Recording] = None

    def follow(self) -> None:
        attributes = vars(self._link)
        was_alone = self._name in attributes and is_alone(attributes, self._name)  # before local variables refer to it
        value: Array = attributes.get(self._name)
        array = self._reference()
        if array is None or self._journal.has_all:
            return
        self._array = array
        if isinstance(value, RecordedArray) and value.recording is not None and value.recording.array is array:
            self._recording = value.recording  # from an outer block
        elif value is array and was_alone:
            self._recording = Recording(array)
        else:
            self._journal.record_all(array)
            return
        self._recording.journals.append(self._journal)
        attributes[self._name] = self._recording.view()

    def unfollow(self, links: Iterable[chainer.Link]) -> None:
        recording = self._recording
        if recording is None:
            return
        if self._journal in recording.journals:
            recording.journals.remove(self._journal)
        if recording.journals:
            return  # an outer block continues
        for attributes in map(vars, links):
            for name, value in attributes.items():
                if isinstance(value, RecordedArray) and value.recording is recording:
                    attributes[name] = recording.plain(value)
        if vars(self._link).get(self._name) is self._array:
            self._array = None
        self._recording = None

    def restore(self) -> None:
        array = self._reference()
        if array is None:
            return
        self._journal.undo(array)
        is_recorded = self._recording is not None and self._recording.journals
        vars(self._link)[self._name] = self._recording.view() if is_recorded and self._recording else array
