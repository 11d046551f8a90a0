"""The number of examples in a micro-batch: given, lowered when memory runs out, or tuned for speed.

Splitting a batch does not change its gradient, so a window may be split in any way. Sizes can therefore be tried in
windows that count, and a window that does not fit in memory restarts with a smaller size.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import Dict, Hashable, Iterator, List, Optional, Protocol, Sized

import chainer

from chainer_accum._arguments import check_int
from chainer_accum._devices import free_memory, synchronize


class OutOfMemory(Exception):
    """Raised when memory runs out in a pass that can be repeated with fewer examples."""

    def __init__(self, num_examples: int, error: MemoryError) -> None:
        super().__init__(str(error))
        self.num_examples = num_examples


class _Repeatable(Protocol):
    """What takes part in a pass."""

    is_repeatable: bool


@contextlib.contextmanager
def retryable_memory_errors(examples: Sized, *repeatable: _Repeatable) -> Iterator[None]:
    """Context manager that raises OutOfMemory for a MemoryError, if the pass can be repeated with fewer examples.

    Args:
        examples: The examples of the pass.
        *repeatable: The objects that take part in the pass. Each has an attribute ``is_repeatable``.

    """
    try:
        yield
    except MemoryError as error:
        if all(each.is_repeatable for each in repeatable):
            raise OutOfMemory(len(examples), error) from None
        raise


def make_micro_batch_size(micro_batch_size: object) -> MicroBatchSize:
    """Returns the micro-batch size for an argument: a number, ``None`` or ``'auto'``."""
    if isinstance(micro_batch_size, str) and micro_batch_size == "auto":
        return TunedMicroBatchSize()
    if micro_batch_size is None:
        return MicroBatchSize(None)
    remedy = "use None to leave batches whole, or 'auto' to find the fastest"
    return MicroBatchSize(check_int("micro_batch_size", micro_batch_size, 1, remedy))


class MicroBatchSize:
    """The largest number of examples in a micro-batch. It is lowered when memory runs out.

    Args:
        size (int): The number, or ``None`` for no limit.

    Attributes:
        size (int): The number for the next window.
        timings (dict): Seconds per example by size, as measured so far.
        is_tuned (bool): Whether the fastest size is searched for.

    """

    is_tuned = False

    def __init__(self, size: Optional[int]) -> None:
        self.size = size

    @property
    def timings(self) -> Dict[int, float]:
        return {}

    def begin_window(self, device: chainer.backend.Device) -> None:
        """Called when a window begins."""

    def lower(self, failed: int) -> None:
        """Lowers the size after memory ran out in a micro-batch of ``failed`` examples, two or more."""
        self.size = (failed + 1) // 2

    def make_room(self, failed: int, cause: str, device: chainer.backend.Device) -> None:
        """Lowers the size after memory ran out, and frees cached memory on the device of the model.

        Raises:
            MemoryError: If memory ran out for a single example.

        """
        if failed == 1:
            raise MemoryError(
                f"one example does not fit in memory: {cause}; use a smaller model or smaller examples, "
                "or chainer.functions.forget, which recomputes parts of the graph instead of keeping them"
            )
        self.lower(failed)
        free_memory(device)
        warnings.warn(
            f"memory ran out for a micro-batch of {failed} examples ({cause}); the update restarts, and from now on a "
            f"micro-batch has at most {self.size}",
            RuntimeWarning,
            stacklevel=2,
        )

    def end_window(
        self, device: chainer.backend.Device, shapes: Hashable, examples: int, largest_batch: int
    ) -> Dict[str, float]:
        """Called when a window has ended.

        Args:
            device (~chainer.backend.Device): Device of the model.
            shapes: Shapes of the arrays in an example.
            examples (int): Number of examples in the window.
            largest_batch (int): Number of examples in its largest iterator batch.

        Returns:
            dict: What to report.

        """
        return {}


class TunedMicroBatchSize(MicroBatchSize):
    """The micro-batch size with the shortest window.

    Powers of two are tried: larger and smaller sizes than the best one so far, until the neighbors on both sides are
    slower. Windows with different shapes or numbers of examples have a separate search, unless they occur singly, as at
    the end of the data.

    """

    is_tuned = True

    def __init__(self) -> None:
        self._search = _Search()
        self._searches: Dict[Hashable, _Search] = {}
        self._last_kind: Hashable = None
        self._is_first_window = True
        self._began: Optional[float] = None

    @property
    def size(self) -> int:  # type: ignore[override]
        return self._search.size

    @property
    def timings(self) -> Dict[int, float]:
        return self._search.timings()

    def begin_window(self, device: chainer.backend.Device) -> None:
        self._began = None
        if not self._search.is_over:
            synchronize(device)
            self._began = time.perf_counter()

    def lower(self, failed: int) -> None:
        self._began = None  # the time so far belongs to no single size
        self._search.lower(failed)

    def end_window(
        self, device: chainer.backend.Device, shapes: Hashable, examples: int, largest_batch: int
    ) -> Dict[str, float]:
        observation: Dict[str, float] = {"micro_batch_size": self.size}
        if self._began is not None and not self._is_first_window:  # the first window includes one-time work
            synchronize(device)
            seconds = observation["seconds_per_example"] = (time.perf_counter() - self._began) / examples
            self._search.add(seconds, largest_batch)
        self._is_first_window = False
        kind = (shapes, examples)
        if not self._searches:
            self._searches[kind] = self._search
        elif kind == self._last_kind:
            self._search = self._searches.setdefault(kind, _Search())
        self._last_kind = kind
        return observation


class _Search:
    """A search for the fastest size in windows of the same kind."""

    _FIRST = 64
    # Windows per size. The final candidates get one more each, since the machine may have been slower for a while.
    # The fastest window counts: disturbances only make a measurement longer.
    _TRIALS = 2
    _REACH = 2  # the number of sizes on either side of the best one that must be slower

    def __init__(self) -> None:
        self.size = self._FIRST
        self.is_over = False
        self._seconds: Dict[int, List[float]] = {}
        self._limit: Optional[int] = None

    def timings(self) -> Dict[int, float]:
        return {size: min(seconds) for size, seconds in sorted(self._seconds.items())}

    def lower(self, failed: int) -> None:
        self._limit = failed
        self._seconds = {size: seconds for size, seconds in self._seconds.items() if size < failed}
        while self.size >= failed:
            self.size //= 2

    def add(self, seconds: float, whole: int) -> None:
        trials = self._seconds.setdefault(self.size, [])
        trials.append(seconds)
        if self.is_over or len(trials) < self._TRIALS:
            return
        timings = self.timings()
        best = min(timings, key=lambda size: timings[size])
        around = self._around(best, whole)
        for size in around:
            if size not in timings:
                self.size = size
                return
        for size in [*around, best]:
            if len(self._seconds[size]) == self._TRIALS:
                self.size = size
                return
        self.size, self.is_over = best, True

    def _around(self, best: int, whole: int) -> List[int]:
        """Returns the neighboring sizes that must be slower than the best one, larger ones first."""
        larger: List[int] = []
        smaller: List[int] = []
        size = best
        while len(larger) < self._REACH and size < whole and (self._limit is None or size * 2 < self._limit):
            size *= 2
            larger.append(size)
        size = best
        while len(smaller) < self._REACH and size > 1:
            size //= 2
            if size < whole:
                smaller.append(size)
        return larger + smaller
