"""The BLAS of NumPy: its threads, and whether it adds matrix products to a sum while it computes them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Callable, Tuple

from chainer_accum._doctor.findings import NOTE, OK, Finding
from chainer_accum._doctor.importing import import_quietly
from chainer_accum._remedies import REINSTALL_NUMPY, USE_ONE_THREAD

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

# The weight gradient of a linear layer from 1024 to 1024 units, for a micro-batch of 32 examples.
_UNITS, _EXAMPLES = 1024, 32


def check_blas() -> Finding:
    """Returns which library computes NumPy's matrix products, and with how many threads."""
    numpy = import_quietly("numpy")
    set_to = [f"{name}={os.environ[name]}" for name in _THREADS if os.environ.get(name)]
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    library, num_threads = _loaded_blas()
    parts = [library or _built_with(numpy)]
    parts += [f"{num_threads} thread{'s' * (num_threads > 1)}"] * (num_threads > 0)
    found = ", ".join([*parts, f"{num_cores} core{'s' * (num_cores > 1)}", *set_to])
    wanted = [int(each.partition("=")[2]) for each in set_to if each.partition("=")[2].isdigit()]
    if max([num_threads, *wanted]) > num_cores:
        return Finding(NOTE, found, "More threads than cores wait for one another.", USE_ONE_THREAD)
    return Finding(OK, found)


def check_products_in_place() -> Finding:
    """Returns whether weight gradients are added to their sum while they are computed, and the time this takes."""
    from chainer_accum.window import adds_products_in_place

    if not adds_products_in_place():
        advice = (
            "Weight gradients of linear layers are computed first and then added, which takes longer. NumPy's own "
            "wheels have the OpenBLAS that adds them in place:"
        )
        return Finding(NOTE, "no: NumPy has not brought its own OpenBLAS", advice, REINSTALL_NUMPY)
    in_place, apart = _measure(import_quietly("numpy"))
    return Finding(
        OK,
        f"yes: {1e3 * in_place:.2f} ms instead of {1e3 * apart:.2f} ms for a weight gradient of {_UNITS} x {_UNITS} "
        f"from {_EXAMPLES} examples",
    )


def _loaded_blas() -> Tuple[str, int]:
    """Returns the library that NumPy has loaded and its number of threads, or an empty name and 0 if unknown."""
    try:
        threadpoolctl = import_quietly("threadpoolctl")
    except ImportError:
        return "", 0
    for pool in threadpoolctl.threadpool_info():
        is_of_scipy = {"scipy", "scipy.libs"} & set(Path(pool["filepath"]).parts)
        if pool["user_api"] == "blas" and not is_of_scipy:
            return f"{pool['internal_api']} {pool['version']}", pool["num_threads"]
    return "", 0


def _built_with(numpy: Any) -> str:
    """Returns the library with which NumPy was built."""
    try:
        blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    except TypeError:  # before NumPy 1.26
        libraries = [
            library
            for name, info in sorted(vars(numpy.__config__).items())
            if name in ("blas_ilp64_opt_info", "blas_opt_info")
            for library in info.get("libraries", [])
        ]
        return ", ".join(dict.fromkeys(libraries)) or "unknown library"


def _measure(numpy: Any) -> Tuple[float, float]:
    """Returns the shortest times, in seconds, in which a product is added in place, and computed and then added."""
    from chainer_accum.window import add_matrix_product

    total = numpy.zeros((_UNITS, _UNITS), numpy.float32)
    gy, x = numpy.ones((2, _EXAMPLES, _UNITS), numpy.float32)

    def add_afterwards() -> None:
        nonlocal total
        total += gy.T.dot(x)

    rounds = [(_time(lambda: add_matrix_product(total, gy, x)), _time(add_afterwards)) for _ in range(10)]
    in_place, apart = zip(*rounds)
    return min(in_place), min(apart)


def _time(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
