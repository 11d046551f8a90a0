"""The state of the global random generators, and how far they have moved."""

from __future__ import annotations

import random
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy


class State(NamedTuple):
    """The state of the global generators of NumPy and Python."""

    numpy: Dict[str, Any]
    python: Tuple[Any, ...]

    def is_same(self, other: State) -> bool:
        """Returns whether another state is the same."""
        return self.python == other.python and _are_same(self.numpy, other.numpy)


def now() -> State:
    """Returns the current state."""
    return State(numpy.random.get_state(legacy=False), random.getstate())


def go_to(state: State) -> None:
    """Sets the generators to a state."""
    numpy.random.set_state(state.numpy)
    random.setstate(state.python)


def _are_same(value: Any, other: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_are_same(each, other[key]) for key, each in value.items())
    return bool((value == other).all()) if isinstance(value, numpy.ndarray) else bool(value == other)


def words_between(start: State, end: State) -> Optional[int]:
    """Returns how many words of 32 bits the generators have drawn, or ``None`` if it is many or unknown."""
    if start.numpy["bit_generator"] != "MT19937":
        return None if not _are_same(start.numpy, end.numpy) else _words_of_python(start, end)
    first, last = start.numpy["state"], end.numpy["state"]
    of_numpy = _moved(tuple(first["key"]), first["pos"], tuple(last["key"]), last["pos"])
    of_python = _words_of_python(start, end)
    return None if of_python is None or of_numpy is None else of_python + of_numpy


def _words_of_python(start: State, end: State) -> Optional[int]:
    return _moved(start.python[1][:-1], start.python[1][-1], end.python[1][:-1], end.python[1][-1])


def _moved(key: Tuple[int, ...], position: int, new_key: Tuple[int, ...], new_position: int) -> Optional[int]:
    if key == new_key and new_position >= position:
        return new_position - position
    generator = random.Random()
    generator.setstate((3, (*map(int, key), int(position)), None))
    words = len(key) - position + new_position
    for _ in range(words):
        generator.getrandbits(32)
    _, state, _ = generator.getstate()
    return words if state == (*map(int, new_key), int(new_position)) else None
