"""Snapshots load both ways between StandardUpdater and AccumulatingUpdater, and resumed runs go on as they were."""

from __future__ import annotations

import json
import pathlib
import zipfile
from typing import Any, Dict, List, NamedTuple

import chainer_accum
import chainer
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, load_snapshot
from chainer.iterators import SerialIterator
from chainer.serializers import DictionarySerializer, load_npz, save_npz
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

from helpers import (
    BOOKKEEPING,
    assert_same_optimizer_state,
    assert_same_parameters,
    make_dataset,
    make_model,
    make_updater,
)

EFFECTIVE_BATCH = 14
LAST_ITERATION = 9
# What of the bookkeeping StandardUpdater can know of a window that was gathered: the rest, its iterator overwrote.
KNOWN_TO_ALL = ("iteration", "epoch", "epoch_detail", "optimizer.t", "optimizer.epoch")


class Moment(NamedTuple):
    """When to take a snapshot: after which iteration, with how many examples in an epoch."""

    size: int
    iteration: int


MOMENTS = {
    "in the middle of an epoch": Moment(45, 2),
    "after a window in which an epoch ended": Moment(45, 4),  # with its first batch, if it was gathered
    "at the end of an epoch": Moment(42, 3),
}
WAYS = ("whole", "gathered", "split")
every_moment = pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
every_window = pytest.mark.parametrize("way", WAYS[1:])


def shuffled(order: numpy.ndarray, position: int) -> numpy.ndarray:
    """Returns the order of the next epoch, which depends on nothing but the last one, as that is in the snapshot."""
    return numpy.random.RandomState(order[0]).permutation(order)


def make_trainer(way: str, size: int, out: pathlib.Path, stop: int = LAST_ITERATION) -> Trainer:
    """Returns a Trainer on a shuffled dataset with an optimizer that has a state, and a log."""
    batch_size = EFFECTIVE_BATCH // 2 if way == "gathered" else EFFECTIVE_BATCH
    iterator = SerialIterator(make_dataset(size), batch_size, order_sampler=shuffled)
    optimizer = chainer.optimizers.Adam(0.01, eps=1e-4)
    if way == "whole":
        updater = make_updater(StandardUpdater, iterator, optimizer)
    else:
        arguments = {"gathered": {"accumulation_steps": 2}, "split": {"micro_batch_size": 5}}[way]
        updater = make_updater(AccumulatingUpdater, iterator, optimizer, **arguments)
    trainer = Trainer(updater, (stop, "iteration"), out=str(out))
    trainer.extend(extensions.LogReport())
    return trainer


def bookkeeping_of(trainer: Trainer) -> Dict[str, Any]:
    optimizer = trainer.updater.get_optimizer("main")
    bookkeeping = {name: getattr(trainer.updater, name) for name in BOOKKEEPING}
    return {**bookkeeping, "optimizer.t": optimizer.t, "optimizer.epoch": optimizer.epoch}


def log_of(trainer: Trainer) -> List[Dict[str, float]]:
    """Returns the log without what no two runs have in common."""
    log = [dict(entry) for entry in trainer.get_extension("LogReport").log]
    for entry in log:
        del entry["elapsed_time"]
    return log


class Uninterrupted(NamedTuple):
    """A run to the end, and its bookkeeping as the snapshot was taken on the way."""

    trainer: Trainer
    bookkeeping: Dict[str, Any]


def run_through(way: str, moment: Moment, snapshot: pathlib.Path) -> Uninterrupted:
    """Runs to the end, and takes the snapshot on the way."""
    trainer = make_trainer(way, moment.size, snapshot.parent / "out")
    bookkeeping: Dict[str, Any] = {}

    def take_snapshot(trainer: Trainer) -> None:
        chainer.serializers.save_npz(str(snapshot), trainer)
        bookkeeping.update(bookkeeping_of(trainer))

    trainer.extend(take_snapshot, trigger=lambda trainer: trainer.updater.iteration == moment.iteration, priority=0)
    trainer.run()
    assert bookkeeping["iteration"] == moment.iteration
    return Uninterrupted(trainer, bookkeeping)


def load(snapshot: Any, trainer: Trainer, strict: bool = True) -> Trainer:
    chainer.serializers.load_npz(str(snapshot), trainer, strict=strict)
    return trainer


def assert_same_end(actual: Trainer, expected: Trainer, tolerance: float) -> None:
    """Asserts that two runs came to the same end, the log included."""
    optimizers = [trainer.updater.get_optimizer("main") for trainer in (actual, expected)]
    assert actual.updater.iteration == LAST_ITERATION
    assert bookkeeping_of(actual) == bookkeeping_of(expected)
    assert_same_parameters(*[optimizer.target for optimizer in optimizers], tolerance=tolerance)
    assert_same_optimizer_state(*optimizers, tolerance=tolerance)
    assert len(log_of(actual)) == len(log_of(expected)) >= 2
    for entry, expected_entry in zip(log_of(actual), log_of(expected)):
        assert entry == pytest.approx(expected_entry, rel=tolerance, abs=tolerance)


