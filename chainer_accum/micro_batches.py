"""Where the micro-batches of a window come from: iterator batches, each split to at most so many examples.

The two ways to form a window compose here: ``accumulation_steps`` iterator batches are gathered, and each is split. All
that is asked of an iterator is ``next``, ``epoch``, ``is_new_epoch`` and ``epoch_detail``, and it is never asked for a
batch only to see whether there is one.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, List, NamedTuple, Optional

from chainer_accum._arguments import check_weight

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

    Attributes:
        is_new_epoch (bool): Whether an epoch ended with one of the iterator batches read so far.
        examples (int): How many examples have been read so far, as far as batches are lists of them.
        expected_weight (float): What the weights of the window add up to if every iterator batch is like the first one,
            or ``None`` if that one counts for nothing.

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
    ) -> None:
        self._iterator = iterator
        self._accumulation_steps = accumulation_steps
        self._micro_batch_size = micro_batch_size
        self._weight_func = weight_func
        self._flushes = epoch_boundary == "flush"
        self.is_new_epoch = False
        self.examples = 0
        self._fetched = self._fetch()
        weight = sum(micro_batch.weight for micro_batch in self._fetched)
        self.expected_weight: Optional[float] = accumulation_steps * weight or None

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self._accumulation_steps):
            if step > 0:
                if self._flushes and self.is_new_epoch:
                    return
                try:
                    self._fetched = self._fetch()
                except StopIteration:
                    return
            while self._fetched:  # what has been handed out is no longer held here
                yield self._fetched.pop(0)

    def _fetch(self) -> List[MicroBatch]:
        batch = self._iterator.next()
        self.is_new_epoch = self.is_new_epoch or bool(self._iterator.is_new_epoch)
        self.examples += len(batch) if _is_list(batch) else 0
        return [MicroBatch(examples, self._weigh(examples)) for examples in self._split(batch)]

    def _split(self, batch: Any) -> List[Any]:
        if self._micro_batch_size is None:
            return [batch]
        size = _count(batch, "to be split, a batch", "use accumulation_steps and no micro_batch_size")
        # Parts as even as can be: none so small that its batch statistics are worth nothing.
        parts = -(-size // self._micro_batch_size)
        ends = [size * (part + 1) // parts for part in range(parts)]
        return [batch[start:end] for start, end in zip([0, *ends], ends)]

    def _weigh(self, examples: Any) -> float:
        if self._weight_func is None:
            return float(_count(examples, "to be weighted by its examples, a batch", "pass a weight_func"))
        return check_weight(self._weight_func(examples), "the value of weight_func")


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
