"""The contrastive example runs, and shows the step of the whole batch in less memory than the whole batch needs."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, rows_of, run_program

CONTRASTIVE = EXAMPLES / "contrastive" / "train_contrastive.py"


def test_contrastive_is_exact_in_memory_in_which_the_whole_batch_fails(tmp_path: Path) -> None:
    printed = run_program(CONTRASTIVE, "--epoch", "2", "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    whole, cached, plain, pixels = rows_of(table)
    assert float(whole[1]) == 0 and float(cached[1]) < 1e-5, printed
    assert float(plain[1]) > 1e-3, printed
    assert cached[2] == whole[2], printed
    assert all(float(row[2].rstrip("%")) > 70 for row in (whole, cached, plain, pixels)), printed
    assert float(cached[3].replace("MiB", "")) < float(whole[3].replace("MiB", "")) / 2, printed
    can_be_limited = Path("/proc/self/statm").exists()
    *_, whole_outcome, cached_outcome = printed.splitlines()
    assert ("within 24 MiB: fails, " in whole_outcome) == can_be_limited, printed
    assert cached_outcome.endswith("within 24 MiB: done") == can_be_limited, printed
