"""The benchmark of the search for a micro-batch size follows it to its end and compares what it predicts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import pytest

from helpers import table_below

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
in_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured as Linux counts it")


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import auto

    with chainer.Reporter().scope({}):
        yield auto


@in_linux
def test_a_search_is_followed_until_the_choice_is_made(auto: Any) -> None:
    updater = auto.make_updater(auto.WORKLOADS[0], 64, "auto")
    reports = auto.search(updater)
    assert 1 < len(reports) <= auto.MOST_WINDOWS
    assert updater.iteration == len(reports) + 1
    chosen = updater.micro_batch_size
    updater.update()
    assert updater.micro_batch_size == chosen


@in_linux
def test_the_peaks_of_each_window_come_from_a_process_of_their_own(auto: Any) -> None:
    windows = auto.peaks_of(0, {})
    assert 1 < len(windows) <= auto.MOST_WINDOWS
    assert windows[0][1] is None and all(peak > 2**20 for _, _, peak in windows)
    assert any(predicted for _, predicted, _ in windows)


def test_a_target_is_kept_if_every_prediction_is_close(auto: Any) -> None:
    first, close, far = (1.0, None, 200.0), (64.0, 210.0, 200.0), (128.0, 160.0, 200.0)
    assert auto.cells_of([first, close])[:2] == ["1", "64: 1.05"]
    assert auto.cells_of([first, close])[-1] == "yes"
    assert auto.cells_of([first, close, far])[-1] == "no"
    assert auto.cells_of([first])[-1] == "no"  # nothing was predicted


def test_the_table_has_two_rows_for_each_network(
    auto: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto, "peaks_of", lambda number, environment: [(1.0, None, 2e8), (8.0, 2e8, 2e8)])
    auto.print_peaks()
    rows = table_below(capsys.readouterr().out, "## Predicted memory")
    assert [row[:2] for row in rows] == [[c.name, freed] for c in auto.CASES for freed in ("kept", "given back")]
    assert len(auto.CASES) == 6
