"""Without a Chainer that will do, the import says how to install one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chainer_accum._compat.requirement import require_chainer

ROOT = Path(__file__).parents[2]


def test_without_chainer_the_import_says_how_to_install_it() -> None:
    script = "import sys; sys.modules['chainer'] = None; import chainer_accum"
    process = subprocess.run([sys.executable, "-c", script], cwd=str(ROOT), capture_output=True, text=True)
    assert "ImportError: chainer_accum needs Chainer 7.8.1 and found none." in process.stderr
    assert 'pip install --no-build-isolation "chainer>=7.8.1"' in process.stderr
    assert "The above exception" not in process.stderr and "During handling" not in process.stderr


@pytest.mark.parametrize("version", ["5.4.0", "7.8.0", "7.8.0.post1", "8.0.0b1"])
def test_another_version_of_chainer_is_refused(version: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "chainer", SimpleNamespace(__version__=version))
    with pytest.raises(ImportError, match=f"needs Chainer 7.8.1 and found {version}"):
        require_chainer()


@pytest.mark.parametrize("version", ["7.8.1", "7.8.1.post1", "7.9.0"])
def test_chainer_from_the_one_that_is_tested_on_is_taken(version: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "chainer", SimpleNamespace(__version__=version))
    require_chainer()


def test_an_import_that_fails_within_chainer_is_not_mistaken_for_a_missing_chainer(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "chainer.py").write_text("import a_module_that_is_not_there")
    monkeypatch.delitem(sys.modules, "chainer")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        require_chainer()


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md"])
def test_the_documentation_gives_the_command_of_the_error(page: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "chainer", None)
    with pytest.raises(ImportError) as error:
        require_chainer()
    command, doctor = map(str.strip, str(error.value).splitlines()[2::2])
    text = (ROOT / page).read_text(encoding="utf-8")
    assert command in text and doctor in text
