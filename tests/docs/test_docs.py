"""The code in docs/ runs, page by page, and the pages lead to one another."""

from __future__ import annotations

import inspect
import pathlib
import re
import types

import chainer_accum
import chainer
import pytest
from chainer_accum import functions
from chainer.training import Trainer

from helpers import dead_links, make_dataset, make_model, serial, table_below

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
WITHOUT_CODE = ["compatibility.md", "how_it_works.md", "index.md", "installation.md", "results.md"]


def code_of(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    lines = [line.strip("`") for _, line in table_below(text, "## Lines")] if name == "cheat_sheet.md" else []
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL) + lines


def test_the_pages_without_code_are_those_that_are_meant_to_have_none():
    assert [name for name in PAGES if not code_of(name)] == WITHOUT_CODE


@pytest.mark.parametrize(
    "name, optimizer_class",
    [(name, chainer.optimizers.SGD) for name in PAGES if name not in WITHOUT_CODE]
    + [("choosing.md", chainer.optimizers.Adam)],  # whose learning rate has another name
)
def test_the_code_of_a_page_runs(name, optimizer_class, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # to which a Trainer writes
    model = make_model()
    optimizer = optimizer_class().setup(model)
    updater = chainer_accum.AccumulatingUpdater(serial(make_dataset(48), 12), optimizer, micro_batch_size=6)
    namespace = {
        "chainer": chainer,
        "chainer_accum": chainer_accum,
        "AccumulatingUpdater": chainer_accum.AccumulatingUpdater,
        "comm": types.SimpleNamespace(rank=0, size=1),
        "model": model,
        "optimizer": optimizer,
        "out": str(tmp_path),
        "train_iter": serial(make_dataset(48), 12),
        "train": make_dataset(48),
        "other_iter": serial(make_dataset(48), 12),
        "trainer": Trainer(updater, (2, "epoch"), out=str(tmp_path)),
    }
    for block in code_of(name):
        exec(block, namespace)
    capsys.readouterr()
    assert namespace["optimizer"].t > 0


@pytest.mark.parametrize("heading", ["## Arguments", "## Names in other frameworks"])
def test_the_updater_takes_the_arguments_of_the_cheat_sheet(heading):
    rows = table_below((DOCS / "cheat_sheet.md").read_text(encoding="utf-8"), heading)
    assert len(rows) > 1
    for _, cell, *_ in rows:
        arguments = eval(f"dict({cell.strip('`')})", {"count_targets": len, "TokenBudget": chainer_accum.TokenBudget})
        optimizer = chainer.optimizers.SGD().setup(make_model())
        chainer_accum.AccumulatingUpdater(serial(make_dataset(), 4), optimizer, **arguments)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert not dead_links(DOCS / name)


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Some `code`, a word\n[1](page.md#some-code-a-word) [2](#word) [3](none.md) [4](page.md)")
    assert dead_links(page) == ["#word", "none.md"]


def test_every_page_is_linked():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [name for name in [*PAGES, "api.rst"] if f"({name})" not in index] == ["index.md"]


def test_every_public_name_is_on_a_page_and_in_the_reference():
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in PAGES)
    reference = re.findall(r"^.. auto(?:class|function):: (.*)$", (DOCS / "api.rst").read_text("utf-8"), re.MULTILINE)
    for module in (chainer_accum, chainer_accum.extensions, functions):
        for name in module.__all__:
            assert name in text, name
            assert f"{module.__name__}.{name}" in reference
            public = getattr(module, name)
            assert public.__doc__ and ("Args:" in public.__doc__ or not inspect.signature(public).parameters), name


def test_every_table_of_the_benchmarks_is_among_the_results():
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    tables = {path.name for path in (DOCS.parent / "benchmarks").glob("*.md")} - {"README.md"}
    assert tables == set(re.findall(r"^```\{include\} \.\./benchmarks/(.*)$", results, re.MULTILINE))
