"""The extensions of this package report what is true, and write it where it can be read."""

from __future__ import annotations

import builtins
import json
import struct

import chainer
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.serializers import load_npz
from chainer.training import Trainer
from chainer.training import extensions as chainer_extensions
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import ExampleMean, TensorBoardReport

from conftest import make_dataset, make_updater, serial


def make_trainer(tmp_path, epochs=2, size=50, batch_size=6, **kwargs):
    kwargs = kwargs or {"accumulation_steps": 4}
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(size), batch_size), optimizers.SGD(0.1), **kwargs)
    trainer = Trainer(updater, (epochs, "epoch"), out=str(tmp_path))
    trainer.extend(chainer_extensions.LogReport())
    return trainer


def record(trainer):
    """Returns a list to which each update adds its loss and its number of examples."""
    seen = []

    @chainer.training.make_extension(trigger=(1, "iteration"), priority=1000)
    def recorder(trainer):
        seen.append((float(trainer.observation["main/loss"].array), trainer.updater.effective_batch_size))

    trainer.extend(recorder, name="recorder")
    return seen


def read_log(tmp_path):
    return json.loads((tmp_path / "log").read_text())


def assert_example_mean(tmp_path, seen, expected_sizes):
    """Asserts that the one entry of the log has the mean over examples, and returns the entry."""
    losses, sizes = zip(*seen)
    assert sizes == expected_sizes
    (entry,) = read_log(tmp_path)
    numpy.testing.assert_allclose(entry["main/loss/example_mean"], numpy.average(losses, weights=sizes), rtol=1e-6)
    return entry


def test_an_example_mean_counts_examples(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, accumulation_steps=4, epoch_boundary="flush", size=30)
    trainer.extend(ExampleMean("main/loss"))
    seen = record(trainer)
    trainer.run()
    entry = assert_example_mean(tmp_path, seen, (24, 6))
    assert abs(entry["main/loss"] - entry["main/loss/example_mean"]) > 1e-3


def test_an_example_mean_begins_anew_with_each_period(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3, accumulation_steps={0: 1, 1: 2, 2: 4}, size=48)
    trainer.extend(ExampleMean("main/loss", "mean", trigger=(1, "epoch")))
    seen = record(trainer)
    trainer.run()
    for entry, part in zip(read_log(tmp_path), (seen[:8], seen[8:12], seen[12:])):
        losses, sizes = zip(*part)
        numpy.testing.assert_allclose(entry["mean"], numpy.average(losses, weights=sizes), rtol=1e-6)


def test_an_example_mean_survives_a_resume(tmp_path):
    def run(out, epochs, resume=None):
        trainer = make_trainer(out, epochs, size=48)
        trainer.extend(ExampleMean("main/loss", "mean", trigger=(5, "iteration")))
        trainer.extend(chainer_extensions.snapshot(filename="snapshot_{.updater.iteration}"), trigger=(3, "iteration"))
        reported = []

        @chainer.training.make_extension(trigger=(1, "iteration"))
        def recorder(trainer):
            reported.append(trainer.observation.get("mean"))

        trainer.extend(recorder, name="recorder")
        if resume is not None:
            load_npz(str(resume), trainer)
        trainer.run()
        return reported

    whole = run(tmp_path / "whole", 4)
    resumed = run(tmp_path / "resumed", 4, tmp_path / "whole" / "snapshot_3")
    assert whole[4] is not None and whole[4] == resumed[1]
    assert whole[3:] == resumed


