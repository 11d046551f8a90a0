"""The script that runs Chainer's own tests runs those of a checkout, and tells why they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import chainer_accum
import chainer
import pytest

ROOT = Path(chainer_accum.__file__).parent.parent

SOME_TESTS = """
import unittest

import numpy
from chainer import testing
from chainer.testing import attr


@testing.parameterize({"key": object()}, {"key": object()})
class TestSome(unittest.TestCase):
    def test_fails(self):
        int("")

    def test_passes(self):
        assert numpy.random.rand() == numpy.random.RandomState(0).rand()

    @attr.gpu
    def test_on_a_gpu(self):
        assert False
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Returns a folder that looks like a checkout of Chainer with some tests."""
    folder = tmp_path / "tests" / "chainer_tests" / "some_tests"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(SOME_TESTS)
    (folder / "test_cannot_be_imported.py").write_text("import no_such_module")
    return tmp_path


def run(*arguments: Any, path: Any = "") -> Tuple[int, str]:
    """Runs the script and returns its exit status and what it prints."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "test_chainer.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path), str(ROOT)]))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return process.returncode, process.stdout


def test_failures_are_grouped_by_cause(checkout: Path) -> None:
    status, printed = run(checkout, "-n2")
    assert status == 1, printed
    assert "     2 ValueError: invalid literal for int() with base 10: ''\n" in printed
    assert "     1 ModuleNotFoundError: No module named 'no_such_module'\n" in printed
    assert "2 failed, 2 passed" in printed


def test_some_of_the_tests_can_be_named(checkout: Path) -> None:
    _, printed = run(checkout, "chainer_tests/some_tests/test_some.py", "-k", "passes")
    assert "2 passed, 4 deselected" in printed


def test_what_is_no_checkout_is_told(tmp_path: Path) -> None:
    status, printed = run(tmp_path)
    assert status == 1
    assert printed.startswith(f"test_chainer: {tmp_path} has no tests/chainer_tests; name a checkout")


def test_the_chainer_of_the_checkout_itself_is_not_tested(checkout: Path) -> None:
    shutil.copytree(Path(chainer.__file__).parent, checkout / "chainer")
    status, printed = run(checkout, path=checkout)
    assert status == 1
    assert printed.startswith(f"test_chainer: Chainer is imported from {checkout}; install")
