"""What becomes of micro-batches whose loss or gradient is not finite."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.training.updaters import StandardUpdater

from helpers import (
    assert_same_optimizer_state,
    assert_same_parameters,
    make_dataset,
    make_model,
    make_updater,
    run,
    serial,
    to_host,
)

# NumPy warns of the invalid values that these tests make.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def poison(examples, indexes, value=numpy.nan):
    """Returns the examples with some inputs replaced by a value that is not finite."""
    return [(numpy.full_like(x, value), t) if i in indexes else (x, t) for i, (x, t) in enumerate(examples)]


@pytest.mark.parametrize("steps, size", [(5, None), (1, 4), (5, 4)])
def test_skipping_leaves_out_the_micro_batch_with_its_weight(steps, size):
    data = make_dataset(40)
    broken = {4, 5, 21}  # the 2nd and the 6th micro-batch of four
    kept = [i for i in range(40) if i // 4 not in {i // 4 for i in broken}]
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(poison(data, broken), 20 // steps),
        chainer.optimizers.Adam(),
        accumulation_steps=steps,
        micro_batch_size=size,
        nonfinite="skip",
    )
    steps_run = run(updater, 2)
    expected = chainer.optimizers.Adam().setup(make_model())
    losses = []
    for half in ([i for i in kept if i < 20], [i for i in kept if i >= 20]):
        x, t = chainer.dataset.concat_examples([data[i] for i in half])
        losses.append(float(expected.target(x, t).array))
        expected.update(expected.target, x, t)
    assert_same_parameters(updater.get_optimizer("main").target, expected.target)
    assert [step.observation["skipped_micro_batches"] for step in steps_run] == [1, 1]
    observed = [float(chainer.as_array(step.observation["main/loss"])) for step in steps_run]
    numpy.testing.assert_allclose(observed, losses, rtol=1e-5)


def test_what_was_skipped_before_the_window_begins_again_is_not_counted_twice():
    class Limited(L.Classifier):
        def forward(self, x, t):
            if len(x) > 5 and numpy.isfinite(to_host(x)).all():
                raise MemoryError("no room")
            return super().forward(x, t)

    data = make_dataset(20)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(poison(data, {1}), 20),
        chainer.optimizers.SGD(),
        Limited(make_model().predictor),
        micro_batch_size=10,
        nonfinite="skip",
    )
    with pytest.warns(RuntimeWarning, match="memory ran out for a micro-batch of 10 examples"):
        (step,) = run(updater, 1)
    assert updater.effective_batch_size == 15
    assert step.observation["skipped_micro_batches"] == 1
    expected = chainer.optimizers.SGD().setup(make_model())
    expected.update(expected.target, *chainer.dataset.concat_examples(data[5:]))
    assert_same_parameters(updater.get_optimizer("main").target, expected.target)


def test_nothing_is_skipped_where_all_is_finite():
    data = make_dataset(40)
    updaters = [
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(data, 20),
            chainer.optimizers.MomentumSGD(),
            micro_batch_size=7,
            nonfinite=nonfinite,
        )
        for nonfinite in ("keep", "skip", "raise")
    ]
    standard = make_updater(StandardUpdater, serial(data, 20), chainer.optimizers.MomentumSGD())
    run(standard, 4)
    for updater in updaters:
        run(updater, 4)
        assert_same_parameters(updater.get_optimizer("main").target, standard.get_optimizer("main").target)
        assert_same_optimizer_state(updater.get_optimizer("main"), standard.get_optimizer("main"))


class Root(chainer.Chain):
    """A model whose loss is finite, and of whose gradients one is not, where the input is zero."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.linear = L.Linear(5, 1, nobias=True, initialW=1.0)
            self.shift = chainer.Parameter(0.0, ())
            self.normalization = L.BatchNormalization(5)

    def forward(self, x, t):
        self.normalization(x)
        loss = F.mean(F.sqrt(F.absolute(self.linear(x)))) + self.shift
        chainer.report({"loss": loss}, self)
        return loss


@pytest.mark.parametrize("passes_gradients", [False, True])
def test_a_gradient_is_looked_at_as_well_as_a_loss(passes_gradients):
    model = Root()
    optimizer = chainer.optimizers.SGD().setup(model)
    good, bad = numpy.ones((4, 5), "f"), numpy.zeros((4, 5), "f")
    model.cleargrads()
    with chainer_accum.accumulate(optimizer, nonfinite="skip") as window:
        for x in (good, bad, good):
            if passes_gradients:
                model(x, None).backward()
                assert window.add_gradients() is (x is good)
            else:
                assert window.add(model, x, None) is (x is good)
        assert (window.num_micro_batches, window.num_skipped) == (3, 1)
    expected = Root()
    chainer.optimizers.SGD().setup(expected).update(expected, good, None)
    assert_same_parameters(model.linear, expected.linear, 0)
    assert model.shift.array == expected.shift.array != 0


def test_skipping_takes_back_what_the_pass_did_to_running_averages():
    model = Root()
    optimizer = chainer.optimizers.SGD().setup(model)
    good, bad = numpy.ones((4, 5), "f"), numpy.full((4, 5), numpy.nan, "f")
    with chainer_accum.accumulate(optimizer, nonfinite="skip") as window:
        for x in (good, bad):
            window.add(model, x, None)
    expected = L.BatchNormalization(5)
    expected(good)
    numpy.testing.assert_array_equal(model.normalization.avg_mean, expected.avg_mean)
    numpy.testing.assert_array_equal(model.normalization.avg_var, expected.avg_var)


