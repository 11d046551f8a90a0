"""Search: which limit of a pass to try next, and which is the fastest so far."""

from __future__ import annotations

import contextlib
import math
from typing import Dict, Iterator, List, NamedTuple, Optional

import chainer
import numpy

_MARGIN = 1.1  # how much more memory a pass may take than is predicted


class Single(NamedTuple):
    """A single pass: its cost, the length of its longest example, and the bytes that it took."""

    cost: int
    length: float
    num_bytes: float

    @property
    def density(self) -> float:
        """Bytes per unit of cost."""
        return self.num_bytes / self.cost


class Footprint:
    """The memory that a pass takes, by its cost: measured, or predicted from measurements, as a straight line.

    Some of it may stay in use until the next pass, because models keep the loss and with it the graph.

    """

    def __init__(self) -> None:
        self.measured: Dict[int, float] = {}
        self._longest = 0.0  # length of an example
        self._last: Optional[Single] = None
        self._kept = 0.0  # share of what a pass takes

    def add_pass(self, cost: int, num_bytes: float, length: float) -> None:
        """Records what a single pass has taken, as if its examples were as long as the longest so far."""
        # A token of a longer example may take more, with attention in proportion to the length.
        self._longest = max(self._longest, length)
        last, self._last = self._last, Single(cost, length, num_bytes)
        density = self._last.density
        slope = 0.0
        if last is not None and last.length > length:
            slope = max((last.density - density) / (last.length - length), 0.0)
        self.add(cost, cost * min(density + slope * (self._longest - length), density * self._longest / length))

    def add_kept(self, cost: int, num_bytes: float) -> None:
        """Records what a single pass has left in use."""
        if self._last is not None and self._last.cost == cost:
            self._kept = min(max(num_bytes / max(self._last.num_bytes, 1.0), 0.0), 1.0)

    def kept(self, cost: int) -> float:
        """Returns the bytes that a pass leaves in use until the next one."""
        return self._kept * (self.predict(cost) or 0.0)

    def add(self, cost: int, num_bytes: float) -> None:
        """Records what a pass has taken."""
        # Some of what earlier passes took may have been at hand for this one.
        self.measured[cost] = max(num_bytes, self.measured.get(cost, 0.0))

    def predict(self, cost: int) -> Optional[float]:
        """Returns the bytes for a pass, or ``None`` if nothing has been measured."""
        if not self.measured:
            return None
        largest = max(self.measured)
        if cost <= largest:
            costs = sorted(self.measured)
            return float(numpy.interp(cost, costs, [self.measured[each] for each in costs]))
        most = self.measured[largest]
        smaller = [each for each in self.measured if each <= largest // 2]
        if not smaller:
            return most * cost / largest
        other = max(smaller)
        slope = max(most - self.measured[other], 0.0) / (largest - other)
        return most + slope * (cost - largest)


class Search:
    """A search for the fastest limit in windows of the same kind.

    It first grows from pass to pass, to learn what they take. Then it compares whole windows.

    Args:
        kind (int): A number for what the windows have in common, or ``None`` if it is not known yet.

    Attributes:
        kind (int): See the argument.
        limit (int): The limit to use now.
        is_growing (bool): Whether each pass may still be twice as large as the one before it.
        is_over (bool): Whether the fastest limit has been found.
        footprint (Footprint): The memory that passes have taken.

    """

    MOST_WINDOWS = 8
    FIRST_UNMEASURED = 64
    _REACH = 2  # the number of limits on either side of the best one that are tried
    _LEAP = 8  # from the largest limit to the next, if single passes cannot be measured
    _HOPELESS = 1.5  # a pass that took so much longer than the best is not worth a window
    _CLOSE = 1.2  # windows that differ by less have a second trial

    def __init__(self, kind: Optional[int] = None) -> None:
        self.kind = kind
        self.limit = 1
        self.is_growing = True
        self.is_over = False
        self.footprint = Footprint()
        self._unit = 1  # limits are multiples of it by powers of two
        self._passes: Dict[int, float] = {}  # seconds per token of single passes
        self._windows: Dict[int, List[float]] = {}  # seconds per token of whole windows
        self._num_windows = 0
        self._failed = math.inf  # what did not fit

    def timings(self) -> Dict[int, float]:
        """Returns the seconds per token, by limit."""
        # Disturbances only make a measurement longer.
        return {limit: min(seconds) for limit, seconds in sorted(self._windows.items())}

    def skip_growing(self) -> None:
        """Begins at a usual limit, where memory cannot be measured."""
        self.limit, self.is_growing = self.FIRST_UNMEASURED, False

    def end_pass(self, cost: int, length: float, seconds: float, num_bytes: float, room: float) -> None:
        """Doubles the limit after a pass, if twice its cost fits in memory and may be faster.

        Args:
            cost (int): What the pass cost.
            length (float): The cost of an example in it.
            seconds (float): Seconds per token.
            num_bytes (float): Bytes that it took.
            room (float): Bytes that are free.

        """
        if not self._passes:  # the first pass also makes what stays, so the limit stays for another one
            self._unit = self.limit = max(cost, 1)
            self._passes[self.limit] = math.inf
            return
        if 2 * cost <= self.limit:
            return  # the last part of a batch, or one that was cut before the limit grew
        self._passes[self.limit] = seconds
        self.footprint.add_pass(cost, num_bytes, length)
        best = min(self._passes, key=lambda limit: self._passes[limit])
        ratio = self.limit // best  # a single pass may be slow by chance
        is_slower = ratio >= 2 * 2**self._REACH or ratio >= 2**self._REACH and self._is_hopeless(self.limit, best)
        if not is_slower and self._fits(2 * self.limit, room):
            self.limit *= 2
        else:
            self.limit, self.is_growing = best, False

    def end_window(
        self, seconds: Optional[float], cost: int, num_bytes: Optional[float], largest: int, room: float
    ) -> None:
        """Records a window and chooses the next limit.

        Args:
            seconds (float): Seconds per token, or ``None`` if the limit has changed in the window.
            cost (int): What the costliest pass cost.
            num_bytes (float): Bytes that the window took, or ``None`` if that is unknown.
            largest (int): The cost of the costliest batch, as one pass.
            room (float): Bytes that are free.

        """
        self._num_windows += 1
        if seconds is not None and self._num_windows > 1:  # the first window includes one-time work
            self._windows.setdefault(self.limit, []).append(seconds)
            if num_bytes is not None:
                self.footprint.add(cost, num_bytes)
        if self.is_growing and len(self._passes) > 1:
            if self.limit < largest and self._num_windows < self.MOST_WINDOWS:
                return
            self.limit = min(self._passes, key=lambda limit: self._passes[limit])
        self.is_growing = False
        following = self._following(largest, room) if self._num_windows < self.MOST_WINDOWS else None
        if following is None:
            timings = self.timings()
            self.limit = min(timings, key=lambda limit: timings[limit], default=self.limit)
            self.is_over = True
        else:
            self.limit = following

    def shrink_to_fit(self, room: float) -> None:
        """Lowers the limit until it is predicted to fit."""
        while self.limit > self._unit and not self._fits(self.limit, room):
            self.limit //= 2

    def lower(self, failed: int) -> None:
        """Lowers the limit after memory ran out in a pass that cost ``failed``."""
        self._failed = failed
        self.is_growing = False
        self._windows = {limit: seconds for limit, seconds in self._windows.items() if limit < failed}
        while self.limit >= failed and self.limit > 1:
            self.limit //= 2

    def serialize(self, serializer: chainer.AbstractSerializer, name: str) -> None:
        """Serializes what has been found under a name, so that a resumed run does not search again."""
        trials = [(limit, second) for limit, seconds in self._windows.items() for second in seconds]
        state = {
            "progress": [self.limit, self.is_growing, self.is_over, self._unit, self._num_windows, self._failed],
            "kind": [] if self.kind is None else [self.kind],
            "memory": list(self.footprint.measured.items()),
            "passes": list(self._passes.items()),
            "windows": trials,
        }
        if not isinstance(serializer, chainer.Deserializer):
            for key, values in state.items():
                serializer(f"{name}/{key}", numpy.array(values, numpy.float64))
            return
        with contextlib.suppress(KeyError):  # a snapshot without a search
            progress, kind, *others = [serializer(f"{name}/{key}", None) for key in state]
            if progress is None:  # nothing was to be loaded
                return
            limit, growing, over, unit, windows, failed = map(float, progress)
            memory, passes, trials = (array.reshape(-1, 2) for array in others)
            self.limit, self.is_growing, self.is_over = int(limit), bool(growing), bool(over)
            self._unit, self._num_windows, self._failed = int(unit), int(windows), failed
            self.kind = int(kind[0]) if len(kind) else None
            self.footprint.measured = {int(cost): float(num_bytes) for cost, num_bytes in memory}
            self._passes = {int(limit): float(seconds) for limit, seconds in passes}
            self._windows = {}
            for limit, seconds in trials:
                self._windows.setdefault(int(limit), []).append(float(seconds))

    def _following(self, largest: int, room: float) -> Optional[int]:
        """Returns the limit for the next window, or ``None`` if there is nothing left to try."""
        timings = self.timings()
        if not timings:
            return self.limit
        best = min(timings, key=lambda limit: timings[limit])
        for limit in self._candidates(best):
            # From twice the costliest batch on, nothing is cut, as with half the limit.
            is_new = limit not in timings and self._unit <= limit < 2 * largest
            if is_new and self._fits(limit, room):
                return limit
        rivals = sorted(timings, key=lambda limit: timings[limit])[: self._REACH]
        for limit in rivals if len(rivals) > 1 else ():
            if len(self._windows[limit]) == 1 and timings[limit] < self._CLOSE * timings[best]:
                return limit
        return None

    def _candidates(self, best: int) -> Iterator[int]:
        """Returns an iterator over limits around the best one so far, the most promising first."""
        if best == max(self._windows):  # larger ones have not been tried, so the best may be far
            if len(self._passes) <= 1:
                yield from (best * self._LEAP, best * self._LEAP // 2)
            elif best // 2 in self._windows:
                yield best * self._LEAP // 2
        for step in range(1, self._REACH + 1):
            for limit in (best * 2**step, best // 2**step):
                # A single pass may be slow by chance, so it does not rule out what is next to the best.
                if step == 1 or not self._is_hopeless(limit, best):
                    yield limit

    def _is_hopeless(self, limit: int, best: int) -> bool:
        """Returns whether a single pass took far longer than one with the best limit."""
        passes = self._passes
        return limit in passes and best in passes and passes[limit] > self._HOPELESS * passes[best]

    def _fits(self, limit: int, room: float) -> bool:
        num_bytes = self.footprint.predict(limit)
        return limit < self._failed and (num_bytes is None or num_bytes * _MARGIN <= room)
