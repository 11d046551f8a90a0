"""Environments for an interpreter of its own: folders of packages that are real, real and damaged, or stubs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any, Dict, List

import chainer_accum
from chainer_accum._doctor import Finding

NUMPY = ["numpy"]
CHAINER = [*NUMPY, "chainer", "six", "filelock", "protobuf", "typing_extensions"]


class Environment:
    """A folder that takes the place of all installed packages.

    Args:
        folder (pathlib.Path): An empty folder.

    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.packages = folder / "packages"
        self.work = folder / "work"
        self.variables: Dict[str, str] = {}
        self.packages.mkdir()
        self.work.mkdir()
        (self.packages / "chainer_accum").symlink_to(pathlib.Path(chainer_accum.__file__).parent)

    def install(self, *names: str) -> None:
        """Links what belongs to installed distributions."""
        for name in names:
            for source in sources_of(name):
                if not (self.packages / source.name).exists():  # several have a folder google
                    (self.packages / source.name).symlink_to(source)

    def replace(self, path: str, old: str, new: str) -> None:
        """Replaces a text in a file of a package, which is copied first."""
        top = self.packages / pathlib.Path(path).parts[0]
        if top.is_symlink():
            source = top.resolve()
            top.unlink()
            shutil.copytree(str(source), str(top), ignore=shutil.ignore_patterns("__pycache__", "tests"))
        text = (self.packages / path).read_text(encoding="utf-8")
        assert old in text
        (self.packages / path).write_text(text.replace(old, new), encoding="utf-8")

    def write(self, files: Dict[str, str]) -> None:
        """Writes files of packages."""
        for name, text in files.items():
            (self.packages / name).parent.mkdir(parents=True, exist_ok=True)
            (self.packages / name).write_text(text, encoding="utf-8")

    def run(self, *arguments: str, status: int) -> str:
        """Runs Python without any other package and returns what it prints."""
        cleared = ("CHAINER_ACCUM_COMPAT", "CHAINER_CUDNN", "OMP_NUM_THREADS")
        inherited = {name: value for name, value in os.environ.items() if name not in cleared}
        process = subprocess.run(
            [sys.executable, "-S", "-W", "ignore", *arguments],
            cwd=str(self.work),
            env={**inherited, "PYTHONPATH": str(self.packages), **self.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert process.returncode == status, process.stdout
        return process.stdout

    def examine(self, status: int) -> Dict[str, Finding]:
        """Returns the doctor's findings."""
        printed: Dict[str, Any] = json.loads(self.run("-m", "chainer_accum", "doctor", "--json", status=status))
        return {name: Finding(**finding) for name, finding in printed.items()}


def sources_of(name: str) -> List[pathlib.Path]:
    """Returns the files and folders of an installed distribution that lie next to other packages."""
    files = importlib.metadata.files(name) or []
    tops = {file.parts[0] for file in files} - {"..", "__pycache__"}
    folder = pathlib.Path(str(importlib.metadata.distribution(name).locate_file("")))
    return [folder / top for top in sorted(tops) if (folder / top).exists()]


def metadata_of(name: str, version: str) -> Dict[str, str]:
    """Returns the metadata of an installed distribution, as files."""
    name_in_path = name.replace("-", "_")
    return {
        f"{name_in_path}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    }


def stub_of_cupy(**replaced: str) -> Dict[str, str]:
    """Returns a package that looks like CuPy 14 on a machine with a GPU, in the parts that the doctor looks at."""
    parts = {
        "cublas": "object()",
        "runtime_version": "12090",
        "driver_version": "13000",
        "count": "1",
        "ones": "types.SimpleNamespace(sum=lambda: 2.0)",
        **replaced,
    }
    source = """
import types

__version__ = "14.2.0"


def fail(message):
    raise ImportError(message)


class Cuda(types.ModuleType):
    runtime = types.SimpleNamespace(
        runtimeGetVersion=lambda: {runtime_version},
        driverGetVersion=lambda: {driver_version},
        getDeviceCount=lambda: {count},
        getDeviceProperties=lambda index: {{"name": b"NVIDIA H100"}},
    )

    @property
    def cublas(self):
        return {cublas}


def ones(size):
    return {ones}


import sys

cuda = sys.modules["cupy.cuda"] = Cuda("cupy.cuda")
"""
    return {"cupy/__init__.py": source.format(**parts), **metadata_of("cupy-cuda12x", "14.2.0")}
