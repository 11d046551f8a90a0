"""Processes: how workers are started, and the MPI that connects the ranks of ChainerMN."""

from __future__ import annotations

import multiprocessing
import sys

from chainer_accum._doctor.findings import NOTE, OK, WRONG, Finding
from chainer_accum._doctor.importing import describe, import_quietly, is_missing
from chainer_accum._remedies import INSTALL_MPI


def check_start_method() -> Finding:
    """Returns how :mod:`multiprocessing` starts processes, and what this asks of a script."""
    method = multiprocessing.get_start_method()
    if method == "fork":
        return Finding(OK, method)
    advice = (
        "The workers of MultiprocessIterator import your script. Put what it runs below `if __name__ == '__main__':`, "
        "and define datasets at the top level of a module."
    )
    return Finding(NOTE, method, advice)


def check_mpi() -> Finding:
    """Returns the versions of mpi4py and of the MPI that it uses. MPI is not initialized, which may end the process."""
    try:
        mpi4py = import_quietly("mpi4py")
    except Exception as error:
        if is_missing(error, "mpi4py"):
            return Finding(OK, "not installed")
        return Finding(WRONG, f"mpi4py cannot be imported: {describe(error)}", "Install it again.", INSTALL_MPI)
    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize = False
    try:
        library = import_quietly("mpi4py.MPI").Get_library_version()
    except Exception as error:
        found = f"mpi4py {mpi4py.__version__} cannot load MPI: {describe(error)}"
        return Finding(WRONG, found, "ChainerMN needs an MPI, of the system or of pip.", INSTALL_MPI)
    return Finding(OK, f"mpi4py {mpi4py.__version__}, {' '.join(library.splitlines()[0].split())}")
