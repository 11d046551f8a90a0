"""The tagger runs, and shows what micro-batches of unlike numbers of tokens have to be weighted by."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, rows_of, run_program

TAGGER = EXAMPLES / "tagger" / "train_tagger.py"


def test_tagger_ends_in_the_same_parameters_only_if_micro_batches_are_weighted_by_tokens(tmp_path: Path) -> None:
    work = ["--epoch", "1", "--lines", "200", "--batch-size", "64", "--micro-batch-size", "16", "--max-tokens", "128"]
    printed = run_program(TAGGER, *work, "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert len(rows) == 5, printed
    _, first_differences, differences, losses, validation_losses, accuracies = zip(*rows)
    for full, gathered, split, sorted_split, unweighted in (map(float, first_differences), map(float, differences)):
        assert full == 0
        assert max(gathered, split, sorted_split) < 1e-5, printed
        assert unweighted > 1e-4, printed
    for full, gathered, split, sorted_split, unweighted in (map(float, losses), map(float, validation_losses)):
        assert max(abs(loss - full) for loss in (gathered, split, sorted_split)) < 1e-5, printed
        assert unweighted != full, printed
    assert len(set(accuracies[:4])) == 1, printed
    for way in ("full_batch", "gathered", "split", "split_by_tokens", "gathered_by_sequences"):
        assert (tmp_path / way / "log").exists()
