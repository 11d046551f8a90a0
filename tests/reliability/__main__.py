"""Runs the reliability suite and prints what it did, as docs/reliability.md has it.

python tests/reliability

"""

from __future__ import annotations

import collections
import pathlib
import sys
from typing import Any, Dict, Tuple

import pytest
from scale import SEED, TIMES

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "reliability.md"
# By what the tests record as they pass: what is counted.
ROWS: Dict[str, str] = {
    "kills": "kills of a training process, survived",
    "exceptions": "exceptions within a window",
    "memory limits": "processes with a memory limit",
    "damaged snapshots": "damaged, truncated or foreign snapshots",
    "bad inputs": "bad inputs, refused",
    "random cases": "random cases, equal to `StandardUpdater`",
    "random programs": "random programs, equal to `StandardUpdater`",
    "random networks in lockstep": "random networks in lockstep, equal to `StandardUpdater`",
    "interrupts": "interrupts at random bytecodes",
}


class Counts:
    """Adds up what the tests that pass have recorded."""

    def __init__(self) -> None:
        self._counts: Dict[str, int] = collections.Counter()
        self.is_complete = True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            for name, count in report.user_properties:
                self._counts[name] += count
        elif not report.passed:
            self.is_complete = False

    def table(self) -> str:
        lines: Tuple[str, ...] = ("| what | times |", "| --- | ---: |")
        return "\n".join([*lines, *(f"| {what} | {self._counts[name]:,} |" for name, what in ROWS.items())])


def main() -> int:
    counts = Counts()
    status = int(pytest.main(["-q", str(HERE), *sys.argv[1:]], plugins=[counts]))
    print(counts.table())
    is_usual = not sys.argv[1:] and (TIMES, SEED) == (1, 0)
    if counts.is_complete and is_usual and counts.table() not in PAGE.read_text(encoding="utf-8"):
        print("docs/reliability.md has another table; give it this one")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
