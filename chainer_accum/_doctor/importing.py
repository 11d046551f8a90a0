"""Modules that may be missing or broken, and the errors of those that are."""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any


def import_quietly(name: str) -> Any:
    """Imports a module without warnings and returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def is_missing(error: Exception, name: str) -> bool:
    """Returns whether an import failed because there is no module of that name, rather than for another reason."""
    return isinstance(error, ModuleNotFoundError) and error.name == name


def describe(error: BaseException) -> str:
    """Returns an error in one line. Where a package explains an error at length, this is the original error."""
    while error.__cause__ is not None:
        error = error.__cause__
    quoted = re.search(r"Original error(?: was)?:\s*(.+)", str(error))  # in NumPy 1
    if quoted is not None:
        return quoted.group(1)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
