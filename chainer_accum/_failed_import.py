"""The commands of this package run even if it cannot be imported.

``python -m chainer_accum doctor`` imports the package first. Where a doctor is needed most, this fails: Chainer or
NumPy is missing, broken, or too old. Therefore the ``__init__`` of this package imports everything inside
:class:`CommandIfCalled`. No other import of the package is affected.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Optional, Type


class CommandIfCalled:
    """Context manager that runs a command instead of raising, if the command is why the package is being imported."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if isinstance(error, Exception) and _is_command_called():
            from chainer_accum.__main__ import main

            raise SystemExit(main(failure=error)) from None


def _is_command_called() -> bool:
    # While Python looks for the module that option -m names, sys.argv[0] is "-m". Which module this is can be read from
    # Python 3.10 on.
    command_line = getattr(sys, "orig_argv", ["chainer_accum"])
    is_ours = any(argument.endswith("chainer_accum") for argument in command_line)
    return is_ours and sys.argv[0] == "-m" and sys.argv[1:2] in (["doctor"], ["check"])
