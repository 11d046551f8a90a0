"""Python, NumPy, Chainer, and the names that Chainer needs and newer packages lack."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, List, Optional, Tuple

from chainer_accum._doctor.findings import NOTE, OK, WRONG, Finding
from chainer_accum._doctor.importing import describe, import_quietly, is_missing
from chainer_accum._remedies import (
    INSTALL_CHAINER,
    INSTALL_NUMPY,
    REINSTALL_CHAINER,
    REINSTALL_NUMPY,
    RESTORE_NAMES,
)

_NOT_INSTALLED = "not installed for this Python"


def check_python() -> Finding:
    """Returns the version, and which interpreter it is."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info >= (3, 16):
        return Finding(NOTE, found, "chainer_accum has been tested on Python 3.8 to 3.15.")
    return Finding(OK, found)


def check_numpy(failure: Optional[Exception]) -> Finding:
    """Returns the version of NumPy, or why it cannot be imported.

    Args:
        failure (Exception): The error of the first import. A second one may fail in another way.

    """
    try:
        numpy = import_quietly("numpy")
    except Exception as error:
        if is_missing(error, "numpy"):
            return Finding(WRONG, _NOT_INSTALLED, "Chainer needs NumPy 1.22 or later.", INSTALL_NUMPY)
        found = f"cannot be imported: {describe(failure or error)}"
        return Finding(WRONG, found, "The installation is damaged, or made for another Python.", REINSTALL_NUMPY)
    if not hasattr(numpy, "__version__"):
        return _shadowed(numpy)
    version = _numbers(numpy.__version__)
    if version < (1, 22):
        return Finding(WRONG, numpy.__version__, "chainer_accum needs NumPy 1.22 or later.", INSTALL_NUMPY)
    if version >= (3,):
        return Finding(NOTE, numpy.__version__, "chainer_accum has been tested with NumPy 1.22 to 2.5.")
    return Finding(OK, numpy.__version__)


def check_chainer(failure: Optional[Exception]) -> Finding:
    """Returns the version of Chainer, or why it cannot be imported or used.

    Args:
        failure (Exception): The error of the first import. A second one may fail in another way.

    """
    try:
        chainer = import_quietly("chainer")
    except Exception as error:
        return _judge_import(error, describe(failure or error))
    if not hasattr(chainer, "__version__"):
        return _shadowed(chainer)
    version = _numbers(chainer.__version__)
    if version < (7, 8, 1):
        return Finding(WRONG, chainer.__version__, "chainer_accum needs Chainer 7.8.1.", INSTALL_CHAINER)
    if version >= (8,):
        return Finding(WRONG, chainer.__version__, "chainer_accum needs Chainer 7.8.1.", REINSTALL_CHAINER)
    edited = edited_files("chainer")
    if edited:
        found = f"{chainer.__version__}, with changes in {_listed(edited)}"
        advice = "If they make it run on newer packages, they are not needed. This command undoes them:"
        return Finding(NOTE, found, advice, REINSTALL_CHAINER)
    return Finding(OK, chainer.__version__)


def check_names() -> Finding:
    """Returns the names that the installed packages lack and Chainer needs, and whether they are restored."""
    from chainer_accum._compat import names_to_restore

    switch = os.environ.get("CHAINER_ACCUM_COMPAT")
    names = ", ".join(names_to_restore()) or "none is missing"
    if switch == "0" and names_to_restore():
        advice = "Chainer needs these names, and CHAINER_ACCUM_COMPAT=0 leaves them missing."
        return Finding(WRONG, f"none of {names}", advice, RESTORE_NAMES)
    if switch == "0":
        return Finding(
            NOTE, names, "CHAINER_ACCUM_COMPAT=0 turns off the repair of Chainer's functions.", RESTORE_NAMES
        )
    if switch == "all":
        return Finding(OK, f"{names}; for other programs, all (CHAINER_ACCUM_COMPAT=all)")
    if switch:
        advice = f"CHAINER_ACCUM_COMPAT={switch} has no effect. Only 0 and all have one."
        return Finding(NOTE, names, advice, RESTORE_NAMES)
    return Finding(OK, names)


def edited_files(name: str) -> List[str]:
    """Returns the Python files of an installed package that have changed since its installation."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:  # a folder on PYTHONPATH
        return []
    return [str(file) for file in files if file.suffix == ".py" and file.hash and _hash(file) != file.hash.value]


def _hash(file: importlib.metadata.PackagePath) -> Optional[str]:
    assert file.hash is not None
    try:
        digest = hashlib.new(file.hash.mode, Path(file.locate()).read_bytes()).digest()
    except OSError:
        return None
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _judge_import(error: Exception, description: str) -> Finding:
    """Returns why the import of Chainer failed, and what helps."""
    if is_missing(error, "chainer"):
        advice = "pip cannot build Chainer with setuptools 82 or later. This command installs an older one first:"
        return Finding(WRONG, _NOT_INSTALLED, advice, INSTALL_CHAINER)
    found = f"cannot be imported: {description}"
    if os.environ.get("CHAINER_ACCUM_COMPAT") == "0":
        return Finding(WRONG, found, "CHAINER_ACCUM_COMPAT=0 turns off what makes it run here.", RESTORE_NAMES)
    if isinstance(error, ModuleNotFoundError):
        return Finding(WRONG, found, "A package that it requires is missing.", INSTALL_CHAINER)
    return Finding(WRONG, found, "The installation is damaged.", REINSTALL_CHAINER)


def _shadowed(module: Any) -> Finding:
    """Returns the finding for a file or folder that Python imports in place of a package."""
    place = getattr(module, "__file__", None) or next(iter(module.__path__))
    advice = "It has the name of a package and is found first. Rename it, or run your program from another folder."
    return Finding(WRONG, f"{place} is imported instead", advice)


def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _listed(files: List[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
