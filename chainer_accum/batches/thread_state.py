"""ThreadState: the thread-local state of one thread, for use in another.

Chainer's configuration and reporters, CuPy's current device and, in NumPy 1, the handling of floating-point errors are
thread-local. A new thread has the defaults of all of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from typing import Any, Callable, ContextManager, Dict, Generic, List, TypeVar

import chainer
import numpy
from chainer.backends import cuda

from chainer_accum.observations import Reported, reporting_to

Result = TypeVar("Result")


class ThreadState:
    """The thread-local state of the current thread.

    It consists of Chainer's configuration, the current reporter, Python's context variables, NumPy's handling of
    floating-point errors and its buffer size, and CuPy's device, stream and allocator. Function hooks and link hooks
    stay with the thread that registered them: a hook such as :class:`~chainer.function_hooks.TimerHook` keeps a stack
    of running functions, which two concurrent threads would corrupt.

    Call :meth:`run` once, in a thread that does nothing else, since it does not restore the state of that thread.

    """

    def __init__(self) -> None:
        self._variables = contextvars.copy_context()
        self._config = dict(vars(chainer.config._local))
        self._reporter = _reporter_for_another_thread()
        handler: Any = numpy.geterrcall()
        self._errors = numpy.errstate(call=handler, **numpy.geterr())
        self._buffer_size = numpy.getbufsize()
        self._of_cupy = _state_of_cupy()

    def run(self, function: Callable[[], Result]) -> Result:
        """Calls the function in the current thread with the stored state and returns its result."""
        return self._variables.run(self._run, function)

    def _run(self, function: Callable[[], Result]) -> Result:
        config = vars(chainer.config._local)
        config.clear()
        config.update(self._config)
        with contextlib.ExitStack() as stack:
            for state in [self._reporter, self._errors, *self._of_cupy]:
                stack.enter_context(state)
            numpy.setbufsize(self._buffer_size)
            return function()


class Outcome(Generic[Result]):
    """The outcome of a call in one thread, for another thread to take over: result or exception, and reports.

    Args:
        function (callable): Function without arguments. It is called immediately.

    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._observation: Dict[str, Reported] = {}
        self._results: List[Result] = []
        self._errors: List[BaseException] = []
        with reporting_to(self._observation):
            try:
                self._results.append(function())
            except BaseException as error:
                self._errors.append(error)

    def take_over(self) -> Result:
        """Forwards the reports, and returns the result or raises the exception. It can be called once."""
        with contextlib.suppress(IndexError):  # there is no reporter
            # Not chainer.report(), which would add prefixes that the keys already have.
            chainer.get_current_reporter().observation.update(self._observation)
        if self._errors:
            raise self._errors.pop()  # popped, since its traceback refers to this object
        return self._results.pop()


def _reporter_for_another_thread() -> ContextManager[object]:
    try:
        reporter = chainer.get_current_reporter()
    except IndexError:  # there is none, and a new thread has none either
        return contextlib.nullcontext()
    # The copy has the same observers, but its own observation, whatever the original does meanwhile.
    return copy.copy(reporter)


def _state_of_cupy() -> List[ContextManager[object]]:
    if not cuda.available:
        return []
    cupy_cuda = cuda.cupy.cuda
    with contextlib.suppress(cupy_cuda.runtime.CUDARuntimeError):  # CuPy may be installed without a device
        device, stream = cupy_cuda.Device(), cupy_cuda.get_current_stream()
        return [device, stream, cupy_cuda.using_allocator(cupy_cuda.get_allocator())]
    return []