@every_moment
@every_window
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(way: str, moment: Moment, tmp_path: pathlib.Path) -> None:
    snapshot = tmp_path / "snapshot"
    uninterrupted = run_through(way, moment, snapshot)
    resumed = load(snapshot, make_trainer(way, moment.size, tmp_path))
    assert bookkeeping_of(resumed) == uninterrupted.bookkeeping
    resumed.run()
    assert_same_end(resumed, uninterrupted.trainer, tolerance=0)


@every_moment
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [(saved, loaded) for saved in WAYS for loaded in WAYS if saved != loaded]
)
def test_snapshots_load_both_ways(saved_by: str, loaded_by: str, moment: Moment, tmp_path: pathlib.Path) -> None:
    uninterrupted = run_through("whole", moment, tmp_path / "whole")
    if saved_by != "whole":
        run_through(saved_by, moment, tmp_path / saved_by)
    resumed = load(tmp_path / saved_by, make_trainer(loaded_by, moment.size, tmp_path))
    known = KNOWN_TO_ALL if (saved_by, loaded_by) == ("gathered", "whole") else uninterrupted.bookkeeping
    bookkeeping = bookkeeping_of(resumed)
    assert {name: bookkeeping[name] for name in known} == {name: uninterrupted.bookkeeping[name] for name in known}
    resumed.run()
    assert_same_end(resumed, uninterrupted.trainer, tolerance=1e-6)


@every_moment
@every_window
@pytest.mark.parametrize("saved_by", ["whole", "gathered"])
def test_snapshots_load_when_not_strict(saved_by: str, way: str, moment: Moment, tmp_path: pathlib.Path) -> None:
    snapshot = tmp_path / "snapshot"
    uninterrupted = run_through(saved_by, moment, snapshot)
    resumed = load(snapshot, make_trainer(way, moment.size, tmp_path), strict=False)
    assert bookkeeping_of(resumed) == uninterrupted.bookkeeping
    resumed.run()
    assert_same_end(resumed, uninterrupted.trainer, tolerance=1e-6)


@every_moment
@every_window
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("saved_by", ["whole", "gathered"])
def test_a_snapshot_replaces_what_an_updater_knew(
    saved_by: str, strict: bool, way: str, moment: Moment, tmp_path: pathlib.Path
) -> None:
    uninterrupted = run_through(saved_by, moment, tmp_path / "snapshot")
    trainer = make_trainer(way, moment.size, tmp_path)
    for _ in range(7):
        trainer.updater.update()
    load(tmp_path / "snapshot", trainer, strict=strict)
    assert bookkeeping_of(trainer) == uninterrupted.bookkeeping


@every_window
def test_a_snapshot_has_what_that_of_standard_updater_has(way: str, tmp_path: pathlib.Path) -> None:
    keys = {}
    for name in ("whole", way):
        run_through(name, MOMENTS["in the middle of an epoch"], tmp_path / name)
        with numpy.load(str(tmp_path / name), allow_pickle=True) as snapshot:
            keys[name] = set(snapshot.files)
    assert keys[way] - keys["whole"] == {"updater/previous_epoch_detail", "updater/is_new_epoch"}
    assert keys["whole"] < keys[way]


@every_window
def test_the_snapshot_extension_resumes_a_run_by_itself(way: str, tmp_path: pathlib.Path) -> None:
    moment = MOMENTS["after a window in which an epoch ended"]
    uninterrupted = run_through(way, moment, tmp_path / "snapshot")
    iterations: List[int] = []
    for stop in (moment.iteration, LAST_ITERATION):
        trainer = make_trainer(way, moment.size, tmp_path, stop)
        trainer.extend(extensions.snapshot(autoload=True), trigger=(moment.iteration, "iteration"))
        iterations.clear()
        trainer.extend(lambda trainer: iterations.append(trainer.updater.iteration), name="note the iteration")
        trainer.run()
    assert iterations == [5, 6, 7, 8, 9]  # of the second run
    assert_same_end(trainer, uninterrupted.trainer, tolerance=0)


@every_window
def test_an_updater_saved_before_the_first_update_is_loaded_as_a_new_one(way: str, tmp_path: pathlib.Path) -> None:
    saved, loaded = (make_trainer(way, 45, tmp_path) for _ in range(2))
    chainer.serializers.save_npz(str(tmp_path / "snapshot"), saved.updater)
    # Not strict, as Adam asks for moments that it does not save before it has any.
    chainer.serializers.load_npz(str(tmp_path / "snapshot"), loaded.updater, strict=False)
    assert bookkeeping_of(loaded) == bookkeeping_of(saved)
    assert loaded.updater.previous_epoch_detail is None


