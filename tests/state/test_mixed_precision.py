"""float16 and mixed16 train as they do with StandardUpdater, and a run that is resumed goes on as it would have."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, run, serial

Updater = chainer_accum.AccumulatingUpdater


def make_mixed(updater_class, dtype="mixed16", scaling=None, batch=16, make_optimizer=None, **kwargs):
    """Returns an updater that trains a float16 model with float32 updates."""
    rng = numpy.random.RandomState(0)
    with chainer.using_config("dtype", chainer.mixed16 if dtype == "mixed16" else numpy.dtype(dtype)):
        model = L.Classifier(
            chainer.Sequential(
                L.Linear(5, 8, initialW=rng.randn(8, 5) * 0.3),
                F.tanh,
                L.Linear(8, 3, initialW=rng.randn(3, 8) * 0.3),
            )
        )
    optimizer = (make_optimizer or chainer.optimizers.MomentumSGD)()
    optimizer.use_fp32_update()
    optimizer.setup(model)
    if scaling == "dynamic":
        optimizer.loss_scaling(interval=3)
    elif scaling:
        optimizer.loss_scaling(scale=scaling)
    data = [(x.astype(numpy.float16), t) for x, t in make_dataset(48)]
    return updater_class(serial(data, batch), optimizer, **kwargs)


def float32_parameters(updater):
    rules = [param.update_rule for _, param in sorted(updater.get_optimizer("main").target.namedparams())]
    return [rule._fp32_param.array for rule in rules]


# Rates with which parameters move by far more than the tolerance; and in float16, the usual eps of Adam is zero.
@pytest.mark.parametrize(
    "make_optimizer",
    [lambda: chainer.optimizers.MomentumSGD(0.1), lambda: chainer.optimizers.Adam(0.01, eps=1e-3)],
    ids=["MomentumSGD", "Adam"],
)
@pytest.mark.parametrize("scaling", [None, 128.0, "dynamic"])
@pytest.mark.parametrize("dtype", ["float16", "mixed16"])
def test_training_is_that_of_the_whole_batch_within_float16(dtype, scaling, make_optimizer):
    expected = make_mixed(StandardUpdater, dtype, scaling, make_optimizer=make_optimizer)
    updater = make_mixed(Updater, dtype, scaling, make_optimizer=make_optimizer, micro_batch_size=3)
    run(expected, 6)
    run(updater, 6)
    for actual, wanted in zip(float32_parameters(updater), float32_parameters(expected)):
        numpy.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-3)
    assert updater.get_optimizer("main")._loss_scale == expected.get_optimizer("main")._loss_scale


def test_gradients_that_float16_would_round_away_are_added_in_float32():
    with chainer.using_config("dtype", numpy.float16):
        model = L.Linear(1, 1, nobias=True, initialW=0)
    optimizer = chainer.optimizers.SGD(1.0)
    optimizer.use_fp32_update()
    optimizer.setup(model)
    with chainer_accum.accumulate(optimizer, loss_reduction="sum") as window:
        for _ in range(3000):  # from 2048 on, adding 1 in float16 changes nothing
            window.add(lambda: -F.sum(model(numpy.ones((1, 1), "e"))))
    assert model.W.dtype == numpy.float16 and float(model.W.array[0, 0]) == 3000


@pytest.mark.parametrize("kwargs", [{}, {"micro_batch_size": 3}])
@pytest.mark.parametrize("scaling", [None, 128.0, "dynamic"])
def test_a_resumed_run_is_the_run_itself(scaling, kwargs, tmp_path):
    expected = make_mixed(Updater, scaling=scaling, **kwargs)
    run(expected, 4)
    save_npz(tmp_path / "snapshot.npz", expected)
    run(expected, 4)
    updater = make_mixed(Updater, scaling=scaling, **kwargs)
    load_npz(tmp_path / "snapshot.npz", updater)
    run(updater, 4)
    assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, 0)
    assert_same_optimizer_state(updater.get_optimizer("main"), expected.get_optimizer("main"), 0)
    for actual, wanted in zip(float32_parameters(updater), float32_parameters(expected)):
        numpy.testing.assert_array_equal(actual, wanted)
    actual, wanted = updater.get_optimizer("main"), expected.get_optimizer("main")
    assert actual._loss_scale == wanted._loss_scale
    assert getattr(actual, "_loss_scaling_isnan_ever", None) == getattr(wanted, "_loss_scaling_isnan_ever", None)


def test_the_loss_scales_of_all_optimizers_are_in_a_snapshot(tmp_path):
    def make():
        by_name = {name: chainer.optimizers.SGD().setup(L.Classifier(L.Linear(5, 3))) for name in ("main", "other")}
        for optimizer in by_name.values():
            optimizer.loss_scaling()
        return Updater(serial(make_dataset(48), 16), by_name, micro_batch_size=3)

    saved, loaded = make(), make()
    for name, scale in (("main", 16.0), ("other", 32.0)):
        saved.get_optimizer(name)._loss_scale = scale
        saved.get_optimizer(name).t = 1  # before the first update, the scale is not saved
    saved.get_optimizer("other")._loss_scaling_isnan_ever = True  # after which the scale grows less often
    save_npz(tmp_path / "snapshot.npz", saved)
    load_npz(tmp_path / "snapshot.npz", loaded)
    for name in ("main", "other"):
        actual, expected = loaded.get_optimizer(name), saved.get_optimizer(name)
        assert actual._loss_scale == expected._loss_scale > 1
        assert actual._loss_scaling_isnan_ever == expected._loss_scaling_isnan_ever


def test_chainers_own_snapshots_can_be_loaded_and_ours_by_chainer(tmp_path):
    standard, ours = (make_mixed(cls, scaling="dynamic") for cls in (StandardUpdater, Updater))
    run(standard, 3)
    run(ours, 3)
    save_npz(tmp_path / "standard.npz", standard)
    save_npz(tmp_path / "ours.npz", ours)
    for path, saved, cls in (("standard.npz", standard, Updater), ("ours.npz", ours, StandardUpdater)):
        updater = make_mixed(cls, scaling="dynamic")
        load_npz(tmp_path / path, updater)
        assert updater.iteration == 3
        assert_same_parameters(updater.get_optimizer("main").target, saved.get_optimizer("main").target, 0)
        assert_same_optimizer_state(updater.get_optimizer("main"), saved.get_optimizer("main"), 0)
        run(updater, 1)
        assert updater.get_optimizer("main").t == 4


def test_float32_parameters_of_before_the_snapshot_are_not_used_with_it(tmp_path):
    standard = make_mixed(StandardUpdater)
    run(standard, 1)
    save_npz(tmp_path / "standard.npz", standard)
    updater = make_mixed(Updater, micro_batch_size=3)
    run(updater, 5)
    load_npz(tmp_path / "standard.npz", updater)
    run(updater, 1)
    run(standard, 1)
    for actual, wanted in zip(float32_parameters(updater), float32_parameters(standard)):
        numpy.testing.assert_allclose(actual, wanted, rtol=2e-3, atol=2e-3)


def test_the_accumulating_optimizer_keeps_them_too(tmp_path):
    def make():
        with chainer.using_config("dtype", numpy.float16):
            model = L.Linear(2, 1, nobias=True, initialW=0)
        optimizer = chainer.optimizers.SGD(1e-4)
        optimizer.use_fp32_update()
        optimizer.setup(model)
        optimizer.loss_scaling(interval=2)
        return chainer_accum.create_accumulating_optimizer(optimizer, 2)

    def train(optimizer):
        for _ in range(6):
            optimizer.update(lambda: F.sum(optimizer.target(numpy.ones((1, 2), "e"))))

    expected, actual = make(), make()
    train(expected)
    save_npz(tmp_path / "optimizer.npz", expected)
    save_npz(tmp_path / "model.npz", expected.target)
    load_npz(tmp_path / "model.npz", actual.target)
    load_npz(tmp_path / "optimizer.npz", actual)
    train(expected)
    train(actual)
    numpy.testing.assert_array_equal(
        actual.target.W.update_rule._fp32_param.array, expected.target.W.update_rule._fp32_param.array
    )
    assert actual._loss_scale == expected._loss_scale
