"""With micro_batch_size='auto', the fastest size is found, and every window on the way is an exact update."""

from __future__ import annotations

import warnings

import chainer_accum
import chainer
import numpy
import pytest
from chainer.training.updaters import StandardUpdater
from chainer_accum.batches import sizes as tuning
from chainer_accum.batches.sizes import TunedMicroBatchSize
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_same_parameters, make_dataset, make_model, make_updater, run, serial


class Machine:
    """A machine whose clock shows what windows are said to cost, so that no test depends on a real one."""

    def __init__(self, monkeypatch, seconds_per_example):
        self.now = 0.0
        self.seconds_per_example = seconds_per_example
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)

    def run(self, size, windows, examples=256, shapes=(5,), fits=None):
        for _ in range(windows):
            size.begin_window(chainer.get_device("@numpy"))
            while fits is not None and min(size.size, examples) > fits:
                self.now += 1e6
                size.lower(min(size.size, examples))
            self.now += examples * self.seconds_per_example(size.size)
            size.end_window(chainer.get_device("@numpy"), shapes, examples, examples)


@pytest.fixture
def make_machine(monkeypatch):
    return lambda seconds_per_example: Machine(monkeypatch, seconds_per_example)


@pytest.mark.parametrize("best", [1, 2, 8, 32, 64, 128, 256, 1024])
def test_the_fastest_size_is_found(best, make_machine):
    machine = make_machine(lambda size: 1 + abs(numpy.log2(size / best)))
    size = TunedMicroBatchSize()
    machine.run(size, 60, examples=1024)
    assert size.size == best
    assert min(size.timings, key=size.timings.get) == best
    assert size.timings[best] == 1.0
    machine.run(size, 5, examples=1024)
    assert size.size == best


def test_one_size_that_is_slow_by_chance_does_not_end_the_search(make_machine):
    machine = make_machine(lambda size: {128: 3.0, 256: 0.5, 512: 0.7}.get(size, 2.0))
    size = TunedMicroBatchSize()
    machine.run(size, 60, examples=512)
    assert size.size == 256


def test_a_size_that_was_disturbed_once_has_another_trial(make_machine):
    trials = {}

    def seconds(size):
        trials[size] = trials.get(size, 0) + 1
        return (100.0 if trials[size] == 1 else 1.0) + abs(numpy.log2(size / 128))

    size = TunedMicroBatchSize()
    make_machine(seconds).run(size, 60)
    assert size.size == 128


@pytest.mark.parametrize("begins", range(12))
def test_a_machine_that_is_slower_for_a_while_does_not_mislead_the_search(begins, make_machine):
    windows = []

    def seconds(size):
        windows.append(size)
        is_slower = begins < len(windows) <= begins + 4  # for all trials of two sizes
        return (2.0 + abs(numpy.log2(size / 512))) * (5 if is_slower else 1)

    size = TunedMicroBatchSize()
    make_machine(seconds).run(size, 60, examples=2048)
    assert size.size == 512


def test_neither_the_first_window_nor_one_that_began_again_is_timed(make_machine):
    machine = make_machine(lambda size: 1.0)
    size = TunedMicroBatchSize()
    machine.run(size, 1)
    assert size.timings == {}
    machine.run(size, 1, fits=32)
    assert (size.size, size.timings) == (32, {})
    machine.run(size, 1, fits=32)
    assert size.timings == {32: 1.0}


def test_a_size_that_did_fit_and_fits_no_longer_is_forgotten(make_machine):
    machine = make_machine(lambda size: 1 + abs(numpy.log2(size / 64)))
    size = TunedMicroBatchSize()
    machine.run(size, 6)
    assert max(size.timings) > 64
    machine.run(size, 40, fits=16)
    assert size.size == max(size.timings) == 16


@given(best=st.sampled_from([2**i for i in range(11)]), fits=st.integers(1, 1024), examples=st.integers(1, 1024))
def test_memory_bounds_the_search(best, fits, examples):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, lambda size: 1 + abs(numpy.log2(size / best)))
        size = TunedMicroBatchSize()
        machine.run(size, 80, examples=examples, fits=fits)
    assert min(size.size, examples) <= fits
    assert all(min(each, examples) <= fits for each in size.timings)
    assert size._search.is_over


