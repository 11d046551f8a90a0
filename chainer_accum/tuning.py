"""How many examples a micro-batch has: as many as were asked for, as fit, or as are fastest.

Splitting a batch does not change its gradient, so any window may be split in any way: sizes can be tried out on windows
that count, and a window that does not fit begins again with a smaller size.
"""

from __future__ import annotations

import time
from typing import Any, Dict, Hashable, List, Optional

import chainer

from chainer_accum._devices import synchronize


class MicroBatchSize:
    """The largest number of examples in a micro-batch, which memory may lower.

    Args:
        size (int): The number, or ``None`` for no limit.

    Attributes:
        size (int): The number for the next window.
        timings (dict): Seconds per example by size, as far as they were measured.
        is_tuned (bool): Whether the size is being searched for.

    """

    is_tuned = False

    def __init__(self, size: Optional[int]) -> None:
        self.size = size

    @property
    def timings(self) -> Dict[int, float]:
        return {}

    def begin_window(self, device: Any) -> None:
        """Takes note that a window begins."""

    def lower(self, failed: int) -> None:
        """Lowers the size after a micro-batch of ``failed`` examples, two or more, did not fit in memory."""
        self.size = (failed + 1) // 2

    def end_window(self, device: Any, shapes: Hashable, examples: int, largest_batch: int) -> None:
        """Takes note that the window is over.

        Args:
            device (~chainer.backend.Device): Device of the model.
            shapes: Shapes of the arrays in an example.
            examples (int): Number of examples in the window.
            largest_batch (int): Number of examples in its largest iterator batch.

        """


class TunedMicroBatchSize(MicroBatchSize):
    """The size with which windows are fastest.

    It is found among the powers of two by trying: from the best size so far, larger and smaller ones, until those on
    both sides of it are slower. Windows with other shapes, or with other numbers of examples, have a search of their
    own, unless they are single ones between others, as the last of the data may be.

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

    def begin_window(self, device: Any) -> None:
        self._began = None
        if not self._search.is_over:
            synchronize(device)
            self._began = time.perf_counter()

    def lower(self, failed: int) -> None:
        self._began = None  # the time until now is not that of any size
        self._search.lower(failed)

    def end_window(self, device: Any, shapes: Hashable, examples: int, largest_batch: int) -> None:
        chainer.report({"micro_batch_size": self.size})
        if self._began is not None and not self._is_first_window:  # which also makes what is made only once
            synchronize(device)
            seconds = (time.perf_counter() - self._began) / examples
            chainer.report({"seconds_per_example": seconds})
            self._search.add(seconds, largest_batch)
        self._is_first_window = False
        kind = (shapes, examples)
        if not self._searches:
            self._searches[kind] = self._search
        elif kind == self._last_kind:
            self._search = self._searches.setdefault(kind, _Search())
        self._last_kind = kind


class _Search:
    """A search for the best size, for windows that are alike."""

    _FIRST = 64
    # Windows per size, and the sizes that are left have one more each, as the machine may have been slower for a while.
    # The fastest window counts: what disturbs a measurement makes it longer.
    _TRIALS = 2
    _REACH = 2  # how many sizes on either side of the best one must be slower

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
        """Returns the sizes that are to be slower than the best one, larger ones first."""
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
