"""All checks, in the order in which their findings are printed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Callable, Dict, Optional

from chainer_accum import __version__
from chainer_accum._doctor.blas import check_blas, check_products_in_place
from chainer_accum._doctor.devices import check_cuda, check_cudnn, check_cupy
from chainer_accum._doctor.findings import NOTE, OK, WRONG, Finding, is_well
from chainer_accum._doctor.importing import describe
from chainer_accum._doctor.packages import check_chainer, check_names, check_numpy, check_python
from chainer_accum._doctor.processes import check_mpi, check_start_method
from chainer_accum._remedies import SHOW_TRACEBACK


def examine(failure: Optional[Exception] = None) -> Dict[str, Finding]:
    """Returns the findings in this environment, by name.

    Args:
        failure (Exception): Why chainer_accum cannot be imported, or ``None`` if it can.

    """
    checks: Dict[str, Callable[[], Finding]] = {
        "Python": check_python,
        "NumPy": functools.partial(check_numpy, failure),
        "Chainer": functools.partial(check_chainer, failure),
        "restored names": check_names,
        "BLAS": check_blas,
        "products in place": check_products_in_place,
        "start method": check_start_method,
        "CuPy": check_cupy,
        "CUDA": check_cuda,
        "cuDNN": check_cudnn,
        "MPI": check_mpi,
    }
    findings = {name: _run(check) for name, check in checks.items()}
    return {"chainer_accum": _judge_itself(failure, is_well(findings)), **findings}


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # such as the BLAS of a NumPy that cannot be imported
        return Finding(NOTE, f"not examined: {describe(error)}")


def _judge_itself(failure: Optional[Exception], is_rest_well: bool) -> Finding:
    if failure is None:
        return Finding(OK, f"{__version__}, {Path(__file__).parents[1]}")
    found = f"{__version__} cannot be imported: {describe(failure)}"
    if not is_rest_well:
        return Finding(WRONG, found, "The cause is below.")
    return Finding(WRONG, found, "The cause is unknown. Report it with the output of:", SHOW_TRACEBACK)
