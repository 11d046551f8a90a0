"""Coroutine: a function in a thread of its own, which runs only when it is resumed, and can wait anywhere.

One thread runs at a time: the one that resumes waits until the coroutine waits or ends. So nothing in them has to be
protected from another thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from typing import Callable, List

from chainer_accum.state import DeferredSignals, ThreadState


class Abandoned(BaseException):
    """Raised in a coroutine that must end."""


class Coroutine:
    """A function that runs in a thread of its own, with the thread-local state of the thread that creates it.

    Function hooks and link hooks are shared with that thread.

    Args:
        function (callable): Function without arguments. It may call :meth:`wait`.

    Attributes:
        has_ended (bool): Whether the function has returned or raised.

    """

    def __init__(self, function: Callable[[], None]) -> None:
        _use_one_heap()
        self.has_ended = False
        self._function = function
        self._errors: List[BaseException] = []
        self._is_abandoned = False
        self._is_parked = False
        self._num_raised = 0
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        run = functools.partial(ThreadState(with_hooks=True).run, self._run)
        self._thread = threading.Thread(target=run, name="chainer_accum", daemon=True)

    def resume(self) -> None:
        """Runs the function until it waits or ends.

        If it raises, so does this.

        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self.has_ended:
            self._thread.join()
            if self._errors:
                raise self._errors.pop()  # popped, since its traceback refers to this object

    def wait(self) -> None:
        """Gives control back to the thread that resumed the function, until it does so again.

        Raises:
            Abandoned: If the function must end. Each later call raises it as well.

        """
        if not self._is_abandoned:
            self._back.release()
            self._go.acquire()
        if self._is_abandoned:
            self._num_raised += 1
            if self._num_raised > _MOST_RAISED:  # the function catches it and goes on for ever
                self._is_parked = True
                threading.Event().wait()
            raise Abandoned

    def end(self) -> None:
        """Ends the function, wherever it waits, and the thread. It can be called any number of times.

        A function that catches the exception and calls :meth:`wait` again, for ever, is left alone, asleep.

        """
        with DeferredSignals():
            self._is_abandoned = True
            while self._thread.ident is not None and self._thread.is_alive() and not self._is_parked:
                _release(self._go)  # again and again, since an interrupt may have come at any point of resume
                self._thread.join(timeout=0.001)
            self._errors.clear()

    def _run(self) -> None:
        try:
            if not self._is_abandoned:
                self._function()
        except Abandoned:
            pass
        except BaseException as error:
            self._errors.append(error)
        del self._function  # which may refer to this object
        self.has_ended = True
        _release(self._back)


def _release(lock: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # it was free
        lock.release()


@functools.lru_cache(maxsize=None)
def _use_one_heap() -> None:
    """Makes all threads allocate from the same heap, if the C library is glibc.

    It would give each thread a heap of its own, and what one has freed would not be used by the next.

    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)


_MOST_RAISED = 1000
_M_ARENA_MAX = -8  # from malloc.h
