"""Signals wait until a step is whole, and are as they were afterwards."""

from __future__ import annotations

import signal
import threading

import chainer_accum
import chainer
import pytest
from chainer_accum.state.signals import DeferredSignals

from helpers import make_dataset, make_updater, serial


@pytest.fixture()
def handled():
    """Signals that have been handled by a handler of the test, which raises for SIGTERM."""
    seen = []

    def handler(number, frame):
        seen.append(number)
        if number == signal.SIGTERM:
            raise SystemExit

    numbers = [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(number, handler) for number in numbers]
    yield seen
    for number, old in zip(numbers, before):
        signal.signal(number, old)


def test_signals_are_handled_once_in_the_end(handled):
    with pytest.raises(SystemExit), DeferredSignals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert handled == []
    assert handled == [signal.SIGINT, signal.SIGTERM]
    signal.raise_signal(signal.SIGINT)
    assert handled == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]


def test_contexts_may_be_nested(handled):
    with DeferredSignals():
        with DeferredSignals():
            signal.raise_signal(signal.SIGINT)
        assert handled == []
    assert handled == [signal.SIGINT]


def test_an_exception_passes_and_the_handlers_are_back(handled):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), DeferredSignals():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_is_set_within_stays(handled):
    def other(number, frame):
        pass

    with DeferredSignals():
        signal.signal(signal.SIGINT, other)
    assert signal.getsignal(signal.SIGINT) is other


def test_what_python_does_not_handle_is_left_alone(handled):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with DeferredSignals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
    assert handled == []


def test_other_threads_do_nothing(handled):
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with DeferredSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupt_while_the_optimizer_updates_comes_once_the_books_are_kept():
    class Interrupted(chainer.optimizers.SGD):
        def update(self, lossfun=None, *args, **kwds):
            signal.raise_signal(signal.SIGINT)
            super().update(lossfun, *args, **kwds)

    optimizer = Interrupted(0.1)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(make_dataset(12), 6), optimizer, accumulation_steps=2
    )
    with pytest.raises(KeyboardInterrupt):
        updater.update()
    assert (optimizer.t, optimizer.epoch) == (1, 1)
    assert updater.effective_batch_size == 12
