"""Where the micro-batches of a window come from: iterator batches, each split to at most so many examples.

The two ways to form a window compose here: ``accumulation_steps`` iterator batches are gathered, and each is split. All
that is asked of an iterator is ``next``, ``epoch``, ``is_new_epoch`` and ``epoch_detail``, and it is never asked for a
batch only to see whether there is one.
"""

from __future__ import annotations

from typing import Any, Callable, Hashable, Iterator, List, NamedTuple, Optional

from chainer_accum._arguments import call, check_weight

EPOCH_BOUNDARIES = ("carry", "flush")

WeightFunc = Callable[[Any], float]


class MicroBatch(NamedTuple):
    """The examples of one forward/backward pass, as the iterator gave them, and what they count for."""

    examples: Any
    weight: float


class MicroBatches:
    """The micro-batches of one window, read from the iterator as they are asked for.

    The first iterator batch is read at once, the others during the iteration, each when those before it are used up.
    The window ends after ``accumulation_steps`` iterator batches, at the end of the data, or with the epoch if
    ``epoch_boundary`` is ``'flush'``.

    Args:
        iterator (~chainer.dataset.Iterator): Dataset iterator.
        accumulation_steps (int): Iterator batches per window.
        micro_batch_size (int): The most examples in a micro-batch, or ``None`` to leave iterator batches whole.
        weight_func (callable): Maps the examples of a micro-batch to its weight, or ``None`` to count the examples.
        epoch_boundary (str): ``'carry'`` or ``'flush'``.
        is_repeatable (bool): Whether the iterator batches are kept, so that the iteration can begin again.
        likely_weight (float): What an iterator batch is likely to weigh, as far as that is known from others.

    Attributes:
        is_repeatable (bool): See the argument.
        num_batches (int): How many iterator batches have been read so far.
        num_epochs (int): How many epochs ended with them.
        examples (int): How many examples have been read so far, as far as batches are lists of them.
        skipped_examples (int): How many of them do not count after all.
        largest_batch (int): How many of them were in the largest iterator batch.
        shapes: Shapes of the arrays in the first example.
        regular_weight (float): What the weights of the window add up to if every iterator batch is like the first one,
            or ``None`` if that one counts for nothing.
        largest_weight (float): What the heaviest of the iterator batches counts for.

    Raises:
        StopIteration: If the iterator has no batch left.

    """

    def __init__(
        self,
        iterator: Any,
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
        self.examples = 0
        self.skipped_examples = 0
        self.largest_batch = 0
        self._read()
        self.regular_weight: Optional[float] = accumulation_steps * self._weight or None
        first = self._parts[0][0].examples
        self.shapes: Hashable = _shapes(first[0]) if _is_list(first) else None

    @property
    def expected_weight(self) -> float:
        """What the weights of the window add up to if no iterator batch to come is heavier than those so far."""
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
            while parts:  # what has been handed out is no longer held here
                yield parts.pop(0)

    def begin_again(self, micro_batch_size: Optional[int]) -> None:
        """Lets the next iteration begin with the first iterator batch again, and split to another size."""
        self._micro_batch_size = micro_batch_size
        self._parts = [self._split(batch) for batch in self._batches]
        self.skipped_examples = 0

    def skip(self, examples: Any) -> None:
        """Takes note that the examples of a micro-batch do not count."""
        self.skipped_examples += len(examples) if _is_list(examples) else 0

    def _read(self) -> None:
        batch = self._iterator.next()
        self.num_batches += 1
        self.num_epochs += bool(self._iterator.is_new_epoch)
        size = len(batch) if _is_list(batch) else 0
        self.examples += size
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
        # Parts as even as can be: none so small that its batch statistics are worth nothing.
        count = -(-size // self._micro_batch_size)
        ends = [size * (part + 1) // count for part in range(count)]
        parts = [batch[start:end] for start, end in zip([0, *ends], ends)]
        return [MicroBatch(examples, self._weigh(examples)) for examples in parts]

    def _weigh(self, examples: Any) -> float:
        if self._weight_func is None:
            return float(_count(examples, "to be weighted by its examples, a batch", "pass a weight_func"))
        return check_weight(call("weight_func", self._weight_func, examples), "the value of weight_func")


def _shapes(example: Any) -> Hashable:
    if isinstance(example, (tuple, list)):
        return tuple(map(_shapes, example))
    if isinstance(example, dict):
        return tuple((key, _shapes(value)) for key, value in example.items())
    return getattr(example, "shape", ())


def _is_list(batch: Any) -> bool:
    # The length of a tuple or a dictionary is that of something else, such as the number of arrays in an example.
    return hasattr(batch, "__len__") and not isinstance(batch, (tuple, dict))


def _count(batch: Any, what: str, remedy: str) -> int:
    if not _is_list(batch):
        raise TypeError(f"{what} must be a list of examples, got a {type(batch).__name__} from the iterator; {remedy}")
    size = len(batch)
    if size == 0:
        raise ValueError(f"the iterator returned an empty batch, got {batch!r}; check the dataset, which may be empty")
    return size
