"""The README is true: its code runs, its links and commands exist, its figures are those of the committed results."""

from __future__ import annotations

import pathlib
import re

import chainer_accum
import chainer
import pytest
from chainer.training.updaters import StandardUpdater

from helpers import dead_links, make_dataset, make_model, serial, table_below

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_code_runs():
    optimizer = chainer.optimizers.SGD().setup(make_model())
    x, t = chainer.dataset.concat_examples(make_dataset(8))
    namespace = {
        "chainer": chainer,
        "model": optimizer.target,
        "micro_batches": [(x[:3], t[:3]), (x[3:], t[3:])],
        "train_iter": serial(make_dataset(), 2),
        "optimizer": optimizer,
    }
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    importing, updating, adding, wrapping = code.split("\n\n")
    exec(importing, namespace)
    exec(updating, namespace)
    namespace["updater"].update()
    assert (namespace["updater"].accumulation_steps, optimizer.t) == (8, 1)
    exec(adding, namespace)
    assert optimizer.t == 2
    exec(wrapping, namespace)
    for _ in range(8):
        namespace["optimizer"].update(optimizer.target, x, t)
    assert namespace["optimizer"].t == 2


def test_the_one_line_change_is_one_line_that_runs():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    removed, added = diff.splitlines()
    assert removed.startswith("-updater = StandardUpdater(") and added.startswith("+updater = AccumulatingUpdater(")
    namespace = {
        "AccumulatingUpdater": chainer_accum.AccumulatingUpdater,
        "train_iter": serial(make_dataset(), 48),
        "optimizer": chainer.optimizers.SGD().setup(make_model()),
    }
    exec(added[1:], namespace)
    namespace["updater"].update()
    assert namespace["updater"].iteration == 1


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md"]
)
def test_links_lead_somewhere(name):
    assert not dead_links(ROOT / name)


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_figures_are_those_of_the_committed_results():
    overhead = table_below((ROOT / "benchmarks/overhead.md").read_text(encoding="utf-8"), "# ")
    memory = table_below((ROOT / "benchmarks/memory.md").read_text(encoding="utf-8"), "# ")
    quoted = table_below(RESULTS, "## Summary")
    assert len(quoted) == len(overhead) == len(memory) / 2
    for (_, window, by_hand, peak, whole), time_row, memory_row in zip(quoted, overhead, memory[::2]):
        assert window == f"{float(time_row[4].split()[0]):.2f}"
        assert by_hand == f"{float(time_row[5].split()[0]):.2f}"
        assert peak == span(map(float, memory_row[4:8]))
        assert whole == f"{float(memory_row[8]):.1f}"

    (of_one_pass,) = re.findall(r"the LSTM takes (\S+) of the time of `StandardUpdater`", RESULTS)
    assert of_one_pass == f"{float(overhead[-1][6].split()[0]):.2f}"


def test_the_peak_of_an_update_does_not_grow_with_k(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peaks
    import workloads

    workload, *_ = workloads.WORKLOADS
    size = workload.micro_batch_size

    def peak(updater_class, examples=16 * size, **kwargs):
        return peaks.peak(workload, chainer.optimizers.Adam, updater_class, size, examples, **kwargs)

    peak(StandardUpdater, size)  # imports and caches what the first update needs
    floor = peak(StandardUpdater)
    for k in (1, 4, 16):
        assert peak(chainer_accum.AccumulatingUpdater, accumulation_steps=k) <= 1.05 * floor, k


def test_the_figures_of_growing_work_are_those_of_the_committed_tables():
    growth = (ROOT / "benchmarks/growth.md").read_text(encoding="utf-8")
    quoted = table_below(RESULTS, "varying one factor at a time")
    titles = re.findall(r"^## By (.*)$", growth, re.MULTILINE)
    assert len(quoted) == len(titles) == 3
    for (_, times, peaks), title in zip(quoted, titles):
        rows = table_below(growth, f"## By {title}\n")
        assert times == span(float(row[4].split()[0]) for row in rows)
        assert peaks == span(float(row[5].split()[0]) / float(row[7].split()[0]) for row in rows)


def span(ratios):
    ratios = sorted(ratios)
    return f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
