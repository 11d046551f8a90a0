"""One call trains as a StandardUpdater with the large batch does, and tells the truth about it."""

from __future__ import annotations

import json

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum import setup_trainer_with_accumulation, train_model
from chainer import optimizers
from chainer.training.updaters import StandardUpdater
from chainer_accum.training import _report_loss
from chainer_accum.updater import AccumulatingUpdater

import helpers
from helpers import assert_same_parameters, make_dataset, make_model, make_updater, run, serial, to_host


def losses_of_whole_batches(updates, batch_size=24, size=50, **kwargs):
    updater = make_updater(StandardUpdater, serial(make_dataset(size), batch_size, **kwargs), optimizers.SGD(0.1))
    steps = run(updater, updates)
    return updater.get_optimizer("main").target, steps


def test_the_model_is_trained_as_with_the_large_batch():
    model = make_model()
    history = train_model(model, optimizers.SGD(0.1), serial(make_dataset(), 6), None, 4, 3, helpers.DEVICE)
    expected, steps = losses_of_whole_batches(7)  # the seventh batch of 24 ends the third epoch of 50
    assert_same_parameters(model, expected)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    ends = [number for number, step in enumerate(steps, 1) if step.bookkeeping["is_new_epoch"]]
    for entry, start, end in zip(history, [0, *ends], ends):
        for key in ("main/loss", "main/accuracy"):
            mean = numpy.mean([to_host(step.observation[key]) for step in steps[start:end]])
            numpy.testing.assert_allclose(entry[key], mean, rtol=1e-5)
        numpy.testing.assert_allclose(entry["loss"], entry["main/loss"], rtol=1e-6)
        assert {type(value) for key, value in entry.items() if key != "epoch"} == {float}


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_means_count_examples_and_the_end_of_the_data_ends_the_training(accumulation_steps):
    class Model(chainer.Chain):
        def __init__(self):
            super().__init__(classifier=make_model())

        def forward(self, x, t):
            first = float(x[0, 0])
            chainer.report({"first": first, "weighted": (first, 3 - 2 * first)}, self)
            return self.classifier(x, t)

    dataset = [(numpy.full(5, index < 32, "f"), t) for index, (_, t) in enumerate(make_dataset(40))]
    history = train_model(Model(), optimizers.SGD(0.0), serial(dataset, 32, repeat=False), None, accumulation_steps, 9)
    (entry,) = history
    assert entry["main/first"] == pytest.approx(32 / 40)
    assert entry["main/weighted"] == pytest.approx(1 / (1 + 3))
    assert entry.keys() >= {"epoch", "loss", "main/first", "main/classifier/loss"}


def test_a_loss_function_of_its_own_and_an_optimizer_that_is_set_up():
    models = [make_model(), make_model()]

    def loss_func(model):
        return lambda x, t: F.mean_squared_error(model.predictor(x), numpy.eye(3, dtype="f")[t])

    optimizer = optimizers.SGD(0.1).setup(models[0])
    history = train_model(models[0], optimizer, serial(make_dataset(48), 6), loss_func(models[0]), 2, 2, "@numpy")
    assert [entry.keys() for entry in history] == [{"epoch", "loss"}] * 2
    whole = optimizers.SGD(0.1).setup(models[1])
    x, t = chainer.dataset.concat_examples(make_dataset(48))
    for start in [0, 12, 24, 36] * 2:
        whole.update(loss_func(models[1]), x[start : start + 12], t[start : start + 12])
    assert_same_parameters(*models)


def test_the_trainer_is_ready_to_run(tmp_path, capsys):
    model = make_model()
    trainer = setup_trainer_with_accumulation(
        model, serial(make_dataset(48), 6), optimizers.SGD(0.1), None, {0: 2, 1: 4}, 2, "@numpy", out=tmp_path
    )
    assert type(trainer.updater) is AccumulatingUpdater
    trainer.run()
    log = json.loads((tmp_path / "log").read_text())
    assert [(entry["accumulation_steps"], entry["iteration"]) for entry in log] == [(2, 4), (4, 6)]
    assert log[0]["loss"] == pytest.approx(log[0]["main/loss"])
    assert {"loss", "main/loss", "main/accuracy", "effective_batch_size"} <= log[0].keys()
    trainer.get_extension("ProgressBar")
    capsys.readouterr()


@pytest.mark.parametrize("function", [train_model, setup_trainer_with_accumulation])
def test_bad_input_is_refused(function):
    def call(optimizer, steps=2, epochs=1, model=None, loss_func=None):
        model = make_model() if model is None else model
        iterator = serial(make_dataset(), 6)
        first, second = (optimizer, iterator) if function is train_model else (iterator, optimizer)
        function(model, first, second, loss_func, steps, epochs)

    with pytest.raises(
        ValueError, match="optimizer must be set up with the model, got one set up with a different Class"
    ):
        call(optimizers.SGD().setup(make_model()))
    with pytest.raises(ValueError, match="accumulation_steps must be an int of 1 or more, got 0"):
        call(optimizers.SGD(), steps=0)
    with pytest.raises(TypeError, match="num_epochs must be an int of 1 or more, got 1.5; give the number of epochs"):
        call(optimizers.SGD(), epochs=1.5)
    with pytest.raises(TypeError, match=r"optimizer must be an instance, got the class SGD; write SGD\(\)"):
        call(optimizers.SGD)
    with pytest.raises(TypeError, match="optimizer must have the method setup, got <chainer.iterators.* at .*; check"):
        call(serial(make_dataset(), 6))
    with pytest.raises(TypeError, match="loss_func must be callable, got 'mse'; pass a function, or None if the model"):
        call(optimizers.SGD(), loss_func="mse")