def test_other_shapes_and_other_effective_batches_have_a_search_of_their_own(make_machine):
    machine = make_machine(lambda size: 1 + abs(numpy.log2(size / 256)))
    size = TunedMicroBatchSize()
    machine.run(size, 40)
    assert size.size == 256
    machine.seconds_per_example = lambda size: 1 + abs(numpy.log2(size / 16))
    machine.run(size, 40, shapes=(10,))
    assert size.size == 16
    machine.run(size, 40, shapes=(10,), examples=512)
    assert size.size == 16 and len(size.timings) > 3
    machine.run(size, 2)  # what was found before is known
    assert size.size == 256


def test_a_single_window_of_another_kind_changes_nothing(make_machine):
    machine = make_machine(lambda size: 1 + abs(numpy.log2(size / 256)))
    size = TunedMicroBatchSize()
    machine.run(size, 40)
    timings = size.timings
    for _ in range(3):
        machine.run(size, 1, examples=100)  # the tail of an epoch
        assert size.size == 256
        machine.run(size, 3)
    assert size.timings == timings


@pytest.mark.parametrize("steps, batch", [(1, 40), (2, 20)])
def test_every_window_is_exact_and_says_what_was_tried(steps, batch):
    data = make_dataset(120)
    expected = make_updater(StandardUpdater, serial(data, 40), chainer.optimizers.Adam())
    expected_steps = run(expected, 30)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(data, batch),
        chainer.optimizers.Adam(),
        accumulation_steps=steps,
        micro_batch_size="auto",
    )
    assert (updater.micro_batch_size, updater.micro_batch_timings) == (64, {})
    actual_steps = run(updater, 30)
    assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, 1e-5)
    assert [step.bookkeeping for step in actual_steps] == [step.bookkeeping for step in expected_steps]
    sizes = [step.observation["micro_batch_size"] for step in actual_steps]
    assert set(updater.micro_batch_timings) == {
        size for size, step in zip(sizes, actual_steps) if "seconds_per_example" in step.observation
    }
    assert len(set(sizes)) > 2
    assert (
        updater.micro_batch_size == sizes[-1] == min(updater.micro_batch_timings, key=updater.micro_batch_timings.get)
    )
    assert "seconds_per_example" not in actual_steps[-1].observation


def test_a_size_that_does_not_fit_is_not_tried_again():
    class Limited(chainer.links.Classifier):
        sizes: list = []

        def forward(self, x, t):
            self.sizes.append(len(x))
            if len(x) > 10:
                raise MemoryError("no room")
            return super().forward(x, t)

    model = Limited(make_model().predictor)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_dataset(80), 40),
        chainer.optimizers.SGD(),
        model,
        micro_batch_size="auto",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(updater, 30)
    assert [size for size in model.sizes if size > 10] == [40, 20, 13]
    assert len([w for w in caught if "memory ran out" in str(w.message)]) == 3
    assert updater.micro_batch_size <= 10


def test_other_words_and_batches_that_cannot_be_split_are_refused():
    with pytest.raises(TypeError, match="micro_batch_size must be an int of 1 or more, got 'automatic'; .* or 'auto'"):
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(make_dataset(), 4),
            chainer.optimizers.SGD(),
            micro_batch_size="automatic",
        )


@pytest.mark.parametrize("steps", [1, 2])
def test_a_search_meets_sizes_that_do_not_fit_and_goes_on(steps):
    class Limited(chainer.links.Classifier):
        def forward(self, x, t):
            if len(x) > 70:
                raise MemoryError("no room")
            return super().forward(x, t)

    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_dataset(400), 200),
        chainer.optimizers.SGD(),
        Limited(make_model().predictor),
        accumulation_steps=steps,
        micro_batch_size="auto",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run(updater, 20)
    assert max(updater.micro_batch_timings) <= 64


def test_a_search_that_may_not_split_is_refused():
    with pytest.raises(ValueError, match="split_when_out_of_memory must not be False with micro_batch_size='auto'"):
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(make_dataset(), 4),
            chainer.optimizers.SGD(),
            micro_batch_size="auto",
            split_when_out_of_memory=False,
        )
