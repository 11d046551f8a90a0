"""A coroutine's thread runs only when it is resumed, and ends in every case."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import os
import signal
import sys
import threading
import time
import weakref
from typing import Any, List

import chainer
import numpy
import pytest
from chainer_accum.lockstep.coroutine import Abandoned, Coroutine
from hypothesis import given
from hypothesis import strategies as st
from lockstep_helpers import lockstep_threads

from helpers import run_python


def test_it_runs_from_wait_to_wait() -> None:
    seen: List[str] = []

    def function() -> None:
        seen.append("a")
        coroutine.wait()
        seen.append("b")
        coroutine.wait()
        seen.append("c")

    coroutine = Coroutine(function)
    for expected in ("", "a", "ab", "abc"):
        assert "".join(seen) == expected
        assert coroutine.has_ended == (expected == "abc")
        if not coroutine.has_ended:
            coroutine.resume()
    assert lockstep_threads() == []
    coroutine.end()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_several_run_in_any_order(lengths: List[int], random: Any) -> None:
    seen: List[int] = []
    coroutines: List[Coroutine] = []

    def make(number: int) -> Coroutine:
        def function() -> None:
            for step in range(lengths[number]):
                seen.append(number)
                assert len(lockstep_threads()) > 0
                if step < lengths[number] - 1:
                    coroutines[number].wait()

        return Coroutine(function)

    coroutines += [make(number) for number in range(len(lengths))]
    order = [number for number, length in enumerate(lengths) for _ in range(length)]
    random.shuffle(order)
    for number in order:
        coroutines[number].resume()
    assert seen == order
    assert all(each.has_ended for each in coroutines)


def test_one_thread_runs_at_a_time() -> None:
    running: List[int] = []

    def function() -> None:
        for _ in range(3):
            running.append(1)
            assert len(running) == 1
            time.sleep(0.001)
            running.pop()
            coroutine.wait()

    coroutine = Coroutine(function)
    for _ in range(3):
        coroutine.resume()
        assert running == []
    coroutine.end()


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, MemoryError, SystemExit, GeneratorExit])
@pytest.mark.parametrize("waits", [0, 2])
def test_what_the_function_raises_resume_raises_and_the_thread_ends(error: Any, waits: int) -> None:
    def function() -> None:
        for _ in range(waits):
            coroutine.wait()
        raise error("why")

    coroutine = Coroutine(function)
    for _ in range(waits):
        coroutine.resume()
    with pytest.raises(error, match="why") as caught:
        coroutine.resume()
    assert coroutine.has_ended
    assert lockstep_threads() == []
    assert "function" in [entry.name for entry in caught.traceback]  # where it was raised
    coroutine.end()


@pytest.mark.parametrize("resumes", [0, 1, 2])
def test_it_can_end_at_any_point_any_number_of_times(resumes: int) -> None:
    cleaned_up = []

    def function() -> None:
        try:
            while True:
                coroutine.wait()
        finally:
            cleaned_up.append(True)

    coroutine = Coroutine(function)
    for _ in range(resumes):
        coroutine.resume()
    for _ in range(3):
        coroutine.end()
    assert lockstep_threads() == []
    assert cleaned_up == [True] * (resumes > 0)


def test_a_function_that_catches_everything_ends_nevertheless() -> None:
    seen: List[Any] = []

    def function() -> None:
        for _ in range(5):
            try:
                coroutine.wait()
            except:  # noqa: E722
                seen.append(sys.exc_info()[0])

    coroutine = Coroutine(function)
    coroutine.resume()
    coroutine.end()
    assert seen == [Abandoned] * 5
    assert lockstep_threads() == []


def test_a_function_that_waits_as_it_cleans_up_ends_nevertheless() -> None:
    def function() -> None:
        try:
            coroutine.wait()
        finally:
            coroutine.wait()

    coroutine = Coroutine(function)
    coroutine.resume()
    coroutine.end()
    assert lockstep_threads() == []


def test_a_function_that_raises_as_it_is_ended_ends_quietly() -> None:
    def function() -> None:
        try:
            coroutine.wait()
        finally:
            raise ConnectionError

    coroutine = Coroutine(function)
    coroutine.resume()
    coroutine.end()
    assert lockstep_threads() == []


def test_a_function_that_never_ran_does_not_run_at_the_end() -> None:
    coroutine = Coroutine(lambda: pytest.fail("it runs"))
    coroutine.end()
    assert lockstep_threads() == []


def test_ending_waits_for_a_function_that_is_slow_to_clean_up() -> None:
    cleaned_up = []

    def function() -> None:
        try:
            coroutine.wait()
        finally:
            time.sleep(0.05)
            cleaned_up.append(True)

    coroutine = Coroutine(function)
    coroutine.resume()
    coroutine.end()
    assert cleaned_up == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_interrupt_while_it_runs_is_raised_at_once_and_the_thread_ends(repeats: int) -> None:
    seen = []

    def function() -> None:
        for _ in range(repeats):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
        seen.append("went on")
        coroutine.wait()
        seen.append("was not to go on")

    coroutine = Coroutine(function)
    with pytest.raises(KeyboardInterrupt):
        try:
            coroutine.resume()
        finally:
            coroutine.end()
    assert seen == ["went on"]
    assert lockstep_threads() == []
    coroutine.end()


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_an_interrupt_as_it_is_ended_is_raised_afterwards() -> None:
    def function() -> None:
        try:
            coroutine.wait()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)

    coroutine = Coroutine(function)
    coroutine.resume()
    with pytest.raises(KeyboardInterrupt):
        coroutine.end()
    assert lockstep_threads() == []


def test_an_interrupt_at_any_instruction_leaves_no_thread() -> None:
    """Each line of the coroutine's own code is where an interrupt comes once."""
    source = sys.modules[Coroutine.__module__].__file__
    raised = 0

    def run(stop_at: int) -> bool:
        count = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename != source or frame.f_code.co_name not in ("resume", "__init__"):
                return None
            if event == "line":
                count += 1
                if count == stop_at:
                    raise KeyboardInterrupt
            return trace

        def function() -> None:
            coroutine.wait()
            coroutine.wait()

        coroutine = None
        before = sys.gettrace()
        try:
            sys.settrace(trace)
            coroutine = Coroutine(function)
            for _ in range(3):
                coroutine.resume()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            if coroutine is not None:
                coroutine.end()
        return False

    while run(raised + 1):
        raised += 1
        assert lockstep_threads() == []
    assert raised > 10


variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


def test_it_has_the_state_of_the_thread_that_creates_it() -> None:
    seen: List[Any] = []

    class Hook(chainer.FunctionHook):
        name = "mine"

    class LinkHook(chainer.LinkHook):
        name = "mine"

    reporter = chainer.Reporter()
    observer = object()
    reporter.add_observer("observer", observer)

    def function() -> None:
        for _ in range(2):
            seen.append(
                (
                    chainer.config.train,
                    chainer.config.enable_backprop,
                    list(chainer.get_function_hooks()),
                    list(chainer._get_link_hooks()),
                    numpy.geterr()["over"],
                    variable.get(),
                    chainer.get_current_reporter()._observer_names == reporter._observer_names,
                )
            )
            coroutine.wait()

    token = variable.set(5)
    try:
        with chainer.using_config("train", False), chainer.no_backprop_mode(), numpy.errstate(over="raise"), reporter:
            with Hook(), LinkHook():
                coroutine = Coroutine(function)
        coroutine.resume()
        coroutine.resume()
    finally:
        coroutine.end()
        variable.reset(token)
    assert seen == [(False, False, ["mine"], ["mine"], "raise", 5, True)] * 2


def test_what_it_sets_stays_in_its_thread() -> None:
    before = dict(vars(chainer.config._local))

    def function() -> None:
        chainer.config.train = False
        numpy.seterr(all="raise")
        coroutine.wait()
        assert not chainer.config.train

    coroutine = Coroutine(function)
    errors = numpy.geterr()
    for _ in range(2):
        coroutine.resume()
        assert vars(chainer.config._local) == before
        assert numpy.geterr() == errors


def test_nothing_is_kept_after_the_end() -> None:
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing)

    def make(thing: Any) -> Coroutine:
        def function() -> None:
            coroutine.wait()
            raise ConnectionError(thing)

        coroutine = Coroutine(function)
        return coroutine

    coroutine = make(thing)
    coroutine.resume()
    coroutine.end()
    del thing, coroutine
    gc.collect()
    assert reference() is None


def test_many_that_are_ended_leave_no_thread() -> None:
    def fail() -> None:
        current[0].wait()
        raise ConnectionError

    before, current = threading.active_count(), [Coroutine(fail)]
    for number in range(300):
        coroutine = current[0] = Coroutine(fail)
        for _ in range(number % 3):
            with contextlib.suppress(ConnectionError):
                coroutine.resume()
        coroutine.end()
    assert threading.active_count() == before


def test_threads_do_not_keep_the_process_alive() -> None:
    program = (
        "import chainer_accum\n"
        "from chainer_accum.lockstep.coroutine import Coroutine\n"
        "coroutine = Coroutine(lambda: coroutine.wait())\n"
        "coroutine.resume()\n"
        "print('done')\n"
    )
    assert run_python("-c", program) == "done\n"
