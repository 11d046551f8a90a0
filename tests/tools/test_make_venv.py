"""The environment of ``make test`` is made with any Python that is new enough, and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import pytest

ROOT = Path(__file__).parents[2]

# Takes itself for another version, claims to have venv, and makes no environment.
PYTHON = """#!/bin/sh
case $* in
    "-c import ensurepip, venv") ;;
    -c*) shift; exec "{executable}" -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$@" ;;
    -V*) echo "Python {name}" ;;
    *) echo "asked for $*"; exit 7 ;;
esac
"""


@pytest.fixture
def make_venv(tmp_path: Path) -> Any:
    def run(version: Tuple[int, int]) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "python"
        name = ".".join(map(str, version))
        python.write_text(PYTHON.format(executable=sys.executable, version=version, name=name))
        python.chmod(0o755)
        command = [str(ROOT / "tools/make_venv.sh"), str(tmp_path / "venv"), str(python)]
        return subprocess.run(command, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("version", [(3, 8), (3, 15)])
def test_the_ends_of_the_range_are_taken_without_a_word(make_venv: Any, version: Tuple[int, int]) -> None:
    process = make_venv(version)
    assert process.returncode == 7 and "asked for -m venv" in process.stdout
    assert process.stderr == ""


def test_a_newer_python_is_tried_with_a_notice(make_venv: Any) -> None:
    process = make_venv((3, 16))
    assert process.returncode == 7 and "asked for -m venv" in process.stdout
    assert process.stderr == "make_venv: trying Python 3.16, which is newer than 3.15 and untested\n"


def test_an_older_python_is_refused_with_the_remedy(make_venv: Any) -> None:
    process = make_venv((3, 7))
    assert process.returncode == 1 and "asked for" not in process.stdout
    assert process.stderr.startswith("make_venv: Python 3.7 is too old; install one of 3.8 to 3.15, or name it: ")
