"""Schedule: the number of iterator batches per window, and when it changes.

The schedule is evaluated once, when a window begins. It is a function of the updater, whose epoch and iteration are in
every snapshot. So it needs no state of its own, and a resumed run continues with the right number.

Its numbers count iterator batches, or the examples of all ranks. In the latter case, the number of iterator batches
follows from the batch size of the iterator and the number of ranks.
"""

from __future__ import annotations

import numbers
from typing import Any, Callable, Dict, Mapping, Optional, Protocol, Union

import chainer
from chainer.training.updaters import StandardUpdater

from chainer_accum._arguments import call, check_int
from chainer_accum.batches.gathering import Gathering, NumBatches, NumTokens
from chainer_accum.batches.token_budget import TokenBudget

Steps = Union[int, Mapping[int, int], Callable[[Any], int]]


class Unit(Protocol):
    """What the numbers of a schedule count.

    Attributes:
        argument (str): The name of the argument that gives these numbers.

    """

    argument: str

    def to_steps(self, name: str, number: object) -> int:
        """Returns how many iterator batches the number stands for. Error messages refer to it by ``name``.

        Raises:
            TypeError: If the number is not an int.
            ValueError: If it is not possible.

        """


class Batches:
    """Numbers that count iterator batches."""

    argument = "accumulation_steps"

    def to_steps(self, name: str, number: object) -> int:
        return check_int(name, number, 1, "use 1 to disable accumulation")


class Examples:
    """Numbers that count the examples of all ranks.

    Each rank reads an equal share of them, so the ranks may even have iterators of different batch sizes.

    Args:
        iterator (~chainer.dataset.Iterator): Dataset iterator of this rank. It has an attribute ``batch_size``.
        num_ranks (int): Number of ranks.

    """

    argument = "effective_batch_size"

    def __init__(self, iterator: chainer.dataset.Iterator, num_ranks: int) -> None:
        self._iterator = iterator
        self._num_ranks = num_ranks

    def to_steps(self, name: str, number: object) -> int:
        size = check_int(name, number, 1, "give the number of examples per update")
        batch_size = self._batch_size()
        step = batch_size * self._num_ranks
        if size % step:
            lower = size - size % step
            nearest = f"{lower} or {lower + step}" if lower else f"{step}"
            ranks = "1 rank" if self._num_ranks == 1 else f"{self._num_ranks} ranks"
            raise ValueError(
                f"{name} must be a multiple of {step} (iterator batches of {batch_size} on {ranks}), got {size}; "
                f"use {nearest}, or another batch size of the iterator"
            )
        return size // step

    def _batch_size(self) -> int:
        value = getattr(self._iterator, "batch_size", None)
        if not isinstance(value, numbers.Integral) or value < 1:
            raise TypeError(
                "iterator must have a batch_size of 1 or more for effective_batch_size, "
                f"got {type(self._iterator).__name__} with {value!r}; use accumulation_steps instead"
            )
        return int(value)


class Schedule:
    """The number of iterator batches in each window.

    Args:
        value: An int; or a dictionary from epochs, counted from 0, to the number that applies from then on (before the
            first of them, a window is one iterator batch); or a function that takes the updater and returns the number.
        unit (Unit): What the numbers count.

    Attributes:
        depends_on_data (bool): Whether ranks may have different numbers, because their examples differ.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is not possible, an epoch is negative, or the dictionary is empty.

    """

    depends_on_data = False

    def __init__(self, value: Steps, unit: Optional[Unit] = None) -> None:
        self._unit: Unit = unit or Batches()
        self._function: Optional[Callable[[Any], int]] = None
        self._by_epoch: Dict[int, Optional[int]] = {0: None}  # None is one iterator batch
        name = self._unit.argument
        if callable(value):
            self._function = value
        elif isinstance(value, Mapping):
            if not value:
                raise ValueError(f"{name} must map epochs to numbers, got {{}}; give at least one epoch and its number")
            for epoch, number in value.items():
                epoch = check_int(f"an epoch in {name}", epoch, 0, "count epochs from 0")
                self._unit.to_steps(f"{name}[{epoch}]", number)  # raises if it is not possible
                self._by_epoch[epoch] = number
        else:
            self._unit.to_steps(name, value)
            self._by_epoch[0] = value

    def ask(self, updater: StandardUpdater) -> Gathering:
        """Returns what the window that begins now gathers."""
        if self._function is None:
            return NumBatches(self._find(updater))
        name = self._unit.argument
        return NumBatches(self._unit.to_steps(f"the value of {name}", call(name, self._function, updater)))

    @property
    def is_always_one(self) -> bool:
        """Whether each window is one iterator batch."""
        return self._function is None and all(self._to_steps(number) == 1 for number in self._by_epoch.values())

    def known(self, updater: StandardUpdater) -> Optional[int]:
        """Returns the number for the next window, or ``None`` if a function decides."""
        return None if self._function is not None else self._find(updater)

    def _find(self, updater: StandardUpdater) -> int:
        if len(self._by_epoch) == 1:
            return self._to_steps(self._by_epoch[0])
        return self._to_steps(self._by_epoch[max(start for start in self._by_epoch if start <= updater.epoch)])

    def _to_steps(self, number: Optional[int]) -> int:
        return 1 if number is None else self._unit.to_steps(self._unit.argument, number)


class TokenSchedule(Schedule):
    """Windows whose iterator batches, over all ranks, have at least a number of tokens.

    Args:
        budget (TokenBudget): The number of tokens, and the lengths of examples.
        num_ranks (int): Number of ranks.

    """

    depends_on_data = True

    def __init__(self, budget: TokenBudget, num_ranks: int) -> None:
        if not isinstance(budget.max_tokens, int) or budget.across_window:
            raise ValueError(
                f"effective_batch_size must have a number of tokens and nothing else, got {budget!r}; 'auto' and "
                "across_window are for micro_batch_size"
            )
        super().__init__(self._unknown)
        self._num_tokens = -(-budget.max_tokens // num_ranks)
        self._length_func = budget.length_func

    def ask(self, updater: StandardUpdater) -> Gathering:
        return NumTokens(self._num_tokens, self._length_func)

    def _unknown(self, updater: StandardUpdater) -> int:
        """Takes the place of a number, which depends on the data."""
        return 1


def make_schedule(
    accumulation_steps: Steps,
    effective_batch_size: Union[Steps, TokenBudget, None],
    iterator: chainer.dataset.Iterator,
    num_ranks: int,
) -> Schedule:
    """Returns the schedule for the arguments of an updater.

    Raises:
        TypeError: If a number is not an int, or the iterator has no batch size and needs one.
        ValueError: If a number is not possible, or both arguments were given.

    """
    schedule = Schedule(accumulation_steps)
    if effective_batch_size is None:
        return schedule
    if accumulation_steps != 1:
        raise ValueError(
            f"effective_batch_size must be None with accumulation_steps, got effective_batch_size="
            f"{effective_batch_size!r} and accumulation_steps={accumulation_steps!r}; give one of them"
        )
    if isinstance(effective_batch_size, TokenBudget):
        return TokenSchedule(effective_batch_size, num_ranks)
    return Schedule(effective_batch_size, Examples(iterator, num_ranks))