@pytest.mark.parametrize("kwargs", [{"accumulation_steps": 1}])
def test_an_example_mean_says_what_to_do_where_examples_are_not_counted(tmp_path, kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    trainer.extend(ExampleMean("main/loss"))
    with pytest.raises(ValueError, match=r"effective_batch_size must be known, got None; .* accumulation_steps={0: 1}"):
        trainer.run(show_loop_exception_msg=False)


def test_an_example_mean_needs_an_updater_that_counts(tmp_path):
    updater = make_updater(StandardUpdater, serial(make_dataset(), 6), optimizers.SGD())
    trainer = Trainer(updater, (1, "epoch"), out=str(tmp_path))
    trainer.extend(ExampleMean("main/loss"))
    with pytest.raises(TypeError, match="must count examples, got StandardUpdater; use chainer_accum.Accumulating"):
        trainer.run()


def read_events(folder):
    """Returns what TensorBoard would show: a list of (tag, step, value), in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    values = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            values.extend((value.tag, event.step, value.simple_value) for value in event.summary.value)
    return values


def test_tensorboard_shows_each_scalar_at_each_update(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.extend(TensorBoardReport())
    trainer.extend(chainer_extensions.observe_lr("main", "lr"))
    seen = record(trainer)

    @chainer.training.make_extension(trigger=(1, "iteration"), priority=1000)
    def reporter(trainer):
        chainer.report({"text": "x", "array": numpy.zeros(3), "weighted": (2.5, 3), "number": 7})

    trainer.extend(reporter, name="reporter")
    # LogReport cannot average text.
    del trainer._extensions["LogReport"]
    trainer.run()
    events = read_events(tmp_path / "tensorboard")
    assert {tag for tag, _, _ in events} == {"main/loss", "main/accuracy", "lr", "weighted", "number"}
    losses = [(step, value) for tag, step, value in events if tag == "main/loss"]
    assert [step for step, _ in losses] == list(range(1, len(seen) + 1))
    numpy.testing.assert_allclose([value for _, value in losses], [loss for loss, _ in seen], rtol=1e-6)
    assert {value for tag, _, value in events if tag == "weighted"} == {2.5}


def test_tensorboard_keys_trigger_and_folder_can_be_chosen(tmp_path):
    trainer = make_trainer(tmp_path, size=48)
    trainer.extend(TensorBoardReport(str(tmp_path / "events"), keys=["main/loss"], trigger=(2, "iteration")))
    trainer.run()
    assert [(tag, step) for tag, step, _ in read_events(tmp_path / "events")] == [("main/loss", 2), ("main/loss", 4)]


def test_without_tensorboardx_the_error_says_what_to_install(monkeypatch):
    def fail(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match="TensorBoardReport needs tensorboardX; install it with: pip install"):
        TensorBoardReport()


def test_example_mean_loads_sums_that_are_wider_than_its_own(tmp_path):
    means = []
    for dtype in (numpy.float64, numpy.float32):
        trainer = make_trainer(tmp_path)
        trainer.extend(ExampleMean("main/loss", trigger=lambda _: False))
        trainer.updater.update()
        trainer.observation = {"main/loss": dtype(1.5)}
        mean = trainer.get_extension("example_mean:main/loss")
        mean(trainer)
        means.append(mean)
    chainer.serializers.save_npz(str(tmp_path / "mean.npz"), means[0])
    load_npz(str(tmp_path / "mean.npz"), means[1])
    assert means[1]._summary.compute_mean() == 1.5


def test_keys_are_checked():
    with pytest.raises(TypeError, match="key must be a str, got 3; give the key of an observed value, such as 'main/l"):
        ExampleMean(3)
    with pytest.raises(TypeError, match=r"keys must be a sequence of str, got 'main/loss'; write \['main/loss'\]"):
        TensorBoardReport(keys="main/loss")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_example_mean_leaves_out_what_was_skipped(tmp_path):
    data = make_dataset(24)
    broken = [(x * numpy.float32("nan") if i < 9 else x, t) for i, (x, t) in enumerate(data)]
    optimizer = optimizers.SGD(0.1)
    updater = make_updater(AccumulatingUpdater, serial(broken, 12), optimizer, micro_batch_size=3, nonfinite="skip")
    trainer = Trainer(updater, (1, "epoch"), out=str(tmp_path))
    trainer.extend(ExampleMean("main/loss"))
    trainer.extend(chainer_extensions.LogReport())
    seen = record(trainer)
    trainer.run()
    assert_example_mean(tmp_path, seen, (3, 12))


def test_an_example_mean_of_nothing_is_a_warning(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.extend(ExampleMean("main/los"))
    with pytest.warns(RuntimeWarning, match="no mean of 'main/los', as it was not observed; observed are"):
        trainer.run()
    assert "main/los/example_mean" not in read_log(tmp_path)[0]
