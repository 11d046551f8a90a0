"""The language model runs, and shows that streams in groups are the same training run."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_examples import EXAMPLES, rows_of, run_program

LANGUAGE_MODEL = EXAMPLES / "language_model" / "train_language_model.py"


def test_language_model_ends_in_the_same_parameters_with_streams_in_groups_and_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its matrix products are many and small: on a busy machine, BLAS threads would mostly wait for one another.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = ["--updates", "3", "--batch-size", "128", "--groups", "4", "--bprop-len", "20"]
    printed = run_program(LANGUAGE_MODEL, *work, "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert len(rows) == 2, printed
    _, differences, perplexities, validation_perplexities, peaks, _ = zip(*rows)
    assert float(differences[0]) == 0
    assert float(differences[1]) < 1e-5, printed
    for full, accumulated in (map(float, perplexities), map(float, validation_perplexities)):
        assert accumulated == pytest.approx(full, abs=1e-3), printed
    full_peak, accumulated_peak = (float(peak.replace("MiB", "")) for peak in peaks)
    assert accumulated_peak < full_peak / 2, printed
    for way in ("full_batch", "accumulated"):
        assert (tmp_path / way / "log").exists()
