"""The examples run, and show what they say they show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import pytest

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
DIGITS = EXAMPLES / "digits" / "train_digits.py"


def run_program(program: Path, *args: str, cwd: Optional[Path] = None) -> str:
    """Runs an example and returns what it printed; if it fails, the test fails with that message."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    completed = subprocess.run(
        [sys.executable, str(program), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
        cwd=cwd,
    )
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def rows_of(table: str) -> List[List[str]]:
    """Returns the cells of a Markdown table, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_digits_shows_three_ways_that_end_in_the_same_parameters_with_less_memory(tmp_path: Path) -> None:
    printed = run_program(
        DIGITS, "--epoch", "2", "--batch-size", "64", "--micro-batch-size", "16", "--out", str(tmp_path)
    )

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert len(rows) == 3, printed
    _, differences, losses, _, peaks, _ = zip(*rows)
    assert float(differences[0]) == 0
    assert max(map(float, differences)) < 1e-5, printed
    assert max(map(float, losses)) - min(map(float, losses)) < 1e-5, printed
    full, gathered, split = (float(peak.replace("MiB", "")) for peak in peaks)
    assert max(gathered, split) < full / 2, printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for way in ("full_batch", "gathered", "split"):
        assert (tmp_path / way / "log").exists()
        assert (tmp_path / way / "loss.png").exists()
        assert len(list((tmp_path / way).glob("snapshot_iter_*"))) == 1


# The other program imports mpi4py.
@pytest.mark.parametrize(
    "program", sorted(set(EXAMPLES.glob("*/*.py")) - {EXAMPLES / "chainermn" / "train_digits.py"}), ids=lambda p: p.stem
)
def test_a_program_finds_what_the_examples_share_from_its_own_folder(program: Path) -> None:
    assert "--out" in run_program(Path(program.name), "--help", cwd=program.parent)
