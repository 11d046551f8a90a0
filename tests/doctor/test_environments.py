"""The doctor finds what is wrong with an environment, says so in words, and prints the command that mends it."""

from __future__ import annotations

import os
import pathlib
import sys
from importlib.metadata import files
from typing import Any

import chainer_accum
import numpy
import pytest
from chainer_accum import _remedies
from chainer_accum.window import adds_products_in_place
from environments import CHAINER, NUMPY, Environment, metadata_of, sources_of, stub_of_cupy

INSTALLATION = (pathlib.Path(__file__).parents[2] / "docs" / "installation.md").read_text(encoding="utf-8")


@pytest.fixture
def environment(tmp_path: pathlib.Path) -> Environment:
    return Environment(tmp_path)


def assert_finds(environment: Environment, name: str, found: str, command: str, status: str = "wrong") -> None:
    """Asserts that the doctor finds this, and that nothing else is wrong but what follows from it."""
    findings = environment.examine(status=1 if status == "wrong" else 0)
    finding = findings[name]
    assert finding.status == status, findings
    assert found in finding.found
    assert finding.advice
    assert finding.command == command
    wrong = {key for key, each in findings.items() if each.status == "wrong"}
    assert wrong <= {name, "chainer_accum"}, findings
    for part in command.split(" && "):
        assert part in INSTALLATION, part


def test_in_a_healthy_environment_nothing_is_wrong(environment: Environment) -> None:
    environment.install(*CHAINER)
    findings = environment.examine(status=0)
    assert {finding.status for finding in findings.values()} <= {"ok", "note"}
    assert not any("not examined" in finding.found for finding in findings.values())
    assert findings["NumPy"].found == numpy.__version__
    assert findings["Chainer"].found == "7.8.1"
    assert "pkg_resources" in findings["restored names"].found  # there is no setuptools
    assert findings["chainer_accum"].found.startswith(chainer_accum.__version__)


def test_where_nothing_is_installed_it_installs_numpy_and_chainer(environment: Environment) -> None:
    findings = environment.examine(status=1)
    assert findings["chainer_accum"].found.endswith("cannot be imported: ModuleNotFoundError: No module named 'numpy'")
    assert findings["NumPy"].command == _remedies.INSTALL_NUMPY
    assert findings["Chainer"].command == _remedies.INSTALL_CHAINER
    assert findings["BLAS"].found == "not examined: ModuleNotFoundError: No module named 'numpy'"


def test_without_chainer_it_installs_chainer(environment: Environment) -> None:
    environment.install(*NUMPY)
    assert_finds(environment, "Chainer", "not installed", _remedies.INSTALL_CHAINER)


def test_without_a_package_that_chainer_requires_it_installs_that(environment: Environment) -> None:
    environment.install(*(name for name in CHAINER if name != "six"))
    assert_finds(environment, "Chainer", "No module named 'six'", _remedies.INSTALL_CHAINER)


@pytest.mark.parametrize(
    "version, command", [("7.8.0", _remedies.INSTALL_CHAINER), ("8.0.0b1", _remedies.REINSTALL_CHAINER)]
)
def test_another_version_of_chainer_is_replaced(environment: Environment, version: str, command: str) -> None:
    environment.install(*CHAINER)
    environment.replace("chainer/_version.py", "7.8.1", version)
    assert_finds(environment, "Chainer", version, command)


