"""How a batch is cut into micro-batches: by the number of examples, by their lengths, or by a function of the user.

Each way arranges the examples of a batch in an order, and says how many of those that come next fit into one pass. The
limit may change between two passes of the same batch, because a search for the best limit learns from each.
"""

from __future__ import annotations

import collections.abc
import itertools
import reprlib
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Protocol

from chainer_accum._arguments import call
from chainer_accum.batches.token_budget import LengthFunc, lengths_of

CutFunc = Callable[[List[Any]], Iterable[Iterable[Any]]]


class Load(NamedTuple):
    """How much there is in a pass.

    Attributes:
        num_examples (int): Number of examples, or 0 if the batch is not a list of them.
        cost (int): What counts for the limit of a pass: the number of examples, or of tokens with padding.
        num_tokens (int): Number of examples, or of tokens without padding.
        num_positions (int): Number of examples, or of tokens with padding.

    """

    num_examples: int
    cost: int
    num_tokens: int
    num_positions: int


class Part(NamedTuple):
    """The examples of one pass, as the iterator returned them."""

    examples: Any
    load: Load


class Arranged(Protocol):
    """The examples of a batch, in the order in which they are cut."""

    cost: int  # of all of them in one pass
    order: List[int]  # their positions in the batch; empty if they are in the order of the batch

    def __len__(self) -> int: ...

    def part(self, start: int, limit: Optional[int]) -> Part:
        """Returns the next part, which begins at ``start``. It has at least one example."""


