"""The extensions of this package report what is true, and write it where it can be read."""

from __future__ import annotations

import builtins
import json
import struct

import chainer_accum
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.serializers import load_npz
from chainer.training import Trainer, triggers
from chainer.training import extensions as chainer_extensions
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import ExampleMean, TensorBoardReport

from helpers import make_dataset, make_model, make_updater, serial


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
    log = read_log(tmp_path)
    assert (len(log), len(seen)) == (3, 14)
    for entry, part in zip(log, (seen[:8], seen[8:12], seen[12:])):
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


def test_an_example_mean_saves_the_state_of_its_trigger(tmp_path):
    class EveryThirdCall:
        calls = 0

        def __call__(self, trainer):
            self.calls += 1
            return self.calls % 3 == 0

        def serialize(self, serializer):
            self.calls = serializer("calls", self.calls)

    saved, loaded = EveryThirdCall(), EveryThirdCall()
    trainer = make_trainer(tmp_path, epochs=1, size=48)
    trainer.extend(ExampleMean("main/loss", trigger=saved))
    trainer.run()
    chainer.serializers.save_npz(str(tmp_path / "mean.npz"), trainer.get_extension("example_mean:main/loss"))
    load_npz(str(tmp_path / "mean.npz"), ExampleMean("main/loss", trigger=loaded))
    assert loaded.calls == saved.calls == 2


def test_an_example_mean_says_what_to_do_where_examples_are_not_counted(tmp_path):
    trainer = make_trainer(tmp_path, accumulation_steps=1)
    iterator = trainer.updater.get_iterator("main")
    iterator.next = lambda: tuple(type(iterator).next(iterator))
    trainer.extend(ExampleMean("main/loss"))
    with pytest.raises(ValueError, match="effective_batch_size must be known, got None; let the iterator return lists"):
        trainer.run(show_loop_exception_msg=False)


@pytest.mark.parametrize("steps", [1, {0: 1}])
def test_an_example_mean_counts_the_examples_of_single_batches(steps, tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, accumulation_steps=steps, size=15)
    trainer.updater.get_iterator("main")._repeat = False  # so that the last batch is shorter
    trainer.extend(ExampleMean("main/loss"))
    seen = record(trainer)
    trainer.run()
    assert_example_mean(tmp_path, seen, (6, 6, 3))


def test_an_example_mean_needs_an_updater_that_counts(tmp_path):
    updater = make_updater(StandardUpdater, serial(make_dataset(), 6), optimizers.SGD())
    trainer = Trainer(updater, (1, "epoch"), out=str(tmp_path))
    trainer.extend(ExampleMean("main/loss"))
    with pytest.raises(TypeError, match="must count examples, got StandardUpdater; use chainer_accum.Accumulating"):
        trainer.run()


