"""What Chainer 7.8.1, and programs of its time, look up in newer versions of Python, NumPy and setuptools.

It knows nothing of accumulation. Of the rest of the package, it imports only the commands that its errors name.
"""

from chainer_accum._compat import names, old_names, requirement
from chainer_accum._compat.names import names_to_restore
from chainer_accum._compat.old_names import restore_removed_names

__all__ = ["names_to_restore", "prepare_chainer", "restore_removed_names"]


def prepare_chainer() -> None:
    """Imports Chainer, with all that it looks up in place, and mends what fails in it."""
    names.restore_missing_names()
    old_names.restore_removed_names_if_asked()
    requirement.require_chainer()

    from chainer_accum._compat import processes, repairs  # which import Chainer

    processes.let_chainer_start_processes()
    repairs.repair_chainer()
