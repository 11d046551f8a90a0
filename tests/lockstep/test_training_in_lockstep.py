"""A whole training of a residual network with dropout, in lockstep, has the log of the whole batch."""

from __future__ import annotations

import importlib
import json
import pathlib
import signal
import sys
from typing import Any, Dict, List

import chainer_accum  # noqa: F401 - before chainer, which it makes importable
import chainer
import numpy
import pytest
from digits_training import train

from helpers import run_python

HERE = pathlib.Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
SIZES = {"training": 300, "validation": 100}

Log = List[Dict[str, Any]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: Any) -> pathlib.Path:
    """A file with some of the digits of the examples, in float64."""
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        parts = importlib.import_module("handwritten_digits").load_split()
    arrays = {}
    for (name, size), part in zip(SIZES.items(), parts):
        arrays[f"{name}_images"] = part.images[:size].astype(float)
        arrays[f"{name}_labels"] = part.labels[:size]
    numpy.savez(file, **arrays)
    return pathlib.Path(file)


@pytest.fixture(scope="module")
def expected(digits: pathlib.Path, tmp_path_factory: Any) -> Log:
    """The log of the whole batch."""
    out = tmp_path_factory.mktemp("whole")
    with chainer.using_config("dtype", numpy.dtype("float64")):
        train(str(digits), str(out), "whole")
    return log_of(out)


def log_of(out: pathlib.Path) -> Log:
    entries: Log = json.loads((out / "log").read_text())
    for entry in entries:
        del entry["elapsed_time"]
    return entries


def assert_same_logs(actual: Log, expected: Log) -> None:
    assert len(expected) == 9
    assert expected[-1].keys() > {
        "validation/main/loss",
        "validation/main/accuracy",
        "main/loss",
        "main/accuracy",
        "lr",
    }
    assert expected[-1]["main/loss"] < 0.8 * expected[0]["main/loss"]  # it learns
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for entry, expected_entry in zip(actual, expected):
        for key, value in expected_entry.items():
            assert entry[key] == pytest.approx(value, rel=1e-9, abs=1e-11), (key, expected_entry["iteration"])


def test_the_log_is_that_of_the_whole_batch(digits: pathlib.Path, tmp_path: pathlib.Path, expected: Log) -> None:
    train(str(digits), str(tmp_path), "memory")
    assert_same_logs(log_of(tmp_path), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_the_log_is_that_of_the_whole_batch_if_the_training_is_killed_and_resumed(
    digits: pathlib.Path, tmp_path: pathlib.Path, expected: Log
) -> None:
    def run(death: int) -> str:
        program = ("-W", "ignore", str(HERE / "digits_training.py"), str(digits), str(tmp_path), "file", str(death))
        return run_python(*program, status=-signal.SIGKILL if death else 0)

    run(7)
    assert "resumed from snapshot_iter_4" in run(14)
    assert "resumed from snapshot_iter_12" in run(0)
    assert_same_logs(log_of(tmp_path), expected)
