"""The GAN example runs, and both ways of training end in the same networks."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, rows_of, run_program

GAN = EXAMPLES / "gan" / "train_gan.py"


def test_gan_ends_in_the_same_networks_with_less_memory(tmp_path: Path) -> None:
    printed = run_program(GAN, "--epoch", "2", "--out", str(tmp_path))

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    whole, accumulated = rows_of(table)
    assert float(whole[1]) == float(whole[2]) == 0
    assert float(accumulated[1]) < 1e-5 and float(accumulated[2]) < 1e-5, printed
    assert accumulated[3:5] == whole[3:5], printed
    assert float(accumulated[5].replace("MiB", "")) < float(whole[5].replace("MiB", "")) / 2, printed
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
