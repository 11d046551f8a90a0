"""A window that does not fit in memory begins again with smaller micro-batches, and nothing is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import warnings

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from helpers import (
    CountingUpdater,
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


class Limited(L.Classifier):
    """A classifier whose forward or backward pass has memory for so many examples only."""

    def __init__(self, predictor, limit, stage="forward"):
        super().__init__(predictor)
        self.limit = limit
        self.stage = stage
        self.sizes = []

    def forward(self, x, t):
        self.sizes.append(len(x))
        loss = super().forward(x, t)
        if self.stage == "forward":
            self.check(x)
            return loss
        return CheckedBackward(self.check).apply((loss,))[0]

    def check(self, _):
        if self.limit is not None and self.sizes[-1] > self.limit:
            raise MemoryError(f"no room for {self.sizes[-1]} examples")


class CheckedBackward(chainer.FunctionNode):
    """Passes values on, and checks memory as the gradients come back."""

    def __init__(self, check):
        self.check = check

    def forward(self, inputs):
        return inputs

    def backward(self, indexes, grads):
        self.check(grads[0])
        return grads


class LateLimited(Limited):
    """The backward pass fails when the gradients of the last layer have been added already."""

    def forward(self, x, t):
        self.sizes.append(len(x))
        h = F.relu(self.predictor[0](x))
        h = CheckedBackward(self.check).apply((h,))[0]
        loss = F.softmax_cross_entropy(self.predictor[2](h), t)
        chainer.report({"loss": loss}, self)
        return loss


def make_limited(limit, stage="forward"):
    predictor = make_model().predictor
    return LateLimited(predictor, limit) if stage == "late" else Limited(predictor, limit, stage)


@pytest.mark.parametrize("stage", ["forward", "backward", "late"])
@pytest.mark.parametrize("make_optimizer", [chainer.optimizers.SGD, chainer.optimizers.Adam])
def test_the_run_is_that_of_a_machine_with_more_memory(make_optimizer, stage):
    data = make_dataset(50)
    expected = make_updater(StandardUpdater, serial(data, 20), make_optimizer(), make_limited(None, stage))
    expected_steps = run(expected, 5)
    model = make_limited(3, stage)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(data, 20), make_optimizer(), model, micro_batch_size=16
    )
    with pytest.warns(RuntimeWarning, match="memory ran out for a micro-batch of (10|5) examples") as record:
        steps = run(updater, 5)
    assert_same_steps(steps, expected_steps)
    assert_same_parameters(model, expected.get_optimizer("main").target)
    assert_same_optimizer_state(updater.get_optimizer("main"), expected.get_optimizer("main"))
    assert len(record) == 2
    assert updater.micro_batch_size == 3  # 10 did not fit, nor did 5, and later windows begin with what did
    assert model.sizes[0] == 10 and max(model.sizes[1:]) == 5 and max(model.sizes[2:]) <= 3


@settings(max_examples=50)
@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 20),
    steps=st.integers(1, 3),
    part=st.one_of(st.none(), st.integers(1, 20)),
    limit=st.integers(1, 20),
    repeat=st.booleans(),
    stage=st.sampled_from(["forward", "late"]),
)
def test_nothing_is_lost_whatever_the_limit(size, batch, steps, part, limit, repeat, stage):
    data = make_dataset(size)
    updates = 3 if repeat else -(-size // (batch * steps))
    expected = make_updater(
        CountingUpdater,
        serial(data, batch * steps, repeat=repeat),
        chainer.optimizers.MomentumSGD(),
        make_limited(None, stage),
        batches=serial(data, batch, repeat=repeat),
        accumulation_steps=steps,
    )
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(data, batch, repeat=repeat),
        chainer.optimizers.MomentumSGD(),
        make_limited(limit, stage),
        accumulation_steps=steps,
        micro_batch_size=part,
        split_when_out_of_memory=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        steps_run = run(updater, updates)
    assert_same_steps(steps_run, run(expected, updates))
    assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, 1e-5)


def test_one_example_that_does_not_fit_is_an_error_that_changes_nothing():
    model = make_limited(0)
    model.add_link("normalization", L.BatchNormalization(5))
    forward = model.forward

    optimizer = chainer.optimizers.Adam()
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(make_dataset(), 4), optimizer, model, micro_batch_size=4
    )
    model.forward = lambda x, t: forward(model.normalization(F.dropout(x)), t)
    observation = {}
    random_states = random.getstate(), numpy.random.get_state()[1].tolist()
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    with pytest.warns((RuntimeWarning, UserWarning)), reporter.scope(observation):
        with pytest.raises(MemoryError, match="one example does not fit in memory: no room for 1 examples; use a sm"):
            updater.update()
    assert observation == {}
    assert (optimizer.t, updater.iteration) == (0, 0)
    assert model.normalization.avg_mean.sum() == 0 and (model.normalization.avg_var == 1).all()
    assert random_states == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_the_examples_and_the_random_numbers_of_the_failed_pass_are_used_again():
    if helpers.DEVICE is not None:
        pytest.skip("CuPy's generator cannot be put back")
    seen = []

    def converter(batch, device):
        seen.extend(t for _, t in batch)
        return chainer.dataset.concat_examples(batch, device)

    data = [(x, numpy.int32(i % 3)) for i, (x, _) in enumerate(make_dataset(24))]
    runs = []
    for limit in (None, 4):
        numpy.random.seed(5)
        model = make_limited(limit)
        predictor = model.predictor
        predictor.insert(0, F.dropout)  # with one layer of it, masks drawn in parts are those drawn at once
        updater = make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(data, 12),
            chainer.optimizers.SGD(),
            model,
            converter=converter,
            micro_batch_size=12,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run(updater, 2)
        runs.append((model, numpy.random.rand()))
    assert_same_parameters(runs[1][0], runs[0][0])
    assert runs[0][1] == runs[1][1]
    assert len(seen) == 24 + 24 + 12 + 6  # all examples once in either run, and those of two passes that failed


def test_running_averages_are_those_of_the_passes_that_count():
    data = make_dataset(24)
    averages = []
    for limit, size in ((None, 3), (3, 12)):
        model = make_limited(limit)
        model.predictor.insert(0, L.BatchNormalization(axis=0, initial_avg_mean=1.0))
        updater = make_updater(
            chainer_accum.AccumulatingUpdater, serial(data, 12), chainer.optimizers.SGD(), model, micro_batch_size=size
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run(updater, 2)
        averages.append(to_host(model.predictor[0].avg_mean))
    numpy.testing.assert_array_equal(*averages)
    assert (averages[0] != 1).all()


def make_limited_updater(**kwargs):
    return make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_dataset(), 8),
        chainer.optimizers.SGD(),
        make_limited(4),
        **kwargs,
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"micro_batch_size": 8},
        {"accumulation_steps": 2, "split_when_out_of_memory": True},
        {"split_when_out_of_memory": True},
    ],
)
def test_it_splits_where_the_iterator_has_the_whole_batch_or_if_it_is_asked_to(kwargs):
    updater = make_limited_updater(**kwargs)
    with pytest.warns(RuntimeWarning, match="from now on a micro-batch has at most 4"):
        updater.update()
    assert updater.micro_batch_size == 4
    assert updater.iteration == updater.get_optimizer("main").t == 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"micro_batch_size": 8, "split_when_out_of_memory": False},
        {"accumulation_steps": 2},
        {"accumulation_steps": 2, "micro_batch_size": 8},
        {},
    ],
)
def test_elsewhere_it_raises_what_the_pass_raised(kwargs):
    updater = make_limited_updater(**kwargs)
    with pytest.raises(MemoryError, match="^no room for 8 examples$"):
        updater.update()
    assert updater.iteration == updater.get_optimizer("main").t == 0


def test_memory_that_the_iterator_or_the_optimizer_lacks_is_not_for_us_to_find():
    class Iterator(chainer.iterators.SerialIterator):
        def next(self):
            raise MemoryError("of the loader")

    class Optimizer(chainer.optimizers.SGD):
        def update(self, *args, **kwargs):
            raise MemoryError("of the optimizer")

    for iterator, optimizer, message in (
        (Iterator(make_dataset(), 4), chainer.optimizers.SGD(), "of the loader"),
        (serial(make_dataset(), 4), Optimizer(), "of the optimizer"),
    ):
        updater = make_updater(chainer_accum.AccumulatingUpdater, iterator, optimizer, micro_batch_size=2)
        with pytest.raises(MemoryError, match=message):
            updater.update()


def test_another_type_is_refused():
    with pytest.raises(
        TypeError, match="split_when_out_of_memory must be True or False, got 1; use None for the default"
    ):
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(make_dataset(), 4),
            chainer.optimizers.SGD(),
            split_when_out_of_memory=1,
        )


LIMITED_PROGRAM = textwrap.dedent(
    """
    import resource, sys, warnings
    import chainer_accum
    import chainer, chainer.functions as F, chainer.links as L, numpy

    limit, path = int(sys.argv[1]), sys.argv[2]
    random = numpy.random.RandomState(0)
    data = [(random.randn(256).astype("f"), numpy.int32(i % 10)) for i in range(2048)]
    rng = [chainer.initializers.LeCunNormal(rng=numpy.random.RandomState(seed)) for seed in range(3)]
    model = L.Classifier(chainer.Sequential(
        L.Linear(256, 4096, initialW=rng[0]), F.tanh, L.Linear(4096, 64, initialW=rng[1]), F.tanh,
        L.Linear(64, 10, initialW=rng[2]),
    ))
    optimizer = chainer.optimizers.SGD(0.1).setup(model)
    iterator = chainer.iterators.SerialIterator(data, 2048, shuffle=False)
    updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=2048)
    model(*chainer.dataset.concat_examples(data[:8]))  # so that what is loaded late is loaded
    if limit:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            updater.update()
    messages = [str(warning.message) for warning in caught if "memory ran out" in str(warning.message)]
    print(updater.micro_batch_size, len(messages))
    chainer.serializers.save_npz(path, model)
    """
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is set as Linux has it")
def test_a_process_with_a_real_limit_ends_where_one_without_ends(tmp_path):
    results = []
    for limit in (0, 64 * 2**20):
        path = tmp_path / f"{limit}.npz"
        program = subprocess.run(
            [sys.executable, "-c", LIMITED_PROGRAM, str(limit), str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert program.returncode == 0, program.stderr
        size, retries = map(int, program.stdout.split())
        results.append((size, retries, dict(numpy.load(path))))
    (size, retries, expected), (lowered_size, retries_of_limited, actual) = results
    assert (size, retries) == (2048, 0)
    assert lowered_size < 2048 and retries_of_limited >= 1
    for name, array in expected.items():
        numpy.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-6)
