"""LinkStates: what passes that run in turns set on links, such as the state of recurrent layers.

Each pass starts from what was there before the window, and finds what it has set itself, never what another pass has
set. In the end, the links have what the whole batch would have left: a Variable with a row for each example, such as
the state of a recurrent layer, is put together from the rows of all micro-batches. In the next window, each of these
finds its own rows there.
"""

from __future__ import annotations

import operator
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import chainer
import chainer.links as L

from chainer_accum._devices import Array, device_of
from chainer_accum.lockstep.left import Ended, Gone, RowsOfWindow, are_same, simple

State = List[Tuple["_LinkState", Dict[str, Any], Dict[str, Array]]]
_Key = Tuple["_LinkState", str]
Left = List[Tuple[chainer.Link, str, Any]]  # what a window has left on links, and has no rows to be told apart by

_MISSING: Any = object()
_ARRAYS = chainer.get_array_types()

Rows = Dict[_Key, RowsOfWindow]

# Layers whose state has a row for each example, and the names of their state.
_RECURRENT = (L.LSTM, L.StatefulGRU, L.StatefulMGU, L.StatefulPeepholeLSTM, L.StatefulZoneoutLSTM)
_STATES = ("h", "c")


class LinkStates:
    """The attributes of links, for passes that run in turns.

    Args:
        links: Links that passes use. Items may be ``None``.
        left: What the last window has left on links.

    Attributes:
        roots (list): The links that were named.

    """

    def __init__(self, links: Iterable[Optional[chainer.Link]], left: Left) -> None:
        self._left = {(id(link), name): value for link, name, value in left}
        self._states: Dict[int, _LinkState] = {}
        self._num_examples: Optional[int] = 0  # of the passes so far
        self._has_passes = False
        self._first: Optional[Dict[_Key, Any]] = None  # what the first pass has left
        self._different: Set[_Key] = set()  # what others have left otherwise
        self.roots = [link for link in links if link is not None]
        for link in self.roots:
            self.add(link)

    def add(self, link: chainer.Link) -> None:
        """Adds a link and all links below it, unless they are known."""
        if id(link) not in self._states:
            for each in link.links():
                if id(each) not in self._states:
                    self._states[id(each)] = _LinkState(each)

    def name_of(self, thing: object) -> str:
        """Returns the name of a link, or of the link that has an array, or an empty string."""
        for root in self.roots:
            for name, link in root.namedlinks():
                if thing is not None and (link is thing or any(value is thing for value in vars(link).values())):
                    return name
        return ""

    def share(self, array: Array) -> None:
        """Makes a persistent array the same for all passes from now on."""
        for state in self._states.values():
            state.share(array)

    def begin_pass(self, num_examples: Optional[int]) -> State:
        """Returns what a new pass finds instead of what is there: its rows of what the last window has left."""
        if self._has_passes:
            for state in self._states.values():
                state.check_complete()
        self._has_passes = True
        gone: State = [(state, state.gone(self._left), {}) for state in self._states.values()]
        start = self._num_examples
        end = self._num_examples = None if start is None or num_examples is None else start + num_examples
        if start is not None and end is not None:
            gone += [(state, state.rows(slice(start, end)), {}) for state in self._states.values()]
        return [(state, attributes, arrays) for state, attributes, arrays in gone if attributes]

    def end_pass(self, state: State) -> None:
        """Notes what a pass has left, to tell what is the same for all passes from what belongs to its examples.

        Raises:
            RuntimeError: If it has left another persistent value than the first pass.

        """
        values = {key: simple(value) for key, value in _values_of(state)}
        if self._first is None:
            self._first = values
        for key in {**values, **self._first}:
            if not are_same(self._first.get(key, _MISSING), values.get(key, _MISSING)):
                link_state, name = key
                self._different.add(key)
                if name in link_state.link._persistent:
                    raise RuntimeError(
                        "persistent values must change in the same way in all micro-batches of a lockstep window, got "
                        f"different values of {name!r} of {self.name_of(link_state.link)}; take statistics over the "
                        "whole batch, with chainer_accum.functions.sum_over_batch, or set lockstep=None"
                    )

    def take(self) -> State:
        """Returns what the current pass has set, and puts back what was there at first."""
        taken = [(state, *state.take()) for state in self._states.values()]
        return [(state, attributes, arrays) for state, attributes, arrays in taken if attributes or arrays]

    def give(self, taken: State) -> None:
        """Sets again what a pass has set."""
        for state, attributes, arrays in taken:
            state.give(attributes, arrays)

    def leave(self, last: State, rows: Sequence[Rows]) -> Left:
        """Sets what the whole batch would have left, as far as it is known, and returns the rest.

        Args:
            last (list): What the last pass has set.
            rows (list): For each pass, its rows.

        """
        last = [(state, _without_gone(attributes), arrays) for state, attributes, arrays in last]
        self.give(last)
        for _, attributes, _ in last:
            for value in attributes.values():
                if isinstance(value, chainer.Variable) and value.creator_node is not None:
                    Ended(value)  # frees the graph, which cannot be used any more
        whole = {key for key in rows[0] if all(key in each for each in rows)} if rows else set()
        for state, name in whole:
            parts = [each[state, name] for each in rows]
            if len({part.array.shape[1:] for part in parts}) == 1:
                state.give({name: RowsOfWindow.of(parts)}, {})
        return [
            (state.link, name, value)
            for state, attributes, _ in last
            for name, value in attributes.items()
            if (state, name) in self._different and (state, name) not in whole
        ]