@pytest.mark.skipif(not any(file.hash for file in files("chainer") or []), reason="its installer kept no checksums")
def test_a_chainer_that_was_edited_by_hand_is_noted(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.replace("chainer/functions/array/resize_images.py", "numpy.float", "float")
    found = "7.8.1, with changes in chainer/functions/array/resize_images.py"
    assert_finds(environment, "Chainer", found, _remedies.REINSTALL_CHAINER, status="note")


def test_a_damaged_chainer_is_installed_again(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.replace("chainer/link.py", "class Link(", "class Broken(")
    assert_finds(environment, "Chainer", "cannot be imported: NameError", _remedies.REINSTALL_CHAINER)


@pytest.mark.parametrize("name", ["chainer", "numpy"])
def test_a_script_with_the_name_of_a_package_is_to_be_renamed(environment: Environment, name: str) -> None:
    environment.install(*CHAINER)
    script = environment.work / f"{name}.py"
    script.write_text("")
    finding = environment.examine(status=1)[{"chainer": "Chainer", "numpy": "NumPy"}[name]]
    assert finding.status == "wrong"
    assert finding.found == f"{script} is imported instead"
    assert "Rename it" in finding.advice


def test_a_clone_of_chainer_next_to_the_script_is_found(environment: Environment) -> None:
    environment.install(*NUMPY)
    (environment.work / "chainer").mkdir()
    finding = environment.examine(status=1)["Chainer"]
    assert finding.found == f"{environment.work / 'chainer'} is imported instead"


def test_a_numpy_for_another_python_is_installed_again(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.replace("numpy/__init__.py", '"""', '"""')
    for library in environment.packages.glob("numpy/*core/_multiarray_umath*"):
        library.unlink()
    findings = environment.examine(status=1)
    assert "_multiarray_umath" in findings["NumPy"].found
    assert findings["NumPy"].command == _remedies.REINSTALL_NUMPY
    assert "_multiarray_umath" in findings["chainer_accum"].found


def test_where_the_names_are_turned_off_it_turns_them_on(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.variables["CHAINER_ACCUM_COMPAT"] = "0"
    findings = environment.examine(status=1)
    assert findings["restored names"].status == findings["Chainer"].status == "wrong"
    assert findings["restored names"].command == findings["Chainer"].command == _remedies.RESTORE_NAMES
    assert "pkg_resources" in findings["restored names"].found


@pytest.mark.skipif(not adds_products_in_place(), reason="NumPy has not brought its own OpenBLAS here")
def test_a_blas_that_does_not_come_with_numpy_is_noted(environment: Environment) -> None:
    environment.install(*CHAINER)
    libraries = next(source for source in sources_of("numpy") if source.name == "numpy.libs")
    (environment.packages / "numpy.libs").unlink()
    environment.variables["LD_LIBRARY_PATH"] = str(libraries)
    assert_finds(environment, "products in place", "no", _remedies.REINSTALL_NUMPY, status="note")


def test_more_threads_than_cores_are_noted(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.variables["OMP_NUM_THREADS"] = str(2 * (os.cpu_count() or 1))
    found = f"OMP_NUM_THREADS={environment.variables['OMP_NUM_THREADS']}"
    assert_finds(environment, "BLAS", found, _remedies.USE_ONE_THREAD, status="note")


def test_two_packages_of_cupy_are_replaced_by_one(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write({**stub_of_cupy(), **metadata_of("cupy-cuda11x", "12.3.0")})
    command = f"{_remedies.UNINSTALL_CUPY} && {_remedies.INSTALL_CUPY_FOR_CUDA_12}"
    assert_finds(environment, "CuPy", "cupy-cuda11x, cupy-cuda12x", command)


def test_a_cupy_that_cannot_be_imported_is_installed_again(environment: Environment) -> None:
    environment.install(*CHAINER)
    source = "raise ImportError('long\\nadvice') from ImportError('numpy.core.multiarray failed to import')"
    environment.write({"cupy/__init__.py": source, **metadata_of("cupy-cuda13x", "14.2.0")})
    found = "cupy-cuda13x cannot be imported: ImportError: numpy.core.multiarray failed to import"
    assert_finds(environment, "CuPy", found, _remedies.INSTALL_CUPY_FOR_CUDA_13)


def test_a_cupy_without_cublas_is_installed_with_it(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write(stub_of_cupy(cublas="fail('libcublas.so.12: cannot open shared object file')"))
    assert_finds(environment, "CUDA", "libcublas.so.12: cannot open", _remedies.INSTALL_CUPY_FOR_CUDA_12)


def test_an_old_cupy_is_told_where_the_libraries_of_pip_are(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write({**stub_of_cupy(cublas="fail('libcublas.so.12')"), "nvidia/cublas/lib/libcublas.so.12": ""})
    environment.replace("cupy/__init__.py", "14.2.0", "13.6.0")
    assert_finds(environment, "CUDA", "libcublas.so.12", _remedies.SET_LIBRARY_PATH)


@pytest.mark.parametrize(
    "toolkit, driver, command",
    [
        ("13000", "12080", f"{_remedies.UNINSTALL_CUPY} && {_remedies.INSTALL_CUPY_FOR_CUDA_12}"),
        ("12090", "11040", _remedies.SHOW_DRIVER),
    ],
)
def test_a_driver_that_is_older_than_cuda_is_found(
    environment: Environment, toolkit: str, driver: str, command: str
) -> None:
    environment.install(*CHAINER)
    environment.write(stub_of_cupy(runtime_version=toolkit, driver_version=driver))
    assert_finds(environment, "CUDA", f"driver for CUDA {driver[:2]}.{driver[3]}", command)


@pytest.mark.parametrize(
    "replaced, found",
    [({"driver_version": "0"}, "no driver"), ({"count": "fail('100')"}, "no device: ImportError: 100")],
)
def test_a_machine_without_a_gpu_is_noted(environment: Environment, replaced: Any, found: str) -> None:
    environment.install(*CHAINER)
    environment.write(stub_of_cupy(**replaced))
    assert_finds(environment, "CUDA", found, _remedies.SHOW_DRIVER, status="note")


def test_a_gpu_on_which_no_kernel_can_be_compiled_is_found(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write(stub_of_cupy(ones="fail('libnvrtc.so.12')"))
    assert_finds(environment, "CUDA", "cannot compute: ImportError: libnvrtc", _remedies.INSTALL_CUPY_FOR_CUDA_12)


def test_a_gpu_that_works_is_named_and_the_missing_cudnn_is_noted(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write(stub_of_cupy())
    findings = environment.examine(status=0)
    assert findings["CuPy"] == ("ok", "14.2.0 (cupy-cuda12x)", "", "")
    assert findings["CUDA"] == ("ok", "CUDA 12.9, driver for CUDA 13.0, NVIDIA H100", "", "")
    assert findings["cuDNN"].status == "note"
    assert findings["cuDNN"].command in INSTALLATION
    environment.variables["CHAINER_CUDNN"] = "0"
    assert environment.examine(status=0)["cuDNN"].status == "ok"


def test_mpi4py_without_an_mpi_gets_one(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write(
        {
            "mpi4py/__init__.py": "import types; __version__ = '4.1.2'; rc = types.SimpleNamespace(initialize=True)",
            "mpi4py/MPI.py": "raise RuntimeError('cannot load MPI library')",
        }
    )
    found = "mpi4py 4.1.2 cannot load MPI: RuntimeError: cannot load MPI library"
    assert_finds(environment, "MPI", found, _remedies.INSTALL_MPI)


def test_mpi_is_named_without_being_initialized(environment: Environment) -> None:
    environment.install(*CHAINER)
    environment.write(
        {
            "mpi4py/__init__.py": "import types; __version__ = '4.1.2'; rc = types.SimpleNamespace(initialize=True)",
            "mpi4py/MPI.py": "import mpi4py\nassert not mpi4py.rc.initialize\n"
            "Get_library_version = lambda: 'MPICH Version:      5.0.2\\nMPICH Release date: 2026'",
        }
    )
    assert environment.examine(status=0)["MPI"] == ("ok", "mpi4py 4.1.2, MPICH Version: 5.0.2", "", "")


def test_the_table_has_the_command_below_what_is_wrong(environment: Environment) -> None:
    environment.install(*NUMPY)
    lines = environment.run("-m", "chainer_accum", "doctor", status=1).splitlines()
    (line,) = [number for number, line in enumerate(lines) if line.startswith("wrong  Chainer ")]
    below = [line.strip() for line in lines[line + 1 :]]
    assert below.index(_remedies.INSTALL_CHAINER) < below.index("Wrong: chainer_accum, Chainer.")


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["-c", "import chainer_accum"], 1),
        (["-m", "chainer_accum"], 1),
        (["-m", "program", "doctor"], 1),
        (["-m", "chainer_accum", "check", "script.py:make"], 2),
    ],
)
def test_anything_else_still_fails_and_names_the_doctor(environment: Environment, arguments: Any, status: int) -> None:
    environment.install(*NUMPY)
    environment.write({"program/__init__.py": "import chainer_accum"})
    if arguments[1] == "program" and sys.version_info < (3, 10):
        pytest.skip("Python does not tell which module it looks for")
    printed = environment.run(*arguments, status=status)
    assert "ImportError: chainer_accum needs Chainer 7.8.1 and found none" in printed
    assert printed.endswith(f"{_remedies.RUN_DOCTOR}\n")
