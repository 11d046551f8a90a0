"""An interrupt at the n-th bytecode that is executed, as Ctrl-C gives one, and what is left behind after it."""

from __future__ import annotations

import gc
import pathlib
import signal
import sys
import threading
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import chainer_accum
import chainer

PACKAGE = str(pathlib.Path(chainer_accum.__file__).parent)


class Way(NamedTuple):
    """How an update is interrupted, and in which files."""

    is_in_package_only: bool
    strike: Callable[[], None]


def _raise_directly() -> None:
    raise KeyboardInterrupt


# A signal is handled as a real one is: by Python's own handler, or by one that the package has put in its place. What
# is raised directly cannot be put off, so it comes in the package only: Chainer is not made for that.
WAYS = {
    "a signal anywhere": Way(False, lambda: signal.raise_signal(signal.SIGINT)),
    "raised in the package": Way(True, _raise_directly),
}


class Interrupt:
    """Context in which the ``number``-th bytecode is interrupted before it is executed; 0 interrupts none.

    Attributes:
        executed (int): How many bytecodes were executed, up to the interrupt.
        place (str): Where it came, or ``None`` if all ended before it.

    """

    def __init__(self, way: Way, number: int) -> None:
        self._way, self._number = way, number
        self.executed = 0
        self.place: Optional[str] = None

    def __enter__(self) -> Interrupt:
        sys._getframe().f_trace_opcodes = True  # without which Python 3.12 does not see it in the frames to come
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def _enter_frame(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code is Interrupt.__exit__.__code__:
            return None
        if self._way.is_in_package_only and not code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._count

    def _count(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.executed += 1
            if self.executed == self._number:
                sys.settrace(None)
                path = pathlib.Path(frame.f_code.co_filename)
                self.place = f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
                self._way.strike()
        return self._count


class _ById(tuple):  # type: ignore[type-arg]
    """Objects that are equal only to themselves."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and list(map(id, self)) == list(map(id, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


class Surroundings:
    """What an update borrows of its process, to be as it was afterwards, whatever happens."""

    def __init__(self) -> None:
        self._before = self._now()

    def changes(self) -> List[str]:
        """Returns what differs from how it was."""
        gc.collect()  # so that generators which were interrupted have been closed
        now = self._now()
        return [f"{name} differ: {now[name]}" for name, value in self._before.items() if now[name] != value]

    def put_back(self) -> None:
        """Takes away what is left, so that it is not found again in what comes next."""
        for hooks in chainer.get_function_hooks(), chainer._get_link_hooks():
            hooks.clear()
        reporter, observation = self._before["reporter"]
        while chainer.get_current_reporter() is not reporter:
            chainer.get_current_reporter().__exit__(None, None, None)
        reporter.observation = observation
        signal.signal(signal.SIGINT, self._before["signal handler"])
        vars(chainer.config._local).clear()
        vars(chainer.config._local).update(self._before["configuration"])

    @staticmethod
    def _now() -> Dict[str, Any]:
        reporter = chainer.get_current_reporter()
        return {
            "function hooks": list(chainer.get_function_hooks().items()),
            "link hooks": list(chainer._get_link_hooks().items()),
            "threads": threading.enumerate(),
            "signal handler": signal.getsignal(signal.SIGINT),
            "reporter": _ById((reporter, reporter.observation)),
            "configuration": dict(vars(chainer.config._local)),
        }
