"""Runs the tests of a checkout of Chainer on the Chainer that is installed, and groups what fails by cause.

usage: python tools/test_chainer.py CHECKOUT [PYTEST_ARGUMENT...]

It runs the tests that need no device and are not marked as slow. Paths among the arguments are relative to the folder
``tests`` of the checkout. Without any, it runs all of ``chainer_tests``.
"""

from __future__ import annotations

import collections
import os
import random
import re
import sys
from pathlib import Path
from typing import Any, DefaultDict, Set

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import numpy
import pytest
from chainer.testing import parameterized

MARKERS = ["chainerx", "cudnn", "gpu", "ideep", "slow", "theano"]
EXCLUDED = " or ".join(MARKERS)


def main(checkout: str, *arguments: str) -> int:
    """Runs the tests and returns pytest's exit status."""
    tests = Path(checkout).resolve() / "tests"
    if not (tests / "chainer_tests").is_dir():
        sys.exit(f"test_chainer: {checkout} has no tests/chainer_tests; name a checkout of github.com/chainer/chainer")
    if tests.parent in Path(chainer.__file__).resolve().parents:
        sys.exit(f"test_chainer: Chainer is imported from {checkout}; install it, and take that off PYTHONPATH")
    os.chdir(tests)
    # The settings in the checkout turn each warning into an error.
    return pytest.main(
        [
            *("-c", os.devnull, f"--rootdir={tests}", "-o", "testpaths=chainer_tests"),
            *("-o", "python_functions=test", "-o", "markers=" + "\n".join(MARKERS), "-m", f"not ({EXCLUDED})"),
            *("-p", Path(__file__).stem, "-p", "no:cacheprovider", "--continue-on-collection-errors"),
            *("-q", "-rN", "--tb=no", "--disable-warnings"),
            *arguments,
        ],
        plugins=[FailuresByCause()],
    )


class FailuresByCause:
    """Plugin that gathers failures by the error that caused them, and prints how many there are of each."""

    def __init__(self) -> None:
        self._tests: DefaultDict[str, Set[str]] = collections.defaultdict(set)

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._tests[cause_of(report)].add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for cause, tests in sorted(self._tests.items(), key=lambda item: -len(item[1])):
            terminalreporter.write_line(f"{len(tests):6} {cause}\n       as in {min(tests)}")


def cause_of(report: Any) -> str:
    """Returns the type of the error of a failed test or import and the first line of its message."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longrepr).strip().splitlines()[-1].lstrip("E ")[:100]
    # Chainer wraps errors in others of the same type, and the one in the middle is the cause.
    return crash.message.rsplit("(caused by)\n", 1)[-1].strip().splitlines()[0][:100]


# What follows is done in each process of pytest, which imports this file as a plugin.


def seed() -> None:
    """Seeds what the tests draw from."""
    random.seed(0)
    numpy.random.seed(0)


def pytest_collection() -> None:
    """Gives the tests, which bear the values of their parameters in their names, the same names in each process."""
    make_name = parameterized._make_class_name
    parameterized._make_class_name = lambda *args: re.sub(" at 0x[0-9a-f]+", "", make_name(*args))
    seed()


def pytest_runtest_setup() -> None:
    """Gives each test the same random numbers, whatever runs before it."""
    seed()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
