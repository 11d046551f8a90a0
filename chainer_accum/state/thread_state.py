"""ThreadState: the thread-local state of one thread, for use in another.

Chainer's configuration and reporters, CuPy's current device and, in NumPy 1, the handling of floating-point errors are
thread-local. A new thread has the defaults of all of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from typing import Any, Callable, ContextManager, Dict, List, TypeVar

import chainer
import numpy
from chainer.backends import cuda

Result = TypeVar("Result")


class ThreadState:
    """The thread-local state of the current thread.

    It consists of Chainer's configuration, the current reporter, Python's context variables, NumPy's handling of
    floating-point errors and its buffer size, and CuPy's device, stream and allocator.

    Function hooks and link hooks stay with the thread that registered them, unless asked for: a hook such as
    :class:`~chainer.function_hooks.TimerHook` keeps a stack of running functions, which two concurrent threads would
    corrupt.

    Call :meth:`run` once, in a thread that does nothing else, since it does not restore the state of that thread.

    Args:
        with_hooks (bool): Whether function hooks and link hooks belong to the state.

    """

    def __init__(self, with_hooks: bool = False) -> None:
        self._variables = contextvars.copy_context()
        self._config = dict(vars(chainer.config._local))
        self._reporter = _reporter_for_another_thread()
        handler: Any = numpy.geterrcall()
        self._errors = numpy.errstate(call=handler, **numpy.geterr())
        self._buffer_size = numpy.getbufsize()
        self._of_cupy = _state_of_cupy()
        self._hooks = [table.copy() if with_hooks else {} for table in hook_tables()]

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
            for table, hooks in zip(hook_tables(), self._hooks):
                table.update(hooks)
            return function()


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


def hook_tables() -> List[Dict[str, Any]]:
    """Returns the function hooks and the link hooks of the current thread."""
    return [chainer.get_function_hooks(), chainer._get_link_hooks()]
