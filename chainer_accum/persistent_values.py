"""The persistent values of links, such as running averages, to go back to.

A forward pass moves them, and the move of a pass that is abandoned must be undone.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import chainer

from chainer_accum._devices import device_of
from chainer_accum.recorded_arrays import Journal, RecordedArray, Recording, can_be_recorded, is_alone
from chainer_accum.touched_links import Touches


class PersistentValues:
    """The persistent values of links and of all links below them, as they are now, and their state.

    The state is which variables and arrays other attributes are set to, such as those of a recurrent layer. Parameters
    keep their values.

    Persistent arrays are copied. Large ones in host memory are not, but what is written to them is recorded, and only
    within :meth:`following`: there, the attribute is a view of the array, see
    :class:`~chainer_accum.recorded_arrays.RecordedArray`. An array to which something else refers, too, is copied as
    that begins.

    Args:
        links: Links, or ``None`` in the place of one.
        has_state (bool): Whether other state goes back as well, such as that of recurrent layers.

    """

    def __init__(self, links: Iterable[Optional[chainer.Link]], has_state: bool = True) -> None:
        self._has_state = has_state
        self._attributes: List[_Attributes] = []
        self._copies: List[Tuple[Any, Any]] = []
        self._large: List[_LargeValue] = []
        self._known: Dict[int, Any] = {}  # links and arrays by identity
        self._touches: Optional[Touches] = None  # only while following, since it refers to this object
        for root in links:
            for link in () if root is None else root.links():
                self._add_link(link)

    @contextlib.contextmanager
    def following(self, links: bool = True, functions: bool = True) -> Iterator[None]:
        """Context manager for passes, in which links and running averages are remembered as they turn up.

        Contexts of several objects may be nested. :meth:`restore` ends the one of its object.

        Args:
            links (bool): Whether to look at the links that are called, which takes some two microseconds for each.
            functions (bool): Whether to look at functions, too, which takes some two microseconds for each. Without,
                running averages go unseen if they are of no link that is known or called.

        """
        try:
            on_link, on_array = self._add_link if links else None, self._add_array if functions else None
            self._touches = Touches(self._known, on_link, on_array)
            self._touches.begin()
            for value in self._large:
                value.follow()
            yield
        finally:
            try:
                self._end_following()
            except BaseException:  # an interrupt
                self._end_following()
                raise

    @property
    def has_large_arrays(self) -> bool:
        """Whether there is one that can be put back only if passes are followed."""
        return bool(self._large)

    @property
    def links(self) -> List[chainer.Link]:
        """The links that are known so far."""
        return [known for known in self._known.values() if isinstance(known, chainer.Link)]

    def restore(self) -> None:
        """Puts everything back, each array in its place.

        It can be called any number of times, also after a call that was interrupted.

        """
        self._end_following()
        for array, copy in self._copies:
            with device_of(array):
                array[...] = copy
        for attributes in self._attributes:
            attributes.restore()
        for value in self._large:
            value.restore()

    def checkpoint(self) -> PersistentValues:
        """Returns the values of the same links, and of those that turned up, as they are now."""
        checkpoint = PersistentValues((), self._has_state)
        for known in self._known.values():
            (checkpoint._add_link if isinstance(known, chainer.Link) else checkpoint._add_array)(known)
        return checkpoint

    def _add_link(self, link: chainer.Link) -> None:
        if id(link) in self._known:
            return
        attributes = _Attributes(link, self._has_state)
        for name in attributes.persistent:
            array = attributes.contents.get(name)
            recording = array.recording if isinstance(array, RecordedArray) else None
            if recording is not None or can_be_recorded(array):
                attributes.contents[name] = _ELSEWHERE
                value = _LargeValue(link, name, array if recording is None else recording.array)
                self._large.append(value)
                if self._touches is not None:
                    del array, recording  # references that would count
                    value.follow()
            else:
                self._add_array(array)
        self._attributes.append(attributes)
        self._known[id(link)] = link

    def _add_array(self, array: Any) -> None:
        is_array = isinstance(array, chainer.get_array_types()) and not isinstance(array, RecordedArray)
        if is_array and id(array) not in self._known and getattr(getattr(array, "flags", None), "writeable", True):
            with device_of(array):
                self._copies.append((array, array.copy()))
            self._known[id(array)] = array

    def _end_following(self) -> None:
        if self._touches is not None:
            self._touches.end()
            for value in self._large:
                value.unfollow(self._attributes)
            self._touches = None


_VARIABLE = chainer.Variable
_ELSEWHERE: Any = object()  # in the place of an attribute that is remembered elsewhere


class _Attributes:
    """What the attributes of a link are set to, as far as they go back. This is made for each link and window."""

    __slots__ = ("link", "contents", "persistent", "_has_state", "_variables", "_hooks")

    def __init__(self, link: chainer.Link, has_state: bool) -> None:
        self.link = link
        self._has_state = has_state
        self.contents: Dict[str, Any] = vars(link).copy()
        # Chainer can list parameters, but persistent values have no public way to be found.
        self.persistent = tuple(link._persistent)
        # Such as the loss of the pass before, whose graph is not to be kept.
        self._variables: List[Tuple[str, Any, Any, bool]] = []
        if _VARIABLE in map(type, self.contents.values()):
            for name, value in self.contents.items():
                if type(value) is _VARIABLE and value.creator_node is not None:
                    self._variables.append((name, weakref.ref(value), value.array, value.requires_grad))
                    self.contents[name] = _ELSEWHERE
        # Those of the link itself, which may mark it as initialized.
        hooks = self.contents.get("_local_link_hooks")
        self._hooks = [(vars(hook), dict(vars(hook))) for hook in hooks.values()] if hooks else []

    def restore(self) -> None:
        link, attributes = self.link, vars(self.link)
        for name in attributes.keys() - self.contents.keys() if self._has_state else ():
            if name in link._persistent or _is_state(attributes[name]):
                delattr(link, name)
                for actual, contents in self._hooks:
                    actual.update(contents)
        # A link that gives itself its shape later does so from what else it has.
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


def _is_state(value: Any) -> bool:
    return value is None or isinstance(value, (chainer.Variable, *chainer.get_array_types()))


class _LargeValue:
    """A persistent value that is not copied, if recording what is written to it will do."""

    def __init__(self, link: chainer.Link, name: str, array: Any) -> None:
        self._link = link
        self._name = name
        # Between passes it is held weakly. A reference would keep others from recording it.
        self._reference = weakref.ref(array)
        self._array: Any = None
        self._journal = Journal()
        self._recording: Optional[Recording] = None

    def follow(self) -> None:
        attributes = vars(self._link)
        was_alone = self._name in attributes and is_alone(attributes, self._name)  # before there are variables for it
        value = attributes.get(self._name)
        array = self._reference()
        if array is None or self._journal.has_all:
            return
        self._array = array
        if isinstance(value, RecordedArray) and value.recording is not None and value.recording.array is array:
            self._recording = value.recording  # of a context around this one
        elif value is array and was_alone:
            self._recording = Recording(array)
        else:
            self._journal.record_all(array)
            return
        self._recording.journals.append(self._journal)
        attributes[self._name] = self._recording.view()

    def unfollow(self, links: Iterable[_Attributes]) -> None:
        recording = self._recording
        if recording is None:
            return
        if self._journal in recording.journals:
            recording.journals.remove(self._journal)
        if recording.journals:
            return  # a context around this one goes on
        for attributes in [vars(each.link) for each in links]:
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
