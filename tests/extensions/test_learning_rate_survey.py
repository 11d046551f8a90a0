"""A survey tells which learning rates a model can be trained with, and leaves no trace."""

from __future__ import annotations

import builtins
import functools
import itertools
import json
import math

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.iterators import MultiprocessIterator, MultithreadIterator, SerialIterator
from chainer.training import Trainer, make_extension
from chainer.training import extensions as chainer_extensions
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import LearningRateSurvey
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_updater,
    run,
)

WAYS = {
    "standard": (StandardUpdater, 12, {}),
    "gather": (AccumulatingUpdater, 4, {"accumulation_steps": 3}),
    "split": (AccumulatingUpdater, 12, {"micro_batch_size": 5}),
}


def make(way="standard", optimizer=None, iterator_class=SerialIterator):
    """Returns an updater that shuffles, for a model with dropout and a layer whose size is not known yet."""
    numpy.random.seed(0)
    updater_class, batch_size, kwargs = WAYS[way]
    model = L.Classifier(chainer.Sequential(L.Linear(None, 8), F.tanh, F.dropout, L.Linear(8, 3)))
    optimizer = optimizers.SGD() if optimizer is None else optimizer
    return make_updater(updater_class, iterator_class(make_dataset(), batch_size), optimizer, model, **kwargs)


def survey(updater, out, *args, extensions=(), stop_trigger=None, **kwargs):
    """Runs a survey, by default of the rates from 0.01 to 1, and returns it."""
    trainer = Trainer(updater, stop_trigger, out=str(out))
    own_trigger = trainer.stop_trigger
    extension = LearningRateSurvey(*(args or (0.01, 1, 10)), **kwargs)
    for each in (extension, *extensions):
        trainer.extend(each)
    try:
        trainer.run(show_loop_exception_msg=False)
    finally:
        assert trainer.stop_trigger is own_trigger
    return extension


def reporting(losses):
    """Returns a Trainer extension with which these are the observed losses, one after the other."""
    losses = iter(losses)

    @make_extension(trigger=(1, "iteration"), priority=1000)
    def report_next(trainer):
        trainer.observation["main/loss"] = next(losses)

    return report_next


def assert_leaves_no_trace(surveyed, make_updater, before=0):
    """Asserts that after ``surveyed(updater)``, an updater makes the same updates as without, bit for bit."""
    results = []
    for disturb in (lambda updater: None, surveyed):
        updater = make_updater()
        run(updater, before)
        updater.finalize()
        disturb(updater)
        steps = run(updater, 9)
        updater.finalize()
        results.append((steps, updater.get_optimizer("main")))
    (expected_steps, expected), (steps, optimizer) = results
    assert_same_steps(steps, expected_steps, tolerance=0)
    assert_same_parameters(optimizer.target, expected.target, tolerance=0)
    assert_same_optimizer_state(optimizer, expected, tolerance=0)
    assert optimizer.hyperparam.get_dict() == expected.hyperparam.get_dict()


@pytest.mark.parametrize("iterator_class", [SerialIterator, MultithreadIterator])
@pytest.mark.parametrize("optimizer_class", [optimizers.SGD, optimizers.MomentumSGD, optimizers.Adam])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [0, 7])
def test_training_after_a_survey_is_that_without_one(tmp_path, way, optimizer_class, iterator_class, before):
    def surveyed(updater):
        assert len(survey(updater, tmp_path).losses) == 10

    assert_leaves_no_trace(surveyed, lambda: make(way, optimizer_class(), iterator_class), before)


@pytest.mark.parametrize("way", WAYS)
def test_a_survey_that_raises_leaves_no_trace(tmp_path, way):
    @make_extension(trigger=(5, "iteration"))
    def fail(trainer):
        raise RuntimeError("no more")

    def surveyed(updater):
        with pytest.raises(RuntimeError, match="no more"):
            survey(updater, tmp_path, extensions=[fail])
        assert len(json.loads((tmp_path / "learning_rate_survey.json").read_text())["losses"]) == 4

    assert_leaves_no_trace(surveyed, lambda: make(way, optimizers.MomentumSGD()))


def test_a_survey_that_is_interrupted_leaves_no_trace(tmp_path):
    @make_extension(trigger=(5, "iteration"))
    def interrupt(trainer):
        raise KeyboardInterrupt

    def surveyed(updater):
        with pytest.raises(KeyboardInterrupt):
            survey(updater, tmp_path, extensions=[interrupt])

    assert_leaves_no_trace(surveyed, make)


