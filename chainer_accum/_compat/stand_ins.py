"""Modules that newer packages lack, for those modules of Chainer that import them and for no others.

What stands in for a module has only the part of it that Chainer uses. In :data:`sys.modules`, other packages would
take it for the real one and fail, where they have a way to do without. So the modules of Chainer that need it, and only
they, are given an ``import`` statement of their own, which falls back on the stand-ins.

They are given it when they are imported, whenever that is and by whomever. To import them here instead would cost a
tenth of a second, since ``chainer.testing`` imports pytest, and few programs need it.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import Any, Callable, Dict, List, Optional, Sequence

IMPORTED_BY = ("chainer._environment_check", "chainer.testing.helper", "chainer.testing.doctest_helper")


def show_stand_ins_to_chainer() -> None:
    """Lets the modules of Chainer named :data:`IMPORTED_BY` import the modules named :data:`STAND_INS`, from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _pkg_resources() -> types.ModuleType:
    return importlib.import_module("chainer_accum._compat.pkg_resources")


def _numpy_with_system_info() -> types.SimpleNamespace:
    # As the statement "import numpy.distutils.system_info" does, it gives the package on top.
    system_info = types.SimpleNamespace(get_info=lambda name: {})
    return types.SimpleNamespace(distutils=types.SimpleNamespace(system_info=system_info))


STAND_INS: Dict[str, Callable[[], object]] = {
    "pkg_resources": _pkg_resources,
    "numpy.distutils.system_info": _numpy_with_system_info,
}


def missing_modules() -> List[str]:
    """Returns the names of the modules that Chainer needs and that cannot be imported."""
    return [name for name in STAND_INS if _import_real(name) is None]


def _import(name: str, *arguments: Any) -> object:
    """Does what the statement ``import`` does, and falls back on a stand-in."""
    if name not in STAND_INS:
        return builtins.__import__(name, *arguments)
    module = _import_real(name, *arguments)
    return STAND_INS[name]() if module is None else module


def _import_real(name: str, *arguments: Any) -> Optional[object]:
    """Does what the statement ``import`` does, or returns ``None`` if there is no such module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is Chainer that imports what is deprecated, and Chainer stays as it is
        try:
            module: object = builtins.__import__(name, *arguments)
            return module
        except Exception:  # not only ImportError: pkg_resources of 2022 on Python 3.12 dies of an AttributeError
            return None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of Chainer that need a stand-in, as the default finder does."""

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[types.ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if fullname not in IMPORTED_BY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module whose ``import`` statements fall back on the stand-ins, and otherwise as another loader does."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Optional[types.ModuleType]:
        module: Optional[types.ModuleType] = self._loader.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # such as get_source, which tracebacks and debuggers ask for