class Weighted(chainer.Chain):
    """A classifier that reports its loss over the labels that are not ignored, with their number."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.predictor = make_model().predictor

    def forward(self, x, t):
        loss = F.softmax_cross_entropy(self.predictor(x), t)
        chainer.report({"loss": loss, "own": (loss, (t != -1).sum())}, self)
        return loss


def train_weighted(out, updater_class, *extend, **kwargs):
    """Trains on batches of 12, of which some micro-batches have no label that is not ignored."""
    random = numpy.random.RandomState(0)
    labels = [numpy.int32(-1 if index % 4 == 3 else random.randint(3)) for index in range(16)]
    data = [(x, labels[index // 3]) for index, (x, _) in enumerate(make_dataset(48))]
    updater = make_updater(updater_class, serial(data, 12), optimizers.SGD(0.5), Weighted(), **kwargs)
    trainer = Trainer(updater, (12, "iteration"), out=str(out))
    trainer.extend(chainer_extensions.LogReport(trigger=(2, "iteration")))
    for extension, trigger in extend:
        trainer.extend(extension, name=extension.__name__, trigger=trigger)
    trainer.run(show_loop_exception_msg=False)
    return read_log(out)


MICRO_BATCHES = {"micro_batch_size": 3, "weight_func": lambda batch: sum(t != -1 for _, t in batch)}


def test_values_with_a_weight_are_logged_and_trigger_like_those_of_the_whole_batch(tmp_path):
    def iterations(name, updater_class, **kwargs):
        fired = []

        def lowest(trainer):
            fired.append(("lowest", trainer.updater.iteration))

        def highest(trainer):
            fired.append(("highest", trainer.updater.iteration))

        def stopped(trainer):
            fired.append(("stopped", trainer.updater.iteration))

        log = train_weighted(
            tmp_path / name,
            updater_class,
            (lowest, triggers.MinValueTrigger("main/own", (2, "iteration"))),
            (highest, triggers.MaxValueTrigger("main/own", (2, "iteration"))),
            (stopped, triggers.EarlyStoppingTrigger((1, "iteration"), "main/own", patience=1)),
            **kwargs,
        )
        return fired, [entry["main/own"] for entry in log]

    expected_fired, expected = iterations("whole", StandardUpdater)
    fired, losses = iterations("micro", AccumulatingUpdater, **MICRO_BATCHES)
    assert {name for name, _ in expected_fired} == {"lowest", "highest", "stopped"}
    assert fired == expected_fired
    numpy.testing.assert_allclose(losses, expected, rtol=1e-5)


def events_in(folder):
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def read_events(folder):
    """Returns what TensorBoard would show: a list of (tag, step, value), in the order in which they were written."""
    return [(value.tag, event.step, value.simple_value) for event in events_in(folder) for value in event.summary.value]


def test_tensorboard_shows_each_scalar_at_each_update(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.extend(TensorBoardReport())
    trainer.extend(chainer_extensions.observe_lr("main", "lr"))
    seen = record(trainer)

    @chainer.training.make_extension(trigger=(1, "iteration"), priority=1000)
    def reporter(trainer):
        chainer.report({"text": "x", "array": numpy.zeros(3), "weighted": (2.5, 3), "number": 7, "empty": ()})
        chainer.report({"complex": 1j, "pair": ("x", 1), "variable": (chainer.Variable(numpy.array(2.5)), 3)})

    trainer.extend(reporter, name="reporter")
    # LogReport cannot average text.
    del trainer._extensions["LogReport"]
    trainer.run()
    events = read_events(tmp_path / "tensorboard")
    assert {tag for tag, _, _ in events} == {"main/loss", "main/accuracy", "lr", "weighted", "variable", "number"}
    losses = [(step, value) for tag, step, value in events if tag == "main/loss"]
    assert [step for step, _ in losses] == list(range(1, len(seen) + 1))
    numpy.testing.assert_allclose([value for _, value in losses], [loss for loss, _ in seen], rtol=1e-6)
    assert {value for tag, _, value in events if tag in ("weighted", "variable")} == {2.5}


def test_tensorboard_forgets_what_a_resumed_run_shows_again(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, size=48)
    trainer.updater.update()
    trainer.extend(TensorBoardReport())
    trainer.run()
    sessions = [event.step for event in events_in(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert sessions == [2]
    assert {step for _, step, _ in read_events(tmp_path / "tensorboard")} == {2}


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
    with pytest.raises(TypeError, match=r"keys must be a sequence of str, got 'main/loss'; pass a list: \['main/l"):
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


def example_mean_of(tmp_path, reports, steps=4):
    """Returns the mean that is logged of values that are observed one after the other, the last over 6 examples."""
    size = 6 * steps * (len(reports) - 1) + 6
    trainer = make_trainer(tmp_path, epochs=1, size=size, accumulation_steps=steps, epoch_boundary="flush")
    del trainer._extensions["LogReport"]  # which would average the values themselves, too, and maybe overflow
    trainer.extend(chainer_extensions.LogReport(["x/example_mean"]))
    trainer.extend(ExampleMean("x"))
    reports = iter(reports)

    @chainer.training.make_extension(trigger=(1, "iteration"), priority=1000)
    def report_next(trainer):
        trainer.observation["x"] = next(reports)

    trainer.extend(report_next, name="report_next")
    trainer.run(show_loop_exception_msg=False)
    return read_log(tmp_path)[0].get("x/example_mean")


OWN_WEIGHTS = {
    "int": int,
    "numpy.int64": numpy.int64,
    "numpy.float16": numpy.float16,
    "array": numpy.array,
    "Variable": lambda weight: chainer.Variable(numpy.array(weight, "f")),
}


@pytest.mark.parametrize(
    "wrap", [float, numpy.float16, numpy.array, lambda value: chainer.Variable(numpy.array([value]))]
)
@pytest.mark.parametrize("weight", OWN_WEIGHTS)
def test_an_example_mean_takes_the_weight_that_a_value_has(tmp_path, weight, wrap):
    weight = OWN_WEIGHTS[weight]
    reports = [(wrap(1.0), weight(1)), (wrap(float("nan")), weight(0)), (wrap(2.0), weight(3))]
    assert example_mean_of(tmp_path, reports) == 1.75


def test_an_example_mean_with_weights_of_its_own_needs_no_count(tmp_path):
    assert example_mean_of(tmp_path, [(1.0, 1), (2.0, 0), (2.0, 3)], steps=1) == 1.75


def test_an_example_mean_is_right_for_arrays_of_one_element_and_in_float16(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "half").mkdir()
    assert example_mean_of(tmp_path / "one", [numpy.array([1.0], "f"), chainer.Variable(numpy.array([[6.0]]))]) == 2.0
    mean = example_mean_of(tmp_path / "half", [numpy.float16(250)] * 11 + [numpy.float16(200)])  # their sum is infinite
    assert mean == pytest.approx((264 * 250 + 6 * 200) / 270)


def test_an_example_mean_without_any_weight_is_a_warning(tmp_path):
    with pytest.warns(RuntimeWarning, match="no mean of 'x', because all its weights were 0"):
        assert example_mean_of(tmp_path, [(float("nan"), 0), (1.0, 0)]) is None


@pytest.mark.parametrize("value", ["text", None, numpy.zeros(2), (1.0, "a")])
def test_an_example_mean_of_what_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="'x' must be a number or an array of one element, got .*; report a mean"):
        example_mean_of(tmp_path, [value])


def test_an_example_mean_does_not_wait_for_a_device(tmp_path):
    class OnDevice(numpy.ndarray):
        def _read(self, *args):
            raise AssertionError("the host waited for the value")

        __float__ = __int__ = __bool__ = __index__ = item = tolist = _read

    extension = ExampleMean("x", trigger=(2, "iteration"))
    trainer = make_trainer(tmp_path)
    reported = {}
    with chainer.Reporter().scope(reported):
        for iteration, (value, weight) in enumerate([(numpy.nan, 0), (2.0, 3)], start=1):
            trainer.updater.iteration = iteration
            trainer.observation = {"x": tuple(numpy.array(each, "f").view(OnDevice) for each in (value, weight))}
            extension(trainer)
    numpy.testing.assert_array_equal(numpy.asarray(reported["x/example_mean"]).view(numpy.ndarray), 2.0)


def test_an_example_mean_of_nothing_is_a_warning(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.extend(ExampleMean("main/los"))
    with pytest.warns(RuntimeWarning, match="no mean of 'main/los', because it was not observed; use one of"):
        trainer.run()
    assert "main/los/example_mean" not in read_log(tmp_path)[0]


def test_a_star_import_leaves_the_extensions_of_chainer_visible():
    namespace = {}
    exec("from chainer.training import extensions\nfrom chainer_accum import *", namespace)
    assert namespace["extensions"] is chainer_extensions
    assert namespace["AccumulatingUpdater"] is AccumulatingUpdater
    assert chainer_accum.extensions.ExampleMean is ExampleMean
