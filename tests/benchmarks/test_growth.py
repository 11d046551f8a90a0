"""The benchmark of cost as work grows times what it says it does, and its committed tables agree with one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import pytest
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater

from helpers import assert_same_parameters, table_below

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED = (BENCHMARKS / "growth.md").read_text(encoding="utf-8")


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import growth

    return growth


def step(make: Any, growth: Any, job: Any) -> chainer.Chain:
    """Returns the model after one window of what is timed."""
    with chainer.Reporter().scope({}):
        optimizer, iterator = growth.set_up(job.workload, job.k)
        make(optimizer, iterator, job.k)()
    assert iterator.epoch_detail == 1
    return optimizer.target


def standard_step(job: Any, examples: Any) -> chainer.Chain:
    optimizer = chainer.optimizers.SGD().setup(job.workload.make_model())
    StandardUpdater(SerialIterator(examples, len(examples), shuffle=False), optimizer).update()
    return optimizer.target


@pytest.mark.parametrize("k", [1, 3])
def test_a_window_makes_the_step_of_standard_updater_with_the_whole_batch(growth: Any, k: int) -> None:
    job = growth.Job(width=5, micro_batch_size=2, k=k)
    expected = standard_step(job, job.workload.make_dataset(job.examples))
    assert_same_parameters(step(growth.make_window, growth, job), expected)


def test_the_floor_passes_all_examples_and_makes_the_step_of_the_last_micro_batch(growth: Any) -> None:
    job = growth.Job(width=5, micro_batch_size=2, k=3)
    expected = standard_step(job, job.workload.make_dataset(job.examples)[-2:])
    assert_same_parameters(step(growth.make_floor, growth, job), expected)


def test_each_growth_covers_its_range(growth: Any) -> None:
    ends = [[getattr(job, grown.name) for job in grown.jobs[:: len(grown.jobs) - 1]] for grown in growth.GROWTHS]
    assert ends[:2] == [[1, 1024], [1, 4096]]
    assert ends[2] == [pytest.approx(1e4, rel=0.03), pytest.approx(1e8, rel=0.03)]


def test_the_number_of_parameters_is_that_of_the_model(growth: Any) -> None:
    job = growth.Job(width=7)
    assert job.parameters == sum(param.size for param in job.workload.make_model().params())


def test_the_peak_of_a_window_is_that_of_a_micro_batch(growth: Any) -> None:
    job = growth.Job(width=64, micro_batch_size=256, k=16)
    growth.measure_peaks(job)  # imports and caches what the first updates need
    peaks = growth.measure_peaks(job)
    assert peaks[growth.WINDOW] < 1.1 * peaks[growth.AT_SIZE]
    assert peaks[growth.WHOLE] > 8 * peaks[growth.AT_SIZE]


def test_a_table_has_a_row_for_each_job_and_a_plot(
    growth: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    jobs = [growth.Job(width=4, micro_batch_size=2, k=k) for k in (1, 2)]
    grown = growth.Growth("k", "k", "a small one", jobs)
    costs = growth.print_table(grown, seconds=0)
    rows = table_below(capsys.readouterr().out, "## By k")
    assert [row[:2] for row in rows] == [["1", "5"], ["2", "5"]]
    assert [cost.job for cost in costs] == jobs
    growth.plot(grown, costs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_committed_tables_have_the_rows_and_plots_of_today(growth: Any) -> None:
    for grown in growth.GROWTHS:
        rows = table_below(COMMITTED, f"## By {grown.title}\n")
        assert [row[0] for row in rows] == [f"{getattr(job, grown.name):,}" for job in grown.jobs]
        assert f"(growth_{grown.name}.png)" in COMMITTED
        assert (BENCHMARKS / f"growth_{grown.name}.png").exists()
