"""Names that programs of Chainer's time look up, and that NumPy and Python have removed since.

Chainer itself needs none of them; those that it needs are in :mod:`~chainer_accum._compat`. So nothing here is put back
unless the program asks for it. :data:`REMOVED_NAMES` is what was found in the sources of some 50 such programs and
libraries, where something that is still there can take its place.
"""

from __future__ import annotations

import collections.abc
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import time
import types
import warnings
from typing import Any, Dict, List, NamedTuple

import numpy

from chainer_accum._compat.names import lacks


class RemovedNames(NamedTuple):
    """Names that old programs look up in a module, with the values to put back where newer versions lack them."""

    module: str
    values: Dict[str, Any]
    why: str
    looked_up_by: str


class _ArgSpec(NamedTuple):
    args: List[str]
    varargs: Any
    keywords: Any
    defaults: Any


def _getargspec(func: Any) -> _ArgSpec:
    return _ArgSpec(*inspect.getfullargspec(func)[:4])


def _asscalar(a: Any) -> Any:
    return a.item()


def _in1d(ar1: Any, ar2: Any, assume_unique: bool = False, invert: bool = False) -> Any:
    return numpy.isin(numpy.ravel(ar1), ar2, assume_unique=assume_unique, invert=invert)


def _load_source(name: str, pathname: str) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, pathname)
    spec = importlib.util.spec_from_file_location(name, pathname, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


REMOVED_NAMES = [
    RemovedNames(
        module="numpy",
        values={"bool": bool, "int": int, "long": int, "object": object, "str": str, "complex": complex},
        why="aliases of Python's types, removed in NumPy 1.24; bool and long are types of NumPy 2 itself",
        looked_up_by="ESPnet 1, ChainerCV, FCIS, Chainer Chemistry, chainercv2, sngan_projection, Chainer's tests",
    ),
    RemovedNames(
        module="numpy",
        values={"asscalar": _asscalar},
        why="removed in NumPy 1.23",
        looked_up_by="Chainer Chemistry, in each training; chainer-pspnet",
    ),
    RemovedNames(
        module="numpy",
        values={
            "alltrue": numpy.all,
            "product": numpy.prod,
            "float_": numpy.float64,
            "complex_": numpy.complex128,
            **dict.fromkeys(["Inf", "Infinity", "PINF", "infty"], numpy.inf),
            **dict.fromkeys(["NaN", "NAN"], numpy.nan),
            **{"NINF": -numpy.inf, "PZERO": 0.0, "NZERO": -0.0},
        },
        why="second spellings, removed in NumPy 2.0",
        looked_up_by="the tests of Chainer Chemistry and of Chainer; wandb 0.16, which cvfinetune imports",
    ),
    RemovedNames(
        module="numpy",
        values={"in1d": _in1d, "trapz": getattr(numpy, "trapezoid", None)},
        why="removed in NumPy 2.4",
        looked_up_by="Chainer Chemistry's evaluators; chainer-hand-pose",
    ),
    RemovedNames(
        module="collections",
        values={
            name: getattr(collections.abc, name)
            for name in (
                "Callable Container Generator Hashable Iterable Iterator Mapping MutableMapping "
                "MutableSequence MutableSet Sequence Set Sized"
            ).split()
        },
        why="moved to collections.abc, removed in Python 3.10",
        looked_up_by="ChainerRL's recurrent models, Chainer Chemistry, Mask R-CNN, TGAN2, teras, tensorboard-chainer",
    ),
    RemovedNames(
        module="inspect",
        values={"getargspec": _getargspec},
        why="removed in Python 3.11",
        looked_up_by="chainer_computational_cost",
    ),
    RemovedNames(
        module="time",
        values={"clock": time.process_time},
        why="removed in Python 3.8",
        looked_up_by="chainer-segnet, chainer-faster-rcnn",
    ),
    RemovedNames(
        module="imp",
        values={"load_source": _load_source},
        why="the module was removed in Python 3.12",
        looked_up_by="chainer-segnet, DeepPose, chainer-faster-rcnn, extra-chainer",
    ),
]


def restore_removed_names() -> None:
    """Puts back names that NumPy and Python have removed and that programs of Chainer's time still look up.

    ``numpy.int``, ``numpy.asscalar`` and ``collections.Iterable`` are among them; the documentation has the list. A
    name that is still there is left alone. The names are visible to all code in the process, so call this in a program
    and not in a library.

    Call it at the top of the script, right after ``import chainer_accum``, so that worker processes that import the
    script find the names as well. To leave the script as it is, set the environment variable
    ``CHAINER_ACCUM_COMPAT=all`` instead.

    """
    for removed in REMOVED_NAMES:
        module = _import_or_make(removed.module)
        for name, value in removed.values.items():
            if lacks(module, name):
                setattr(module, name, value)


def restore_removed_names_if_asked() -> None:
    """Calls :func:`restore_removed_names` if the environment variable ``CHAINER_ACCUM_COMPAT`` is ``all``."""
    if os.environ.get("CHAINER_ACCUM_COMPAT") == "all":
        restore_removed_names()


def _import_or_make(name: str) -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module that is only deprecated is there
        try:
            return importlib.import_module(name)
        except ImportError:
            return sys.modules.setdefault(name, types.ModuleType(name, "What chainer_accum has put back of it."))
