"""Signals that wait until a step is whole.

Ctrl-C raises KeyboardInterrupt between any two instructions of Python, and so does every other signal whose handler
raises, such as one that a job scheduler sends. During the passes that is harmless, for a window that fails is dropped.
But a step that has begun cannot be taken back.
"""

from __future__ import annotations

import signal
import threading
from typing import Any, Callable, Dict, List

# What terminals, job schedulers and timers send, as far as the platform has it.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class DeferredSignals:
    """Context manager in which signals with a handler in Python wait until its end.

    Outside of the main thread, where no handler runs, it does nothing.

    """

    def __init__(self) -> None:
        self._handlers: Dict[int, Callable[..., Any]] = {}
        self._pending: List[int] = []

    def __enter__(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or _is_deferred(signal.SIGINT):  # or it is nested
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

    def __exit__(self, *exception: Any) -> None:
        try:
            self._put_back()
        finally:
            self._put_back()
        for number in self._pending:
            signal.raise_signal(number)

    def _defer(self, number: int, frame: Any) -> None:
        if number not in self._pending:
            self._pending.append(number)

    def _put_back(self) -> None:
        for number, handler in reversed(list(self._handlers.items())):  # SIGINT, which people send, comes last
            if _is_deferred(number):  # and not handled in another way since
                signal.signal(number, handler)


def _is_deferred(number: int) -> bool:
    return getattr(signal.getsignal(number), "__func__", None) is DeferredSignals._defer
