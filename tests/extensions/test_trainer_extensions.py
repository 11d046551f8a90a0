"""Chainer's Trainer extensions: over windows of micro-batches they do what they do over the whole batches.

Each test runs one and the same Trainer twice, with StandardUpdater on the whole effective batch and with
AccumulatingUpdater on micro-batches of it, and compares what the extension logged, printed, plotted, wrote or decided.
"""

from __future__ import annotations

import io
import json
import pathlib
import re
from typing import Any, Callable, Dict, List, Tuple

import chainer
import matplotlib
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer.training import Trainer, extensions, triggers
from chainer.training.updaters import StandardUpdater

from helpers import assert_same_parameters, make_dataset, make_model, make_updater, serial

matplotlib.use("Agg")

EFFECTIVE_BATCH = 14
TOLERANCE = 1e-5
WAYS = ("gathered from the iterator", "split from a batch")


@pytest.fixture(params=WAYS)
def way(request: Any) -> str:
    """The way in which a window is formed."""
    return request.param


def train(
    way: str,
    out: Any,
    extend: Callable[[Trainer], None] = lambda trainer: None,
    *,
    dataset: Any = None,
    model: Any = None,
    stop: Any = (3, "epoch"),
    lr: float = 0.5,
    **kwargs: Any,
) -> Trainer:
    """Trains on effective batches that do not divide the data, and returns the Trainer."""
    dataset = make_dataset() if dataset is None else dataset
    batch_size = EFFECTIVE_BATCH
    updater_class: Any = AccumulatingUpdater
    if way == "whole":
        updater_class, kwargs = StandardUpdater, {}
    elif way == "gathered from the iterator":
        batch_size //= 2
        kwargs["accumulation_steps"] = 2
    else:
        kwargs["micro_batch_size"] = 5
    optimizer = chainer.optimizers.SGD(lr)
    updater = make_updater(updater_class, serial(dataset, batch_size), optimizer, model, **kwargs)
    trainer = Trainer(updater, stop, out=str(pathlib.Path(out) / way))
    extend(trainer)
    trainer.run(show_loop_exception_msg=False)
    return trainer


def log_of(trainer: Trainer) -> List[Dict[str, float]]:
    """Returns the log without what no two runs have in common."""
    log = [dict(entry) for entry in trainer.get_extension("LogReport").log]
    for entry in log:
        assert entry.pop("elapsed_time") >= 0
    return log


def assert_same_log(actual: List[Dict[str, float]], expected: List[Dict[str, float]]) -> None:
    """Asserts that two logs have the same entries at the same iterations, and so at least one."""
    assert expected
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for entry, expected_entry in zip(actual, expected):
        assert (entry["epoch"], entry["iteration"]) == (expected_entry["epoch"], expected_entry["iteration"])
        for key, value in entry.items():
            numpy.testing.assert_allclose(
                value, expected_entry[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{key} of {expected_entry}"
            )


@pytest.mark.parametrize("trigger", [(1, "epoch"), (2, "iteration")])
def test_log_report_logs_the_whole_batches(way: str, trigger: Any, tmp_path: pathlib.Path) -> None:
    def extend(trainer: Trainer) -> None:
        trainer.extend(extensions.LogReport(trigger=trigger))

    expected = train("whole", tmp_path, extend)
    actual = train(way, tmp_path, extend)
    assert_same_log(log_of(actual), log_of(expected))
    assert {"main/loss", "main/accuracy"} < log_of(actual)[0].keys()
    assert json.loads((tmp_path / way / "log").read_text()) == actual.get_extension("LogReport").log


def test_print_report_prints_the_whole_batches(way: str, tmp_path: pathlib.Path) -> None:
    def printed(way: str) -> Tuple[List[str], numpy.ndarray]:
        out = io.StringIO()

        def extend(trainer: Trainer) -> None:
            trainer.extend(extensions.LogReport())
            trainer.extend(extensions.PrintReport(["epoch", "iteration", "main/loss", "main/accuracy"], out=out))

        train(way, tmp_path, extend)
        header, *lines = out.getvalue().replace("\033[J", "").splitlines()
        return header.split(), numpy.array([line.split() for line in lines], dtype=float)

    header, expected = printed("whole")
    actual_header, actual = printed(way)
    assert actual_header == header
    assert expected.shape == (3, 4)
    numpy.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)  # only six digits are printed