@pytest.mark.parametrize("accumulation_steps, size", [(5, 12), (9, 12), (3, 50)])
def test_there_is_an_entry_for_each_epoch_however_long_a_window_is(accumulation_steps, size):
    optimizer = optimizers.SGD(0.1)
    history = train_model(make_model(), optimizer, serial(make_dataset(size), 6), None, accumulation_steps, 6)
    last = len(history)
    assert last >= 6
    assert [entry["epoch"] for entry in history] == list(range(1, last + 1))
    assert optimizer.epoch == last
    assert all(set(entry) == {"epoch", "loss", "main/loss", "main/accuracy"} for entry in history)


def test_a_loss_function_without_the_model_is_an_error():
    with pytest.raises(RuntimeError, match="a loss must depend on the parameters of the optimizer's target"):
        iterator = serial([(x, numpy.int32(0)) for x, _ in make_dataset(12)], 6)
        train_model(make_model(), optimizers.SGD(0.1), iterator, F.softmax_cross_entropy, 2, 1)


def test_the_end_of_the_data_is_for_the_iterator_to_tell():
    def loss_func(x, t):
        return next(iter([]))

    with pytest.raises(RuntimeError, match="the loss function must not raise StopIteration, got it from"):
        train_model(make_model(), optimizers.SGD(0.1), serial(make_dataset(12), 6), loss_func, 2, 1)


def halve(batch, device=None):
    """Converter that halves the inputs."""
    x, t = chainer.dataset.concat_examples(batch, device)
    return x * 0.5, t


OPTIONS = {
    "micro_batch_size": ({"micro_batch_size": 5}, {}),
    "lockstep": ({"lockstep": "memory"}, {}),
    "loss_scale": ({"loss_scale": 8.0}, {}),
    "nonfinite": ({"nonfinite": "skip"}, {}),
    "converter": ({"converter": halve}, {"converter": halve}),
    "weight_func": ({"weight_func": len, "micro_batch_size": 7}, {}),
    "observation_rules": ({"observation_rules": {"main/loss": lambda values, weights: values[0]}}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_updater_are_taken(name, tmp_path, capsys):
    options, of_whole = OPTIONS[name]
    model, whole = make_model(), make_model()
    history = train_model(model, optimizers.SGD(0.1), serial(make_dataset(48), 12), None, 2, 2, **options)
    expected = make_updater(StandardUpdater, serial(make_dataset(48), 24), optimizers.SGD(0.1), whole, **of_whole)
    run(expected, 4)
    assert len(history) == 2
    assert_same_parameters(model, whole)
    model = make_model()
    iterator = serial(make_dataset(48), 12)
    trainer = setup_trainer_with_accumulation(model, iterator, optimizers.SGD(0.1), None, 2, 2, out=tmp_path, **options)
    trainer.run()
    capsys.readouterr()
    assert_same_parameters(model, whole)


def test_a_rule_says_what_the_history_has_of_an_epoch():
    rules = {"main/accuracy": lambda values, weights: float(len(values)), "loss": "max", "main/loss": "concat"}
    kwargs = {"observation_rules": rules, "micro_batch_size": 4}
    (entry,) = train_model(make_model(), optimizers.SGD(0.1), serial(make_dataset(48), 12), None, 2, 1, **kwargs)
    assert entry["main/accuracy"] == 6.0
    assert entry.keys() == {"epoch", "loss", "main/accuracy"}


@pytest.mark.parametrize("steps, options", [(0, {}), (2, {"nonfinite": "ignore"}), (2, {"micro_batch_size": 1.5})])
def test_an_optimizer_can_be_set_up_again_after_an_error(steps, options):
    optimizer = optimizers.SGD(0.1)
    with pytest.raises((ValueError, TypeError)):
        train_model(make_model(), optimizer, serial(make_dataset(), 6), None, steps, 1, **options)
    assert optimizer.target is None
    train_model(make_model(), optimizer, serial(make_dataset(), 6), None, 2, 1)
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        setup_trainer_with_accumulation(
            optimizer.target, serial(make_dataset(), 6), optimizer, None, 2, 1, nonfinite="ignore"
        )
    assert optimizer.target is not None


def test_the_sum_of_several_losses_is_reported_as_loss():
    loss, observation = chainer.Variable(numpy.ones((), "f")), {}
    with chainer.Reporter().scope(observation):
        for value, expected in ((loss, 1), ((loss, 2.0), 1), ([(loss, 2.0), (loss, 1.0), (loss, 0.0)], 2)):
            assert _report_loss(lambda value: value, value) is value
            assert float(observation.pop("loss").array) == expected
