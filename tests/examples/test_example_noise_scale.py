"""The example of the noise scale runs, and the batch that grows with it needs fewer updates than the small one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List

from test_examples import EXAMPLES, rows_of, run_program

NOISE_SCALE = EXAMPLES / "noise_scale" / "train_noise_scale.py"


def test_a_batch_that_grows_with_the_noise_scale_reaches_the_target_in_fewer_updates(tmp_path: Path) -> None:
    printed = run_program(
        NOISE_SCALE,
        *("--updates", "60", "--adapt-up-to", "8", "--target", "0.925", "--seeds", "1", "--out", str(tmp_path)),
    )

    def logged(way: str, key: str) -> List[Any]:
        log = json.loads((tmp_path / f"{way}_0" / "log").read_text(encoding="utf-8"))
        return [entry[key] for entry in log if key in entry]

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert [row[0][:3] for row in rows] == ["(a)", "(b)", "(c)"], printed

    assert set(logged("small_batch", "accumulation_steps")) == {2}
    assert set(logged("large_batch", "accumulation_steps")) == {8}
    steps = logged("noise_scale", "accumulation_steps")
    assert steps[0] == 2 and steps == sorted(steps) and steps[-1] > 4, printed
    assert logged("noise_scale", "effective_batch_size") == [8 * k for k in steps]
    for way in ("small_batch", "noise_scale", "large_batch"):
        assert min(logged(way, "noise_scale")) > 0

    # Up to the first update that is looked at, (a) and (b) are one training.
    assert logged("noise_scale", "main/loss")[:4] == logged("small_batch", "main/loss")[:4]
    small, grown, _ = (None if row[1].startswith("more") else int(row[1].split()[0]) for row in rows)
    assert grown is not None and (small is None or grown < 0.8 * small), printed
    accuracies = logged("noise_scale", "validation/main/accuracy")
    assert accuracies[grown - 1] >= 0.925 > max(accuracies[: grown - 1])
    assert int(rows[1][2].split()[0]) == 8 * sum(steps[:grown])
    last = int(steps[-1])
    assert rows[1][4] == f"{last} ({last}–{last})"
    assert (tmp_path / "noise_scale.png").read_bytes().startswith(b"\x89PNG")
