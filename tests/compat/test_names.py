"""Chainer works whatever newer packages have removed, and what they still have is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from chainer_accum._compat import names, pkg_resources

from helpers import run_python

NAMES = [entry.name for entry in names.MISSING_NAMES]

# Start of a script for which all that Chainer needs is missing, whatever is installed.
HIDE_ALL = """
import importlib.abc
import sys
import numpy

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "pkg_resources" or name.startswith("numpy.distutils"):
            raise ModuleNotFoundError(f"No module named {name!r}")

def getattr_without_the_names(name, getattr_of_numpy=numpy.__getattr__):
    if name in ["sctypes", "float", "distutils"]:
        raise AttributeError(name)
    return getattr_of_numpy(name)

sys.meta_path.insert(0, Hidden())
for name in ["sctypes", "float", "distutils"]:
    vars(numpy).pop(name, None)
numpy.__getattr__ = getattr_without_the_names
"""

# Prints which of the modules others find, and whether one is left where they look.
LOOK_AROUND = """
import importlib, sys, numpy
for name in ["pkg_resources", "numpy.distutils", "numpy.distutils.system_info"]:
    try:
        print(importlib.import_module(name).__name__)
    except ImportError as error:
        print(type(error).__name__)
print([name for name in sys.modules if name.startswith(("pkg_resources", "numpy.distutils"))])
print(hasattr(numpy, "distutils"))
"""
NOTHING_FOUND = "ModuleNotFoundError\n" * 3 + "[]\nFalse\n"

# What there is of Chainer that imports one of the modules.
IMPORT_ALL = """
import chainer
import chainer.testing
import chainer.testing.doctest_helper
"""


@pytest.fixture(autouse=True)
def _default_of_the_switch(monkeypatch: Any) -> None:
    monkeypatch.delenv("CHAINER_ACCUM_COMPAT", raising=False)


def hide(monkeypatch: Any, name: str) -> None:
    """Hides a name of NumPy."""
    monkeypatch.setitem(vars(numpy), name, None)
    del vars(numpy)[name]
    monkeypatch.setitem(vars(numpy), "__getattr__", _raise_attribute_error)  # some versions have numpy.float there


def _raise_attribute_error(name: str) -> None:
    raise AttributeError(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_is_restored(name: str, monkeypatch: Any) -> None:
    hide(monkeypatch, name)
    names.restore_missing_names()
    assert vars(numpy)[name] is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_there_is_left_alone(name: str, monkeypatch: Any) -> None:
    original = object()
    monkeypatch.setitem(vars(numpy), name, original)
    names.restore_missing_names()
    assert vars(numpy)[name] is original


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_stays_missing_when_switched_off(name: str, monkeypatch: Any) -> None:
    hide(monkeypatch, name)
    monkeypatch.setenv("CHAINER_ACCUM_COMPAT", "0")
    names.restore_missing_names()
    assert name not in vars(numpy)


@pytest.mark.parametrize("first", ["import chainer_accum", "import chainer_accum" + IMPORT_ALL])
def test_others_find_no_module_that_is_not_there(first: str) -> None:
    assert run_python("-c", HIDE_ALL + first + LOOK_AROUND) == NOTHING_FOUND


def test_others_find_no_module_that_is_not_there_while_chainer_is_imported(tmp_path: Path) -> None:
    # Chainer's helpers import the package mock if it is installed.
    (tmp_path / "mock.py").write_text(LOOK_AROUND)
    script = HIDE_ALL + "import chainer_accum, chainer.testing"
    assert run_python("-c", script, path=tmp_path) == NOTHING_FOUND


def test_chainer_finds_a_module_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "pkg_resources.py").write_text(
        """
class DistributionNotFound(Exception): pass
class VersionConflict(Exception): pass
class ResolutionError(Exception): pass
class WorkingSet:
    def require(self, requirement): raise ResolutionError
def require(requirement): raise DistributionNotFound
"""
    )
    script = """
import pkg_resources
for module in [chainer._environment_check, chainer.testing.helper, chainer.testing.doctest_helper]:
    assert module.pkg_resources is pkg_resources is sys.modules["pkg_resources"]
print(pkg_resources.__file__)
"""
    printed = run_python("-c", "import sys, chainer_accum" + IMPORT_ALL + script, path=tmp_path)
    assert printed == f"{tmp_path / 'pkg_resources.py'}\n"


def test_a_module_that_fails_to_import_with_any_error_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "pkg_resources.py").write_text("raise AttributeError('ImpImporter')")
    script = "print(chainer.testing.helper.pkg_resources.__name__)"
    printed = run_python("-c", "import chainer_accum" + IMPORT_ALL + script, path=tmp_path)
    assert printed == "chainer_accum._compat.pkg_resources\n"


def test_a_module_is_found_by_those_who_import_it_later(tmp_path: Path) -> None:
    (tmp_path / "pkg_resources.py").write_text("working_set = []")
    script = f"""
