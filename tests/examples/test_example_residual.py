"""The residual network runs, and shows that lockstep makes batch normalization and dropout exact."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, rows_of, run_program

RESIDUAL = EXAMPLES / "residual" / "train_residual.py"


def test_the_residual_network_is_that_of_the_whole_batch_in_lockstep_only(tmp_path: Path) -> None:
    printed = run_program(RESIDUAL, "--epoch", "1", "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    whole, lockstep, alone = rows_of(table)
    assert [float(cell) for cell in whole[1:3]] == [0, 0]
    assert max(float(cell) for cell in lockstep[1:3]) < 1e-10, printed
    assert min(float(cell) for cell in alone[1:3]) > 1e-2, printed
    assert lockstep[3] == whole[3], printed
    assert float(lockstep[4].split()[0]) < float(whole[4].split()[0]) / 2, printed
