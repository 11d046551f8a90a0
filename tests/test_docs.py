"""The code in docs/ runs, page by page, and the pages lead to one another."""

from __future__ import annotations

import inspect
import pathlib
import re

import chainer_accum
import chainer
import pytest
from chainer.training import Trainer

from conftest import make_dataset, make_model, serial

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name, tmp_path, capsys):
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
    for block in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)
    capsys.readouterr()
    assert optimizer.t > 0 or name in ("chainer_examples.md", "distributed.md", "index.md", "optimizer.md")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_every_page_is_linked(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (DOCS / target).exists(), target
    assert name == "index.md" or f"({name})" in (DOCS / "index.md").read_text(encoding="utf-8")


def test_every_public_name_is_documented():
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in PAGES)
    for name in {*chainer_accum.__all__, *chainer_accum.extensions.__all__} - {"extensions"}:
        assert name in text, name
        public = getattr(chainer_accum, name, None) or getattr(chainer_accum.extensions, name)
        assert public.__doc__ and ("Args:" in public.__doc__ or not inspect.signature(public).parameters), name
