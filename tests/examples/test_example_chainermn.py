"""The ChainerMN example runs on 1, 2 and 4 ranks, which all end with the same parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_examples import EXAMPLES, rows_of, run_program

COMPARE = EXAMPLES / "chainermn" / "compare.py"


def test_all_numbers_of_ranks_end_in_the_same_network_with_an_eighth_of_the_traffic(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="needs MPI: make test-mpi")

    printed = run_program(COMPARE, "--epoch", "1", "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    rows = rows_of(table)
    assert [row[:4] for row in rows] == [
        [steps, ranks, updates, updates] for steps, updates in (("1", "40"), ("8", "5")) for ranks in "124"
    ]
    for row in rows:
        assert float(row[5]) == 0, printed
        assert float(row[6]) < 1e-5, printed
    for each, accumulated in zip(rows[:3], rows[3:]):
        assert float(accumulated[4]) == pytest.approx(float(each[4]) / 8, abs=0.05)
    assert len({row[7] for row in rows[:3]}) == len({row[7] for row in rows[3:]}) == 1
