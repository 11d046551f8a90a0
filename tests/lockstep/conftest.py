"""How the tests of lockstep run: in float64, each with a watchdog, and none may leave a thread."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from types import FrameType
from typing import Any, Iterator, Optional

import chainer_accum  # noqa: F401 - before chainer, which it makes importable
import chainer
import numpy
import pytest
from lockstep_helpers import lockstep_threads

PATIENCE = 60  # seconds until a test is taken for one that hangs


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with chainer.using_config("dtype", numpy.dtype("float64")):
        yield


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Fails a test that hangs, and ends the process if even that does not help."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    try:
        if sys.platform == "win32":
            yield
        else:
            yield from _interrupting()
    finally:
        faulthandler.cancel_dump_traceback_later()


def _interrupting() -> Iterator[None]:
    def give_up(number: int, frame: Optional[FrameType]) -> None:
        raise TimeoutError(f"the test has not ended after {PATIENCE} seconds")

    # A signal that a window does not put off.
    before: Any = signal.signal(signal.SIGVTALRM, give_up)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(PATIENCE, signal.pthread_kill, (main, signal.SIGVTALRM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGVTALRM, before)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert lockstep_threads() == []
