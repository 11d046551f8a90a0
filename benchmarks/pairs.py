"""Times that are compared in pairs, so that a ratio holds when the speed of the machine drifts."""

from __future__ import annotations

import statistics
import time
from typing import Callable, Dict, List


def measure(contestants: Dict[str, Callable[[], None]], rounds: int) -> Dict[str, List[float]]:
    """Returns the seconds of each run; in each round, all run once, in an order that rotates."""
    names = list(contestants)
    seconds: Dict[str, List[float]] = {name: [] for name in names}
    for contestant in contestants.values():
        contestant()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: List[float], reference: List[float]) -> str:
    """Returns the median of the ratios round by round, and the quartiles."""
    low, median, high = statistics.quantiles([time / other for time, other in zip(seconds, reference)], n=4)
    return f"{median:.3f} ({low:.3f}–{high:.3f})"
