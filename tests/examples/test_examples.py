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


def test_digits_shows_that_lockstep_is_exact_with_less_memory(tmp_path: Path) -> None:
    printed = run_program(
        DIGITS, "--epoch", "2", "--batch-size", "64", "--micro-batch-size", "16", "--out", str(tmp_path)
    )

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert len(rows) == 4, printed
    _, differences, losses, _, peaks, _ = zip(*rows)
    whole, memory, file, alone = map(float, differences)
    assert whole == 0
    assert max(memory, file) < 1e-5 < 1e-2 < alone, printed
    whole_loss, memory_loss, file_loss, alone_loss = map(float, losses)
    assert max(abs(loss - whole_loss) for loss in (memory_loss, file_loss)) < 1e-5 < abs(alone_loss - whole_loss), (
        printed
    )
    full, in_memory, in_file, _ = (float(peak.replace("MiB", "")) for peak in peaks)
    assert in_file < in_memory < full / 2, printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for way in ("full_batch", "lockstep_memory", "lockstep_file", "alone"):
        assert (tmp_path / way / "log").exists()
        assert (tmp_path / way / "loss.png").exists()
        assert len(list((tmp_path / way).glob("snapshot_iter_*"))) == 1


# The other program imports mpi4py.
@pytest.mark.parametrize(
    "program", sorted(set(EXAMPLES.glob("*/*.py")) - {EXAMPLES / "chainermn" / "train_digits.py"}), ids=lambda p: p.stem
)
def test_a_program_finds_what_the_examples_share_from_its_own_folder(program: Path) -> None:
    assert "--out" in run_program(Path(program.name), "--help", cwd=program.parent)
