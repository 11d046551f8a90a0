"""The benchmark of lockstep compares equal steps, and its committed tables keep what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import numpy
import pytest

from helpers import table_below

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED = (BENCHMARKS / "lockstep.md").read_text(encoding="utf-8")


@pytest.fixture
def lockstep(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lockstep

    return lockstep


@pytest.fixture
def small(lockstep: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with small networks, and with peaks that are not measured."""
    job = lockstep.Job(k=2, normalizations=1)
    workloads = [job.workload._replace(name=name, micro_batch_size=2) for name in ("first", "second", "third")]
    targets = [target._replace(workloads=workloads[:2]) for target in lockstep.TARGETS[:-1]]
    targets += [target._replace(workloads=workloads[2:]) for target in lockstep.TARGETS[-1:]]
    monkeypatch.setattr(lockstep, "NORMALIZED", workloads[:2])
    monkeypatch.setattr(lockstep, "NOT_NORMALIZED", workloads[2])
    monkeypatch.setattr(lockstep, "TARGETS", targets)
    monkeypatch.setattr(lockstep, "K", 2)
    monkeypatch.setattr(lockstep, "measure_peak", lambda name, *args: 1.0 + lockstep.CONTESTANTS.index(name))
    return lockstep


def test_the_gradient_of_lockstep_is_that_of_the_whole_batch_and_that_of_plain_micro_batches_is_not(
    lockstep: Any,
) -> None:
    workload = lockstep.Job(normalizations=2).workload._replace(micro_batch_size=3)
    errors = lockstep.errors(workload, 3, lockstep.CONTESTANTS)
    assert max(errors[name] for name in (lockstep.WHOLE, lockstep.MEMORY, lockstep.FILE)) < 1e-3
    assert errors[lockstep.PLAIN] > 0.01


@pytest.mark.parametrize("place", [0, 1, 2])
def test_models_are_initialized_alike_in_every_dtype(lockstep: Any, place: int) -> None:
    workload = [*lockstep.NORMALIZED, lockstep.NOT_NORMALIZED][place]
    narrow = lockstep.make_model(workload)
    with lockstep.chainer.using_config("dtype", numpy.float64):
        wide = lockstep.make_model(workload)
    for param, other in zip(narrow.params(), wide.params()):
        assert other.dtype == numpy.float64
        numpy.testing.assert_array_equal(param.array, other.array)


def test_networks_have_as_many_normalizations_as_they_say(lockstep: Any) -> None:
    def count(workload: Any) -> int:
        return sum(isinstance(link, lockstep.L.BatchNormalization) for link in workload.make_model().links())

    assert [count(workload) for workload in lockstep.NORMALIZED] == [4, 9]
    assert count(lockstep.NOT_NORMALIZED) == 0
    for job in lockstep.GROWTHS[1].jobs:
        assert count(job.workload) == job.normalizations


def test_each_growth_covers_its_range(lockstep: Any) -> None:
    ends = [[getattr(job, grown.name) for job in grown.jobs[:: len(grown.jobs) - 1]] for grown in lockstep.GROWTHS]
    assert ends == [[1, 64], [1, 50]]


def test_the_peak_of_a_process_is_printed_for_each_network(lockstep: Any) -> None:
    job = lockstep.Job(k=1, normalizations=1)
    assert lockstep.measure_peak(lockstep.WHOLE, job.workload, job.k) > 0
    assert len(lockstep.all_workloads()) == 3 + len({job.workload.name for g in lockstep.GROWTHS for job in g.jobs})


def test_the_tables_have_a_row_for_each_contestant_and_target(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    costs = small.print_costs(2)
    small.print_targets(costs)
    small.print_errors()
    printed = capsys.readouterr().out
    rows = table_below(printed, "## Time and peak memory")
    assert [row[2] for row in rows] == [*small.CONTESTANTS, *small.CONTESTANTS, small.PLAIN, small.MEMORY]
    targets = table_below(printed, "## Targets")
    assert [row[1] for row in targets] == ["first", "second"] * 6 + ["third"]
    assert targets[0][2:] == ["2.000", "no"]  # 4 MiB of lockstep, file / 2 MiB of plain micro-batches
    assert [row[0] for row in table_below(printed, "## Rounding")] == ["first", "second"]


def test_a_growth_has_a_row_for_each_job_and_a_plot(
    small: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    grown = [small.Growth("k", "k", "a small one", [small.Job(k=k, normalizations=1) for k in (1, 2)])]
    costs = [small.print_growth(each, seconds=0) for each in grown]
    assert [row[:2] for row in table_below(capsys.readouterr().out, "## By k")] == [["1", "5"], ["2", "5"]]
    small.plot(list(zip(grown, costs)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_committed_tables_have_the_rows_and_the_plot_of_today(lockstep: Any) -> None:
    rows = table_below(COMMITTED, "## Time and peak memory")
    assert list(dict.fromkeys(row[0] for row in rows)) == [
        workload.name for workload in [*lockstep.NORMALIZED, lockstep.NOT_NORMALIZED]
    ]
    for grown in lockstep.GROWTHS:
        rows = table_below(COMMITTED, f"## By {grown.title}\n")
        assert [row[0] for row in rows] == [f"{getattr(job, grown.name)}" for job in grown.jobs]
    assert "(lockstep.png)" in COMMITTED
    assert (BENCHMARKS / "lockstep.png").exists()


def test_the_committed_targets_are_those_of_today_and_are_kept(lockstep: Any) -> None:
    rows = table_below(COMMITTED, "## Targets")
    assert len(rows) == sum(len(target.workloads) for target in lockstep.TARGETS)
    assert not_kept(rows) == []


def not_kept(rows: List[List[str]]) -> List[List[str]]:
    return [row for row in rows if row[-1] != "yes"]
