"""The benchmark of training within a limit on memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import pytest

from helpers import table_below

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory_limit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_limit

    return memory_limit


def test_networks_differ_by_seed_and_are_the_same_for_the_same(memory_limit: Any) -> None:
    def describe(seed: int) -> Any:
        network = memory_limit.draw(seed)
        return network.shape, network.batch, len(network.layers), type(network.optimizer)

    assert describe(3) == describe(3)
    assert len({describe(seed) for seed in range(20)}) == 20


def test_the_table_counts_how_runs_ended(memory_limit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [memory_limit.Run(seed, memory_limit.Watched()) for seed in range(3)]
    outcomes = [{memory_limit.WHOLE: whole, memory_limit.GIVEN: given} for whole, given in zip((-9, -9, 0), (0, 0, 1))]
    memory_limit.print_table(runs, outcomes)
    rows = table_below(capsys.readouterr().out, "| micro-batches")
    assert rows == [[memory_limit.WHOLE, "3", "1", "2", "0"], [memory_limit.GIVEN, "3", "2", "0", "1"]]
