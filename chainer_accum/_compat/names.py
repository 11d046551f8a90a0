"""Names that Chainer 7.8.1 still looks up and that newer versions of Python, NumPy and setuptools have removed.

Chainer is frozen, and the packages under it are not. This module restores the names that ``import chainer`` needs, and
only where they are missing: on the stack that Chainer was made for it does nothing. The names of NumPy in
:data:`MISSING_NAMES` stay, because Chainer looks them up whenever it computes. The modules in :mod:`.stand_ins` are
shown to Chainer only. For what is there and fails, see :mod:`.repairs`; for what other programs look up,
:mod:`.old_names`. With the environment variable ``CHAINER_ACCUM_COMPAT=0``, nothing is restored.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from typing import Any, List, NamedTuple

import numpy

from chainer_accum._compat.stand_ins import missing_modules, show_stand_ins_to_chainer


class MissingName(NamedTuple):
    """A name that Chainer looks up in NumPy and that newer versions lack."""

    name: str
    value: Any
    why: str
    looked_up_by: str


MISSING_NAMES = [
    MissingName(
        name="sctypes",
        value={
            "int": [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
            "uint": [numpy.uint8, numpy.uint16, numpy.uint32, numpy.uint64],
            "float": [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
            "complex": [numpy.complex64, numpy.complex128, numpy.clongdouble],
            "others": [bool, object, bytes, str, numpy.void],
        },
        why="removed in NumPy 2.0",
        looked_up_by="chainer/functions/array/as_strided.py, when it is imported and in each backward pass",
    ),
    MissingName(
        name="float",
        value=float,
        why="removed in NumPy 1.24",
        looked_up_by="chainer/functions/array/resize_images.py, in each forward pass",
    ),
]


def is_switched_off() -> bool:
    """Returns whether every module is to be left as it is."""
    return os.environ.get("CHAINER_ACCUM_COMPAT") == "0"


def restore_missing_names() -> None:
    """Lets Chainer find all that it looks up, unless ``CHAINER_ACCUM_COMPAT=0``."""
    if is_switched_off():
        return
    for missing in MISSING_NAMES:
        if lacks(numpy, missing.name):
            setattr(numpy, missing.name, missing.value)
    show_stand_ins_to_chainer()
    _forget_failed_import()


def names_to_restore() -> List[str]:
    """Returns what Chainer looks up and the installed packages lack, whether or not it has been restored."""
    of_numpy = [
        f"numpy.{missing.name}"
        for missing in MISSING_NAMES
        if lacks(numpy, missing.name) or vars(numpy).get(missing.name) is missing.value
    ]
    return of_numpy + missing_modules()


def lacks(module: types.ModuleType, name: str) -> bool:
    """Returns whether a module lacks a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an alias that is only deprecated is there, and warns when it is looked at
        return not hasattr(module, name)


def _forget_failed_import() -> None:
    """Lets Chainer be imported after an ``import chainer`` that failed for want of one of the names.

    That import left submodules without their package behind, and the next one would stumble over them.

    """
    if "chainer" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("chainer.")]:
            del sys.modules[name]
