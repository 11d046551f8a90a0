"""The benchmark of batches cut by length compares equal steps, and its committed tables are those of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import numpy
import pytest

from helpers import table_below

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
every_tagger = pytest.mark.parametrize("place", [0, 1])
every_distribution = pytest.mark.parametrize("distribution", ["lognormal", "short and long"])


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lengths

    with chainer.Reporter().scope({}):
        yield lengths


@every_tagger
@every_distribution
def test_every_contestant_takes_the_step_of_the_whole_batch(lengths: Any, place: int, distribution: str) -> None:
    job = lengths.Job(lengths.TAGGERS[place], distribution, batch=16, budget=400)
    deviations = lengths.deviations(job, numpy.float64)
    assert set(deviations) == set(lengths.CONTESTANTS)
    assert max(deviations.values()) < 1e-14
    assert max(lengths.deviations(job, numpy.float32).values()) < 1e-6


@every_tagger
def test_padding_does_not_change_what_a_network_says_about_tokens(lengths: Any, place: int) -> None:
    model = lengths.TAGGERS[place].make_model()
    examples = [(numpy.arange(length, dtype="i"), numpy.zeros(length, "i")) for length in (3, 7, 5)]
    with chainer.no_backprop_mode():
        together = model.predictor(lengths.pad(examples, None)[0]).array
        for row, (tokens, _) in zip(together, examples):
            alone = model.predictor(tokens[None]).array[0]
            numpy.testing.assert_allclose(row[: len(tokens)], alone, rtol=1e-4, atol=1e-5)


@every_distribution
def test_lengths_are_within_their_range_and_differ(lengths: Any, distribution: str) -> None:
    drawn = [lengths.length_of(example) for example in lengths.make_dataset(distribution, 1000)]
    assert 4 <= min(drawn) < 10 and 150 < max(drawn) <= 200


def test_no_micro_batch_of_the_compared_ones_exceeds_the_budget(lengths: Any) -> None:
    job = lengths.Job(lengths.TAGGERS[1], "short and long", batch=24, budget=400)
    sizes = []

    def converter(examples: Any, device: Any) -> Any:
        arrays = lengths.pad(examples, device)
        sizes.append(arrays[0].size)
        return arrays

    for name in (lengths.CONTIGUOUS, lengths.TOKENS, lengths.GATHERED, lengths.TOGETHER):
        job.make_updater(name, converter=converter).update()
    assert max(sizes) <= 400


def test_the_tables_have_a_row_for_each_contestant_and_target(
    lengths: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = lengths.TAGGERS[1].network  # without a call for each token
    small = lengths.Tagger("small", lambda: network(units=4, layers=1))
    monkeypatch.setattr(lengths, "TAGGERS", [small])
    monkeypatch.setattr(lengths, "DISTRIBUTIONS", ["lognormal"])
    lengths.print_targets(lengths.print_costs(rounds=2, batch=8, budget=400))
    printed = capsys.readouterr().out
    rows = table_below(printed, "| network, lengths")
    assert [row[1].split(":")[0] for row in rows] == list(lengths.CONTESTANTS)
    assert rows[1][3] == "1.000 (1.000–1.000)"  # of the time of itself
    targets = table_below(printed, "## Targets")
    assert [row[1] for row in targets] == ["small, lognormal"] * 5
    assert [row[-1] for row in targets[3:]] == ["yes", "yes"]


def test_the_committed_table_has_the_rows_of_today_and_equal_steps(lengths: Any) -> None:
    committed = (BENCHMARKS / "lengths.md").read_text(encoding="utf-8")
    rows = table_below(committed, "| network, lengths")
    titles = [lengths.Job(t, d, 0, 0).title for d in lengths.DISTRIBUTIONS for t in lengths.TAGGERS]
    assert [row[0] for row in rows] == [title for title in titles for _ in lengths.CONTESTANTS]
    deviations = [row for row in table_below(committed, "## Targets") if row[0].startswith("deviation")]
    assert [row[-1] for row in deviations] == ["yes"] * 2 * len(titles)
