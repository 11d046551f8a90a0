"""Any iterator: windows fed by it are the whole batches of StandardUpdater, in parameters and in bookkeeping.

Of an iterator, a window may assume ``next``, ``epoch``, ``is_new_epoch`` and ``epoch_detail``, and it asks for no batch
that it does not need.
"""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any, Dict, Iterator, List, Optional, Tuple

import chainer
import hypothesis
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer.iterators import MultiprocessIterator, MultithreadIterator, SerialIterator
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from hypothesis import strategies as st

from helpers import (
    BOOKKEEPING,
    CountingUpdater,
    Step,
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_model,
    make_updater,
    run,
    serial,
    to_host,
)

EFFECTIVE_BATCH = 12
# How the effective batch is formed: the batch size of the iterator, and the arguments of AccumulatingUpdater.
GATHERED: Tuple[int, Dict[str, int]] = (4, {"accumulation_steps": 3})
SPLIT: Tuple[int, Dict[str, int]] = (12, {"micro_batch_size": 5})
BOTH: Tuple[int, Dict[str, int]] = (6, {"accumulation_steps": 2, "micro_batch_size": 4})
every_way = pytest.mark.parametrize("way", [GATHERED, SPLIT, BOTH], ids=["gathered", "split", "both"])


class HasWhatAWindowNeeds:
    """Goes through the examples in order and has ``next``, ``epoch``, ``is_new_epoch``, ``epoch_detail``: no more."""

    def __init__(self, dataset: Any, batch_size: int, **kwargs: Any) -> None:
        self._serial = serial(dataset, batch_size, **kwargs)
        self.calls = 0

    def next(self) -> List[Any]:
        self.calls += 1
        return self._serial.next()

    epoch = property(lambda self: self._serial.epoch)
    is_new_epoch = property(lambda self: self._serial.is_new_epoch)
    epoch_detail = property(lambda self: self._serial.epoch_detail)


class UsersIterator(HasWhatAWindowNeeds, chainer.dataset.Iterator):
    """The same as a subclass of Chainer's Iterator."""


class EpochEndingIterator(chainer.dataset.Iterator):
    """Goes through the examples in order, time and again, and lets no batch run across the end of an epoch."""

    def __init__(self, dataset: List[Any], batch_size: int) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        self._position = self.epoch = 0
        self.is_new_epoch = False
        self.previous_epoch_detail: Optional[float] = None

    def __next__(self) -> List[Any]:
        self.previous_epoch_detail = self.epoch_detail
        batch = self._dataset[self._position : self._position + self._batch_size]
        self._position += len(batch)
        self.is_new_epoch = self._position == len(self._dataset)
        if self.is_new_epoch:
            self.epoch, self._position = self.epoch + 1, 0
        return batch

    @property
    def epoch_detail(self) -> float:
        return self.epoch + self._position / len(self._dataset)


def adam_updater(updater_class: Any, iterator: Any, **kwargs: Any) -> Any:
    """Returns an updater whose optimizer has a state, and scales gradients of any size to steps of one."""
    return make_updater(updater_class, iterator, chainer.optimizers.Adam(0.01, eps=1e-4), **kwargs)


def seeded_run(updater: Any, updates: int) -> List[Step]:
    """Runs the updater; lazy parameters are born alike in every such run."""
    numpy.random.seed(0)
    return run(updater, updates)


def assert_same_run(actual: Any, expected: Any, updates: int) -> None:
    """Runs two updaters and asserts that nobody can tell one from the other."""
    assert_same_steps(seeded_run(actual, updates), seeded_run(expected, updates))
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target)
    assert_same_optimizer_state(actual.get_optimizer("main"), expected.get_optimizer("main"))


@contextlib.contextmanager
def finalizing(updater: Any) -> Iterator[Any]:
    """Returns a context that ends the threads and processes of the updater's iterators."""
    try:
        yield updater
    finally:
        updater.finalize()


