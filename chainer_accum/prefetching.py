"""The next micro-batch is fetched and converted while the present one computes.

It is done in one thread, one ahead at most, in order, and within a window only: when the window is over, the iterator
is where it would be without, so that a snapshot misses nothing.

CuPy copies an array to a GPU through pinned memory and waits for nothing. But it does so on the stream that computes,
behind all that this has to do, or, in another thread, on a stream that does not wait for it at all. So the thread has a
stream of its own here, and each of the two waits for what it needs of the other.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, ContextManager, Generator, Iterator, Tuple, TypeVar

import chainer
from chainer.backends import cuda

from chainer_accum.thread_state import Outcome, ThreadState

Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare_lazily(
    items: Iterator[Item], prepare: Callable[[Item], Result]
) -> Generator[Tuple[Item, Callable[[], Result]], None, None]:
    """Returns an iterator over items, each with a function that prepares it when it is called."""
    for item in items:
        yield item, functools.partial(prepare, item)
        del item  # before the next one is read


def prepare_ahead(
    items: Iterator[Item], prepare: Callable[[Item], Result], device: Any = None
) -> Generator[Tuple[Item, Callable[[], Result]], None, None]:
    """Returns an iterator over items, each with a function that returns it prepared, which a thread does one ahead.

    What fails in preparing an item is raised by that function, and what fails in getting one, by the iterator. What is
    reported in preparing an item is reported by that function, and what is reported in getting one, by the iterator.
    Each item is got and prepared with what is local to the calling thread, as it is when the thread begins with it.
    Once the iterator is closed, the thread is at rest.

    Args:
        items: Iterator over the items.
        prepare (callable): Function that prepares an item. If it raises :class:`StopIteration`, that is an error like
            any other, not the end of the items.
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
            except StopIteration:  # raised by items only; what preparing one raises is in an outcome of its own
                return
            ahead = fetch_ahead()
            yield fetched
            del fetched  # before the next one is waited for


class _NoCopies:
    """What stays on the host is there at once."""

    def making(self) -> ContextManager[None]:
        return contextlib.nullcontext()

    def are_made(self) -> Callable[[], None]:
        return lambda: None


class _CopiesToGpu(_NoCopies):
    """The order between a stream on which one thread copies and that on which the calling thread computes.

    What computes with a copy waits until it is made. And memory may have been that of an array which nothing refers to
    any more, but with which the device has yet to compute: so a copy waits for what it had been told to do by the time
    that the memory for the copy was taken. Only the device waits, the host does not.

    Args:
        device (~chainer.backends.cuda.GpuDevice): Device to copy to.

    """

    def __init__(self, device: Any) -> None:
        self._device = device
        with chainer.using_device(device):
            self._computing = cuda.cupy.cuda.get_current_stream()
            self._copying = _copying_stream(device.device.id, threading.get_ident())

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Returns a context in which the current thread, whichever it is, copies on the stream for that."""
        with chainer.using_device(self._device), self._copying:
            self._await_computing()
            allocate = functools.partial(self._allocate, cuda.cupy.cuda.get_allocator())
            with cuda.cupy.cuda.using_allocator(allocate):
                yield

    def are_made(self) -> Callable[[], None]:
        """Returns a function after which all that is computed comes after the copies that have been begun."""
        return functools.partial(self._computing.wait_event, self._copying.record())

    def _allocate(self, allocate: Callable[[int], Any], size: int) -> Any:
        memory = allocate(size)
        self._await_computing()
        return memory

    def _await_computing(self) -> None:
        self._copying.wait_event(self._computing.record())


@functools.lru_cache(maxsize=None)
def _copying_stream(device_id: int, thread: int) -> Any:
    """Returns the stream of a computing thread. It stays, for CuPy's memory pool keeps memory for each stream."""
    return cuda.Stream(non_blocking=True)
