"""In a process that has too little memory for the whole batch, the run is that of a process that has enough."""

from __future__ import annotations

import multiprocessing
import pathlib
import sys
from typing import Any, Callable, Dict

import chainer_accum  # noqa: F401
import numpy
import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("limits are set as Linux has them", allow_module_level=True)

from limited_training import WAYS, run_out_and_go_on, train_within

MIB = 2**20
LIMITS = (16, 24, 32, 48)
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["chainer_accum"])
every_way = pytest.mark.parametrize("way", WAYS)


def run(function: Callable[..., None], *args: Any) -> None:
    process = server.Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def load(path: pathlib.Path) -> Dict[str, Any]:
    with numpy.load(str(path)) as npz:
        return {name: npz[name] for name in npz.files}


def assert_same(actual: Dict[str, Any], expected: Dict[str, Any], tolerance: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        numpy.testing.assert_allclose(actual[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@every_way
def test_runs_with_a_limit_end_where_one_without_ends(way, tmp_path, record_property):
    run(train_within, None, way, tmp_path / "unlimited.npz")
    expected = load(tmp_path / "unlimited.npz")
    assert expected.pop("size") == WAYS[way].get("micro_batch_size", 0)
    for limit in LIMITS:
        run(train_within, limit * MIB, way, tmp_path / "limited.npz")
        actual = load(tmp_path / "limited.npz")
        assert 0 < actual.pop("size") < WAYS[way]["batch_size"]
        assert_same(actual, expected, tolerance=1e-5)
        record_property("memory limits", 1)


@every_way
def test_where_nothing_fits_there_is_an_error_that_changes_nothing(way, tmp_path, record_property):
    path = tmp_path / "end.npz"
    run(run_out_and_go_on, way, path)
    failed = load(path.with_suffix(".failed.npz"))
    assert str(failed.pop("message")).startswith("one example does not fit in memory: ")
    before = load(path.with_suffix(".before.npz"))
    assert_same(*[{name: state[name] for name in state if "iterator" not in name} for state in (failed, before)])
    assert load(path)["updater/iteration"] == 2
    record_property("memory limits", 1)