@every_way
def test_a_shuffling_iterator_gives_the_whole_batches_from_the_same_seed(way: Any) -> None:
    dataset = make_dataset()
    batch_size, arguments = way

    def shuffling(size: int) -> SerialIterator:
        numpy.random.seed(3)
        return SerialIterator(dataset, size)

    expected = adam_updater(StandardUpdater, shuffling(EFFECTIVE_BATCH))
    expected_steps = run(expected, 10)
    actual = adam_updater(AccumulatingUpdater, shuffling(batch_size), **arguments)
    assert_same_steps(run(actual, 10), expected_steps)
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target)


@pytest.mark.parametrize(
    ("iterator_class", "arguments"),
    [
        (SerialIterator, {}),
        (MultithreadIterator, {"n_threads": 2}),
        pytest.param(
            MultiprocessIterator,
            {"n_processes": 1, "shared_mem": 1000},
            # The workers are forked, which Python warns of where there are threads.
            marks=pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
        ),
    ],
)
@every_way
def test_each_iterator_of_chainer_gives_the_whole_batches(iterator_class: Any, arguments: Any, way: Any) -> None:
    dataset = make_dataset()

    def shuffling(iterator_class: Any, size: int, **kwargs: Any) -> Any:
        sampler = chainer.iterators.ShuffleOrderSampler(numpy.random.RandomState(3))
        return iterator_class(dataset, size, shuffle=None, order_sampler=sampler, **kwargs)

    expected = adam_updater(StandardUpdater, shuffling(SerialIterator, EFFECTIVE_BATCH))
    batch_size, window_arguments = way
    iterator = shuffling(iterator_class, batch_size, **arguments)
    with finalizing(adam_updater(AccumulatingUpdater, iterator, **window_arguments)) as actual:
        assert_same_run(actual, expected, 10)


@pytest.mark.parametrize("iterator_class", [UsersIterator, HasWhatAWindowNeeds])
@every_way
def test_an_iterator_needs_nothing_that_a_window_does_not_need(iterator_class: Any, way: Any) -> None:
    dataset = make_dataset()
    batch_size, arguments = way
    expected = adam_updater(StandardUpdater, serial(dataset, EFFECTIVE_BATCH))
    actual = adam_updater(AccumulatingUpdater, iterator_class(dataset, batch_size), **arguments)
    assert actual.previous_epoch_detail is None
    assert not actual.is_new_epoch
    assert_same_run(actual, expected, 10)


@pytest.mark.parametrize("iterator_class", [UsersIterator, HasWhatAWindowNeeds])
@every_way
def test_such_an_iterator_trains_in_a_trainer_to_the_end(iterator_class: Any, way: Any, tmp_path: pathlib.Path) -> None:
    dataset = make_dataset()
    batch_size, arguments = way
    expected = adam_updater(StandardUpdater, serial(dataset, EFFECTIVE_BATCH))
    actual = adam_updater(AccumulatingUpdater, iterator_class(dataset, batch_size), **arguments)
    for updater in (actual, expected):
        numpy.random.seed(0)  # of which lazy parameters are born
        Trainer(updater, (2, "epoch"), out=str(tmp_path)).run()
    assert actual.iteration == expected.iteration == 9
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target)


@every_way
def test_iterators_and_optimizers_with_other_names_are_left_alone(way: Any) -> None:
    dataset = make_dataset()
    batch_size, arguments = way
    other_iterator = UsersIterator(dataset, 5)
    other_optimizer = chainer.optimizers.Adam().setup(make_model())
    iterators = {"other": other_iterator, "main": serial(dataset, batch_size)}
    optimizers = {"other": other_optimizer, "main": chainer.optimizers.Adam(0.01, eps=1e-4).setup(make_model())}
    actual = AccumulatingUpdater(iterators, optimizers, **arguments)
    expected = adam_updater(StandardUpdater, serial(dataset, EFFECTIVE_BATCH))
    assert_same_run(actual, expected, 10)
    assert actual.get_iterator("other") is other_iterator
    assert actual.get_all_optimizers() == optimizers
    assert (other_iterator.calls, other_optimizer.t, other_optimizer.epoch) == (0, 0, 0)
    assert_same_parameters(other_optimizer.target, make_model(), 0)


