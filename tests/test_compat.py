"""Chainer works whatever newer packages have removed, and what they still have is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import chainer_accum
import numpy
import pytest
from chainer_accum import _compat, _pkg_resources

NAMES = [entry.name for entry in _compat.MISSING_NAMES]

# Start of a script in which every one of the names is missing, whatever is installed.
HIDE_ALL_NAMES = """
import sys
import numpy

getattr_of_numpy = numpy.__getattr__

def getattr_without_the_names(name):
    if name in ["sctypes", "float"]:
        raise AttributeError(name)
    return getattr_of_numpy(name)

for name in ["pkg_resources", "numpy.distutils", "numpy.distutils.system_info"]:
    sys.modules[name] = None  # importing it raises ImportError
for name in ["sctypes", "float"]:
    vars(numpy).pop(name, None)
numpy.__getattr__ = getattr_without_the_names
"""


@pytest.fixture(autouse=True)
def _restorable_state(monkeypatch: Any) -> None:
    """Gives each test the default of the switch and a ``numpy.distutils`` of its own."""
    monkeypatch.delenv("CHAINER_ACCUM_COMPAT", raising=False)
    distutils = types.ModuleType("numpy.distutils")
    monkeypatch.setitem(sys.modules, "numpy.distutils", distutils)
    monkeypatch.setitem(vars(numpy), "distutils", distutils)


def namespace_of(name: str) -> Any:
    """Returns the dict in which ``name`` is found, and its key there: an attribute of NumPy or a module."""
    module, _, attribute = name.rpartition(".")
    return (vars(numpy), attribute) if module == "numpy" else (sys.modules, name)


def put(monkeypatch: Any, name: str, value: Any) -> None:
    monkeypatch.setitem(*namespace_of(name), value)


def hide(monkeypatch: Any, name: str) -> None:
    put(monkeypatch, name, None)  # for a module, that is enough: importing it raises ImportError
    namespace, key = namespace_of(name)
    if namespace is vars(numpy):
        del namespace[key]
        monkeypatch.setitem(vars(numpy), "__getattr__", _raise_attribute_error)  # some versions have numpy.float there


def _raise_attribute_error(name: str) -> None:
    raise AttributeError(name)


def look_up(name: str) -> Any:
    namespace, key = namespace_of(name)
    return namespace.get(key)


def run_python(*arguments: str) -> str:
    """Runs a fresh interpreter and returns what it prints."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(chainer_accum.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_is_restored(name: str, monkeypatch: Any) -> None:
    hide(monkeypatch, name)
    _compat.restore_missing_names()
    assert look_up(name) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_there_is_left_alone(name: str, monkeypatch: Any) -> None:
    original = types.ModuleType(name)
    put(monkeypatch, name, original)
    _compat.restore_missing_names()
    assert look_up(name) is original


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_stays_missing_when_switched_off(name: str, monkeypatch: Any) -> None:
    hide(monkeypatch, name)
    monkeypatch.setenv("CHAINER_ACCUM_COMPAT", "0")
    _compat.restore_missing_names()
    assert look_up(name) is None


def test_a_module_that_fails_to_import_with_any_error_counts_as_missing(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "pkg_resources.py").write_text("raise AttributeError('ImpImporter')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pkg_resources")
    _compat.restore_missing_names()
    assert look_up("pkg_resources") is _pkg_resources


def test_chainer_imports_and_computes_without_any_of_the_names() -> None:
    script = """
import chainer_accum
import chainer
import chainer.functions as F
import chainer.testing

x = chainer.Variable(numpy.arange(4, dtype=numpy.float32).reshape(1, 1, 2, 2))
windows = F.as_strided(x, (3, 2), (1, 1))
numpy.testing.assert_array_equal(windows.array, [[0, 1], [1, 2], [2, 3]])
(gradient,) = chainer.grad([F.sum(windows)], [x])
numpy.testing.assert_array_equal(gradient.array.ravel(), [1, 2, 2, 1])

resized = F.resize_images(x, (3, 3))
numpy.testing.assert_array_equal(resized.array[0, 0], [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]])

@chainer.testing.with_requires("chainer>=7", "numpy>=1")
def runs():
    return True

assert runs()
"""
    assert run_python("-W", "error", "-c", HIDE_ALL_NAMES + script) == ""


def test_chainer_can_be_imported_after_an_import_that_failed() -> None:
    script = """
import sys
sys.modules["pkg_resources"] = None
try:
    import chainer
except (AttributeError, ImportError):
    import chainer_accum
    import chainer

    print(chainer.__version__)
"""
    assert run_python("-c", script) == "7.8.1\n"


@pytest.mark.parametrize("action", ["always", "error"])
def test_the_import_is_quiet_however_warnings_are_shown(action: str) -> None:
    assert run_python("-W", action, "-c", "import chainer_accum") == ""


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_worker_processes_of_an_iterator_can_import_chainer(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        """
import multiprocessing
import sys

import chainer_accum
import chainer
import chainer.links as L
import numpy
from chainer.iterators import MultiprocessIterator, SerialIterator

def train(iterator):
    model = L.Classifier(L.Linear(3, 2, initialW=0.5))
    updater = chainer_accum.AccumulatingUpdater(
        iterator, chainer.optimizers.SGD().setup(model), accumulation_steps=2
    )
    for _ in range(3):
        updater.update()
    iterator.finalize()
    return model.predictor.W.array

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    dataset = [(numpy.full(3, i, numpy.float32), numpy.int32(i % 2)) for i in range(10)]
    actual = train(MultiprocessIterator(dataset, 4, shuffle=False, n_processes=2))
    numpy.testing.assert_array_equal(actual, train(SerialIterator(dataset, 4, shuffle=False)))
    print("trained")
"""
    )
    assert run_python(str(script), start_method) == "trained\n"


def test_require_returns_the_packages_that_meet_the_requirements() -> None:
    (distribution,) = _pkg_resources.require("numpy>=1.22,<99")
    assert distribution.version == numpy.__version__


def test_require_tells_a_package_that_is_not_installed() -> None:
    with pytest.raises(_pkg_resources.DistributionNotFound):
        _pkg_resources.require("numpy", "no-such-package>=1")


def test_require_tells_a_package_of_another_version() -> None:
    with pytest.raises(_pkg_resources.VersionConflict):
        _pkg_resources.require("numpy>=1.22,<1.22")


def test_require_compares_no_versions_without_the_packaging_library(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    (distribution,) = _pkg_resources.require("numpy<1")
    assert distribution.version == numpy.__version__


@pytest.mark.parametrize("requirement", ["numpy<1", "no-such-package"])
def test_whatever_a_working_set_lacks_is_a_resolution_error(requirement: str) -> None:
    with pytest.raises(_pkg_resources.ResolutionError):
        _pkg_resources.WorkingSet().require(requirement)
