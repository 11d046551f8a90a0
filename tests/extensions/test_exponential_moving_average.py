"""The moving average is that of the parameters after each update, however the batch is split, and survives a resume."""

from __future__ import annotations

import copy
import signal

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.serializers import load_npz, save_npz
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import ExponentialMovingAverage
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import assert_same_parameters, make_dataset, make_model, make_updater, on_device, serial, slack, to_host


class Normalized(chainer.Chain):
    """A classifier with running averages, whose sizes are all found in the first pass."""

    def __init__(self, dtype=numpy.float32):
        super().__init__()
        initializer = chainer.initializers.LeCunNormal(dtype=dtype, rng=numpy.random.RandomState(0))
        zeros = chainer.initializers.Zero(dtype)
        with self.init_scope():
            self.first = L.Linear(None, 6, initialW=initializer, initial_bias=zeros)
            self.norm = L.BatchNormalization(axis=0, dtype=dtype)
            self.last = L.Linear(None, 3, initialW=initializer, initial_bias=zeros)

    def forward(self, x, t):
        h = F.tanh(self.norm(self.first(x.astype(self.last.b.dtype))))
        loss = F.softmax_cross_entropy(self.last(h), t)
        chainer.report({"loss": loss}, self)
        return loss


def link_with(parameter):
    """Returns a link whose only parameter is ``w``."""
    link = chainer.Link()
    with link.init_scope():
        link.w = parameter
    return link


MODELS = {
    "lazy": make_model,
    "normalized": Normalized,
    "float16": lambda: Normalized(numpy.float16),
    "float64": lambda: Normalized(numpy.float64),
}
WAYS = {
    "whole": (StandardUpdater, 12, {}),
    "gathered": (AccumulatingUpdater, 4, {"accumulation_steps": 3}),
    "split": (AccumulatingUpdater, 12, {"micro_batch_size": 5}),
}


def make_trainer(out, model, average, way="gathered", updates=7, **kwargs):
    """Returns a Trainer that averages, and a list to which each update adds the parameters in float64."""
    updater_class, batch_size, options = WAYS[way]
    iterator = serial(make_dataset(), batch_size)
    updater = make_updater(updater_class, iterator, optimizers.MomentumSGD(0.3), model, **{**options, **kwargs})
    trainer = Trainer(updater, (updates, "iteration"), out=str(out))
    if average is not None:
        trainer.extend(average)
    seen = []

    @chainer.training.make_extension(trigger=(1, "iteration"), priority=1000)
    def recorder(trainer):
        seen.append({name: to_host(param).astype("d") for name, param in model.namedparams()})

    trainer.extend(recorder, name="recorder")
    return trainer, seen


def averaged(seen, decay, has_warmup=False):
    """Returns the moving average of parameters, computed in float64."""
    mean = dict(seen[0])
    for number, params in enumerate(seen[1:], 1):
        weight = min(decay, (1 + number) / (10 + number)) if has_warmup else decay
        mean = {name: weight * mean[name] + (1 - weight) * params[name] for name in mean}
    return mean


