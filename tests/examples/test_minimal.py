"""The shortest program trains, and logs what it logs with the updater that it replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest
from test_examples import EXAMPLES, run_program

MINIMAL = EXAMPLES / "minimal.py"


def run(program: Path, folder: Path) -> List[Dict[str, Any]]:
    """Runs a program in a folder and returns its log."""
    printed = run_program(program, cwd=folder)

    assert "Warning" not in printed
    log: List[Dict[str, Any]] = json.loads((folder / "result" / "log").read_text(encoding="utf-8"))
    assert len(printed.splitlines()) == 1 + len(log), printed
    return log


def test_minimal_learns_its_task_with_an_update_per_256_examples(tmp_path: Path) -> None:
    log = run(MINIMAL, tmp_path)

    assert [entry["iteration"] for entry in log] == [4096 // 256 * entry["epoch"] for entry in log]
    assert log[-1]["validation/main/accuracy"] > 0.95


def test_minimal_trains_as_it_does_with_the_updater_in_its_comment(tmp_path: Path) -> None:
    source = MINIMAL.read_text(encoding="utf-8")
    with_standard_updater = tmp_path / "with_standard_updater.py"
    updater = "chainer_accum.AccumulatingUpdater(train_iter, optimizer, micro_batch_size=32)"
    assert source.count(updater) == 1
    assert source.count("StandardUpdater(train_iter, optimizer)") == 1
    with_standard_updater.write_text(
        source.replace(updater, "chainer.training.updaters.StandardUpdater(train_iter, optimizer)"), encoding="utf-8"
    )
    folders = [tmp_path / "accumulated", tmp_path / "standard"]
    for folder in folders:
        folder.mkdir()

    accumulated, standard = (run(program, f) for program, f in zip((MINIMAL, with_standard_updater), folders))

    for key in ("main/loss", "main/accuracy", "validation/main/loss"):
        assert [entry[key] for entry in accumulated] == pytest.approx([entry[key] for entry in standard], rel=1e-4)