@pytest.mark.parametrize("kwargs", [{}, {"accumulation_steps": 2}, {"micro_batch_size": 5}])
def test_before_its_first_update_an_updater_saves_what_standard_updater_does(kwargs: Dict[str, Any]) -> None:
    saved = []
    for updater_class, arguments in ((StandardUpdater, {}), (AccumulatingUpdater, kwargs)):
        iterator = SerialIterator(make_dataset(), 10, order_sampler=shuffled)
        updater = make_updater(updater_class, iterator, chainer.optimizers.Adam(), **arguments)
        serializer = DictionarySerializer()
        updater.serialize(serializer)
        saved.append(serializer.target)
    expected, actual = saved
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        numpy.testing.assert_array_equal(actual[name], value, err_msg=name)


@every_window
def test_an_updater_that_loads_one_that_has_not_updated_forgets_its_window(way: str, tmp_path: pathlib.Path) -> None:
    saved, loaded = (make_trainer(way, 45, tmp_path, stop=4) for _ in range(2))
    chainer.serializers.save_npz(str(tmp_path / "snapshot"), saved.updater)
    loaded.run()
    assert loaded.updater.previous_epoch_detail is not None
    chainer.serializers.load_npz(str(tmp_path / "snapshot"), loaded.updater, strict=False)
    assert bookkeeping_of(loaded) == bookkeeping_of(saved)


def state_of(trainer: Trainer) -> Dict[str, numpy.ndarray]:
    """Returns copies of all that a snapshot holds, but for the time."""
    serializer = DictionarySerializer()
    trainer.updater.serialize(serializer["updater"])
    state = {name: numpy.copy(value) for name, value in serializer.target.items()}
    state["log"] = numpy.array(json.dumps(trainer.get_extension("LogReport").log))
    return state


def assert_unchanged(trainer: Trainer, before: Dict[str, numpy.ndarray]) -> None:
    after = state_of(trainer)
    assert after.keys() == before.keys()
    for name, value in before.items():
        numpy.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.fixture(params=["fresh", "under way"])
def trainer(request, tmp_path):
    """A Trainer with lazily initialised parameters, before its first update or after some."""
    trainer = make_trainer("split", 45, tmp_path, stop=3)
    trainer.extend(chainer_accum.extensions.KeepRandomState())
    if request.param == "under way":
        trainer.run()
    return trainer


def snapshot_of(way: str, out: pathlib.Path, **kwargs: Any) -> pathlib.Path:
    trainer = make_trainer(way, 45, out, stop=5)
    trainer.extend(chainer_accum.extensions.KeepRandomState())
    for name, extension in kwargs.items():
        trainer.extend(extension, name=name)
    trainer.run()
    save_npz(str(out / "snapshot.npz"), trainer)
    return out / "snapshot.npz"


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_snapshot_is_loaded_as_by_load_npz(way, trainer, tmp_path):
    path = snapshot_of(way, tmp_path)
    expected = make_trainer("split", 45, tmp_path)
    expected.extend(chainer_accum.extensions.KeepRandomState())
    load_npz(str(path), expected)
    load_snapshot(path, trainer)
    assert_unchanged(trainer, state_of(expected))