def assert_is_average(model, expected, tolerance=1e-6):
    for name, param in model.namedparams():
        numpy.testing.assert_allclose(to_host(param), expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("has_warmup", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_average_is_that_of_the_parameters_after_each_update(name, has_warmup, way, tmp_path):
    model = MODELS[name]()
    average = ExponentialMovingAverage(model, 0.8, warmup=has_warmup)
    trainer, seen = make_trainer(tmp_path, model, average, way)
    trainer.run()
    assert average.num_updates == len(seen) == 7
    tolerance = slack({"float16": 1e-3, "float64": 1e-15}.get(name, 1e-6))
    assert_is_average(average.model, averaged(seen, 0.8, has_warmup), tolerance)
    for param, of_model in zip(average.model.params(), model.params()):
        assert param.dtype == of_model.dtype
    with pytest.raises(AssertionError):
        assert_is_average(average.model, seen[-1], tolerance)


@given(
    decay=st.floats(0, 1, exclude_max=True),
    has_warmup=st.booleans(),
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9),
)
def test_the_average_of_any_values_is_that_of_the_formula(decay, has_warmup, values):
    link = link_with(chainer.Parameter(numpy.array(0.0)))
    average = ExponentialMovingAverage(link, decay, warmup=has_warmup)
    for value in values:
        link.w.array[...] = value
        average(None)
    expected = averaged([{"/w": numpy.float64(value)} for value in values], decay, has_warmup)
    numpy.testing.assert_allclose(average.model.w.array, expected["/w"], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("way", ["gathered", "split"])
def test_one_effective_batch_is_one_step_of_the_average(way, tmp_path):
    models = []
    for each in ("whole", way):
        model = make_model()
        average = ExponentialMovingAverage(model, 0.9)
        trainer, _ = make_trainer(tmp_path, model, average, each)
        trainer.run()
        models.append(average.model)
    assert_same_parameters(*models)


def test_the_average_of_float16_moves_by_less_than_float16_can_tell():
    link = link_with(chainer.Parameter(numpy.zeros(3, "e")))
    average = ExponentialMovingAverage(link, 0.999)
    average(None)
    link.w.array[...] = 1
    for _ in range(2000):
        average(None)
    assert average.model.w.dtype == numpy.float16
    numpy.testing.assert_allclose(average.model.w.array, 1 - 0.999**2000, rtol=1e-3)


def test_a_shared_parameter_is_averaged_once():
    shared = L.Linear(2, 2)
    model = chainer.Chain(first=shared, second=chainer.Chain(again=shared), tied=link_with(shared.W))
    average = ExponentialMovingAverage(model, 0.5)
    for value in (1.0, 3.0):
        shared.W.array[...] = value
        average(None)
    assert average.model.first.W is average.model.second.again.W is average.model.tied.w
    numpy.testing.assert_array_equal(average.model.first.W.array, 2.0)


def test_persistent_values_are_copied():
    link = chainer.Link()
    for name, value in {"array": numpy.zeros(2), "number": 1, "late": None}.items():
        link.add_persistent(name, value)
    average = ExponentialMovingAverage(link)
    link.array += 1
    link.number, link.late = 2, numpy.ones(3)
    link.add_persistent("later", numpy.full(2, 4.0))
    average(None)
    link.array += 1  # which the copy does not follow
    values = {"array": [1, 1], "number": 2, "late": [1, 1, 1], "later": [4, 4]}
    for name, value in values.items():
        numpy.testing.assert_array_equal(getattr(average.model, name), value)
    assert average.model._persistent == set(values)


def test_a_parameter_that_gets_its_size_later_begins_its_average_then():
    model = chainer.Chain(early=L.Linear(1, 1), late=L.Linear(None, 1))
    average = ExponentialMovingAverage(model, 0.5)
    average(None)
    assert not average.model.late.W.is_initialized
    model.late.W.array = numpy.full((1, 2), 1, "f")
    for value in (1, 3):
        model.late.W.array[...] = value
        average(None)
    numpy.testing.assert_array_equal(average.model.late.W.array, [[2, 2]])


def test_training_is_the_same_with_the_average(tmp_path):
    models, draws = [], []
    for averages in (False, True):
        helpers.seed(0)
        model = Normalized()
        model.first.W.initializer = model.last.W.initializer = chainer.initializers.LeCunNormal()  # global generator
        trainer, _ = make_trainer(tmp_path, model, ExponentialMovingAverage(model) if averages else None)
        trainer.run()
        models.append(model)
        draws.append(numpy.random.rand())
    assert_same_parameters(*models, tolerance=0)
    assert draws[0] == draws[1]


def test_the_copy_has_neither_a_gradient_nor_an_update_rule_nor_a_graph():
    optimizer = optimizers.Adam().setup(make_model())
    optimizer.update(optimizer.target, *chainer.dataset.concat_examples(make_dataset(4)))
    rules = [param.update_rule for param in optimizer.target.params()]
    average = ExponentialMovingAverage(optimizer.target)
    assert all(param.update_rule is None and param.grad is None for param in average.model.params())
    assert average.model.loss.creator_node is None and optimizer.target.loss.creator_node is not None
    assert [param.update_rule for param in optimizer.target.params()] == rules and None not in rules
    assert all(param.grad is not None for param in optimizer.target.params())


def test_an_evaluator_of_the_same_iteration_sees_the_new_average(tmp_path):
    model = Normalized()
    average = ExponentialMovingAverage(model, 0.7)
    trainer, seen = make_trainer(tmp_path, model, None)
    evaluator = extensions.Evaluator(serial(make_dataset(20), 20, repeat=False), average.model, device=helpers.DEVICE)
    results = []

    @chainer.training.make_extension(trigger=(1, "iteration"), priority=200)
    def recorder(trainer):
        results.append(float(trainer.observation["average/main/loss"]))

    trainer.extend(evaluator, trigger=(1, "iteration"), name="average")
    trainer.extend(recorder, name="results")
    trainer.extend(average)
    trainer.run()
    expected = copy.deepcopy(model)  # with the running averages of the last update
    for name, param in expected.namedparams():
        param.array[...] = param.device.send(averaged(seen, 0.7)[name].astype("f"))
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        loss = float(expected(*helpers.to_device(make_dataset(20))).array)
    assert results[-1] == pytest.approx(loss, rel=slack(1e-5))
    assert len(set(results)) == 7


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loads", ["load_npz", "load_snapshot", "autoload"])
def test_a_resumed_average_is_the_uninterrupted_one(name, loads, tmp_path):
    def run(out, updates, loads=None):
        model = MODELS[name]()
        average = ExponentialMovingAverage(model, 0.8, warmup=True)
        trainer, _ = make_trainer(tmp_path / out, model, average, updates=updates)
        snapshot = extensions.snapshot(filename="{.updater.iteration}.npz", autoload=loads == "autoload")
        trainer.extend(snapshot, trigger=(4, "iteration"))
        path = str(tmp_path / out / "4.npz")
        if loads == "load_npz":
            load_npz(path, trainer)
        elif loads == "load_snapshot":
            chainer_accum.load_snapshot(path, trainer)
        trainer.run()
        return average

    uninterrupted = run("a", 7)
    run("b", 5)
    resumed = run("b", 7, loads)
    assert resumed.num_updates == uninterrupted.num_updates == 7
    assert_same_parameters(resumed.model, uninterrupted.model, tolerance=0)
    for link, expected in zip(resumed.model.links(), uninterrupted.model.links()):
        for persistent in expected._persistent:
            value, expected_value = (to_host(getattr(each, persistent)) for each in (link, expected))
            numpy.testing.assert_array_equal(value, expected_value)


@pytest.mark.parametrize("name", ["normalized", "float16"])
def test_the_averaged_model_can_be_loaded_by_itself(name, tmp_path):
    model = MODELS[name]()
    average = ExponentialMovingAverage(model, 0.8)
    trainer, _ = make_trainer(tmp_path, model, average)
    trainer.run()
    save_npz(str(tmp_path / "snapshot"), trainer)
    loaded = on_device(MODELS[name]())
    load_npz(str(tmp_path / "snapshot"), loaded, path="extensions/exponential_moving_average/model/")
    assert_same_parameters(loaded, average.model, tolerance=0)


def test_a_snapshot_without_the_average_is_loaded_only_if_that_is_asked_for(tmp_path):
    model = make_model()
    trainer, _ = make_trainer(tmp_path, model, None)
    trainer.run()
    path = str(tmp_path / "snapshot")
    save_npz(path, trainer)

    model = make_model()
    average = ExponentialMovingAverage(model, 0.8)
    trainer, seen = make_trainer(tmp_path, model, average, updates=9)
    with pytest.raises(KeyError, match="exponential_moving_average/num_updates"):
        load_npz(path, trainer)
    with pytest.raises(ValueError, match="is not a snapshot of this Trainer: .*exponential_moving_average/num_updates"):
        chainer_accum.load_snapshot(path, trainer)
    load_npz(path, trainer, strict=False)
    trainer.run()
    assert average.num_updates == len(seen) == 2
    assert_is_average(average.model, averaged(seen, 0.8), slack(1e-6))


class Interrupting:
    """A persistent value that is interrupted as it is copied."""

    is_armed = False

    def __deepcopy__(self, memo):
        if self.is_armed:
            signal.raise_signal(signal.SIGINT)
        return self


def test_an_interrupt_waits_until_all_parameters_have_been_averaged():
    model = chainer.Chain(first=L.Linear(2, 2), last=L.Linear(2, 2))
    model.add_persistent("value", Interrupting())
    average = ExponentialMovingAverage(model, 0.5)
    average(None)
    for param in model.params():
        param.array[...] = average.model.first.W.array[0, 0] + 2
    before = {name: param.array.copy() for name, param in average.model.namedparams()}
    expected = {name: (before[name] + param.array) / 2 for name, param in model.namedparams()}
    model.value.is_armed = True
    with pytest.raises(KeyboardInterrupt):
        average(None)
    assert average.num_updates == 2
    assert_is_average(average.model, expected)


class OtherDevice(type(chainer.get_device("@numpy"))):
    """The host under another name."""

    name = "other"

    def __eq__(self, other):
        return isinstance(other, OtherDevice)

    def __ne__(self, other):
        return not self == other

    __hash__ = None


@pytest.mark.parametrize("dtype", ["e", "f"])
def test_the_average_follows_the_model_to_its_device(dtype):
    model = chainer.Chain(first=link_with(chainer.Parameter(numpy.ones(2, dtype))))
    average = ExponentialMovingAverage(model, 0.5)
    average(None)
    model.to_device(OtherDevice())
    model.first.w.array[...] = 3
    average(None)
    assert all(isinstance(link.device, OtherDevice) for link in average.model.links())
    numpy.testing.assert_array_equal(average.model.first.w.array, 2)


def test_a_layer_that_comes_later_is_an_error():
    model = chainer.Chain(first=L.Linear(2, 2))
    average = ExponentialMovingAverage(model)
    model.add_link("second", L.Linear(2, 2))
    message = r"target must keep the parameters .* a difference in \['/second/W', '/second/b'\]; create the extension"
    with pytest.raises(RuntimeError, match=message):
        average(None)
    assert average.num_updates == 0