def _values_of(state: State) -> Iterator[Tuple[_Key, Any]]:
    """Yields what a pass has set, except what it has not touched."""
    for link_state, attributes, arrays in state:
        for name, value in [*attributes.items(), *arrays.items()]:
            if type(value) is not Gone:
                yield (link_state, name), value


def rows_of(state: State, num_examples: Optional[int]) -> Rows:
    """Returns the Variables in a state that have one row for each example, and one vector in each row."""
    rows = {}
    for link_state, attributes, _ in state:
        for name, value in attributes.items():
            if type(value) in (chainer.Variable, RowsOfWindow) and value.array is not None and value.ndim == 2:
                if len(value) == num_examples:
                    rows[link_state, name] = RowsOfWindow(value.array, value.creator_node is not None)
    return rows


class _LinkState:
    """The attributes of one link at first."""

    __slots__ = ("link", "_attributes", "_arrays", "_new")

    def __init__(self, link: chainer.Link) -> None:
        self.link = link
        self._attributes = vars(link).copy()
        self._new: Optional[str] = None  # a persistent value that the first pass has registered
        self._arrays: Dict[str, Tuple[Array, Array]] = {}  # persistent arrays, which may be changed in place
        # The running averages of batch normalization move once for all passes.
        for name in () if isinstance(link, L.BatchNormalization) else link._persistent:
            array = self._attributes.get(name)
            if isinstance(array, _ARRAYS):
                with device_of(array):
                    self._arrays[name] = array, array.copy()

    def share(self, array: Array) -> None:
        """Forgets what a persistent array was at first."""
        self._arrays = {name: kept for name, kept in self._arrays.items() if kept[0] is not array}

    def check_complete(self) -> None:
        """Raises RuntimeError if the first pass has registered a persistent value, which may have changed since."""
        if self._new is not None:
            raise RuntimeError(
                "links must have all their persistent values before several passes run in lockstep, got "
                f"{self._new!r} of {type(self.link).__name__}, registered in the first pass; call the model once "
                "before training, or give its layers their sizes"
            )

    def gone(self, left: Dict[Tuple[int, str], Any]) -> Dict[str, Any]:
        """Returns what takes the place of what the last window has left, and is still there."""
        here = self._attributes.items()
        return {name: Gone(name) for name, value in here if value is left.get((id(self.link), name), _MISSING)}

    def rows(self, rows: slice) -> Dict[str, chainer.Variable]:
        """Returns some rows of each Variable that has a row for each example of a window."""
        found = {}
        names = _STATES if isinstance(self.link, _RECURRENT) else ()
        for name, value in self._attributes.items():
            if isinstance(value, RowsOfWindow):
                found[name] = value.part(rows)
            elif name in names and isinstance(value, chainer.Variable):
                found[name] = RowsOfWindow(value.array, value.creator_node is not None).part(rows)
        return found

    def take(self) -> Tuple[Dict[str, Any], Dict[str, Array]]:
        """Returns what has been set, and puts back what was there at first."""
        attributes, first = vars(self.link), self._attributes
        if not self._arrays and attributes.keys() == first.keys():  # as for most links, at each of many meetings
            if all(map(operator.is_, attributes.values(), first.values())):
                return {}, {}
        changed: Dict[str, Any] = {}
        for name, value in list(attributes.items()):
            before = first.get(name, _MISSING)
            if type(value) is Gone:
                changed[name] = value
                continue
            if before is value or (_is_structure(value) and before is not None):
                continue
            if before is None and (_is_structure(value) or name in self.link._persistent):
                first[name] = value  # a parameter or persistent array that has been initialized is there for all passes
            else:
                changed[name] = value
                if before is _MISSING and name in self.link._persistent:
                    self._new = name
        for name in changed:
            if name in first:
                attributes[name] = first[name]
            else:
                del attributes[name]
        arrays = {}
        for name, (array, copy) in self._arrays.items():
            with device_of(array):
                if not are_same(array, copy):
                    arrays[name] = array.copy()
                    array[...] = copy
        return changed, arrays

    def give(self, attributes: Dict[str, Any], arrays: Dict[str, Array]) -> None:
        """Sets attributes, and the contents of persistent arrays."""
        vars(self.link).update(attributes)
        for name, value in arrays.items():
            array, _ = self._arrays[name]
            with device_of(array):
                array[...] = value


def _without_gone(attributes: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in attributes.items() if type(value) is not Gone}


def _is_structure(value: object) -> bool:
    return isinstance(value, (chainer.Parameter, chainer.Link))
