"""The import of this package checks that Chainer is installed, because ``pip install`` of this package does not.

Chainer is distributed as source only, and its ``setup.py`` imports ``pkg_resources``, which setuptools 82 removed. If
this package required Chainer, a plain ``pip install`` would fail with an error that gives no remedy.
"""

from __future__ import annotations

import re

from chainer_accum._remedies import INSTALL_CHAINER, RUN_DOCTOR


def require_chainer() -> None:
    """Raises an :class:`ImportError` that says how to install Chainer, if it is missing or too old."""
    try:
        import chainer

        found = chainer.__version__
    except ModuleNotFoundError as error:
        if error.name != "chainer":
            raise
        found = "none"
    if found == "none" or not (7, 8, 1) <= tuple(map(int, re.findall(r"\d+", found)[:3])) < (8,):
        raise ImportError(
            f"chainer_accum needs Chainer 7.8.1 and found {found}.\nInstall it with:\n    {INSTALL_CHAINER}\n"
            f"To examine the whole environment, run:\n    {RUN_DOCTOR}"
        )
