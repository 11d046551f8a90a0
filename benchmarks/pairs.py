"""Times that are compared in pairs, so that a ratio holds when the speed of the machine drifts."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from typing import Callable, Dict, List

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


FEWEST_ROUNDS, MOST_ROUNDS = 5, 200


def measure_for(
    contestants: Dict[str, Callable[[], None]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Dict[str, List[float]]:
    """Returns the seconds of each run, in as many rounds as take about ``seconds``, but not too few or too many."""
    start = time.perf_counter()
    for contestant in contestants.values():
        contestant()
    rounds = int(seconds / (time.perf_counter() - start))
    return measure(contestants, min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS), clock)


def measure(
    contestants: Dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Dict[str, List[float]]:
    """Returns the seconds of each run; in each round, all run once, in an order that rotates."""
    names = list(contestants)
    seconds: Dict[str, List[float]] = {name: [] for name in names}
    for contestant in contestants.values():
        contestant()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: List[float], reference: List[float]) -> str:
    """Returns the median of the ratios round by round, and the quartiles."""
    low, median, high = statistics.quantiles([time / other for time, other in zip(seconds, reference)], n=4)
    return f"{median:.3f} ({low:.3f}–{high:.3f})"


def keep_freed_memory() -> None:
    """Has the C library of Linux keep what is freed, as far as arrays of up to 32 MiB go.

    By default it gives memory at the end of the heap back, and the next array is made of new pages, each of which costs
    a page fault. Which contestant that happens to depends on whose arrays lie at the end.

    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, 2**25)
            mallopt(_M_TRIM_THRESHOLD, 2**30)