def test_every_iterator_that_can_be_finalized_is_finalized() -> None:
    class Finalizable(HasWhatAWindowNeeds):
        finalized = False

        def finalize(self) -> None:
            self.finalized = True

    iterators = {name: Finalizable(make_dataset(), 4) for name in ("main", "other")}
    optimizer = chainer.optimizers.SGD().setup(make_model())
    updater = AccumulatingUpdater({**iterators, "bare": HasWhatAWindowNeeds([], 1)}, optimizer, accumulation_steps=3)
    updater.finalize()
    assert iterators["main"].finalized
    assert iterators["other"].finalized


@pytest.mark.parametrize(
    ("size", "steps", "expected_calls"),
    [
        # The iterator must say that it has no more for a window that is not full, but never for one that is.
        (50, 3, [3, 3, 3, 3, 2]),
        (48, 3, [3, 3, 3, 3]),
        (45, 3, [3, 3, 3, 3]),
        (49, 2, [2, 2, 2, 2, 2, 2, 2]),
        (50, 5, [5, 5, 4]),
        (50, 13, [13]),
        (50, 100, [14]),
    ],
)
def test_the_end_of_the_data_flushes_a_window_and_stops_where_there_is_none(
    size: int, steps: int, expected_calls: List[int]
) -> None:
    dataset = make_dataset(size)
    iterator = UsersIterator(dataset, 4, repeat=False)
    actual = adam_updater(AccumulatingUpdater, iterator, accumulation_steps=steps)
    expected = adam_updater(StandardUpdater, serial(dataset, 4 * steps, repeat=False))
    calls = []
    for _ in expected_calls:
        before = iterator.calls
        assert_same_run(actual, expected, 1)
        calls.append(iterator.calls - before)
    assert calls == expected_calls
    parameters = [to_host(param).copy() for param in actual.get_optimizer("main").target.params()]
    before = iterator.calls
    for updater in (actual, expected):
        with pytest.raises(StopIteration):
            updater.update()
    assert iterator.calls == before + 1
    assert actual.iteration == expected.iteration == actual.get_optimizer("main").t == len(expected_calls)
    assert actual.get_optimizer("main").epoch == 1
    for param, array in zip(actual.get_optimizer("main").target.params(), parameters):
        numpy.testing.assert_array_equal(to_host(param), array)


def test_the_end_of_the_data_cuts_the_last_batch_that_is_split() -> None:
    dataset = make_dataset(50)
    iterator = UsersIterator(dataset, 12, repeat=False)
    actual = adam_updater(AccumulatingUpdater, iterator, micro_batch_size=5)
    assert_same_run(actual, adam_updater(StandardUpdater, serial(dataset, 12, repeat=False)), 5)
    assert iterator.calls == 5
    with pytest.raises(StopIteration):
        actual.update()
    assert actual.iteration == 5


