"""The example of the learning rate survey runs, and shows what it says it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import numpy
from test_examples import EXAMPLES, rows_of, run_program

LR_SURVEY = EXAMPLES / "lr_survey" / "survey_learning_rates.py"


def test_real_and_virtual_batches_coincide_and_larger_ones_tolerate_larger_rates(tmp_path: Path) -> None:
    printed = run_program(LR_SURVEY, "--batch-sizes", "32", "256", "--updates", "50", "--out", str(tmp_path))

    def result(kind: str, batch_size: int) -> Dict[str, Any]:
        path = tmp_path / f"{kind}_{batch_size}" / "learning_rate_survey.json"
        written: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return written

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert [row[0] for row in rows] == ["32", "256"], printed
    for row in rows:
        real, virtual = (result(kind, int(row[0])) for kind in ("real", "virtual"))
        lowest = int(numpy.argmin(real["smoothed_losses"]))
        assert row[2] == f"{real['learning_rates'][lowest]:.3g}"
        assert row[3:5] == [f"{each['diverged_at']:.3g}" for each in (real, virtual)]
        assert real["learning_rates"][0] == 1e-3
        assert real["losses"][lowest] < 0.5 * real["losses"][0], printed
        # Past the lowest loss, rounding grows with everything else.
        numpy.testing.assert_allclose(virtual["losses"][:lowest], real["losses"][:lowest], rtol=1e-4, err_msg=printed)
    small, large = (result("virtual", size)["diverged_at"] for size in (32, 256))
    assert small < large, printed
    assert (tmp_path / "surveys.png").read_bytes().startswith(b"\x89PNG")
