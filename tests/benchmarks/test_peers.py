"""The committed table of peers is true where that can be checked without them: the steps of Chainer's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import pytest

from helpers import table_below

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = table_below((BENCHMARKS / "peers.md").read_text(encoding="utf-8"), "## Deviation")
NORMALIZED = table_below((BENCHMARKS / "peers.md").read_text(encoding="utf-8"), "## The same with batch normalization")
COMMITTED = {name: [float(cell) for cell in cells] for name, *cells in TABLE}
EXACT = 1e-6


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    return peers


def deviations_of(peers: Any, name: str) -> List[float]:
    return [peers.deviation(peers.all_contestants()[name], case) for case in peers.CASES]


def test_the_step_of_accumulating_updater_is_that_of_the_full_batch_in_every_case(peers: Any) -> None:
    assert max(deviations_of(peers, peers.OURS)) < EXACT


def test_no_accumulation_by_hand_in_chainer_is_exact_in_every_case(peers: Any) -> None:
    by_hand = [name for name in peers.peers_in_chainer.CONTESTANTS if name != peers.OURS]
    assert len(by_hand) == 3
    for name in by_hand:
        alike, *others = deviations_of(peers, name)
        assert alike < EXACT, name
        assert max(others) > 0.1, name


def test_the_committed_deviations_are_those_of_today(peers: Any) -> None:
    for name in peers.peers_in_chainer.CONTESTANTS:
        *committed, largest = COMMITTED[name]
        assert largest == max(committed), name
        for actual, expected in zip(deviations_of(peers, name), committed):
            assert actual == pytest.approx(expected, rel=0.05, abs=EXACT), name


def test_updates_at_each_kth_call_leave_out_what_is_left_at_the_end_of_the_data(peers: Any) -> None:
    case = next(case for case in peers.CASES if len(case.sizes) < peers.CASE_STEPS)
    assert peers.deviation(peers.peers_in_chainer.update_at_each_kth_call, case) == 1
    assert peers.deviation(peers.peers_in_chainer.loss_over_k, case) == pytest.approx(1 / 4, abs=1e-5)


def test_with_batch_normalization_and_dropout_only_lockstep_is_exact(peers: Any) -> None:
    contestants = {**peers.peers_in_chainer.LOCKSTEP, **peers.peers_in_chainer.CONTESTANTS}
    for name, make in contestants.items():
        deviations = peers.deviations_with_normalization(make, has_dropout=True)
        if name in peers.peers_in_chainer.LOCKSTEP:
            assert max(deviations) < 2 * EXACT
        else:
            assert min(deviations) > 0.1, name


def test_the_committed_deviations_with_batch_normalization_are_of_all_contestants_of_chainer(peers: Any) -> None:
    rows = {name: cells for name, *cells in NORMALIZED}
    assert next(iter(rows)) in peers.peers_in_chainer.LOCKSTEP
    assert set(rows) >= {*peers.peers_in_chainer.LOCKSTEP, *peers.peers_in_chainer.CONTESTANTS}
    for name, cells in rows.items():
        values = [float(cell) for cell in cells if cell != "–"]
        assert max(values) < 2 * EXACT if name in peers.peers_in_chainer.LOCKSTEP else min(values) > 0.1, name