def test_a_model_and_an_optimizer_can_be_loaded_by_themselves(tmp_path):
    trainer = make_trainer("split", 45, tmp_path, stop=5)
    trainer.run()
    optimizer = trainer.updater.get_optimizer("main")
    fresh = make_trainer("split", 45, tmp_path).updater.get_optimizer("main")
    for name, source, target in (("model", optimizer.target, fresh.target), ("optimizer", optimizer, fresh)):
        save_npz(str(tmp_path / f"{name}.npz"), source)
        load_snapshot(str(tmp_path / f"{name}.npz"), target)
    assert_same_parameters(fresh.target, optimizer.target, 0)
    assert_same_optimizer_state(fresh, optimizer, 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_snapshot_changes_nothing(share, trainer, tmp_path):
    path = snapshot_of("split", tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    before = state_of(trainer)
    with pytest.raises(ValueError, match="cannot be read as a snapshot, .*; it may be truncated or damaged"):
        load_snapshot(path, trainer)
    assert_unchanged(trainer, before)


def test_a_snapshot_with_a_wrong_byte_changes_nothing(trainer, tmp_path):
    path = snapshot_of("split", tmp_path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(str(path)) as archive:
        info = archive.getinfo("updater/model:main/predictor/0/W.npy")
    content[info.header_offset + 100 + info.compress_size // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    before = state_of(trainer)
    with pytest.raises(ValueError, match="cannot be read as a snapshot"):
        load_snapshot(path, trainer)
    assert_unchanged(trainer, before)


def assert_refused(path: pathlib.Path, trainer: Trainer, reason: str) -> None:
    before = state_of(trainer)
    with pytest.raises(ValueError, match=f"{path.name} is not a snapshot of this Trainer: .*{reason}"):
        load_snapshot(path, trainer)
    assert_unchanged(trainer, before)


def test_a_snapshot_of_something_else_changes_nothing(trainer, tmp_path):
    numpy.savez(str(tmp_path / "other.npz"), something=numpy.zeros(3))
    assert_refused(tmp_path / "other.npz", trainer, "it has no updater/iterator:main/current_position")


@pytest.mark.parametrize(
    "array, reason",
    [
        (numpy.zeros((8, 6), "f"), r"W is float32 of shape \(8, 6\), not float32 of \(8, 5\)"),
        (numpy.zeros((8, 5), "F"), r"W is complex64 of shape \(8, 5\), not float32 of \(8, 5\)"),
    ],
    ids=["shape", "dtype"],
)
def test_a_snapshot_with_an_array_that_does_not_fit_changes_nothing(array, reason, tmp_path):
    trainer = make_trainer("split", 45, tmp_path, stop=3)  # one that has run: a parameter without a shape takes any
    trainer.extend(chainer_accum.extensions.KeepRandomState())
    trainer.run()
    with numpy.load(str(snapshot_of("split", tmp_path)), allow_pickle=True) as npz:
        numpy.savez(str(tmp_path / "other.npz"), **{**npz, "updater/model:main/predictor/0/W": array})
    assert_refused(tmp_path / "other.npz", trainer, reason)


def test_a_snapshot_of_a_trainer_without_one_of_the_extensions_changes_nothing(trainer, tmp_path):
    path = snapshot_of("split", tmp_path)
    trainer.extend(extensions.ExponentialShift("alpha", 0.9))
    before = state_of(trainer)
    alpha = trainer.updater.get_optimizer("main").alpha
    with pytest.raises(ValueError, match="it has no extensions/ExponentialShift/.*; create model, optimizer and ext"):
        load_snapshot(path, trainer)
    assert_unchanged(trainer, before)
    assert trainer.updater.get_optimizer("main").alpha == alpha


def test_the_unfinished_window_of_an_accumulating_optimizer_survives_a_snapshot_of_something_else(tmp_path):
    def make():
        optimizer = chainer_accum.create_accumulating_optimizer(chainer.optimizers.Adam(), 3).setup(make_model())
        for start in (0, 4):
            optimizer.update(lossfun, optimizer, start)
        return optimizer

    def lossfun(optimizer, start):
        x, t = chainer.dataset.concat_examples(make_dataset(12)[start : start + 4])
        return chainer.functions.softmax_cross_entropy(optimizer.target.predictor(x), t)

    actual, expected = make(), make()
    numpy.savez(str(tmp_path / "other.npz"), t=numpy.array(5), epoch=numpy.array(1))
    with pytest.raises(ValueError, match="is not a snapshot"):
        load_snapshot(tmp_path / "other.npz", actual)
    for optimizer in (actual, expected):
        optimizer.update(lossfun, optimizer, 8)
    assert_same_parameters(actual.target, expected.target, 0)
    assert (actual.t, actual.epoch) == (1, 0)


def test_a_file_that_is_not_there_is_said_not_to_be_there(trainer, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_snapshot(tmp_path / "nowhere.npz", trainer)


@pytest.mark.parametrize("make_optimizer", [chainer.optimizers.MomentumSGD, chainer.optimizers.Adam])
def test_a_fresh_optimizer_that_refuses_the_state_of_another_is_still_fresh(make_optimizer, tmp_path):
    x, t = chainer.dataset.concat_examples(make_dataset(8))
    model = make_model()
    model(x, t)  # so that all of the model can be loaded, and the state of the optimizer is what is refused
    other = make_optimizer().setup(model)
    other.update(model, x, t)
    save_npz(str(tmp_path / "other.npz"), other)
    actual, expected = (chainer.optimizers.Adam(amsgrad=True).setup(make_model()) for _ in range(2))
    with pytest.raises(
        ValueError, match="other.npz is not a snapshot of this Adam: it has no .*/(m|vhat); create model"
    ):
        load_snapshot(tmp_path / "other.npz", actual)
    assert {param.update_rule.state for param in actual.target.params()} == {None}
    for optimizer in (actual, expected):
        optimizer.update(optimizer.target, x, t)
    assert_same_parameters(actual.target, expected.target, 0)
    assert_same_optimizer_state(actual, expected, 0)


def test_a_target_that_has_no_values_is_refused():
    with pytest.raises(TypeError, match="target must be an object that Chainer can serialize, got 'model'; pass a Tr"):
        load_snapshot("snapshot", "model")
