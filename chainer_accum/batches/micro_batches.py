"""MicroBatches: the micro-batches of one window, made by cutting batches of the iterator.

Iterator batches are read until there are enough, and each is cut into micro-batches. The iterator must provide only
``next``, ``epoch``, ``is_new_epoch`` and ``epoch_detail``. It is never asked for a batch just to find out whether there
is one.
"""

from __future__ import annotations

from typing import Any, Callable, Hashable, Iterator, List, NamedTuple, Optional, Tuple

import chainer

from chainer_accum._arguments import call, check_weight
from chainer_accum.batches.cutting import Load, as_examples, as_list, count_examples
from chainer_accum.batches.gathering import Gathering
from chainer_accum.batches.sizes import MicroBatchSize

EPOCH_BOUNDARIES = ("carry", "flush")

WeightFunc = Callable[[Any], float]


class MicroBatch(NamedTuple):
    """One forward/backward pass: its examples, as the iterator returned them, their weight, and how much there is."""

    examples: Any
    weight: float
    load: Load


class MicroBatches:
    """The micro-batches of one window, read from the iterator on demand.

    The first iterator batch is read immediately; each of the others, once those before it are used up, or as soon as
    the window begins if all are cut together. The window ends when there are enough, at the end of the data or, if
    ``epoch_boundary`` is ``'flush'``, at the end of the epoch.

    Args:
        iterator (~chainer.dataset.Iterator): Dataset iterator.
        gathering (Gathering): Whether there are enough iterator batches.
        size (MicroBatchSize): How batches are cut. By default, they stay whole.
        weight_func (callable): Maps the examples of a micro-batch to its weight, or ``None`` to count the examples.
        epoch_boundary (str): ``'carry'`` or ``'flush'``.
        is_repeatable (bool): Whether iterator batches are kept, so that the iteration can restart.
        likely_weight (float): The likely weight of an iterator batch, as known from earlier windows.

    Attributes:
        is_repeatable (bool): See the argument.
        num_batches (int): Number of iterator batches read so far.
        num_epochs (int): Number of epochs that ended with them.
        num_examples (int): Number of examples read so far, in batches that are lists.
        costliest (int): What the costliest batch so far would cost as one micro-batch.
        order (list of int): Positions in the window of the examples so far, in the order in which they were cut. Empty
            if the order is the same.
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
        gathering: Gathering,
        size: Optional[MicroBatchSize] = None,
        weight_func: Optional[WeightFunc] = None,
        epoch_boundary: str = "carry",
        is_repeatable: bool = False,
        likely_weight: float = 0.0,
    ) -> None:
        self._iterator = iterator
        self._gathering = gathering
        self._size = MicroBatchSize() if size is None else size
        self._weight_func = weight_func
        self._flushes = epoch_boundary == "flush"
        self.is_repeatable = is_repeatable
        self._read: List[Tuple[Any, float]] = []  # batches and their weights, if they are kept
        self._pending: List[Tuple[Any, float]] = []  # those that have not been cut yet
        self._likely_weight = likely_weight
        self._weight = 0.0
        self.largest_weight = 0.0
        self.num_batches = 0
        self.num_epochs = 0
        self.num_examples = 0
        self.costliest = 0
        self.order: List[int] = []
        self._read_batch()
        first, weight = self._pending[0]
        self.regular_weight: Optional[float] = (1 + gathering.to_come) * weight or None
        self.shapes: Hashable = _shapes(first[0]) if count_examples(first) else None

    @property
    def expected_weight(self) -> float:
        """The total weight of the window if no later iterator batch is heavier than those so far."""
        return self._weight + self._gathering.to_come * max(self.largest_weight, self._likely_weight)

    def __iter__(self) -> Iterator[MicroBatch]:
        while self._pending or self._read_on():
            yield from self._cut(*self._next_batch())

    def begin_again(self) -> None:
        """Restarts the iteration from the first iterator batch."""
        self._size.begin_again()
        self._pending = list(self._read)
        self.order = []

    def _cut(self, batch: Any, weight: float) -> Iterator[MicroBatch]:
        arranged = self._size.arrange(batch)
        self.costliest = max(self.costliest, arranged.cost)
        start = len(self.order)
        self.order += [start + position for position in arranged.order]
        for part in self._size.parts(arranged):
            yield MicroBatch(part.examples, weight if part.examples is batch else self._weigh(part.examples), part.load)

    def _next_batch(self) -> Tuple[Any, float]:
        """Returns what is cut next: a batch, or all batches of the window as one."""
        if not self._size.across_window:
            return self._pending.pop(0)
        while self._read_on():
            pass
        batches, self._pending = self._pending, []
        examples = [
            example
            for batch, _ in batches
            for example in as_list(batch, "to be cut together, batches", "leave across_window out")
        ]
        return examples, sum(weight for _, weight in batches)

    def _read_on(self) -> bool:
        """Reads another batch, and returns whether the window has one."""
        if not self._gathering.to_come or self._flushes and self.num_epochs > 0:
            return False
        try:
            self._read_batch()
        except StopIteration:
            return False
        return True

    def _read_batch(self) -> None:
        batch = self._iterator.next()
        if not self._size.leaves_whole:
            as_examples(batch)  # raises if it cannot be cut
        self._gathering.add(batch)
        self.num_batches += 1
        self.num_epochs += bool(self._iterator.is_new_epoch)
        self.num_examples += count_examples(batch) or 0
        weight = self._weigh(batch)
        self._weight += weight
        self.largest_weight = max(self.largest_weight, weight)
        self._pending.append((batch, weight))
        if self.is_repeatable:
            self._read.append((batch, weight))

    def _weigh(self, examples: Any) -> float:
        if self._weight_func is None:
            return float(len(as_list(examples, "to be weighted by its examples, a batch", "pass a weight_func")))
        return check_weight(call("weight_func", self._weight_func, examples), "the value of weight_func")


def _shapes(example: object) -> Hashable:
    if isinstance(example, (tuple, list)):
        return tuple(map(_shapes, example))
    if isinstance(example, dict):
        return tuple((key, _shapes(value)) for key, value in example.items())
    return getattr(example, "shape", ())
