"""With prefetch=True, the next micro-batch is prepared while the present one computes, and nothing else changes."""

from __future__ import annotations

import contextlib
import contextvars
import decimal
import gc
import itertools
import threading
import types
import warnings
import weakref

import chainer_accum
import chainer
import numpy
import pytest
from chainer.iterators import SerialIterator
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater
from chainer_accum.batches.prefetching import prepare_ahead, prepare_lazily
from chainer_accum.state import thread_state
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from helpers import (
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
    if helpers.DEVICE is not None:
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
    assert 1 <= min(alive) <= max(alive) <= 2  # the one that the loss function has been given is among them


STEP: contextvars.ContextVar = contextvars.ContextVar("step", default=0)


@contextlib.contextmanager
def config_set(key, value):
    """Sets a key of the configuration that may exist in this thread only, without ``using_config``."""
    setattr(chainer.config, key, value)
    try:
        yield
    finally:
        delattr(chainer.config, key)


@contextlib.contextmanager
def buffer_size(size):
    old = numpy.setbufsize(size)
    try:
        yield
    finally:
        numpy.setbufsize(old)


def decimals():
    return decimal.getcontext().prec


def handle(kind, flag):
    """Takes note of a floating-point error, for :func:`numpy.seterrcall`."""


# What is local to a thread: how to read it, and contexts in which it is not what a new thread has.
LOCAL = {
    "a key of Chainer": (lambda: chainer.config.train, lambda: chainer.using_config("train", False)),
    "a key of one's own": (lambda: chainer.config.augment, lambda: chainer.using_config("augment", 3)),
    "a key that was set": (lambda: chainer.config.augment, lambda: config_set("augment", 3)),
    "a key that is not there": (lambda: hasattr(chainer.config, "augment"), contextlib.nullcontext),
    "a context variable": (STEP.get, lambda: setting(STEP, 3)),
    "the precision of decimals": (decimals, lambda: decimal.localcontext(decimal.Context(prec=3))),
    "errors of NumPy": (numpy.geterr, lambda: numpy.errstate(divide="raise", under="print")),
    "the handler of errors": (numpy.geterrcall, lambda: numpy.errstate(all="call", call=handle)),
    "the buffer size of NumPy": (numpy.getbufsize, lambda: buffer_size(160)),
}


@contextlib.contextmanager
def setting(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def make_noticing(notice, prefetch):
    """Returns an updater, and a list of what its iterator, dataset and converter notice, and which of them it was."""
    noticed = []

    class Dataset(chainer.dataset.DatasetMixin):
        examples = make_dataset(10)

        def __len__(self):
            return len(self.examples)

        def get_example(self, i):
            noticed.append(("dataset", notice("dataset")))
            return self.examples[i]

    class Iterator(SerialIterator):
        def next(self):
            noticed.append(("iterator", notice("iterator")))
            return super().next()

    def converter(batch, device):
        noticed.append(("converter", notice("converter")))
        return chainer.dataset.concat_examples(batch, device)

    iterator = Iterator(Dataset(), 5, shuffle=False)
    updater = make(iterator, accumulation_steps=3, micro_batch_size=3, converter=converter, prefetch=prefetch)
    return updater, noticed


@pytest.mark.parametrize("name", LOCAL)
def test_the_thread_has_what_is_local_to_the_calling_thread(name):
    read, changed = LOCAL[name]
    runs = []
    for prefetch in (False, True):
        updater, noticed = make_noticing(lambda which: read(), prefetch)
        with changed():
            value = read()
            run(updater, 2)
        runs.append(noticed)
    assert runs[1] == runs[0]
    assert {which: each for which, each in runs[1]} == dict.fromkeys(["iterator", "dataset", "converter"], value)


def test_an_item_is_prepared_with_the_configuration_of_when_that_began():
    values = []
    with contextlib.closing(prepare_ahead(iter(range(3)), lambda item: chainer.config.augment)) as prepared:
        with chainer.using_config("augment", "first"):
            values.append(next(prepared)[1]())
        with chainer.using_config("augment", "second"):
            values.append(next(prepared)[1]())
        with chainer.using_config("augment", "third"):
            values.append(next(prepared)[1]())
    assert values == ["first", "first", "second"]


def test_the_thread_leaves_the_state_of_the_calling_thread_alone():
    def prepare(item):
        chainer.config.augment = item
        numpy.seterr(all="ignore")
        STEP.set(item)
        chainer.get_current_reporter().add_observer("other", prepare)

    before = numpy.geterr()
    observation = {}
    with chainer.Reporter().scope(observation):
        for _, prepared in prepare_ahead(iter([1, 2]), prepare):
            prepared()
    assert (numpy.geterr(), STEP.get(), hasattr(chainer.config, "augment"), observation) == (before, 0, False, {})


def reporting(model):
    """Returns a function that reports in each of the ways, another value at each call."""
    calls = itertools.count()

    def report(which):
        call = float(next(calls))
        chainer.report({which: call, f"{which}/weighted": (call, 1 + call)})
        chainer.report({f"{which}/array": numpy.full(2, call), "shared": chainer.Variable(numpy.array(call))}, model)
        with chainer.report_scope({}):
            chainer.report({"elsewhere": call})

    return report


def test_what_iterator_dataset_and_converter_report_is_reported():
    runs = []
    for prefetch in (False, True):
        links = []
        updater, _ = make_noticing(lambda which, links=links: links[0](which), prefetch)
        links.append(reporting(updater.get_optimizer("main").target))
        runs.append(run(updater, 3))
    assert_same_steps(runs[1], runs[0], 0)
    keys = {f"{which}{kind}" for which in ("iterator", "dataset", "converter") for kind in ("", "/weighted")}
    keys |= {f"main/{which}/array" for which in ("iterator", "dataset", "converter")} | {"main/shared", "main/loss"}
    assert keys <= runs[1][0].observation.keys()
    assert "elsewhere" not in runs[1][0].observation


def test_nothing_is_reported_before_the_item_is_taken_over():
    is_prepared = threading.Event()

    def items():
        chainer.report({"item": 1})
        yield "only"
        chainer.report({"end": 1})
        is_prepared.set()

    observation, inner = {}, {}
    with chainer.Reporter().scope(observation):
        prepared_items = prepare_ahead(items(), lambda item: chainer.report({"prepared": 1}))
        _, prepared = next(prepared_items)
        assert is_prepared.wait(10)
        assert observation == {"item": 1}
        with chainer.report_scope(inner):
            prepared()
        assert (observation, inner) == ({"item": 1}, {"prepared": 1})
        assert list(prepared_items) == []
    assert observation == {"item": 1, "end": 1}


def test_a_reporter_of_a_class_of_its_own_is_asked_once():
    runs = []
    for prepare_all in (prepare_lazily, prepare_ahead):
        calls = []

        class Prefixing(chainer.Reporter):
            def report(self, values, observer=None, calls=calls):
                calls.append(values)
                super().report({f"train/{key}": value for key, value in values.items()}, observer)

        observation = {}
        with Prefixing().scope(observation):
            for _, prepared in prepare_all(iter([1, 2]), lambda item: chainer.report({"prepared": item})):
                prepared()
        runs.append((calls, observation))
    assert runs[1] == runs[0] == ([{"prepared": 1}, {"prepared": 2}], {"train/prepared": 2})


@pytest.mark.parametrize("prefetch", [False, True])
def test_without_a_reporter_nothing_is_reported(prefetch):
    updater, noticed = make_noticing(lambda which: chainer.report({which: 1.0}), prefetch)
    updater.update()
    assert len(noticed) == 3 * (1 + 5 + 2)


@pytest.mark.parametrize("prefetch", [False, True])
def test_an_observer_that_is_not_known_is_an_error_where_it_reports(prefetch):
    def notice(which):
        with pytest.raises(KeyError, match="not registered"):
            chainer.report({"x": 1.0}, object())

    updater, noticed = make_noticing(notice, prefetch)
    run(updater, 1)
    assert len(noticed) == 3 * (1 + 5 + 2)


def test_hooks_watch_the_thread_that_registered_them_only():
    threads = []

    class FunctionHook(chainer.FunctionHook):
        def forward_preprocess(self, function, in_data):
            threads.append(threading.current_thread())

    class LinkHook(chainer.LinkHook):
        def forward_preprocess(self, args):
            threads.append(threading.current_thread())

    link = chainer.links.Linear(5, 5)
    updater, noticed = make_noticing(lambda which: link(numpy.ones((1, 5), "f")), prefetch=True)
    with FunctionHook(), LinkHook():
        run(updater, 1)
    assert len(noticed) == 3 * (1 + 5 + 2)
    assert set(threads) == {threading.main_thread()}


def test_a_stop_iteration_in_preparing_is_not_the_end_of_the_items():
    def prepare(item):
        if item == 2:
            raise StopIteration("no more words")
        return item

    prepared = [function for _, function in prepare_ahead(iter([1, 2, 3]), prepare)]
    assert (prepared[0](), prepared[2]()) == (1, 3)
    with pytest.raises(StopIteration, match="no more words"):
        prepared[1]()


def test_a_stop_iteration_of_the_converter_reaches_the_caller():
    raised = []
    for prefetch in (False, True):
        conversions = []

        def converter(batch, device, conversions=conversions):
            conversions.append(1)
            if len(conversions) == 2:
                raise StopIteration("no more words")
            return chainer.dataset.concat_examples(batch, device)

        updater = make(serial(make_dataset(), 5), accumulation_steps=3, converter=converter, prefetch=prefetch)
        with pytest.raises((StopIteration, RuntimeError)) as error:
            updater.update()
        assert (updater.iteration, updater.get_optimizer("main").t) == (0, 0)
        raised.append(error.type)
    assert raised[0] is raised[1]


def test_what_failed_is_not_held_once_the_error_is_dropped():
    class Item:
        pass

    def prepare(item):
        raise MemoryError("no room")

    def items(references):
        item = Item()
        references.append(weakref.ref(item))
        yield item

    references = []
    gc.disable()  # which would find a cycle
    try:
        with contextlib.closing(prepare_ahead(items(references), prepare)) as prepared:
            with contextlib.suppress(MemoryError):
                next(prepared)[1]()
        assert references[0]() is None
    finally:
        gc.enable()


class FakeCupy(threading.local):
    """What of CuPy's state is local to a thread: the device, the stream and the allocator that are current."""

    device, stream, allocator = 0, "default stream", "default allocator"

    @contextlib.contextmanager
    def using(self, name, value):
        old = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, old)

    def state(self):
        return self.device, self.stream, self.allocator


def test_the_thread_has_the_current_device_stream_and_allocator_of_cupy(monkeypatch):
    current = FakeCupy()
    fake = types.SimpleNamespace(
        Device=lambda: current.using("device", current.device),
        get_current_stream=lambda: current.using("stream", current.stream),
        get_allocator=lambda: current.allocator,
        using_allocator=lambda allocator: current.using("allocator", allocator),
        runtime=types.SimpleNamespace(CUDARuntimeError=RuntimeError),
    )
    fake_cuda = types.SimpleNamespace(available=True, cupy=types.SimpleNamespace(cuda=fake))
    monkeypatch.setattr(thread_state, "cuda", fake_cuda)
    with current.using("device", 1), current.using("stream", "other"), current.using("allocator", "managed"):
        values = [prepared() for _, prepared in prepare_ahead(iter([1, 2]), lambda item: current.state())]
    assert values == [(1, "other", "managed")] * 2


def test_cupy_without_a_device_is_left_alone(monkeypatch):
    def no_device():
        raise RuntimeError("no CUDA-capable device is detected")

    fake = types.SimpleNamespace(Device=no_device, runtime=types.SimpleNamespace(CUDARuntimeError=RuntimeError))
    fake_cuda = types.SimpleNamespace(available=True, cupy=types.SimpleNamespace(cuda=fake))
    monkeypatch.setattr(thread_state, "cuda", fake_cuda)
    assert [prepared() for _, prepared in prepare_ahead(iter([1, 2]), lambda item: item)] == [1, 2]


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
