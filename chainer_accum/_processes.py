"""Worker processes of Chainer that start under any start method, or fail at once.

A process started by *fork* has all that its parent has. One started by *spawn*, or by *forkserver*, the default on
Linux from Python 3.14 on, is a new interpreter that imports the main script and whatever it is sent. It dies if it
imports Chainer before this package, if it is sent an object whose class was defined in a notebook, or if importing the
script begins the training anew. A pool replaces each worker that dies, so the training would wait forever.

Here, what Chainer sends to a new interpreter travels as bytes inside an object of this package, which is therefore
imported before the bytes are unpacked. The first process that unpacks them tells its parent. If it cannot, or if it
ends before that, the parent raises an error.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import multiprocessing.pool
import pickle
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Tuple

from chainer.iterators import multiprocess_iterator
from chainer.training.extensions import snapshot_writers

from chainer_accum._compat import is_switched_off


def let_chainer_start_processes() -> None:
    """Lets Chainer's iterators and snapshot writers do as said above, unless ``CHAINER_ACCUM_COMPAT=0``."""
    if is_switched_off():
        return
    for module in (multiprocess_iterator, snapshot_writers):
        module.multiprocessing = _Multiprocessing()


class _Multiprocessing:
    """The module :mod:`multiprocessing`, as the modules of Chainer that start processes see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)

    def Pool(
        self,
        processes: int,
        initializer: Callable[..., Any],
        initargs: Tuple[Any, ...],
        maxtasksperchild: Optional[int] = None,
    ) -> Any:
        """Returns a pool, one of whose workers at least is set up."""
        if multiprocessing.get_start_method() == "fork":
            return _Pool(processes, initializer, initargs, maxtasksperchild)
        workers: List[Any] = []

        def make_worker(*args: Any, **kwargs: Any) -> Any:
            workers.append(multiprocessing.Process(*args, **kwargs))
            return workers[-1]

        context: Any = copy.copy(multiprocessing.get_context())
        context.Process = make_worker
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with _explaining(), receiver:
            call = _Parcel((initializer, initargs, {}))
            pool = _Pool(processes, _run, (sender, call), maxtasksperchild, context)
            try:
                _await_report(receiver, workers)
            except BaseException:
                pool.terminate()
                raise
        return pool

    def Process(self, target: Callable[..., Any], args: Tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> Any:
        """Returns a process whose ``start`` returns once it runs."""
        if multiprocessing.get_start_method() == "fork":
            return multiprocessing.Process(target=target, args=args, kwargs=kwargs)
        return _Process(target, args, kwargs)


class _Pool(multiprocessing.pool.Pool):
    """A pool that may have no worker for a while, when all of them have done their share and new ones are starting.

    By default, :mod:`multiprocessing` divides the work by the number of workers that are alive.

    """

    def __init__(self, processes: int, *args: Any) -> None:
        self._num_chunks = 4 * processes
        super().__init__(processes, *args)

    def map_async(self, func: Callable[..., Any], iterable: Iterable[Any]) -> Any:  # type: ignore[override]
        items = list(iterable)
        return super().map_async(func, items, chunksize=max(1, -(-len(items) // self._num_chunks)))


class _Process:
    """A new interpreter that calls a function."""

    def __init__(self, *call: Any) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.Process(target=_run, args=(sender, _Parcel(call)))

    def start(self) -> None:
        with _explaining(), self._receiver:
            self._process.start()
            _await_report(self._receiver, [self._process])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)


class _Parcel:
    """Something that a new interpreter unpacks only when it is told to, by which time this package is imported."""

    def __init__(self, contents: Any) -> None:
        self._contents = contents

    def open(self) -> Any:
        return self._contents

    def __reduce__(self) -> Any:
        stream = io.BytesIO()
        _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(self._contents)
        return _SealedParcel, (stream.getvalue(),)


class _SealedParcel(_Parcel):
    """A parcel as the new interpreter gets it."""

    def open(self) -> Any:
        return pickle.loads(self._contents)


class _Pickler(ForkingPickler):
    """Pickles no process: a snapshot writer, which is sent to the process that writes, still has the one before."""

    def reducer_override(self, value: Any) -> Any:
        return (type(None), ()) if isinstance(value, (BaseProcess, _Process)) else NotImplemented


def _run(sender: Any, parcel: _Parcel) -> None:
    """Unpacks a function and its arguments, says so, and calls it."""
    try:
        function, args, kwargs = parcel.open()
    except BaseException as error:
        _report(sender, f"{type(error).__name__}: {error}")
        raise
    _report(sender, None)
    function(*args, **kwargs)


def _report(sender: Any, cause: Optional[str]) -> None:
    with contextlib.suppress(OSError):  # only the first worker of a pool is listened to
        sender.send(cause)


def _await_report(receiver: Any, processes: Iterable[Any]) -> None:
    """Waits until one of the processes reports, and raises an error if one of them ends before that."""
    wait([receiver, *(process.sentinel for process in processes)])
    cause = "it ended before it was set up; its traceback is in its own output"
    with contextlib.suppress(EOFError):
        if receiver.poll():
            cause = receiver.recv()
    if cause is not None:
        raise RuntimeError(cause)


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Adds to an error what a new interpreter needs."""
    try:
        yield
    except Exception as error:
        message = (
            f"a worker process of Chainer cannot start: {error}. The start method "
            f"{multiprocessing.get_start_method()!r} makes it a new interpreter, which imports the main script and is "
            "sent the dataset or the snapshot writer. So put what the script runs below `if __name__ == '__main__':`, "
            "and define the classes and functions that are sent at the top level of a module"
        )
        if "fork" in multiprocessing.get_all_start_methods():
            message += ". Or start processes by fork: multiprocessing.set_start_method('fork', force=True)"
        raise RuntimeError(message) from error