class Counted:
    """A batch that is cut evenly: into as few parts as possible, which differ by at most one example.

    A very small part would have poor batch statistics.

    Args:
        batch: Batch from the iterator. Unless it is a list of examples, it cannot be cut.

    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        size = count_examples(batch)
        if size == 0:
            raise _empty(batch)
        self.cost = size or 0
        self.order: List[int] = []

    def __len__(self) -> int:
        return self.cost or 1

    def part(self, start: int, limit: Optional[int]) -> Part:
        if limit is None and start == 0:
            return Part(self._batch, _by_count(self.cost))
        examples = as_examples(self._batch)
        size = even_share(len(examples) - start, limit)
        return Part(examples[start : start + size], _by_count(size))


class Measured:
    """A batch that is sorted by length, longest first, and packed under a limit on the tokens of a part.

    Examples of similar length need little padding. With the longest first, a limit that is too large for the memory
    shows at once.

    Args:
        batch: Batch from the iterator.
        length_func (callable): Function that returns the length of an example, or several.
        max_tokens (int): The limit that the user has set, or ``None``.

    Raises:
        ValueError: If an example alone is longer than ``max_tokens``.

    """

    def __init__(self, batch: Any, length_func: LengthFunc, max_tokens: Optional[int] = None) -> None:
        examples = as_examples(batch)
        lengths = [lengths_of(example, length_func) for example in examples]
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        self._lengths = [lengths[position] for position in self.order]
        self._examples = [examples[position] for position in self.order]
        longest = self._lengths[0].longest
        self.cost = longest * len(lengths)
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(
                f"max_tokens must be at least the length of the longest example, got {max_tokens} for an example of "
                f"{longest} tokens; increase it, or shorten the example"
            )

    def __len__(self) -> int:
        return len(self._examples)

    def part(self, start: int, limit: Optional[int]) -> Part:
        longest = self._lengths[start].longest
        size = len(self) - start if limit is None else max(limit // longest, 1)
        lengths = [each.each for each in self._lengths[start : start + size]]
        sides = list(itertools.zip_longest(*lengths, fillvalue=0))
        load = Load(
            num_examples=len(lengths),
            cost=longest * len(lengths),
            num_tokens=sum(map(sum, sides)),
            num_positions=sum(max(side) * len(side) for side in sides),
        )
        return Part(self._examples[start : start + size], load)


class Grouped:
    """A batch that a function of the user cuts. Its groups are cut further only when memory runs out.

    Args:
        batch: Batch from the iterator.
        function (callable): Function that takes the list of examples and returns lists of them.

    Raises:
        TypeError: If the function does not return lists.
        ValueError: If the function does not return each example once.

    """

    def __init__(self, batch: Any, function: CutFunc) -> None:
        examples = list(as_examples(batch))
        groups = _groups(function, examples)
        self._examples = [example for group in groups for example in group]
        self._ends = list(itertools.accumulate(map(len, groups)))
        self.cost = max(map(len, groups), default=0)
        positions: Dict[int, List[int]] = {}  # an example may be in a batch more than once
        for position, example in enumerate(examples):
            positions.setdefault(id(example), []).append(position)
        returned, given = (collections.Counter(map(id, each)) for each in (self._examples, examples))
        if returned != given or not all(groups):
            raise ValueError(
                "micro_batch_size must return each example once, in lists that are not empty, got "
                f"{_difference(returned, given) or 'an empty list'} from {function!r}; return the examples themselves, "
                "not copies"
            )
        self.order = [positions[id(example)].pop(0) for example in self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    def part(self, start: int, limit: Optional[int]) -> Part:
        end = next(end for end in self._ends if end > start)
        size = even_share(end - start, limit)
        return Part(self._examples[start : start + size], _by_count(size))


def together(loads: Iterable[Load]) -> Load:
    """Returns the load of passes that run together: that of the costliest, but with the tokens of all."""
    each = list(loads)
    costliest = max(each, key=lambda load: (load.cost, load.num_examples))
    return costliest._replace(num_tokens=sum(load.num_tokens for load in each))


def costliest_to_cut(loads: Iterable[Load]) -> Load:
    """Returns the load of the costliest pass among those of several examples or, if there is none, among all."""
    return max(loads, key=lambda load: (load.num_examples > 1, load.cost, load.num_examples))


def _by_count(size: int) -> Load:
    return Load(size, size, size, size)


def even_share(size: int, limit: Optional[int]) -> int:
    """Returns the size of the first part if ``size`` examples are split evenly into parts of at most ``limit``."""
    return size if limit is None else size // -(-size // limit)


def count_examples(batch: Any) -> Optional[int]:
    """Returns the number of examples in an iterator batch, or ``None`` if it is not a list of examples."""
    # The length of a tuple or a dictionary is not the number of examples, but for example that of arrays in an example.
    is_list = hasattr(batch, "__len__") and not isinstance(batch, (tuple, dict))
    return len(batch) if is_list else None


def as_list(batch: Any, what: str, remedy: str) -> Any:
    """Returns the batch, or raises TypeError unless it is a list of examples, and ValueError if it is empty."""
    size = count_examples(batch)
    if size is None:
        raise TypeError(f"{what} must be a list of examples, got a {type(batch).__name__} from the iterator; {remedy}")
    if size == 0:
        raise _empty(batch)
    return batch


def as_examples(batch: Any) -> Any:
    """Returns a batch that is to be cut, or raises as :func:`as_list` does."""
    return as_list(batch, "to be split, a batch", "use accumulation_steps and no micro_batch_size")


def _groups(function: CutFunc, examples: List[Any]) -> List[List[Any]]:
    """Returns the lists that a function of the user has made of the examples."""
    returned = call("micro_batch_size", function, list(examples))
    is_nested = isinstance(returned, collections.abc.Iterable)
    groups = list(returned) if is_nested else []
    if not is_nested or not all(isinstance(group, collections.abc.Iterable) for group in groups):
        raise TypeError(
            f"micro_batch_size must return lists of examples, got {reprlib.repr(returned)} from {function!r}; return a "
            "list for each micro-batch"
        )
    return [list(group) for group in groups]


def _empty(batch: Any) -> ValueError:
    return ValueError(f"the iterator returned an empty batch, got {batch!r}; check that the dataset is not empty")


def _difference(returned: collections.Counter[int], given: collections.Counter[int]) -> str:
    """Returns in words what is too much and what is missing."""
    unknown = sum((returned - given).values())
    missing = sum((given - returned).values())
    words = [f"{unknown} too many"] if unknown else []
    words += [f"{missing} missing"] if missing else []
    return " and ".join(words)
