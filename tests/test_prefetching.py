"""With prefetch=True, the next micro-batch is prepared while the present one computes, and nothing else changes."""

from __future__ import annotations

import threading
import warnings
import weakref

import chainer_accum
import chainer
import numpy
import pytest
from chainer.iterators import SerialIterator
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

import conftest
from conftest import (
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_model,
    make_updater,
    run,
    serial,
)


def make(iterator, model=None, optimizer=None, **kwargs):
    kwargs = {"prefetch": True, **kwargs}
    optimizer = optimizer or chainer.optimizers.Adam()
    return make_updater(chainer_accum.AccumulatingUpdater, iterator, optimizer, model, **kwargs)


@settings(max_examples=30)
@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 9),
    steps=st.integers(1, 4),
    part=st.one_of(st.none(), st.integers(1, 9)),
    repeat=st.booleans(),
    boundary=st.sampled_from(["carry", "flush"]),
)
def test_the_run_is_the_same(size, batch, steps, part, repeat, boundary):
    runs = []
    for prefetch in (False, True):
        iterator = serial(make_dataset(size), batch, repeat=repeat)
        updater = make(
            iterator, accumulation_steps=steps, micro_batch_size=part, epoch_boundary=boundary, prefetch=prefetch
        )
        results = []
        try:
            for _ in range(5):
                results += run(updater, 1)
        except StopIteration:
            pass
        runs.append((updater, results, iterator.current_position, iterator.epoch))
    (expected, expected_steps, *expected_position), (actual, actual_steps, *position) = runs
    assert_same_steps(actual_steps, expected_steps, 0)
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target, 0)
    assert_same_optimizer_state(actual.get_optimizer("main"), expected.get_optimizer("main"), 0)
    assert position == expected_position


def test_it_is_the_step_of_the_whole_batch():
    expected = make_updater(StandardUpdater, serial(make_dataset(), 24), chainer.optimizers.Adam(eps=1e-4))
    actual = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_dataset(), 6),
        chainer.optimizers.Adam(eps=1e-4),
        accumulation_steps=4,
        prefetch=True,
    )
    assert_same_steps(run(actual, 5), run(expected, 5))
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target)


def test_the_next_is_prepared_while_the_present_one_computes_and_no_other():
    converted, computing = [], threading.Event()

    def converter(batch, device):
        converted.append(threading.current_thread() is not threading.main_thread())
        if len(converted) == 2:
            assert computing.wait(10)  # or else this would not be at the same time
        return chainer.dataset.concat_examples(batch, device)

    model = make_model()
    ahead = []

    def loss_func(x, t):
        computing.set()
        while len(converted) < min(len(ahead) + 2, 4):  # ends only if the next one is prepared meanwhile
            pass
        ahead.append(len(converted) - len(ahead) - 1)
        return model(x, t)

    updater = make(
        serial(make_dataset(), 5),
        model,
        chainer.optimizers.SGD(),
        converter=converter,
        loss_func=loss_func,
        accumulation_steps=4,
    )
    run(updater, 1)
    assert converted == [True] * 4
    assert ahead == [1, 1, 1, 0]


def test_one_converted_micro_batch_more_is_alive_and_no_other():
    if conftest.DEVICE is not None:
        pytest.skip("it follows arrays of a type that is made of NumPy's")
    alive = []

    class Batch(numpy.ndarray):
        pass

    references = []

    def converter(batch, device):
        x, t = chainer.dataset.concat_examples(batch, device)
        x = x.view(Batch)
        references.append(weakref.ref(x))
        return x, t

    model = make_model()

    def loss_func(x, t):
        alive.append(sum(reference() is not None for reference in references))
        return model(numpy.array(x), t)

    updater = make(
        serial(make_dataset(), 5),
        model,
        chainer.optimizers.SGD(),
        converter=converter,
        loss_func=loss_func,
        accumulation_steps=8,
    )
    run(updater, 2)
    assert max(alive) <= 2


def test_the_thread_has_the_configuration_of_the_caller():
    seen = []

    def converter(batch, device):
        seen.append((chainer.config.train, chainer.config.dtype))
        return chainer.dataset.concat_examples(batch, device)

    updater = make(serial(make_dataset(), 5), accumulation_steps=3, converter=converter)
    with chainer.using_config("train", False), chainer.using_config("dtype", numpy.dtype(numpy.float64)):
        updater.update()
    assert seen == [(False, numpy.float64)] * 3
    assert chainer.config.train


@pytest.mark.parametrize("stage", ["iterator", "converter", "forward"])
def test_an_exception_is_raised_where_it_belongs_and_training_goes_on(stage):
    failing = [True]

    def fail_at(number, counter):
        counter.append(1)
        if failing[0] and len(counter) == number:
            raise KeyError(stage)

    reads, conversions, passes = [], [], []

    class Iterator(SerialIterator):
        def next(self):
            if stage == "iterator":
                fail_at(3, reads)
            return super().next()

    def converter(batch, device):
        if stage == "converter":
            fail_at(3, conversions)
        return chainer.dataset.concat_examples(batch, device)

    model = make_model()

    def loss_func(x, t):
        if stage == "forward":
            fail_at(3, passes)
        return model(x, t)

    updater = make(
        Iterator(make_dataset(), 5, shuffle=False),
        model,
        chainer.optimizers.SGD(),
        converter=converter,
        loss_func=loss_func,
        accumulation_steps=4,
    )
    threads = threading.active_count()
    with pytest.raises(KeyError, match=stage):
        run(updater, 1)
    assert (updater.iteration, updater.get_optimizer("main").t) == (0, 0)
    assert threading.active_count() == threads
    failing[0] = False
    run(updater, 2)
    assert updater.get_optimizer("main").t == 2


def test_a_snapshot_misses_nothing(tmp_path):
    expected, updater = (make(serial(make_dataset(), 5), accumulation_steps=3) for _ in range(2))
    run(expected, 2)
    save_npz(str(tmp_path / "updater.npz"), expected)
    load_npz(str(tmp_path / "updater.npz"), updater)
    run(expected, 3)
    run(updater, 3)
    assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, 0)


def test_a_micro_batch_that_does_not_fit_is_split_wherever_memory_fails():
    for stage in ("converter", "forward"):
        models = []
        for limit in (None, 3):

            def converter(batch, device, stage=stage, limit=limit):
                if limit and stage == "converter" and len(batch) > limit:
                    raise MemoryError("no room")
                return chainer.dataset.concat_examples(batch, device)

            model = make_model()

            def loss_func(x, t, stage=stage, limit=limit, model=model):
                if limit and stage == "forward" and len(x) > limit:
                    raise MemoryError("no room")
                return model(x, t)

            updater = make(
                serial(make_dataset(), 20),
                model,
                chainer.optimizers.SGD(),
                converter=converter,
                loss_func=loss_func,
                micro_batch_size=10,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if limit else "error", RuntimeWarning)
                run(updater, 3)
            models.append(model)
        assert_same_parameters(*models)
        assert updater.micro_batch_size == 3


def test_another_type_is_refused():
    with pytest.raises(TypeError, match="prefetch must be True or False, got 2; use True to convert"):
        make(serial(make_dataset(), 5), prefetch=2)


def test_a_converter_with_buffers_of_its_own_is_refused():
    converter = chainer.dataset.ConcatWithAsyncTransfer()
    with pytest.raises(ValueError, match="converter must not be ConcatWithAsyncTransfer with prefetch=True, got both"):
        make(serial(make_dataset(), 5), converter=converter, prefetch=True)
    make(serial(make_dataset(), 5), converter=converter, prefetch=False)
