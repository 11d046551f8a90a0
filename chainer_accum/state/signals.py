"""DeferredSignals: delays signals until a step is complete.

Ctrl-C raises KeyboardInterrupt between any two Python instructions. So does every other signal whose handler raises,
such as one sent by a job scheduler. During the passes, this is harmless, because a failed window is dropped. But a step
that has begun cannot be undone.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Callable, Dict, List, Optional

# Signals from terminals, job schedulers and timers, if the platform has them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class DeferredSignals:
    """Context manager that delays signals with a Python handler until it ends.

    Outside the main thread, where no handler runs, it does nothing.

    """

    def __init__(self) -> None:
        self._handlers: Dict[int, Callable[..., Any]] = {}
        self._pending: List[int] = []

    def __enter__(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or _is_deferred(signal.SIGINT):  # or nested
            return
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._defer)
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self._put_back()
        except BaseException:  # one signal more, before its handler was replaced again
            self._put_back()
            raise
        for number in self._pending:
            signal.raise_signal(number)

    def _defer(self, number: int, frame: Optional[FrameType]) -> None:
        if number not in self._pending:
            self._pending.append(number)

    def _put_back(self) -> None:
        for number, handler in reversed(list(self._handlers.items())):  # SIGINT, which users send, comes last
            if _is_deferred(number):  # and its handler has not been changed since
                signal.signal(number, handler)


def _is_deferred(number: int) -> bool:
    return getattr(signal.getsignal(number), "__func__", None) is DeferredSignals._defer
