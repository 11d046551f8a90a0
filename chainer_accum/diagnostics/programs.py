"""Checks of whole programs, as ``python -m chainer_accum check`` runs them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Optional, Tuple, Union

import chainer

from chainer_accum.diagnostics.equivalence import Equivalence, check_equivalence
from chainer_accum.updater import AccumulatingUpdater


class WrongProgram(ValueError):
    """Raised if a program is not found, or does not return what can be checked."""


def check_program(function: str, micro_batch_size: Optional[int] = None, lockstep: Optional[str] = None) -> Equivalence:
    """Tests whether the accumulated step of a program equals its full-batch step, and if not, finds out why.

    The program stays imported, and its iterator advanced, so this is for a process of its own.

    Args:
        function (str): ``'script.py:function'`` or ``'package.module:function'``. The function takes no arguments and
            returns an :class:`~chainer_accum.AccumulatingUpdater`, whose iterator gives the batch, or a tuple of an
            updater or model and a batch.
        micro_batch_size (int): See :func:`~chainer_accum.check_equivalence`.
        lockstep (str): See :func:`~chainer_accum.check_equivalence`.

    Returns:
        ~chainer_accum.diagnostics.Equivalence: The result. It is true if the steps are equal.

    Raises:
        WrongProgram: If there is no such function, or it returns something else.

    """
    model_or_updater, batch = _read(function, _call(function, _find(function)))
    try:
        return check_equivalence(model_or_updater, batch, micro_batch_size=micro_batch_size, lockstep=lockstep)
    finally:
        if isinstance(model_or_updater, AccumulatingUpdater):
            model_or_updater.finalize()  # ends the workers of its iterator


def _find(function: str) -> Callable[[], Any]:
    path, _, name = function.rpartition(":")
    if not path or not name:
        raise WrongProgram(
            f"the function must be SCRIPT.py:FUNCTION or PACKAGE.MODULE:FUNCTION, got {function!r}; name both parts"
        )
    module = _import_script(path) if path.endswith(".py") else _import(path, path)
    found: Any = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise WrongProgram(f"{path} must define the function {name}, got only {', '.join(own) or 'nothing'}; name it")
    return found  # type: ignore[no-any-return]


def _import_script(path: str) -> ModuleType:
    script = Path(path).resolve()
    if not script.is_file():
        raise WrongProgram(f"the script must be a file, got {path}, which there is not; give its path from this folder")
    sys.path.insert(0, str(script.parent))  # as when it is run, and for its worker processes
    module = _import(script.stem, path)
    if not module.__file__ or not script.samefile(module.__file__):
        raise WrongProgram(f"the script must not have the name of another module, got {path}; rename it")
    return module


def _import(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise
        raise WrongProgram(f"the module must be found from this folder, got {path}; give its name or path") from None
    except SystemExit as error:
        raise _ended(path, "imported", error) from error


def _call(function: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except SystemExit as error:
        raise _ended(function, "called", error) from error


def _ended(what: str, when: str, error: SystemExit) -> WrongProgram:
    return WrongProgram(
        f"{what} must not end the program when it is {when}, got exit status {error.code!r}; put what the script runs "
        "below `if __name__ == '__main__':`"
    )


def _read(function: str, returned: Any) -> Tuple[Union[chainer.Link, AccumulatingUpdater], Any]:
    """Returns the updater or model, and the batch."""
    if isinstance(returned, AccumulatingUpdater):
        return returned, _first_batch(returned)
    if (
        isinstance(returned, tuple)
        and len(returned) == 2
        and isinstance(returned[0], (chainer.Link, AccumulatingUpdater))
    ):
        return returned
    raise WrongProgram(
        f"{function} must return an AccumulatingUpdater, (updater, batch) or (model, batch), "
        f"got {type(returned).__name__}; let it return what it trains with"
    )


def _first_batch(updater: AccumulatingUpdater) -> Any:
    """Returns the first batch of the iterator, and the second one with it if it has one example only."""
    iterator = updater.get_iterator("main")
    batch = iterator.next()
    return batch + iterator.next() if isinstance(batch, list) and len(batch) == 1 else batch
