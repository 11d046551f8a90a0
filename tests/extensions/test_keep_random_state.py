"""With KeepRandomState, a run that shuffles and drops out is, resumed, the run that it would have been."""

from __future__ import annotations

import random

import chainer_accum
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.iterators import SerialIterator
from chainer.serializers import load_npz, save_npz
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import KeepRandomState

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, make_model, make_updater, seed


@pytest.fixture(autouse=True)
def _without_cudnn():
    """Lets CuPy draw for dropout: cuDNN has a generator of its own, whose state is not kept."""
    with chainer.using_config("use_cudnn", "never"):
        yield


def make_trainer(out, updater_class=chainer_accum.AccumulatingUpdater, keeps=True, autoload=False, updates=9, **kwargs):
    model = make_model()
    model.predictor.insert(2, F.dropout)
    iterator = SerialIterator(make_dataset(30), 12)  # shuffled with NumPy's global generator
    updater = make_updater(updater_class, iterator, chainer.optimizers.Adam(), model, **kwargs)
    trainer = Trainer(updater, (updates, "iteration"), out=str(out))
    trainer.extend(
        extensions.snapshot(filename="{.updater.iteration}.npz", autoload=autoload), trigger=(4, "iteration")
    )
    trainer.extend(extensions.LogReport(trigger=(1, "iteration")))
    if keeps:
        trainer.extend(KeepRandomState())
    return trainer


WAYS = {
    "StandardUpdater": {"updater_class": StandardUpdater},
    "gathered": {"accumulation_steps": 2},
    "split": {"micro_batch_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("autoload", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(way, autoload, tmp_path):
    seed(3)
    uninterrupted = make_trainer(tmp_path / "a", **WAYS[way])
    uninterrupted.run()
    seed(3)
    make_trainer(tmp_path / "b", **WAYS[way], updates=6).run()
    seed(99)
    resumed = make_trainer(tmp_path / "b", autoload=autoload, **WAYS[way])
    if not autoload:
        load_npz(str(tmp_path / "b" / "4.npz"), resumed)
        numpy.random.rand(5)  # drawn while the rest is set up
    resumed.run()
    actual, expected = (trainer.updater.get_optimizer("main") for trainer in (resumed, uninterrupted))
    assert_same_parameters(actual.target, expected.target, 0)
    assert_same_optimizer_state(actual, expected, 0)
    losses = [
        [entry["main/loss"] for entry in trainer.get_extension("LogReport").log] for trainer in (resumed, uninterrupted)
    ]
    assert losses[0] == losses[1]


def test_without_it_the_resumed_run_is_another(tmp_path):
    seed(3)
    uninterrupted = make_trainer(tmp_path, keeps=False)
    uninterrupted.run()
    resumed = make_trainer(tmp_path, keeps=False)
    load_npz(str(tmp_path / "4.npz"), resumed)
    resumed.run()
    with pytest.raises(AssertionError):
        assert_same_parameters(
            resumed.updater.get_optimizer("main").target, uninterrupted.updater.get_optimizer("main").target
        )


def test_snapshots_without_it_can_be_loaded_and_leave_the_generators_alone(tmp_path):
    make_trainer(tmp_path, keeps=False, updates=4).run()
    trainer = make_trainer(tmp_path, updates=4)
    load_npz(str(tmp_path / "4.npz"), trainer)
    state = random.getstate(), numpy.random.get_state()[1].tolist()
    trainer.run()
    assert state == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_a_snapshot_without_it_replaces_the_state_that_was_loaded_before(tmp_path):
    make_trainer(tmp_path / "with", updates=4).run()
    make_trainer(tmp_path / "without", keeps=False, updates=4).run()
    trainer = make_trainer(tmp_path, updates=4)
    load_npz(str(tmp_path / "with" / "4.npz"), trainer)
    load_npz(str(tmp_path / "without" / "4.npz"), trainer)
    state = numpy.random.get_state()[1].tolist()
    trainer.run()
    assert numpy.random.get_state()[1].tolist() == state


def test_a_state_that_was_loaded_is_restored_once(tmp_path):
    make_trainer(tmp_path, updates=4).run()
    trainer = make_trainer(tmp_path, updates=4)
    load_npz(str(tmp_path / "4.npz"), trainer)
    extension = trainer.get_extension("keep_random_state")
    drawn = []
    for _ in range(2):
        extension.initialize(trainer)
        drawn.append(numpy.random.rand())
    assert drawn[0] != drawn[1]


def test_to_load_alone_changes_no_generator(tmp_path):
    make_trainer(tmp_path, updates=4).run()
    trainer = make_trainer(tmp_path)
    state = numpy.random.get_state()[1].tolist()
    load_npz(str(tmp_path / "4.npz"), trainer)
    assert numpy.random.get_state()[1].tolist() == state


def test_a_trainer_that_has_not_run_saves_no_state(tmp_path):
    extension = KeepRandomState()
    save_npz(str(tmp_path / "extension.npz"), extension)
    with numpy.load(str(tmp_path / "extension.npz")) as saved:
        assert saved.files == []


def test_a_state_that_was_loaded_and_not_used_yet_is_saved_again(tmp_path):
    make_trainer(tmp_path, updates=4).run()
    trainer = make_trainer(tmp_path)
    load_npz(str(tmp_path / "4.npz"), trainer)
    save_npz(str(tmp_path / "extension.npz"), trainer.get_extension("keep_random_state"))
    with numpy.load(str(tmp_path / "4.npz"), allow_pickle=True) as loaded:
        expected = loaded["extensions/keep_random_state/state"]
    with numpy.load(str(tmp_path / "extension.npz")) as saved:
        numpy.testing.assert_array_equal(saved["state"], expected)
