"""Prefetching: a thread reads and converts the next micro-batch while the current one computes.

There is one thread, which works at most one micro-batch ahead, in order, and only within a window. When the window
ends, the iterator is in the same position as without prefetching, so snapshots are complete.

CuPy copies arrays to a GPU asynchronously through pinned memory. By default, it copies on the computing stream, behind
all work queued there; in another thread, it copies on a stream that does not wait for the computing stream at all. So
the thread here has its own stream, and each of the two streams waits for exactly what it needs from the other.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, ContextManager, Generator, Iterator, Optional, Tuple, TypeVar

import chainer
from chainer.backends import cuda

from chainer_accum.batches.outcome import Outcome
from chainer_accum.state import ThreadState

Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare_lazily(
    items: Iterator[Item], prepare: Callable[[Item], Result]
) -> Generator[Tuple[Item, Callable[[], Result]], None, None]:
    """Yields each item with a function that prepares it when called."""
    for item in items:
        yield item, functools.partial(prepare, item)
        del item  # release it before the next is read


def prepare_ahead(
    items: Iterator[Item], prepare: Callable[[Item], Result], device: Optional[chainer.backend.Device] = None
) -> Generator[Tuple[Item, Callable[[], Result]], None, None]:
    """Yields each item with a function that returns it prepared. A thread prepares the items, one ahead.

    Exceptions and reports from reading an item come from the iterator; those from preparing an item come from its
    function. Items are read and prepared with the thread-local state that the calling thread has when the thread starts
    with them. After the iterator is closed, the thread is idle.

    Args:
        items: Iterator over the items.
        prepare (callable): Function that prepares an item. A :class:`StopIteration` raised by it is an ordinary error
            and does not end the items.
        device (~chainer.backend.Device): Device to which items are copied, or ``None`` for the host.

    """
    copies = _CopiesToGpu(device) if isinstance(device, cuda.GpuDevice) else _NoCopies()

    def fetch() -> Tuple[Item, Callable[[], Result]]:
        with copies.making():
            item = next(items)
            outcome = Outcome(functools.partial(prepare, item))
            await_copies = copies.are_made()

        def prepared() -> Result:
            await_copies()
            return outcome.take_over()

        return item, prepared

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="chainer_accum") as executor:

        def fetch_ahead() -> Future[Outcome[Tuple[Item, Callable[[], Result]]]]:
            return executor.submit(ThreadState().run, functools.partial(Outcome, fetch))

        ahead = fetch_ahead()
        while True:
            try:
                fetched = ahead.result().take_over()
            except StopIteration:  # only from items; errors from preparing are in their own outcome
                return
            ahead = fetch_ahead()
            yield fetched
            del fetched  # release it before waiting for the next


class _NoCopies:
    """No synchronization, for arrays that stay on the host."""

    def making(self) -> ContextManager[None]:
        return contextlib.nullcontext()

    def are_made(self) -> Callable[[], None]:
        return lambda: None


class _CopiesToGpu(_NoCopies):
    """Synchronization between the stream on which a thread copies and the stream on which the calling thread computes.

    Computations with a copy wait until it is complete. In turn, a copy must not overwrite memory that the device still
    uses: its memory may have belonged to an array that is no longer referenced, but with which queued work still
    computes. So a copy waits for all work that was queued when its memory was allocated. Only the device waits, not the
    host.

    Args:
        device (~chainer.backends.cuda.GpuDevice): Device to copy to.

    """

    def __init__(self, device: cuda.GpuDevice) -> None:
        self._device = device
        with chainer.using_device(device):
            self._computing = cuda.cupy.cuda.get_current_stream()
            self._copying = _copying_stream(device.device.id, threading.get_ident())

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Context manager in which the current thread copies on the copying stream."""
        with chainer.using_device(self._device), self._copying:
            self._await_computing()
            allocate = functools.partial(self._allocate, cuda.cupy.cuda.get_allocator())
            with cuda.cupy.cuda.using_allocator(allocate):
                yield

    def are_made(self) -> Callable[[], None]:
        """Returns a function that makes all later computations wait for the copies started so far."""
        return functools.partial(self._computing.wait_event, self._copying.record())

    def _allocate(self, allocate: Callable[[int], Any], size: int) -> Any:
        memory = allocate(size)
        self._await_computing()
        return memory

    def _await_computing(self) -> None:
        self._copying.wait_event(self._computing.record())


@functools.lru_cache(maxsize=None)
def _copying_stream(device_id: int, thread: int) -> Any:
    """Returns the copying stream for a computing thread. It is kept, because CuPy's memory pool caches per stream."""
    return cuda.Stream(non_blocking=True)
