"""benchmarks/gpu.py runs, which without a GPU can be seen on the host only, and does nothing where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import has_gpu

ROOT = Path(__file__).parents[2]


def run_benchmark(*args: str) -> Any:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), *args]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)


def test_it_prints_a_row_for_each_network_and_size() -> None:
    args = ["--device=@numpy", "--rounds", "2", "-k", "2", "--micro-batch-sizes", "1", "2"]
    rows = [line for line in run_benchmark(*args).stdout.splitlines() if " ms |" in line]
    assert [row.split(" | ")[1] for row in rows] == ["1", "2"] * 3


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_prints_no_result() -> None:
    done = run_benchmark()
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "nothing was measured" in done.stderr
