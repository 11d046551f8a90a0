"""The parts of the doctor that need no environment of their own."""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from chainer_accum import _remedies
from chainer_accum.__main__ import main
from chainer_accum._doctor import Finding, as_text, examine, is_well
from chainer_accum._doctor.blas import _built_with, check_blas
from chainer_accum._doctor.devices import check_cuda, check_cudnn, check_cupy
from chainer_accum._doctor.importing import describe
from chainer_accum._doctor.packages import check_chainer, check_names, check_numpy, check_python
from chainer_accum._doctor.processes import check_mpi, check_start_method
from chainer_accum.window import blas

ROOT = pathlib.Path(__file__).parents[2]


def test_json_has_the_findings_of_the_table(capsys: Any) -> None:
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == status
    table = capsys.readouterr().out
    assert list(findings) == [line[7:].split("  ")[0] for line in table.splitlines() if line[:5] in STATUSES]
    assert status == (1 if "wrong" in {finding["status"] for finding in findings.values()} else 0)


STATUSES = ("ok   ", "note ", "wrong")


def test_every_check_succeeds_where_the_tests_run() -> None:
    assert [name for name, finding in examine().items() if finding.found.startswith("not examined")] == []


def test_a_wrong_command_line_has_status_2(capsys: Any) -> None:
    for arguments in ([], ["doctors"], ["check"], ["check", "script.py:make", "--micro-batch-size", "many"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert "usage: python -m chainer_accum" in capsys.readouterr().err


def test_a_failure_without_a_finding_is_to_be_reported(monkeypatch: Any) -> None:
    error = AttributeError("no attribute 'x'")
    findings = examine(error)
    assert findings["chainer_accum"].status == "wrong"
    assert findings["chainer_accum"].found.endswith("cannot be imported: AttributeError: no attribute 'x'")
    assert findings["chainer_accum"].command == _remedies.SHOW_TRACEBACK


@pytest.mark.parametrize("version, status", [("1.21.6", "wrong"), ("1.22.4", "ok"), ("2.9.1", "ok"), ("3.0.0", "note")])
def test_a_numpy_out_of_the_range_is_found(version: str, status: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(numpy, "__version__", version)
    finding = check_numpy(None)
    assert (finding.status, finding.found) == (status, version)
    assert finding.command == (_remedies.INSTALL_NUMPY if status == "wrong" else "")


def test_the_first_error_of_numpy_is_told_and_not_the_second(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert check_numpy(None).command == _remedies.INSTALL_NUMPY
    broken = SimpleNamespace(find_spec=lambda *_: 1 / 0)
    monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.setattr(sys, "meta_path", [broken])
    finding = check_numpy(ImportError("the first"))
    assert finding.found == "cannot be imported: ImportError: the first"
    assert finding.command == _remedies.REINSTALL_NUMPY


def test_a_python_that_is_too_new_is_noted(monkeypatch: Any) -> None:
    assert check_python().status == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 16, 0, "final", 0))
    assert check_python().status == "note"


@pytest.mark.parametrize(
    "module, advice, command",
    [
        ("chainer", "setuptools 82", _remedies.INSTALL_CHAINER),
        ("filelock", "it requires", _remedies.INSTALL_CHAINER),
    ],
)
def test_what_chainer_lacks_is_told_apart_from_chainer(
    module: str, advice: str, command: str, monkeypatch: Any
) -> None:
    def find_spec(*_: Any) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.delitem(sys.modules, "chainer")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec)])
    finding = check_chainer(None)
    assert advice in finding.advice
    assert finding.command == command


@pytest.mark.parametrize("version, status", [("7.8.0", "wrong"), ("7.8.1.post1", "ok"), ("8.0.0", "wrong")])
def test_the_version_of_chainer_is_judged_as_by_the_import(version: str, status: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "chainer", SimpleNamespace(__version__=version))
    assert check_chainer(None).status == status


