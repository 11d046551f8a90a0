"""Worker processes of Chainer that start under any start method, or fail immediately.

A process started by *fork* inherits everything from its parent. A process started by *spawn*, or by *forkserver*, the
default on Linux from Python 3.14 on, is a new interpreter that imports the main script and receives pickled objects. It
dies if it imports Chainer before this package, if it receives an object whose class was defined in a notebook, or if
importing the script starts the training again. A pool replaces each worker that dies, so the training would wait
forever.

Here, what Chainer sends to a new interpreter travels as bytes inside an object of this package, so that this package is
imported before the bytes are unpickled. The first process that unpickles them tells its parent. If it fails, or ends
before that, the parent raises an error.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import multiprocessing.pool
import pickle
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Tuple, Type, Union

from chainer.iterators import multiprocess_iterator
from chainer.training.extensions import snapshot_writers

from chainer_accum._compat.names import is_switched_off


def let_chainer_start_processes() -> None:
    """Lets Chainer's iterators and snapshot writers start processes as described above.

    ``CHAINER_ACCUM_COMPAT=0`` disables this.

    """
    if is_switched_off():
        return
    module: Any  # what it names is not the module's own
    for module in (multiprocess_iterator, snapshot_writers):
        module.multiprocessing = _Multiprocessing()


class _Multiprocessing:
    """Replacement for :mod:`multiprocessing` in the modules of Chainer that start processes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)

    def Pool(
        self,
        processes: int,
        initializer: Callable[..., Any],
        initargs: Tuple[Any, ...],
        maxtasksperchild: Optional[int] = None,
    ) -> multiprocessing.pool.Pool:
        """Returns a pool after at least one of its workers is set up."""
        if multiprocessing.get_start_method() == "fork":
            return _Pool(processes, initializer, initargs, maxtasksperchild)
        workers: List[BaseProcess] = []

        def make_worker(*args: Any, **kwargs: Any) -> BaseProcess:
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

    def Process(
        self, target: Callable[..., Any], args: Tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}
    ) -> Union[BaseProcess, _Process]:
        """Returns a process whose ``start`` returns once the process runs."""
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
    """Process in a new interpreter that calls a function."""

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
    """An object that a new interpreter unpickles only on request, after it has imported this package."""

    def __init__(self, contents: Any) -> None:
        self._contents = contents

    def open(self) -> Any:
        return self._contents

    def __reduce__(self) -> Tuple[Type[_SealedParcel], Tuple[bytes]]:
        stream = io.BytesIO()
        _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(self._contents)
        return _SealedParcel, (stream.getvalue(),)


class _SealedParcel(_Parcel):
    """A parcel as the new interpreter receives it."""

    def open(self) -> Any:
        return pickle.loads(self._contents)


class _Pickler(ForkingPickler):
    """Pickler that replaces processes by ``None``.

    A snapshot writer, which is sent to the process that writes, still refers to the previous process.

    """

    def reducer_override(self, value: object) -> Any:
        return (type(None), ()) if isinstance(value, (BaseProcess, _Process)) else NotImplemented


def _run(sender: Connection, parcel: _Parcel) -> None:
    """Unpickles a function and its arguments, reports success to the parent, and calls the function."""
    try:
        function, args, kwargs = parcel.open()
    except BaseException as error:
        _report(sender, f"{type(error).__name__}: {error}")
        raise
    _report(sender, None)
    function(*args, **kwargs)


def _report(sender: Connection, cause: Optional[str]) -> None:
    with contextlib.suppress(OSError):  # the parent listens only to the first worker of a pool
        sender.send(cause)


def _await_report(receiver: Connection, processes: Iterable[BaseProcess]) -> None:
    """Waits until one of the processes reports, and raises RuntimeError if one of them fails or ends before that."""
    wait([receiver, *(process.sentinel for process in processes)])
    cause = "it ended before it was set up; its traceback is in its own output"
    with contextlib.suppress(EOFError):
        if receiver.poll():
            cause = receiver.recv()
    if cause is not None:
        raise RuntimeError(cause)


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Context manager that adds to an error what a new interpreter needs."""
    try:
        yield
    except Exception as error:
        message = (
            f"a worker process of Chainer cannot start: {error}. The start method "
            f"{multiprocessing.get_start_method()!r} makes it a new interpreter, which imports the main script and "
            "receives the dataset or the snapshot writer. Put what the script runs below `if __name__ == '__main__':`, "
            "and define the classes and functions that are sent at the top level of a module"
        )
        if "fork" in multiprocessing.get_all_start_methods():
            message += ". Or start processes by fork: multiprocessing.set_start_method('fork', force=True)"
        raise RuntimeError(message) from error
