"""A snapshot that is damaged, truncated or of something else is an error, and leaves the trainer as it was."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import zipfile
from typing import Any, Callable, Dict

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.iterators import SerialIterator
from chainer.serializers import DictionarySerializer, load_npz, save_npz
from chainer.training import Trainer, extensions

from helpers import make_dataset

# Since neither trainer is the one whose snapshot it is, to have loaded a part of it would show.
every_trainer = pytest.mark.parametrize("updates", [0, 3], ids=["fresh", "under way"])


def make_trainer(
    out: pathlib.Path,
    updates: int,
    *,
    size: int = 30,
    n_units: int = 8,
    optimizer: Callable[[], Any] = lambda: chainer.optimizers.Adam(amsgrad=True),
    shift: bool = False,
    statistics: bool = True,
) -> Trainer:
    """Returns a Trainer that has run for some updates and would go on."""
    numpy.random.seed(updates)
    normalization = L.BatchNormalization(n_units) if statistics else F.tanh
    model = L.Classifier(chainer.Sequential(L.Linear(None, n_units), normalization, F.dropout, L.Linear(n_units, 3)))
    updater = chainer_accum.AccumulatingUpdater(
        SerialIterator(make_dataset(size), 6), optimizer().setup(model), accumulation_steps=2, micro_batch_size=4
    )
    trainer = Trainer(updater, (max(updates, 1), "iteration"), out=str(out))
    trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
    trainer.extend(chainer_accum.extensions.KeepRandomState())
    trainer.extend(chainer_accum.extensions.ExampleMean("main/loss"))
    if shift:
        trainer.extend(extensions.ExponentialShift("alpha", 0.9))
    if updates:
        trainer.run()
    return trainer


def state_of(trainer: Trainer) -> Dict[str, Any]:
    """Returns copies of all that a snapshot holds, but for the time and what is drawn as it is taken."""
    serializer = DictionarySerializer()
    trainer.updater.serialize(serializer["updater"])
    trainer.get_extension("example_mean:main/loss").serialize(serializer["example_mean"])
    state = {name: numpy.copy(value) for name, value in serializer.target.items()}
    log = [{**entry, "elapsed_time": 0} for entry in trainer.get_extension("LogReport").log]
    return {**state, "log": numpy.array(json.dumps(log))}


def is_same(actual: Dict[str, Any], expected: Dict[str, Any]) -> bool:
    return actual.keys() == expected.keys() and all(
        numpy.array_equal(actual[name], value) for name, value in expected.items()
    )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> bytes:
    """The snapshot of a run of five updates."""
    path = tmp_path_factory.mktemp("sound") / "snapshot"
    trainer = make_trainer(path.parent, 5)
    with open(str(path), "wb") as file:
        save_npz(file, trainer)
    return path.read_bytes()


@pytest.fixture(scope="module")
def values(snapshot) -> Dict[str, numpy.ndarray]:
    with numpy.load(io.BytesIO(snapshot), allow_pickle=True) as npz:
        return {name: npz[name] for name in npz.files}


def assert_refused(path: pathlib.Path, trainer: Trainer, message: str) -> None:
    before, random_state = state_of(trainer), numpy.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match=message):
        chainer_accum.load_snapshot(path, trainer)
    assert is_same(state_of(trainer), before)
    assert numpy.random.get_state()[1].tolist() == random_state


CANNOT_BE_READ = "cannot be read as a snapshot, .*; it may be truncated or damaged, so load an earlier one$"
IS_OF_SOMETHING_ELSE = (
    "is not a snapshot of this Trainer: .*; create model, optimizer and extensions as they were when it was taken$"
)


@every_trainer
def test_a_truncated_snapshot_is_refused(updates, snapshot, tmp_path, record_property):
    trainer = make_trainer(tmp_path, updates)
    lengths = numpy.random.RandomState(0).randint(len(snapshot), size=30)
    for length in [0, 1, len(snapshot) - 1, *lengths]:
        (tmp_path / "truncated").write_bytes(snapshot[:length])
        assert_refused(tmp_path / "truncated", trainer, CANNOT_BE_READ)
        record_property("damaged snapshots", 1)


@every_trainer
def test_a_snapshot_with_bytes_that_are_wrong_is_refused_unless_they_mean_nothing(
    updates, snapshot, tmp_path, record_property
):
    random = numpy.random.RandomState(1)
    trainer = make_trainer(tmp_path, updates)
    loaded = make_trainer(tmp_path, 0)
    load_npz(io.BytesIO(snapshot), loaded)
    before, after = state_of(trainer), state_of(loaded)
    refused = 0
    for number in range(60):
        content = bytearray(snapshot)
        length = [1, 16, 512][number % 3]
        start = random.randint(len(content) - length)
        content[start : start + length] = [byte ^ random.randint(1, 256) for byte in content[start : start + length]]
        (tmp_path / "damaged").write_bytes(bytes(content))
        try:
            chainer_accum.load_snapshot(tmp_path / "damaged", trainer)
        except ValueError:
            refused += 1
            assert is_same(state_of(trainer), before), (start, length)
        else:  # the time of a file in the archive, for example
            assert is_same(state_of(trainer), after), (start, length)
            trainer = make_trainer(tmp_path, updates)
        record_property("damaged snapshots", 1)
    assert refused > 40


@every_trainer
def test_a_snapshot_that_lacks_a_value_is_refused_unless_standard_updater_has_it_not_either(
    updates, values, tmp_path, record_property
):
    trainer = make_trainer(tmp_path, updates)
    optional = {"updater/previous_epoch_detail", "updater/is_new_epoch", "extensions/keep_random_state/state"}
    optional.add("updater/iterator:main/previous_epoch_detail")  # which Chainer works out
    for name in sorted(values):
        rest = {other: value for other, value in values.items() if other != name}
        numpy.savez(str(tmp_path / "lacking.npz"), **rest)
        if name in optional:
            chainer_accum.load_snapshot(tmp_path / "lacking.npz", make_trainer(tmp_path, updates))
        else:
            assert_refused(tmp_path / "lacking.npz", trainer, IS_OF_SOMETHING_ELSE)
            record_property("damaged snapshots", 1)


def test_a_snapshot_with_arrays_of_another_shape_is_refused(values, tmp_path, record_property):
    trainer = make_trainer(tmp_path, 3)  # a fresh one has parameters without a shape, which take any
    for name, value in sorted(values.items()):
        if value.ndim == 0 or name == "extensions/keep_random_state/state":
            continue
        numpy.savez(str(tmp_path / "other.npz"), **{**values, name: value[..., :-1]})
        assert_refused(tmp_path / "other.npz", trainer, IS_OF_SOMETHING_ELSE)
        record_property("damaged snapshots", 1)


FOREIGN: Dict[str, Dict[str, Any]] = {
    "a wider model": {"n_units": 9},
    "a model without batch normalization": {"statistics": False},
    "an optimizer without state": {"optimizer": chainer.optimizers.SGD},
    "an optimizer with other state": {"optimizer": chainer.optimizers.MomentumSGD},
    "an optimizer with less state": {"optimizer": chainer.optimizers.Adam},
    "a larger dataset": {"size": 31},
}


@every_trainer
@pytest.mark.parametrize("name", FOREIGN)
def test_a_snapshot_of_another_training_is_refused(name, updates, tmp_path, record_property):
    save_npz(str(tmp_path / "foreign.npz"), make_trainer(tmp_path, 5, **FOREIGN[name]))
    assert_refused(tmp_path / "foreign.npz", make_trainer(tmp_path, updates), IS_OF_SOMETHING_ELSE)
    record_property("damaged snapshots", 1)


@every_trainer
def test_a_snapshot_without_an_extension_that_the_trainer_has_is_refused(updates, snapshot, tmp_path, record_property):
    (tmp_path / "snapshot").write_bytes(snapshot)
    trainer = make_trainer(tmp_path, updates, shift=True)
    alpha = trainer.updater.get_optimizer("main").alpha
    assert_refused(tmp_path / "snapshot", trainer, IS_OF_SOMETHING_ELSE)
    assert trainer.updater.get_optimizer("main").alpha == alpha
    record_property("damaged snapshots", 1)


def test_a_trainer_that_was_given_a_snapshot_and_refuses_another_keeps_the_random_state_of_the_first(
    snapshot, values, tmp_path, record_property
):
    (tmp_path / "sound").write_bytes(snapshot)
    numpy.savez(str(tmp_path / "lacking.npz"), **{name: value for name, value in values.items() if "epoch" not in name})
    drawn = []
    for is_given_another in (False, True):
        trainer = make_trainer(tmp_path, 0)
        chainer_accum.load_snapshot(tmp_path / "sound", trainer)
        if is_given_another:
            assert_refused(tmp_path / "lacking.npz", trainer, IS_OF_SOMETHING_ELSE)
            record_property("damaged snapshots", 1)
        trainer.run()
        drawn.append(numpy.random.rand())
    assert drawn[0] == drawn[1]


@every_trainer
@pytest.mark.parametrize("part", ["model", "optimizer", "updater"])
def test_a_snapshot_of_a_part_of_the_trainer_is_refused(part, updates, tmp_path, record_property):
    updater = make_trainer(tmp_path, 5).updater
    optimizer = updater.get_optimizer("main")
    parts = {"model": optimizer.target, "optimizer": optimizer, "updater": updater}
    save_npz(str(tmp_path / "part.npz"), parts[part])
    assert_refused(tmp_path / "part.npz", make_trainer(tmp_path, updates), IS_OF_SOMETHING_ELSE)
    record_property("damaged snapshots", 1)


def write_array(path: pathlib.Path) -> None:
    with open(str(path), "wb") as file:
        numpy.save(file, numpy.zeros(3))


def write_archive_of_text(path: pathlib.Path) -> None:
    with zipfile.ZipFile(str(path), "w") as archive:
        archive.writestr("readme.txt", "no array")


NO_SNAPSHOTS: Dict[str, Callable[[pathlib.Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "text": lambda path: path.write_text("epoch: 5\n"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"epoch": 5})),
    "one array": write_array,
}


@every_trainer
@pytest.mark.parametrize("name", NO_SNAPSHOTS)
def test_what_is_no_snapshot_is_refused(name, updates, tmp_path, record_property):
    NO_SNAPSHOTS[name](tmp_path / "other")
    assert_refused(tmp_path / "other", make_trainer(tmp_path, updates), CANNOT_BE_READ)
    record_property("damaged snapshots", 1)


@every_trainer
def test_an_archive_of_other_things_is_refused(updates, tmp_path, record_property):
    trainer = make_trainer(tmp_path, updates)
    write_archive_of_text(tmp_path / "text.zip")
    numpy.savez(str(tmp_path / "arrays.npz"), x=numpy.zeros(3))
    numpy.savez(str(tmp_path / "nothing.npz"))
    for name in ("text.zip", "arrays.npz", "nothing.npz"):
        assert_refused(tmp_path / name, trainer, IS_OF_SOMETHING_ELSE)
        record_property("damaged snapshots", 1)