@pytest.mark.parametrize("switch, status", [(None, "ok"), ("all", "ok"), ("1", "note"), ("0", "note"), ("0", "wrong")])
def test_the_switch_of_the_names_is_explained(switch: Any, status: str, monkeypatch: Any) -> None:
    if switch is None:
        monkeypatch.delenv("CHAINER_ACCUM_COMPAT", raising=False)
    else:
        monkeypatch.setenv("CHAINER_ACCUM_COMPAT", switch)
    missing = ["numpy.sctypes"] if status == "wrong" else []
    monkeypatch.setattr("chainer_accum._compat.names_to_restore", lambda: missing)
    finding = check_names()
    assert finding.status == status
    assert finding.command == ("" if status == "ok" else _remedies.RESTORE_NAMES)
    assert ("numpy.sctypes" if missing else "none is missing") in finding.found


@pytest.mark.parametrize("method, status", [("fork", "ok"), ("forkserver", "note"), ("spawn", "note")])
def test_a_start_method_that_imports_the_script_is_noted(method: str, status: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    assert check_start_method()[:2] == (status, method)


def test_without_threadpoolctl_the_blas_is_the_one_that_numpy_was_built_with(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check_blas().found.startswith(f"{_built_with(numpy)}, ")
    assert check_blas().found.endswith(", OMP_NUM_THREADS=1")
    assert "thread" not in check_blas().found.lower().replace("omp_num_threads", "")


def test_the_blas_of_scipy_is_not_taken_for_that_of_numpy(monkeypatch: Any) -> None:
    def pool(folder: str, api: str, version: str) -> Any:
        return {
            "user_api": "blas",
            "internal_api": api,
            "version": version,
            "num_threads": 1,
            "filepath": f"/packages/{folder}/lib.so",
        }

    pools = [pool("scipy.libs", "openblas", "1"), pool("conda", "mkl", "2")]
    monkeypatch.setitem(sys.modules, "threadpoolctl", SimpleNamespace(threadpool_info=lambda: pools))
    assert check_blas().found.startswith("mkl 2, 1 thread, ")


def test_the_blas_of_an_old_numpy_is_found_in_its_configuration() -> None:
    def show_config() -> None:
        pass

    info = {"libraries": ["openblas64_", "openblas64_"]}
    old = SimpleNamespace(show_config=show_config, __config__=SimpleNamespace(blas_ilp64_opt_info=info))
    assert _built_with(old) == "openblas64_"
    assert _built_with(SimpleNamespace(show_config=show_config, __config__=SimpleNamespace())) == "unknown library"


def test_without_the_library_of_numpy_products_are_not_added_in_place(monkeypatch: Any) -> None:
    monkeypatch.setattr(blas, "_gemm", lambda _: None)
    finding = examine()["products in place"]
    assert finding.status == "note"
    assert finding.command == _remedies.REINSTALL_NUMPY


def test_an_error_is_described_by_its_origin_in_one_line() -> None:
    error = ImportError("\n\nadvice at length\n")
    assert describe(error) == "ImportError: advice at length"
    error.__cause__ = KeyError()
    assert describe(error) == "KeyError"
    assert describe(ImportError("PLEASE READ\nOriginal error was: no library\n")) == "no library"


def test_what_is_optional_may_be_missing(monkeypatch: Any) -> None:
    for name in ("cupy", "mpi4py"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("chainer_accum._doctor.devices._cupy_packages", lambda: [])
    assert {check().status for check in (check_cupy, check_cuda, check_cudnn, check_mpi)} == {"ok"}


def test_the_last_line_names_what_is_wrong() -> None:
    findings = {"A": Finding("ok", "1"), "B": Finding("wrong", "2", "Do it.", "do it")}
    assert not is_well(findings)
    assert as_text(findings).splitlines() == [
        "ok     A  1",
        "wrong  B  2",
        "          Do it.",
        "              do it",
        "",
        "Wrong: B.",
    ]
    assert as_text({"A": Finding("ok", "1")}).endswith("\n\nNothing is wrong.")


def test_the_documentation_names_every_command() -> None:
    text = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    commands = [value for name, value in vars(_remedies).items() if name.isupper() and name[0] != "_"]
    assert len(commands) > 10
    assert [command for command in commands if command not in text] == []