import sys
sys.modules["pkg_resources"] = None
import chainer_accum, chainer.testing
del sys.modules["pkg_resources"]
sys.path.insert(0, {str(tmp_path)!r})
import pkg_resources
print(pkg_resources.working_set)
"""
    assert run_python("-c", script) == "[]\n"


def test_the_paths_of_pytest_can_be_changed() -> None:
    script = """
import chainer_accum, chainer.testing, pytest
with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.syspath_prepend("somewhere")
"""
    assert run_python("-c", HIDE_ALL + script) == ""


def test_the_helpers_can_be_imported_twice() -> None:
    script = """
def check():
    helper = sys.modules["chainer.testing.helper"]
    helper.with_requires("numpy>=1")
    print(helper.pkg_resources.__name__)

import importlib
importlib.reload(chainer.testing.helper)
check()
del sys.modules["chainer.testing.helper"]
import chainer.testing.helper
check()
"""
    printed = run_python("-c", HIDE_ALL + "import chainer_accum" + IMPORT_ALL + script + LOOK_AROUND)
    assert printed == "chainer_accum._compat.pkg_resources\n" * 2 + NOTHING_FOUND


def test_the_source_of_the_helpers_can_be_shown() -> None:
    script = """
import chainer_accum, chainer.testing, inspect
source = inspect.getsource(chainer.testing.helper)
assert chainer.testing.helper.__loader__.get_source("chainer.testing.helper") == source
print("import pkg_resources" in source)
"""
    assert run_python("-c", HIDE_ALL + script) == "True\n"


def test_the_check_of_the_environment_runs_on_a_mac() -> None:
    script = """
import sys
import sysconfig
sysconfig.get_config_vars()  # which Python 3.8 looks up by the platform
sys.platform = "darwin"
import chainer_accum, chainer
print(chainer._environment_check.numpy.distutils.system_info.get_info("blas_opt"))
"""
    assert run_python("-c", HIDE_ALL + script) == "{}\n"


def test_the_finder_is_there_once() -> None:
    names.restore_missing_names()
    ours = [finder for finder in sys.meta_path if type(finder).__module__ == "chainer_accum._compat.stand_ins"]
    assert len(ours) == 1


def test_no_module_is_found_when_switched_off() -> None:
    script = """
import os
os.environ["CHAINER_ACCUM_COMPAT"] = "0"
numpy.sctypes, numpy.float = {"int": [numpy.int32, numpy.int64], "float": [numpy.float32]}, float
try:
    import chainer_accum
except ModuleNotFoundError as error:
    print(error)
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("chainer_accum")])
"""
    assert run_python("-c", HIDE_ALL + script) == "No module named 'numpy.distutils'\n[]\n"


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
    assert run_python("-W", "error", "-c", HIDE_ALL + script) == ""


@pytest.mark.skipif(numpy.__version__ < "2", reason="SciPy for an older NumPy does not survive the first import")
def test_chainer_can_be_imported_after_an_import_that_failed() -> None:
    script = """
try:
    import chainer
except (AttributeError, ImportError):
    import chainer_accum
    import chainer.testing

    print(chainer.__version__)
"""
    assert run_python("-c", HIDE_ALL + script + LOOK_AROUND) == "7.8.1\n" + NOTHING_FOUND


@pytest.mark.parametrize("action", ["always", "error"])
def test_the_import_is_quiet_however_warnings_are_shown(action: str) -> None:
    assert run_python("-W", action, "-c", "import chainer_accum") == ""


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_child_processes_import_the_helpers_and_find_no_other_module(start_method: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE_ALL)  # which the child runs as well
    script = tmp_path / "main.py"
    script.write_text(
        f"""
import multiprocessing
import sys

import chainer_accum

def work(queue):
    import chainer.testing
    chainer.testing.with_requires("numpy>=1")
    queue.put([name for name in sys.modules if name.startswith(("pkg_resources", "numpy.distutils"))])

if __name__ == "__main__":
    context = multiprocessing.get_context({start_method!r})
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    child.join()
    print(child.exitcode, queue.get())
"""
    )
    assert run_python(str(script), path=tmp_path) == "0 []\n"


def test_require_returns_the_packages_that_meet_the_requirements() -> None:
    (distribution,) = pkg_resources.require("numpy>=1.22,<99")
    assert distribution.version == numpy.__version__


def test_require_tells_a_package_that_is_not_installed() -> None:
    with pytest.raises(pkg_resources.DistributionNotFound):
        pkg_resources.require("numpy", "no-such-package>=1")


def test_require_tells_a_package_of_another_version() -> None:
    with pytest.raises(pkg_resources.VersionConflict):
        pkg_resources.require("numpy>=1.22,<1.22")


def test_require_compares_no_versions_without_the_packaging_library(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    (distribution,) = pkg_resources.require("numpy<1")
    assert distribution.version == numpy.__version__


@pytest.mark.parametrize("requirement", ["numpy<1", "no-such-package"])
def test_whatever_a_working_set_lacks_is_a_resolution_error(requirement: str) -> None:
    with pytest.raises(pkg_resources.ResolutionError):
        pkg_resources.WorkingSet().require(requirement)