@pytest.mark.parametrize("size", [48, 50, 17, 12, 7, 5])
@every_way
def test_windows_run_across_the_ends_of_epochs(size: int, way: Any) -> None:
    dataset = make_dataset(size)
    batch_size, arguments = way
    iterator = UsersIterator(dataset, batch_size)
    actual = adam_updater(AccumulatingUpdater, iterator, **arguments)
    steps = arguments.get("accumulation_steps", 1)
    batches = {"batches": serial(dataset, batch_size), "accumulation_steps": steps}
    assert_same_run(actual, adam_updater(CountingUpdater, serial(dataset, EFFECTIVE_BATCH), **batches), 10)
    assert iterator.calls == 10 * steps


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    steps=st.integers(1, 6),
    micro_batch_size=st.none() | st.integers(1, 9),
    repeat=st.booleans(),
)
def test_whatever_the_sizes_the_bookkeeping_is_that_of_the_whole_batches(
    size: int, batch_size: int, steps: int, micro_batch_size: Optional[int], repeat: bool
) -> None:
    dataset = make_dataset(size)
    window = {"accumulation_steps": steps, "micro_batch_size": micro_batch_size}
    iterator = UsersIterator(dataset, batch_size, repeat=repeat)
    actual = adam_updater(AccumulatingUpdater, iterator, **window)
    whole = serial(dataset, batch_size * steps, repeat=repeat)
    small = serial(dataset, batch_size, repeat=repeat)
    expected = adam_updater(CountingUpdater, whole, batches=small, accumulation_steps=steps)
    batches = 6 * steps if repeat else -(-size // batch_size)
    updates = -(-batches // steps)
    assert_same_run(actual, expected, updates)
    assert iterator.calls == min(batches + 1, updates * steps)  # one to hear that there are no more, in a last window


@pytest.mark.parametrize("size", [48, 50, 44, 12, 7])
@pytest.mark.parametrize(
    "way", [(4, {"accumulation_steps": 3}), (12, {"micro_batch_size": 5})], ids=["gather", "split"]
)
def test_flushing_windows_are_batches_that_end_with_the_epoch(size: int, way: Any) -> None:
    dataset = make_dataset(size)
    batch_size, arguments = way
    actual = adam_updater(
        AccumulatingUpdater, EpochEndingIterator(dataset, batch_size), epoch_boundary="flush", **arguments
    )
    expected = adam_updater(StandardUpdater, EpochEndingIterator(dataset, EFFECTIVE_BATCH))
    assert_same_run(actual, expected, 10)
    assert actual.epoch == 10 // -(-size // EFFECTIVE_BATCH)


def test_a_flushing_window_takes_in_the_batch_that_runs_across_the_end_of_the_epoch() -> None:
    iterator = UsersIterator(make_dataset(50), 4)
    updater = adam_updater(AccumulatingUpdater, iterator, accumulation_steps=3, epoch_boundary="flush")
    seen = []
    for _ in range(10):
        updater.update()
        seen.append((iterator.calls, updater.is_new_epoch))
    # Batches 13 and 25 run across the ends of epochs.
    assert [calls for calls, _ in seen] == [3, 6, 9, 12, 13, 16, 19, 22, 25, 28]
    assert [calls for calls, is_new_epoch in seen if is_new_epoch] == [13, 25]


def test_a_flushing_window_that_ends_with_the_data_asks_for_nothing_more() -> None:
    dataset = make_dataset(50)
    iterator = UsersIterator(dataset, 4, repeat=False)
    actual = adam_updater(AccumulatingUpdater, iterator, accumulation_steps=3, epoch_boundary="flush")
    assert_same_run(actual, adam_updater(StandardUpdater, serial(dataset, 12, repeat=False)), 5)
    assert iterator.calls == 13
    with pytest.raises(StopIteration):
        actual.update()
    assert {name: getattr(actual, name) for name in BOOKKEEPING} == {
        "iteration": 5,
        "epoch": 1,
        "is_new_epoch": True,
        "epoch_detail": 1.0,
        "previous_epoch_detail": 48 / 50,
    }


@pytest.mark.parametrize("kwargs", [{}, {"accumulation_steps": 2}])
def test_an_iterator_without_epoch_detail_will_do(kwargs):
    class Minimal(chainer.dataset.Iterator):
        epoch = 0
        is_new_epoch = False

        def __next__(self):
            return make_dataset(4)

    updater = make_updater(AccumulatingUpdater, Minimal(), chainer.optimizers.SGD(), **kwargs)
    updater.update()
    assert updater.iteration == 1
    assert updater.previous_epoch_detail is None