def test_skipping_takes_back_a_persistent_value_that_is_another_array_after_the_pass():
    class Counting(Root):
        def __init__(self):
            super().__init__()
            self.add_persistent("seen", numpy.zeros(1))

        def forward(self, x, t):
            self.seen = self.seen + len(x)
            return super().forward(x, t)

    model = Counting()
    optimizer = chainer.optimizers.SGD().setup(model)
    with chainer_accum.accumulate(optimizer, nonfinite="skip") as window:
        for x in (numpy.ones((4, 5), "f"), numpy.full((3, 5), numpy.nan, "f"), numpy.ones((2, 5), "f")):
            window.add(model, x, None)
    assert model.seen == 6


@pytest.mark.parametrize("running_statistics", ["micro_batch", "update"])
def test_when_all_are_skipped_there_is_no_update_and_a_warning(running_statistics):
    data = poison(make_dataset(12), range(12))
    optimizer = chainer.optimizers.Adam()
    model = make_model()
    model.predictor.insert(0, L.BatchNormalization(5))
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(data, 12),
        optimizer,
        model,
        micro_batch_size=4,
        nonfinite="skip",
        running_statistics=running_statistics,
    )
    with pytest.warns(RuntimeWarning, match="no update: all micro-batches of the window that have a weight"):
        (step,) = run(updater, 1)
    assert (optimizer.t, updater.iteration, updater.epoch) == (0, 1, 1)
    assert step.observation == {"skipped_micro_batches": 3}
    assert numpy.isfinite(model.predictor[0].avg_mean).all()


def test_raising_names_the_micro_batch_and_changes_nothing():
    data = poison(make_dataset(12), {5}, numpy.inf)
    optimizer = chainer.optimizers.Adam()
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(data, 12), optimizer, Root(), micro_batch_size=4, nonfinite="raise"
    )
    observation = {}
    before = {name: to_host(param).copy() for name, param in optimizer.target.namedparams()}
    with pytest.raises(FloatingPointError, match="micro-batch 2 of the window is not finite: its loss is (inf|nan)"):
        reporter = chainer.Reporter()
        reporter.add_observer("main", optimizer.target)
        with reporter.scope(observation):
            updater.update()
    assert observation == {}
    assert (optimizer.t, updater.iteration) == (0, 0)
    for name, param in optimizer.target.namedparams():
        numpy.testing.assert_array_equal(to_host(param), before[name])
    assert optimizer.target.normalization.avg_mean.sum() == 0


def test_raising_tells_a_gradient_from_a_loss():
    optimizer = chainer.optimizers.SGD().setup(Root())
    with pytest.raises(
        FloatingPointError, match="its gradient is not, and its loss is 0.0; .* or use nonfinite='skip'"
    ):
        with chainer_accum.accumulate(optimizer, nonfinite="raise") as window:
            window.add(optimizer.target, numpy.zeros((4, 5), "f"), None)


@pytest.mark.parametrize("nonfinite", ["keep", "skip"])
def test_an_overflow_under_dynamic_scaling_skips_the_window_and_lowers_the_scale(nonfinite):
    data = make_dataset(24)
    scales, parameters = [], []
    for updater_class, kwargs in (
        (StandardUpdater, {}),
        (chainer_accum.AccumulatingUpdater, {"micro_batch_size": 4, "nonfinite": nonfinite}),
    ):
        optimizer = chainer.optimizers.SGD()
        with chainer.using_config("dtype", numpy.float16):
            model = L.Classifier(L.Linear(5, 3, initialW=numpy.full((3, 5), 0.1, "e")))
        half = [((x * 3000).astype(numpy.float16), t) for x, t in data]
        updater = make_updater(updater_class, serial(half, 12), optimizer, model, **kwargs)
        optimizer.loss_scaling(interval=1000)
        optimizer._loss_scale = 1024.0
        with pytest.warns(UserWarning, match="Non finite number"):
            run(updater, 1)
        scales.append(optimizer._loss_scale)
        parameters.append(to_host(model.predictor.W).copy())
    assert scales == [512.0, 512.0]
    numpy.testing.assert_array_equal(*parameters)


def test_under_dynamic_scaling_a_loss_that_is_not_finite_is_skipped_and_the_scale_kept():
    data = poison(make_dataset(12), {5})
    optimizer = chainer.optimizers.SGD()
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(data, 12), optimizer, micro_batch_size=4, nonfinite="skip"
    )
    optimizer.loss_scaling(interval=1000)
    (step,) = run(updater, 1)
    assert (optimizer.t, optimizer._loss_scale) == (1, 2.0)  # doubled, as long as there never was an overflow
    assert step.observation["skipped_micro_batches"] == 1


def test_the_accumulating_optimizer_skips_as_well():
    model = make_model()
    optimizer = chainer_accum.create_accumulating_optimizer(chainer.optimizers.SGD(), 2, nonfinite="skip").setup(model)
    expected = chainer.optimizers.SGD().setup(make_model())
    x, t = chainer.dataset.concat_examples(make_dataset(8))
    observation = {}
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    with reporter.scope(observation):
        optimizer.update(model, x, t)
        optimizer.update(model, x * numpy.nan, t)
    expected.update(expected.target, x, t)
    assert_same_parameters(model, expected.target)
    assert observation["skipped_micro_batches"] == 1


def test_an_unknown_choice_is_refused():
    message = "nonfinite must be one of 'keep', 'skip', 'raise', got 'ignore'"
    optimizer = chainer.optimizers.SGD().setup(make_model())
    with pytest.raises(ValueError, match=message):
        chainer_accum.AccumulatingUpdater(serial(make_dataset(), 4), optimizer, nonfinite="ignore")
    with pytest.raises(ValueError, match=message):
        chainer_accum.create_accumulating_optimizer(optimizer, 4, nonfinite="ignore")
    with pytest.raises(ValueError, match=message), chainer_accum.accumulate(optimizer, nonfinite="ignore"):
        pass
