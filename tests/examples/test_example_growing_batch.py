"""The example of growing batches runs, and follows its schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List

import pytest
from test_examples import EXAMPLES, rows_of, run_program

GROWING_BATCH = EXAMPLES / "growing_batch" / "train_growing_batch.py"


def test_growing_batch_trains_four_ways_each_by_its_schedule(tmp_path: Path) -> None:
    printed = run_program(
        GROWING_BATCH,
        *("--epoch", "3", "--batch-size", "64", "--steps", "4", "--lr", "0.1"),
        *("--warmup", "1", "--grow-at", "1", "2", "--out", str(tmp_path)),
    )

    def logged(way: str, key: str) -> List[Any]:
        return [entry[key] for entry in json.loads((tmp_path / way / "log").read_text(encoding="utf-8"))]

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert "Warning" not in printed
    rows = rows_of(table)
    assert [row[0][:4].strip() for row in rows] == ["(a)", "(b)", "(a')", "(c)"], printed
    for row, way in zip(rows, ("small_batch", "large_batch", "decaying_rate", "growing_batch")):
        assert int(row[1]) == logged(way, "iteration")[-1]
        assert float(row[2]) == pytest.approx(logged(way, "main/loss")[-1], abs=1e-4)

    assert logged("small_batch", "accumulation_steps") == [1, 1, 1]
    assert logged("large_batch", "accumulation_steps") == [4, 4, 4]
    assert logged("decaying_rate", "accumulation_steps") == [1, 1, 1]
    assert logged("growing_batch", "accumulation_steps") == [1, 2, 4]
    assert logged("growing_batch", "effective_batch_size") == [64, 128, 256]

    assert logged("small_batch", "lr") == [0.1, 0.1, 0.1]
    # The warm-up of an epoch is 6 updates; the sixth still has the rate that the fifth step of the extension set.
    assert logged("large_batch", "lr") == pytest.approx([0.35, 0.4, 0.4])
    assert logged("decaying_rate", "lr") == pytest.approx([0.1, 0.05, 0.025])
    assert logged("growing_batch", "lr") == [0.1, 0.1, 0.1]

    # (a') and (c) are one training until they part.
    assert logged("decaying_rate", "main/loss")[0] == pytest.approx(logged("growing_batch", "main/loss")[0], rel=1e-5)
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")
