"""What is local to a thread, so that another thread can work as if it were that one.

Chainer keeps its configuration and its reporters for each thread, CuPy the current device, and NumPy 1 the way in which
it handles floating-point errors. A new thread has the defaults of all of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from typing import Any, Callable, ContextManager, Dict, Generic, List, TypeVar

import chainer
import numpy
from chainer.backends import cuda

from chainer_accum.observations import reporting_to

Result = TypeVar("Result")


class ThreadState:
    """What is local to the current thread, as it is now.

    These are Chainer's configuration, the current reporter, the context variables of Python, how NumPy handles
    floating-point errors and its buffer size, and CuPy's device, stream and allocator. Function hooks and link hooks
    are left to the thread that registered them: a hook such as :class:`~chainer.function_hooks.TimerHook` keeps a stack
    of what is running, which two threads at once would mix up.

    It serves one call of :meth:`run`, in a thread that is used for nothing else, since nothing is put back there.

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
        """Calls the function in the current thread with the state of that other one, and returns what it returns."""
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
    """What a call came to in one thread, for another thread to take over: its result or exception, and its reports.

    Args:
        function (callable): Function without arguments. It is called at once.

    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._observation: Dict[str, Any] = {}
        self._results: List[Result] = []
        self._errors: List[BaseException] = []
        with reporting_to(self._observation):
            try:
                self._results.append(function())
            except BaseException as error:
                self._errors.append(error)

    def take_over(self) -> Result:
        """Reports what was reported, and returns or raises what was returned or raised. It can be called once."""
        with contextlib.suppress(IndexError):  # there is no reporter
            # Not with report(): the keys have their prefixes already.
            chainer.get_current_reporter().observation.update(self._observation)
        if self._errors:
            raise self._errors.pop()  # if it were kept here, it would refer to itself through its traceback
        return self._results.pop()


def _reporter_for_another_thread() -> ContextManager[Any]:
    try:
        reporter = chainer.get_current_reporter()
    except IndexError:  # there is none, and a new thread has none, either
        return contextlib.nullcontext()
    # It knows the same observers, but what is reported to it goes elsewhere, whatever the original is doing meanwhile.
    own: ContextManager[Any] = copy.copy(reporter)
    return own


def _state_of_cupy() -> List[ContextManager[Any]]:
    if not cuda.available:
        return []
    cupy_cuda = cuda.cupy.cuda
    with contextlib.suppress(cupy_cuda.runtime.CUDARuntimeError):  # CuPy may be installed without a device
        device, stream = cupy_cuda.Device(), cupy_cuda.get_current_stream()
        return [device, stream, cupy_cuda.using_allocator(cupy_cuda.get_allocator())]
    return []
