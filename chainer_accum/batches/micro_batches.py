"""MicroBatches: the micro-batches of one window, made by splitting batches of the iterator.

``accumulation_steps`` iterator batches are read, and each is split into micro-batches of at most ``micro_batch_size``
examples. The iterator must provide only ``next``, ``epoch``, ``is_new_epoch`` and ``epoch_detail``. It is never asked
for a batch just to find out whether there is one.
"""

from __future__ import annotations

from typing import Any, Callable, Hashable, Iterator, List, NamedTuple, Optional

import chainer

from chainer_accum._arguments import call, check_weight

EPOCH_BOUNDARIES = ("carry", "flush")

WeightFunc = Callable[[Any], float]


class MicroBatch(NamedTuple):
    """The examples of one forward/backward pass, as the iterator returned them, and their weight."""

    examples: Any
    weight: float


class MicroBatches:
    """The micro-batches of one window, read from the iterator on demand.

    The first iterator batch is read immediately; each of the others, once those before it are used up. The window ends
    after ``accumulation_steps`` iterator batches, at the end of the data or, if ``epoch_boundary`` is ``'flush'``, at
    the end of the epoch.

    Args:
        iterator (~chainer.dataset.Iterator): Dataset iterator.
        accumulation_steps (int): Iterator batches per window.
        micro_batch_size (int): The largest number of examples in a micro-batch, or ``None`` to leave iterator batches
            whole.
        weight_func (callable): Maps the examples of a micro-batch to its weight, or ``None`` to count the examples.
        epoch_boundary (str): ``'carry'`` or ``'flush'``.
        is_repeatable (bool): Whether iterator batches are kept, so that the iteration can restart.
        likely_weight (float): The likely weight of an iterator batch, as known from earlier windows.

    Attributes:
        is_repeatable (bool): See the argument.
        num_batches (int): Number of iterator batches read so far.
        num_epochs (int): Number of epochs that ended with them.
        num_examples (int): Number of examples read so far, in batches that are lists.
        largest_batch (int): Number of examples in the largest iterator batch so far.
        shapes: Shapes of the arrays in the first example.
        regular_weight (float): The total weight of the window if every iterator batch weighs as much as the first, or
            ``None`` if the first weighs 0.
        largest_weight (float): The weight of the heaviest iterator batch so far.

    Raises:
        StopIteration: If the iterator has no batch left.

    """

    def __init__(
        self,
        iterator: chainer.dataset.Iterator,
        accumulation_steps: int = 1,
        micro_batch_size: Optional[int] = None,
        weight_func: Optional[WeightFunc] = None,
        epoch_boundary: str = "carry",
        is_repeatable: bool = False,
        likely_weight: float = 0.0,
    ) -> None:
        self._iterator = iterator
        self._accumulation_steps = accumulation_steps
        self._micro_batch_size = micro_batch_size
        self._weight_func = weight_func
        self._flushes = epoch_boundary == "flush"
        self.is_repeatable = is_repeatable
        self._batches: List[Any] = []
        self._parts: List[List[MicroBatch]] = []
        self._likely_weight = likely_weight
        self._weight = 0.0
        self.largest_weight = 0.0
        self.num_batches = 0
        self.num_epochs = 0
        self.num_examples = 0
        self.largest_batch = 0
        self._read()
        self.regular_weight: Optional[float] = accumulation_steps * self._weight or None
        first = self._parts[0][0].examples
        self.shapes: Hashable = _shapes(first[0]) if _is_list(first) else None

    @property
    def expected_weight(self) -> float:
        """The total weight of the window if no later iterator batch is heavier than those so far."""
        to_come = self._accumulation_steps - self.num_batches
        return self._weight + to_come * max(self.largest_weight, self._likely_weight)

    def __iter__(self) -> Iterator[MicroBatch]:
        for _ in range(self._accumulation_steps):
            if not self._parts:
                if self._flushes and self.num_epochs > 0:
                    return
                try:
                    self._read()
                except StopIteration:
                    return
            parts = self._parts.pop(0)
            while parts:  # pop, so that a micro-batch handed out is no longer held here
                yield parts.pop(0)

    def begin_again(self, micro_batch_size: Optional[int]) -> None:
        """Restarts the iteration from the first iterator batch, split to a different size."""
        self._micro_batch_size = micro_batch_size
        self._parts = [self._split(batch) for batch in self._batches]

    def _read(self) -> None:
        batch = self._iterator.next()
        self.num_batches += 1
        self.num_epochs += bool(self._iterator.is_new_epoch)
        size = count_examples(batch) or 0
        self.num_examples += size
        self.largest_batch = max(self.largest_batch, size)
        if self.is_repeatable:
            self._batches.append(batch)
        parts = self._split(batch)
        weight = sum(micro_batch.weight for micro_batch in parts)
        self._weight += weight
        self.largest_weight = max(self.largest_weight, weight)
        self._parts.append(parts)

    def _split(self, batch: Any) -> List[MicroBatch]:
        if self._micro_batch_size is None:
            return [MicroBatch(batch, self._weigh(batch))]
        size = _count(batch, "to be split, a batch", "use accumulation_steps and no micro_batch_size")
        # Split as evenly as possible: a very small part would have poor batch statistics.
        count = -(-size // self._micro_batch_size)
        ends = [size * (part + 1) // count for part in range(count)]
        parts = [batch[start:end] for start, end in zip([0, *ends], ends)]
        return [MicroBatch(examples, self._weigh(examples)) for examples in parts]

    def _weigh(self, examples: Any) -> float:
        if self._weight_func is None:
            return float(_count(examples, "to be weighted by its examples, a batch", "pass a weight_func"))
        return check_weight(call("weight_func", self._weight_func, examples), "the value of weight_func")


def count_examples(batch: Any) -> Optional[int]:
    """Returns the number of examples in an iterator batch, or ``None`` if it is not a list of examples."""
    return len(batch) if _is_list(batch) else None


def _shapes(example: object) -> Hashable:
    if isinstance(example, (tuple, list)):
        return tuple(map(_shapes, example))
    if isinstance(example, dict):
        return tuple((key, _shapes(value)) for key, value in example.items())
    return getattr(example, "shape", ())


def _is_list(batch: object) -> bool:
    # The length of a tuple or a dictionary is not the number of examples, but for example that of arrays in an example.
    return hasattr(batch, "__len__") and not isinstance(batch, (tuple, dict))


def _count(batch: Any, what: str, remedy: str) -> int:
    if not _is_list(batch):
        raise TypeError(f"{what} must be a list of examples, got a {type(batch).__name__} from the iterator; {remedy}")
    size = len(batch)
    if size == 0:
        raise ValueError(f"the iterator returned an empty batch, got {batch!r}; check that the dataset is not empty")
    return size
