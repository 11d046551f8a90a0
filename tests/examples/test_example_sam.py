"""The example of sharpness-aware minimization learns, and takes the steps of the whole batch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import optimizers
from test_examples import EXAMPLES, run_program

from helpers import serial

SAM = EXAMPLES / "sam.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("sam", SAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model() -> L.Classifier:
    random = numpy.random.RandomState(0)
    layers = [L.Linear(5, 7, initialW=random.standard_normal((7, 5))), L.Linear(7, 3)]
    layers[1].W.array = random.standard_normal((3, 7))
    for param in [param for layer in layers for param in layer.params()]:
        param.array = param.array.astype(numpy.float64)
    return L.Classifier(chainer.Sequential(layers[0], F.tanh, layers[1]))


def sam_step_of_the_whole_batch(optimizer: Any, examples: Any, rho: float) -> None:
    model, arrays = optimizer.target, chainer.dataset.concat_examples(examples)
    model.cleargrads()
    model(*arrays).backward()
    norm = numpy.sqrt(sum((param.grad**2).sum() for param in model.params()))
    before = [param.array.copy() for param in model.params()]
    for param in model.params():
        param.array = param.array + rho * param.grad / norm
    model.cleargrads()
    model(*arrays).backward()
    for param, array in zip(model.params(), before):
        param.array = array
    optimizer.update()


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_sam_in_micro_batches_takes_the_steps_of_the_whole_batch(micro_batch_size: int) -> None:
    random = numpy.random.RandomState(1)
    dataset = list(zip(random.standard_normal((48, 5)), random.randint(3, size=48).astype("i")))
    actual, expected = (optimizers.Adam(0.01).setup(make_model()) for _ in range(2))
    updater = load_example().SAMUpdater(serial(dataset, 12), actual, micro_batch_size, rho=0.5)
    observation: Any = {}
    for start in (0, 12, 24, 36):
        with chainer.reporter.Reporter().scope(observation):
            chainer.get_current_reporter().add_observer("main", actual.target)
            loss = make_loss(expected.target, dataset[start : start + 12])
            updater.update()
        sam_step_of_the_whole_batch(expected, dataset[start : start + 12], 0.5)
        numpy.testing.assert_allclose(observation["main/loss"].array, loss, rtol=1e-12)
    assert actual.t == expected.t == 4
    for param, other in zip(actual.target.params(), expected.target.params()):
        numpy.testing.assert_allclose(param.array, other.array, rtol=1e-11, atol=1e-13)


def make_loss(model: Any, examples: Any) -> Any:
    with chainer.reporter.Reporter().scope({}), chainer.no_backprop_mode():
        chainer.get_current_reporter().add_observer("main", model)
        return model(*chainer.dataset.concat_examples(examples)).array


def test_sam_learns_its_task(tmp_path: Path) -> None:
    printed = run_program(SAM, cwd=tmp_path)
    assert "Warning" not in printed
    log = json.loads((tmp_path / "result" / "log").read_text(encoding="utf-8"))
    assert log[-1]["iteration"] == 160
    assert log[-1]["validation/main/accuracy"] > 0.95