class _Outside(chainer.Chain):
    """A link that the model only refers to: it moves averages, remembers, is trained and is not initialized yet."""

    def __init__(self):
        super().__init__()
        numpy.random.seed(1)
        self.calls = 0
        with self.init_scope():
            self.bn = L.BatchNormalization(5)
            self.lazy = L.Linear(None, 5)
        self.optimizer = optimizers.Adam().setup(self)

    def forward(self, x):
        self.calls += 1
        self.optimizer.update(lambda: F.sum(self.lazy(self.bn(x)) ** 2))
        return self.bn(x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_link_outside_the_model_is_put_back(tmp_path, fails):
    def make_with_link():
        updater = make()
        model, links = updater.get_optimizer("main").target, itertools.repeat(_Outside())
        updater.loss_func = lambda x, t: model(next(links)(x), t)
        return updater

    @make_extension(trigger=(5, "iteration"))
    def interrupt(trainer):
        raise KeyboardInterrupt

    def surveyed(updater):
        if not fails:
            survey(updater, tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                survey(updater, tmp_path, extensions=[interrupt])
        assert not chainer.get_function_hooks() and not chainer._get_link_hooks()

    assert_leaves_no_trace(surveyed, make_with_link)


def test_a_model_may_be_checked_in_a_survey(tmp_path):
    @make_extension(trigger=(3, "iteration"))
    def check(trainer):
        results.append(chainer_accum.check_equivalence(trainer.updater.get_optimizer("main").target, make_dataset(20)))

    results = []
    assert_leaves_no_trace(lambda updater: survey(updater, tmp_path, extensions=[check]), make)
    assert [cause.name for result in results for cause in result.causes] == ["randomness"] * 3


def test_the_data_may_end_before_the_survey_does(tmp_path):
    def make_short():
        iterator = SerialIterator(make_dataset(), 12, repeat=False)
        return make_updater(StandardUpdater, iterator, optimizers.SGD())

    updater = make_short()
    with pytest.raises(StopIteration):
        survey(updater, tmp_path)
    assert (updater.iteration, updater.epoch_detail, updater.get_optimizer("main").lr) == (0, 0, 0.01)


def test_an_iterator_with_processes_can_be_surveyed_with(tmp_path):
    updater = make(iterator_class=functools.partial(MultiprocessIterator, n_processes=1))
    assert len(survey(updater, tmp_path).losses) == 10
    assert (updater.iteration, updater.epoch_detail) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(start=st.floats(1e-8, 1), factor=st.floats(1.001, 1e6), updates=st.integers(2, 8))
def test_the_rate_grows_exponentially_from_start_to_stop(tmp_path_factory, start, factor, updates):
    used = []

    @make_extension(trigger=(1, "iteration"))
    def record(trainer):
        used.append(trainer.updater.get_optimizer("main").lr)

    extension = survey(
        make(), tmp_path_factory.getbasetemp(), start, start * factor, updates, extensions=[record, reporting([1] * 8)]
    )
    assert extension.learning_rates == used
    assert (used[0], used[-1], len(used)) == (start, start * factor, updates)
    numpy.testing.assert_allclose(numpy.diff(numpy.log(used)), math.log(factor) / (updates - 1), rtol=1e-6, atol=1e-9)


def test_a_loss_is_that_of_the_update_with_the_rate(tmp_path):
    updater = make()
    rates = numpy.geomspace(0.01, 1, 10)
    extension = survey(updater, tmp_path)
    expected = []
    for rate in rates:
        updater.get_optimizer("main").lr = rate
        (step,) = run(updater, 1)
        expected.append(float(step.observation["main/loss"].array))
    numpy.testing.assert_allclose(extension.losses, expected, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(losses=st.lists(st.floats(1, 3), min_size=2, max_size=12), smoothing=st.floats(0, 0.99))
def test_the_smoothed_loss_is_a_weighted_mean_of_those_before(tmp_path_factory, losses, smoothing):
    extension = survey(
        make(),
        tmp_path_factory.getbasetemp(),
        *(0.01, 1, len(losses)),
        smoothing=smoothing,
        extensions=[reporting(losses)],
    )
    for count, smoothed in enumerate(extension.smoothed_losses, start=1):
        weights = smoothing ** numpy.arange(count)[::-1]
        numpy.testing.assert_allclose(smoothed, numpy.average(losses[:count], weights=weights), rtol=1e-9)


@pytest.mark.parametrize(
    "losses, updates, has_diverged",
    [
        ([2, 1, 3.9, 1, 1, 1], 6, False),
        ([2, 1, 4.1], 3, True),
        ([2, 1, math.nan], 2, True),
        ([2, math.inf], 1, True),
        ([math.nan], 0, True),
        ([-1, -2, 3, 9, -8, 10], 6, False),  # of which no multiple says anything
    ],
)
def test_a_survey_ends_when_the_loss_diverges(tmp_path, losses, updates, has_diverged):
    updater = make()
    extension = survey(updater, tmp_path, 0.01, 1, 6, smoothing=0, extensions=[reporting(losses)])
    rates = numpy.geomspace(0.01, 1, 6)
    assert extension.losses == losses[:updates] == extension.smoothed_losses
    assert extension.learning_rates == rates[:updates].tolist()
    assert extension.diverged_at == (rates[len(losses) - 1] if has_diverged else None)
    assert (updater.iteration, updater.get_optimizer("main").lr) == (0, 0.01)


def test_a_real_divergence_is_found(tmp_path):
    extension = survey(make(), tmp_path, 0.1, 1e6, 50)
    assert 0.1 < extension.diverged_at < 1e6
    assert len(extension.losses) < 50


def test_a_loss_may_grow_as_long_as_it_is_finite_if_told_so(tmp_path):
    extension = survey(make(), tmp_path, 0.01, 1, 3, divergence=math.inf, extensions=[reporting([1, 1e30, 1e300])])
    assert (len(extension.losses), extension.diverged_at) == (3, None)


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss(tmp_path):
    extension = survey(make(), tmp_path, 0.01, 1, 5, smoothing=0, extensions=[reporting([3, 2, 1, 1.5, 2])])
    assert extension.suggestion == pytest.approx(0.01)
    rising = survey(make(), tmp_path, 0.01, 1, 3, extensions=[reporting([1, 2, 3])])
    assert rising.suggestion is None
    assert LearningRateSurvey(0.01, 1).suggestion is None


def test_the_trainer_may_stop_first_and_another_may_follow(tmp_path):
    updater = make()
    trainer = Trainer(updater, (4, "iteration"), out=str(tmp_path))
    extension = LearningRateSurvey(0.01, 1, 10)
    trainer.extend(extension)
    trainer.run()
    assert (len(extension.losses), updater.iteration) == (4, 0)
    first = extension.losses
    trainer = Trainer(updater, out=str(tmp_path))
    trainer.extend(extension)
    trainer.run()
    assert len(extension.losses) == 10
    assert extension.losses[:4] == first


def test_the_results_are_written_as_json(tmp_path):
    extension = survey(make(), tmp_path, 0.1, 1e6, 20)
    names = ("learning_rates", "losses", "smoothed_losses", "diverged_at", "suggestion")
    written = json.loads((tmp_path / "learning_rate_survey.json").read_text(encoding="utf-8"))
    assert written == {name: getattr(extension, name) for name in names}
    survey(make(), tmp_path / "other", filename="rates.json")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["rates.json"]
    survey(make(), tmp_path / "none", filename=None)
    assert list((tmp_path / "none").iterdir()) == []


@pytest.mark.parametrize(
    "optimizer, kwargs, name",
    [
        (optimizers.SGD, {}, "lr"),
        (optimizers.Adam, {}, "alpha"),
        (optimizers.RMSprop, {}, "lr"),  # whose alpha is another matter
        (optimizers.Adam, {"attr": "eta"}, "eta"),
    ],
)
def test_the_name_of_the_learning_rate_is_found_or_given(tmp_path, optimizer, kwargs, name):
    seen = []

    @make_extension(trigger=(1, "iteration"))
    def record(trainer):
        seen.append(getattr(trainer.updater.get_optimizer("main"), name))

    survey(make(optimizer=optimizer()), tmp_path, 0.01, 1, 3, extensions=[record], **kwargs)
    assert seen == pytest.approx([0.01, 0.1, 1])


def test_the_optimizer_may_be_wrapped_or_another_than_the_main_one(tmp_path):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizers.SGD(), 2)
    assert len(survey(make(optimizer=optimizer), tmp_path).losses) == 10

    updater = make()
    other = optimizers.SGD().setup(L.Linear(2, 2))
    updater._optimizers["other"] = other
    seen = []

    @make_extension(trigger=(1, "iteration"))
    def record(trainer):
        seen.append((trainer.updater.get_optimizer("main").lr, other.lr))

    survey(updater, tmp_path, 0.1, 1, 2, optimizer_name="other", extensions=[record])
    assert seen == [(0.01, 0.1), (0.01, 1)]
    assert other.lr == 0.01


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("reported", ["plain", "weighted", "one element"])
def test_with_a_wrapped_optimizer_the_rate_moves_once_per_update(tmp_path, steps, reported):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizers.SGD(), steps)
    losses = [float(loss) for loss in range(1, 4 * steps + 1)]
    reports = {
        "plain": losses,
        "weighted": [(loss, numpy.array(index % steps)) for index, loss in enumerate(losses, start=1)],
        "one element": [numpy.array([loss], "f") for loss in losses],
    }
    weights = {
        "plain": numpy.ones(steps),
        "one element": numpy.ones(steps),
        "weighted": numpy.arange(1, steps + 1) % steps,
    }
    seen = []

    @make_extension(trigger=(1, "iteration"), priority=-100)
    def record(trainer):
        seen.append((optimizer.t, optimizer.lr))

    extension = survey(
        make(optimizer=optimizer),
        tmp_path,
        *(0.01, 10, 4),
        smoothing=0,
        divergence=math.inf,
        extensions=[record, reporting(reports[reported])],
    )
    rates = [0.01, 0.1, 1, 10]
    assert extension.learning_rates == pytest.approx(rates)
    by_update = numpy.reshape(losses, (4, steps))
    expected = numpy.average(by_update, axis=1, weights=weights[reported] if steps > 1 else None)
    assert extension.losses == pytest.approx(expected)
    assert seen == [((index + 1) // steps, pytest.approx(rates[index // steps])) for index in range(4 * steps)]


def test_a_wrapped_optimizer_is_surveyed_like_one_with_the_whole_batch(tmp_path):
    def make_wrapped():
        optimizer = chainer_accum.create_accumulating_optimizer(optimizers.SGD(), 3)
        return make_updater(StandardUpdater, SerialIterator(make_dataset(48), 4, shuffle=False), optimizer)

    updater = make_wrapped()
    wrapped = survey(updater, tmp_path)
    whole = survey(
        make_updater(StandardUpdater, SerialIterator(make_dataset(48), 12, shuffle=False), optimizers.SGD()), tmp_path
    )
    numpy.testing.assert_allclose(wrapped.losses, whole.losses, rtol=1e-5)
    assert_leaves_no_trace(lambda updater: survey(updater, tmp_path), make_wrapped)


@pytest.mark.parametrize("losses", [[1.0, 1.0, math.nan], [1.0, 1.0, 1.0, math.inf], [math.nan]])
def test_within_a_window_a_loss_that_is_not_finite_ends_the_survey_at_once(tmp_path, losses):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizers.SGD(), 2)
    extension = survey(
        make(optimizer=optimizer), tmp_path, 0.01, 1, 3, extensions=[reporting(losses)]
    )  # no more of them
    assert extension.losses == [1.0] * ((len(losses) - 1) // 2)
    assert extension.diverged_at == pytest.approx(0.01 if len(losses) == 1 else 0.1)


def test_within_a_window_a_loss_without_weight_may_be_nan(tmp_path):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizers.SGD(), 2)
    reports = [(math.nan, 0), (2.0, 3), (3.0, 1), (math.nan, 0)]
    extension = survey(make(optimizer=optimizer), tmp_path, 0.01, 1, 2, extensions=[reporting(reports)], smoothing=0)
    assert (extension.losses, extension.diverged_at) == ([2.0, 3.0], None)


def test_a_survey_in_which_all_is_skipped_has_diverged(tmp_path):
    data = [(x * numpy.nan, t) for x, t in make_dataset()]
    updater = make_updater(AccumulatingUpdater, SerialIterator(data, 12), optimizers.SGD(), nonfinite="skip")
    with pytest.warns(RuntimeWarning, match="no update: all micro-batches"), numpy.errstate(invalid="ignore"):
        extension = survey(updater, tmp_path)
    assert (extension.losses, extension.diverged_at) == ([], 0.01)


def test_a_progress_bar_knows_how_long_a_survey_with_a_wrapped_optimizer_is(tmp_path, capsys):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizers.SGD(), 3)
    survey(make(optimizer=optimizer), tmp_path, extensions=[chainer_extensions.ProgressBar(update_interval=15)])
    out = capsys.readouterr().out
    assert "50.00%" in out and "100.00%" in out


def test_another_value_can_be_the_loss(tmp_path):
    @make_extension(trigger=(1, "iteration"), priority=1000)
    def report(trainer):
        chainer.report({"weighted": (chainer.Variable(numpy.array(trainer.updater.iteration, numpy.float32)), 3)})

    extension = survey(make(), tmp_path, 0.01, 1, 3, loss_key="weighted", extensions=[report])
    assert extension.losses == [1, 2, 3]


def test_other_extensions_that_change_the_rate_do_not_get_in_the_way(tmp_path):
    shift = chainer_extensions.ExponentialShift("lr", 0.5)
    extension = survey(make(), tmp_path, extensions=[shift])
    plain = survey(make(), tmp_path)
    assert extension.losses == plain.losses


def test_a_progress_bar_knows_how_long_a_survey_is(tmp_path, capsys):
    survey(make(), tmp_path, extensions=[chainer_extensions.ProgressBar(update_interval=5)])
    assert "50.00%" in capsys.readouterr().out


def test_the_length_is_counted_from_where_training_was(tmp_path):
    lengths = []

    @make_extension(trigger=(1, "iteration"))
    def record(trainer):
        lengths.append(trainer.stop_trigger.get_training_length())

    updater = make()
    run(updater, 7)
    survey(updater, tmp_path, extensions=[record])
    assert lengths == [(17, "iteration")] * 10


def test_a_survey_that_never_began_has_nothing_to_put_back(tmp_path):
    extension = LearningRateSurvey(0.1, 1)
    extension.finalize()
    assert extension.losses == []


def test_a_plot_is_drawn(tmp_path):
    extension = survey(make(), tmp_path, 0.1, 1e6, 50)
    extension.plot(str(tmp_path / "survey.png"))
    assert (tmp_path / "survey.png").read_bytes().startswith(b"\x89PNG")
    survey(make(), tmp_path, extensions=[reporting(range(1, 11))], divergence=99).plot(tmp_path / "rising.svg")
    assert "main/loss" in (tmp_path / "rising.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="losses must not be empty, got none; plot after the Trainer has run"):
        LearningRateSurvey(0.1, 1).plot(tmp_path / "none.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    def fail(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    extension = survey(make(), tmp_path)
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match="plot needs Matplotlib; install it with: pip install matplotlib"):
        extension.plot(tmp_path / "survey.png")


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((0, 1), {}, ValueError, "start must be a positive number, got 0; start with a small rate"),
        ((math.nan, 1), {}, ValueError, "start must be a positive number, got nan"),
        (("1e-5", 1), {}, TypeError, "start must be a positive number, got '1e-5'"),
        ((True, 2), {}, TypeError, "start must be a positive number, got True"),
        ((0.1, 0.1), {}, ValueError, "stop must be larger than 0.1, got 0.1; the rate must grow"),
        ((0.1, math.inf), {}, ValueError, "stop must be larger than 0.1, got inf"),
        ((0.1, 1, 1), {}, ValueError, "updates must be an int of 2 or more, got 1; each update has a learning rate"),
        ((0.1, 1, 2.5), {}, TypeError, "updates must be an int of 2 or more, got 2.5"),
        ((0.1, 1), {"smoothing": 1}, ValueError, "smoothing must be from 0 to less than 1, got 1; use 0 for none"),
        ((0.1, 1), {"divergence": 1}, ValueError, "divergence must be larger than 1, got 1; use math.inf for no limit"),
    ],
)
def test_bad_arguments_are_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        LearningRateSurvey(*args, **kwargs)


@pytest.mark.parametrize(
    "optimizer, kwargs, message",
    [
        (optimizers.AdaDelta(), {}, "attr must be .*, got None; AdaDelta has eps, rho"),
        (optimizers.SGD(), {"attr": "alpha"}, "attr must be .*, got 'alpha'; SGD has lr"),
        (optimizers.SGD(), {"loss_key": "loss"}, "loss_key must be .*, got 'loss'; use one of 'main/accuracy', 'main/"),
    ],
)
def test_a_survey_of_what_is_not_there_is_an_error(tmp_path, optimizer, kwargs, message):
    updater = make(optimizer=optimizer)
    with pytest.raises(ValueError, match=message):
        survey(updater, tmp_path, **kwargs)
    assert (updater.iteration, optimizer.t) == (0, 0)