def test_plot_report_plots_the_whole_batches(way: str, tmp_path: pathlib.Path) -> None:
    def plotted(way: str) -> Dict[str, numpy.ndarray]:
        lines: Dict[str, numpy.ndarray] = {}

        def keep_lines(figure: Any, axes: Any, summary: Any) -> None:
            lines.update({line.get_label(): line.get_xydata() for line in axes.get_lines()})

        def extend(trainer: Trainer) -> None:
            keys = ["main/loss", "main/accuracy"]
            trainer.extend(extensions.PlotReport(keys, "iteration", trigger=(4, "iteration"), postprocess=keep_lines))

        train(way, tmp_path, extend, stop=(8, "iteration"))
        assert (tmp_path / way / "plot.png").stat().st_size > 0
        return lines

    expected, actual = plotted("whole"), plotted(way)
    assert actual.keys() == expected.keys() == {"main/loss", "main/accuracy"}
    for key, line in actual.items():
        assert line.shape == (2, 2)
        numpy.testing.assert_allclose(line, expected[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)


def test_variable_statistics_plot_plots_data_and_gradients_of_the_whole_batches(
    way: str, tmp_path: pathlib.Path
) -> None:
    def plotted(way: str) -> Tuple[numpy.ndarray, numpy.ndarray]:
        def extend(trainer: Trainer) -> None:
            model = trainer.updater.get_optimizer("main").target
            trainer.extend(extensions.VariableStatisticsPlot(model, trigger=(6, "iteration")))

        trainer = train(way, tmp_path, extend, stop=(6, "iteration"))
        assert (tmp_path / way / "statistics.png").stat().st_size > 0
        return trainer.get_extension("VariableStatisticsPlot")._samples.get_data()

    iterations, expected = plotted("whole")
    actual_iterations, actual = plotted(way)
    assert list(actual_iterations) == list(iterations) == [1, 2, 3, 4, 5, 6]
    _, gradient = expected.swapaxes(0, 1)
    assert (gradient != 0).all()
    numpy.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_parameter_statistics_report_data_and_gradients_of_the_whole_batches(way: str, tmp_path: pathlib.Path) -> None:
    def extend(trainer: Trainer) -> None:
        model = trainer.updater.get_optimizer("main").target
        trainer.extend(extensions.ParameterStatistics(model, trigger=(1, "iteration")))
        trainer.extend(extensions.LogReport(trigger=(1, "iteration")))

    expected = log_of(train("whole", tmp_path, extend))
    assert_same_log(log_of(train(way, tmp_path, extend)), expected)
    assert all(entry["None/predictor/0/W/grad/std"] > 0 for entry in expected)


def test_progress_bar_counts_whole_batches(way: str, tmp_path: pathlib.Path, capsys: Any) -> None:
    def extend(trainer: Trainer) -> None:
        trainer.extend(extensions.ProgressBar(update_interval=1))

    def printed(way: str) -> str:
        train(way, tmp_path, extend)
        return re.sub(r".* iters/sec\. Estimated time to finish: .*\n", "", capsys.readouterr().out)

    expected = printed("whole")
    assert printed(way) == expected
    assert re.findall(r"(\d+) iter, (\d) epoch / 3 epochs", expected)[-1] == ("11", "3")


class CountingClassifier(chainer.Chain):
    """Reports how many of its examples it classifies correctly, of how many."""

    def __init__(self, classifier: Any) -> None:
        super().__init__(classifier=classifier)

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        loss = self.classifier(x, t)
        correct = (self.classifier.y.array.argmax(axis=1) == t).sum()
        chainer.report({"correct": correct, "total": len(t)}, self)
        return loss


def test_micro_average_of_summed_counts_is_that_of_the_whole_batches(way: str, tmp_path: pathlib.Path) -> None:
    def extend(trainer: Trainer) -> None:
        trainer.extend(extensions.MicroAverage("main/correct", "main/total", "micro_average", trigger=(3, "iteration")))
        trainer.extend(extensions.LogReport(trigger=(3, "iteration")))

    rules = {"main/correct": "sum", "main/total": "sum"}
    expected = train("whole", tmp_path, extend, model=CountingClassifier(make_model()))
    actual = train(way, tmp_path, extend, model=CountingClassifier(make_model()), observation_rules=rules)
    assert_same_log(log_of(actual), log_of(expected))
    assert all(entry["main/total"] == EFFECTIVE_BATCH and 0 < entry["micro_average"] < 1 for entry in log_of(actual))


@pytest.mark.parametrize("place", [0, 34, 41])
def test_fail_on_non_number_raises_at_the_same_iteration(way: str, place: int, tmp_path: pathlib.Path) -> None:
    dataset = make_dataset()
    dataset[place] = (numpy.full_like(dataset[place][0], numpy.nan), dataset[place][1])

    def iterations_until_failure(way: str) -> int:
        trainers = []

        def extend(trainer: Trainer) -> None:
            trainer.extend(extensions.FailOnNonNumber())
            trainers.append(trainer)

        with pytest.raises(RuntimeError, match="diverge"):
            train(way, tmp_path, extend, dataset=dataset)
        return trainers[0].updater.iteration

    assert iterations_until_failure(way) == iterations_until_failure("whole") == 1 + place // EFFECTIVE_BATCH


def test_dump_graph_dumps_the_graph_of_one_micro_batch(way: str, tmp_path: pathlib.Path) -> None:
    def dumped_labels(way: str) -> List[str]:
        def extend(trainer: Trainer) -> None:
            trainer.extend(extensions.DumpGraph("main/loss"))

        train(way, tmp_path, extend, stop=(1, "iteration"))
        return sorted(re.findall(r'label="(.*?)"', (tmp_path / way / "cg.dot").read_text()))

    whole, micro = f"({EFFECTIVE_BATCH}", "(7" if way == WAYS[0] else "(5"
    expected = [label.replace(whole, micro) for label in dumped_labels("whole")]
    assert sum(micro in label for label in expected) == 5
    assert dumped_labels(way) == sorted(expected)
    assert not chainer.config.keep_graph_on_report


@pytest.mark.parametrize("check_trigger", [(1, "epoch"), (3, "iteration")])
def test_early_stopping_stops_at_the_same_iteration(way: str, check_trigger: Any, tmp_path: pathlib.Path) -> None:
    def last_iteration(way: str) -> int:
        stop = triggers.EarlyStoppingTrigger(check_trigger, "main/loss", patience=1, max_trigger=(40, "epoch"))
        trainer = train(way, tmp_path, stop=stop, lr=1.0)
        assert trainer.updater.epoch < 40
        return trainer.updater.iteration

    assert last_iteration(way) == last_iteration("whole")


@pytest.mark.parametrize("trigger", [(1, "iteration"), (1, "epoch")])
@pytest.mark.parametrize(
    "make_shift",
    [
        lambda: extensions.ExponentialShift("lr", 0.7, target=0.1),
        lambda: extensions.WarmupShift("lr", 0.01, 3, 0.1),
    ],
    ids=["ExponentialShift", "WarmupShift"],
)
def test_learning_rates_shift_per_whole_batch(
    way: str, make_shift: Callable[[], Any], trigger: Any, tmp_path: pathlib.Path
) -> None:
    def extend(trainer: Trainer) -> None:
        trainer.extend(make_shift(), trigger=trigger)
        trainer.extend(extensions.observe_lr(), trigger=(1, "iteration"))
        trainer.extend(extensions.LogReport(trigger=(1, "iteration")))

    expected = log_of(train("whole", tmp_path, extend))
    actual = log_of(train(way, tmp_path, extend))
    assert [entry["lr"] for entry in actual] == [entry["lr"] for entry in expected]
    assert len({entry["lr"] for entry in expected}) >= 3
    assert_same_log(actual, expected)


def test_observe_lr_observes_once_an_epoch(way: str, tmp_path: pathlib.Path) -> None:
    def epochs_with_lr(way: str) -> List[Tuple[float, float]]:
        def extend(trainer: Trainer) -> None:
            trainer.extend(extensions.observe_lr())
            trainer.extend(extensions.LogReport(trigger=(1, "iteration")))

        log = log_of(train(way, tmp_path, extend))
        return [(entry["iteration"], entry["lr"]) for entry in log if "lr" in entry]

    assert epochs_with_lr(way) == epochs_with_lr("whole") == [(4, 0.5), (8, 0.5), (11, 0.5)]


def test_evaluator_evaluates_the_same_models_at_the_same_iterations(way: str, tmp_path: pathlib.Path) -> None:
    def extend(trainer: Trainer) -> None:
        validation = serial(make_dataset(20, seed=2), 8, repeat=False)
        trainer.extend(extensions.Evaluator(validation, trainer.updater.get_optimizer("main").target))
        trainer.extend(extensions.LogReport(trigger=(1, "iteration")))

    expected = log_of(train("whole", tmp_path, extend))
    assert_same_log(log_of(train(way, tmp_path, extend)), expected)
    assert [entry["iteration"] for entry in expected if "validation/main/loss" in entry] == [4, 8, 11]


def read_snapshots(out: pathlib.Path) -> Dict[str, Dict[str, numpy.ndarray]]:
    """Returns the contents of the npz files in a folder, by name."""
    snapshots = {}
    for path in out.iterdir():
        with numpy.load(str(path), allow_pickle=True) as snapshot:
            snapshots[path.name] = dict(snapshot)
    return snapshots


def test_snapshots_are_taken_of_the_same_models_at_the_same_iterations(way: str, tmp_path: pathlib.Path) -> None:
    def extend(trainer: Trainer) -> None:
        model = trainer.updater.get_optimizer("main").target
        trainer.extend(extensions.snapshot())
        trainer.extend(extensions.snapshot_object(model, "model_{.updater.iteration}"), trigger=(5, "iteration"))

    expected_trainer, trainer = train("whole", tmp_path, extend), train(way, tmp_path, extend)
    expected, actual = read_snapshots(tmp_path / "whole"), read_snapshots(tmp_path / way)
    assert_same_parameters(
        trainer.updater.get_optimizer("main").target, expected_trainer.updater.get_optimizer("main").target
    )
    names = {"snapshot_iter_4", "snapshot_iter_8", "snapshot_iter_11", "model_5", "model_10"}
    assert actual.keys() == expected.keys() == names
    for name, arrays in expected.items():
        parameters = [key for key in arrays if "predictor" in key and not key.endswith("/t")]
        assert len(parameters) >= 4
        for key in parameters:
            numpy.testing.assert_allclose(actual[name][key], arrays[key], rtol=1e-6, atol=1e-6, err_msg=key)
    for name in ("snapshot_iter_4", "snapshot_iter_8", "snapshot_iter_11"):
        for key in ("updater/iteration", "updater/optimizer:main/t", "updater/optimizer:main/epoch"):
            assert actual[name][key] == expected[name][key], key
