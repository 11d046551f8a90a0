"""The metric learning example runs, and shows for which of its losses accumulation is exact."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, rows_of, run_program

SIAMESE = EXAMPLES / "siamese" / "train_siamese.py"


def test_siamese_is_exact_for_pairs_and_not_for_a_loss_that_compares_examples(tmp_path: Path) -> None:
    printed = run_program(SIAMESE, "--epoch", "2", "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    contrastive, contrastive_parts, n_pair, n_pair_parts = rows_of(table)
    assert [float(row[column]) for row in (contrastive, n_pair) for column in (1, 3)] == [0] * 4
    assert float(contrastive_parts[1]) < 1e-5 and float(contrastive_parts[3]) < 1e-5, printed
    assert contrastive_parts[4] == contrastive[4], printed
    assert float(n_pair_parts[1]) > 0.05 * float(n_pair[2]), printed
    assert all(float(row[4].rstrip("%")) > 80 for row in rows_of(table)), printed
