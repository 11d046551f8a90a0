"""The code in docs/ runs, page by page, and the pages lead to one another."""

from __future__ import annotations

import inspect
import pathlib
import re

import chainer_accum
import chainer
import pytest
from chainer.training import Trainer

from conftest import dead_links, make_dataset, make_model, serial

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
WITHOUT_CODE = ["compatibility.md", "distributed.md", "gpu.md", "how_it_works.md", "index.md", "installation.md"]
WITHOUT_CODE += ["not_exact.md", "old_names.md", "results.md"]


def code_of(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_pages_without_code_are_those_that_are_meant_to_have_none():
    assert [name for name in PAGES if not code_of(name)] == WITHOUT_CODE


@pytest.mark.parametrize("name", [name for name in PAGES if name not in WITHOUT_CODE])
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # to which a Trainer writes
    model = make_model()
    optimizer = chainer.optimizers.SGD().setup(model)
    updater = chainer_accum.AccumulatingUpdater(serial(make_dataset(48), 12), optimizer, micro_batch_size=6)
    namespace = {
        "chainer": chainer,
        "chainer_accum": chainer_accum,
        "model": model,
        "optimizer": optimizer,
        "out": str(tmp_path),
        "train_iter": serial(make_dataset(48), 12),
        "other_iter": serial(make_dataset(48), 12),
        "trainer": Trainer(updater, (2, "epoch"), out=str(tmp_path)),
    }
    for block in code_of(name):
        exec(block, namespace)
    capsys.readouterr()
    assert namespace["optimizer"].t > 0


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
    for name in [*chainer_accum.__all__, *chainer_accum.extensions.__all__]:
        assert name in text, name
        module = chainer_accum if name in chainer_accum.__all__ else chainer_accum.extensions
        assert f"{module.__name__}.{name}" in reference
        public = getattr(module, name)
        assert public.__doc__ and ("Args:" in public.__doc__ or not inspect.signature(public).parameters), name


def test_every_table_of_the_benchmarks_is_among_the_results():
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    tables = {path.name for path in (DOCS.parent / "benchmarks").glob("*.md")} - {"README.md"}
    assert tables == set(re.findall(r"^```\{include\} \.\./benchmarks/(.*)$", results, re.MULTILINE))
