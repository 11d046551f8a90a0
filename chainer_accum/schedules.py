"""How many iterator batches make a window, and when that changes.

A schedule is asked as each window begins and is a function of the updater, whose epoch and iteration are in every
snapshot. So it needs no state of its own, and a resumed run goes on with the k that it would have had.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Union

from chainer_accum._arguments import check_int

Steps = Union[int, Mapping[int, int], Callable[[Any], int]]


def make_schedule(accumulation_steps: Steps) -> Callable[[Any], int]:
    """Returns a function that maps an updater to the number of iterator batches in its next window.

    Args:
        accumulation_steps: A number; or a dictionary that maps epochs, counted from 0, to the number that holds from
            then on (before the first of them, it is 1); or a function of the updater that returns a number.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is not positive, an epoch is negative, or the dictionary is empty.

    """
    if callable(accumulation_steps):
        function = accumulation_steps
        return lambda updater: _check_steps("the value of accumulation_steps", function(updater))
    if isinstance(accumulation_steps, Mapping):
        if not accumulation_steps:
            raise ValueError("accumulation_steps must map epochs to numbers, got {}; for example {0: 1, 10: 4}")
        by_epoch = {0: 1}
        for epoch, steps in accumulation_steps.items():
            epoch = check_int("an epoch in accumulation_steps", epoch, 0, "count epochs from 0")
            by_epoch[epoch] = _check_steps(f"accumulation_steps[{epoch}]", steps)
        return lambda updater: by_epoch[max(epoch for epoch in by_epoch if epoch <= updater.epoch)]
    steps = _check_steps("accumulation_steps", accumulation_steps)
    return lambda updater: steps


def _check_steps(name: str, value: Any) -> int:
    return check_int(name, value, 1, "use 1 to disable accumulation")
