"""What Chainer 7.8.1 still looks up in newer versions of Python, NumPy and setuptools.

Chainer is frozen, the packages under it are not: since its last release they removed names that ``import chainer``
needs. This module puts back those names, and only where they are missing, so that on the stack that Chainer was made
for it does nothing. :data:`MISSING_NAMES` is the whole list. Set the environment variable ``CHAINER_ACCUM_COMPAT=0`` to
leave every module as it is.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from typing import Any, Callable, NamedTuple

import numpy

_numpy: Any = numpy  # for type checkers, which do not know what is put into it here


def restore_missing_names() -> None:
    """Restores each of :data:`MISSING_NAMES` that is missing, unless ``CHAINER_ACCUM_COMPAT=0``."""
    if os.environ.get("CHAINER_ACCUM_COMPAT") == "0":
        return
    for entry in MISSING_NAMES:
        if entry.is_missing():
            entry.restore()
    _forget_failed_import()


class MissingName(NamedTuple):
    """A name that Chainer needs and that newer packages lack."""

    name: str
    why: str
    looked_up_by: str
    is_missing: Callable[[], bool]
    restore: Callable[[], None]


def _lacks_attribute(module: Any, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an alias that is only deprecated is there, and warns when it is looked at
        return not hasattr(module, name)


def _cannot_import(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Chainer imports it in any case: once here, without its notices of deprecation
        try:
            importlib.import_module(name)
        except Exception:  # not only ImportError: pkg_resources of 2022 on Python 3.12 dies of an AttributeError
            return True
    return False


def _forget_failed_import() -> None:
    """Lets Chainer be imported after an ``import chainer`` that failed for want of one of the names.

    That import left submodules without their package behind, and the next one would stumble over them.

    """
    if "chainer" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("chainer.")]:
            del sys.modules[name]


def _restore_sctypes() -> None:
    _numpy.sctypes = {
        "int": [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
        "uint": [numpy.uint8, numpy.uint16, numpy.uint32, numpy.uint64],
        "float": [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
        "complex": [numpy.complex64, numpy.complex128, numpy.clongdouble],
        "others": [bool, object, bytes, str, numpy.void],
    }


def _restore_float() -> None:
    _numpy.float = float


def _restore_system_info() -> None:
    if _cannot_import("numpy.distutils"):
        distutils = types.ModuleType("numpy.distutils", "Stands in for what NumPy no longer has.")
        distutils.__path__ = []
        _numpy.distutils = sys.modules["numpy.distutils"] = distutils
    system_info: Any = types.ModuleType("numpy.distutils.system_info", "Stands in for what NumPy no longer has.")
    system_info.get_info = lambda name: {}
    _numpy.distutils.system_info = sys.modules["numpy.distutils.system_info"] = system_info


def _restore_pkg_resources() -> None:
    sys.modules["pkg_resources"] = importlib.import_module("chainer_accum._pkg_resources")


MISSING_NAMES = [
    MissingName(
        name="numpy.sctypes",
        why="removed in NumPy 2.0",
        looked_up_by="chainer/functions/array/as_strided.py",
        is_missing=lambda: _lacks_attribute(numpy, "sctypes"),
        restore=_restore_sctypes,
    ),
    MissingName(
        name="numpy.float",
        why="removed in NumPy 1.24",
        looked_up_by="chainer/functions/array/resize_images.py",
        is_missing=lambda: _lacks_attribute(numpy, "float"),
        restore=_restore_float,
    ),
    MissingName(
        name="numpy.distutils.system_info",
        why="not there on Python 3.12 and later; fails to import where NumPy 1 meets setuptools 74 and later",
        looked_up_by="chainer/_environment_check.py, which uses it on macOS only",
        is_missing=lambda: _cannot_import("numpy.distutils.system_info"),
        restore=_restore_system_info,
    ),
    MissingName(
        name="pkg_resources",
        why="removed in setuptools 82; absent where setuptools is",
        looked_up_by="chainer/_environment_check.py, chainer/testing/helper.py, chainer/testing/doctest_helper.py",
        is_missing=lambda: _cannot_import("pkg_resources"),
        restore=_restore_pkg_resources,
    ),
]
