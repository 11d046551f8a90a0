"""Schedule: the number of iterator batches per window, and when it changes.

The schedule is evaluated once, when a window begins. It is a function of the updater, whose epoch and iteration are in
every snapshot. So it needs no state of its own, and a resumed run continues with the right number.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional, Union

from chainer.training.updaters import StandardUpdater

from chainer_accum._arguments import call, check_int

Steps = Union[int, Mapping[int, int], Callable[[Any], int]]


class Schedule:
    """The number of iterator batches in each window.

    Args:
        accumulation_steps: An int; or a dictionary from epochs, counted from 0, to the number that applies from then on
            (before the first of them, it is 1); or a function that takes the updater and returns the number.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is not positive, an epoch is negative, or the dictionary is empty.

    """

    def __init__(self, accumulation_steps: Steps) -> None:
        self._function: Optional[Callable[[Any], int]] = None
        self._by_epoch = {0: 1}
        if callable(accumulation_steps):
            self._function = accumulation_steps
        elif isinstance(accumulation_steps, Mapping):
            if not accumulation_steps:
                raise ValueError(
                    "accumulation_steps must map epochs to numbers, got {}; pass one such as {0: 1, 10: 4}"
                )
            for epoch, steps in accumulation_steps.items():
                epoch = check_int("an epoch in accumulation_steps", epoch, 0, "count epochs from 0")
                self._by_epoch[epoch] = _check_steps(f"accumulation_steps[{epoch}]", steps)
        else:
            self._by_epoch[0] = _check_steps("accumulation_steps", accumulation_steps)

    def ask(self, updater: StandardUpdater) -> int:
        """Returns the number for the window that begins now."""
        if self._function is None:
            return self._find(updater)
        return _check_steps("the value of accumulation_steps", call("accumulation_steps", self._function, updater))

    @property
    def is_always_one(self) -> bool:
        """Whether each window is one iterator batch."""
        return self._function is None and set(self._by_epoch.values()) == {1}

    def known(self, updater: StandardUpdater) -> Optional[int]:
        """Returns the number for the next window, or ``None`` if a function decides."""
        return None if self._function is not None else self._find(updater)

    def _find(self, updater: StandardUpdater) -> int:
        if len(self._by_epoch) == 1:
            return self._by_epoch[0]
        return self._by_epoch[max(start for start in self._by_epoch if start <= updater.epoch)]


def _check_steps(name: str, value: object) -> int:
    return check_int(name, value, 1, "use 1 to disable accumulation")
