"""The next micro-batch is fetched and converted while the present one computes.

It is done in one thread, one ahead at most, in order, and within a window only: when the window is over, the iterator
is where it would be without, so that a snapshot misses nothing.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Generator, Iterator, Optional, Tuple, TypeVar

import chainer

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
    items: Iterator[Item], prepare: Callable[[Item], Result]
) -> Generator[Tuple[Item, Callable[[], Result]], None, None]:
    """Returns an iterator over items, each with a function that returns it prepared, which a thread does one ahead.

    What fails in preparing an item is raised by that function, and what fails in getting one, by the iterator. Once the
    iterator is closed, the thread is at rest.

    """
    config = {name: getattr(chainer.config, name) for name in vars(chainer.global_config)}

    def fetch() -> Optional[Tuple[Item, Callable[[], Result]]]:
        _take_over(config)  # which each thread has of its own
        try:
            item = next(items)
        except StopIteration:
            return None
        future: Future[Result] = Future()
        try:
            future.set_result(prepare(item))
        except BaseException as error:
            future.set_exception(error)
        return item, future.result

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="chainer_accum") as executor:
        ahead = executor.submit(fetch)
        while True:
            fetched = ahead.result()
            if fetched is None:
                return
            ahead = executor.submit(fetch)
            yield fetched
            del fetched  # before the next one is waited for


def _take_over(config: Dict[str, Any]) -> None:
    for name, value in config.items():
        setattr(chainer.config, name, value)
