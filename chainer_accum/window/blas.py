"""Matrix products that are added to a sum while they are computed.

On a GPU, CuPy has a function for this. On the host, NumPy first computes ``a.T @ b``, writes it to new memory, reads it
again and adds it. BLAS can do both in one call, but NumPy does not expose that. SciPy does, but brings its own BLAS,
whose threads compete with NumPy's. So this module calls the library that NumPy itself uses: the OpenBLAS inside NumPy's
wheels. If NumPy uses another BLAS, the product is computed first and then added.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import pathlib
from typing import Callable, Optional, Tuple, Type, Union

import numpy
from chainer.backends import cuda

from chainer_accum._devices import Array

_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112

# In smaller sums, the call through ctypes takes longer than it saves.
_SMALLEST_SUM = 2**15

_Integer = Union[Type[ctypes.c_int], Type[ctypes.c_int64]]


def add_matrix_product(total: Array, a: Array, b: Array) -> None:
    """Adds ``a.T @ b`` to ``total`` in place.

    Args:
        total (:ref:`ndarray`): Sum of shape ``(m, n)``.
        a (:ref:`ndarray`): Array of shape ``(k, m)``.
        b (:ref:`ndarray`): Array of shape ``(k, n)``.

    """
    # Both libraries require this. Sums of float16 gradients are float32, so they take the last line.
    is_plain = total.flags.c_contiguous and total.dtype == a.dtype == b.dtype and total.dtype.char in "fd"
    if is_plain and total.size > 0 and len(a) > 0:
        if isinstance(total, cuda.ndarray):
            # It accepts both memory orders. The current device is that of the backward pass.
            importlib.import_module("cupy.cublas").gemm("T", "N", a, b, out=total, alpha=1.0, beta=1.0)
            return
        if isinstance(total, numpy.ndarray) and total.size >= _SMALLEST_SUM:
            gemm = _gemm(total.dtype.char)
            if gemm is not None:
                _add_on_host(gemm, total, a, b)
                return
    total += a.T.dot(b)


def adds_products_in_place() -> bool:
    """Returns whether products on the host are added while they are computed."""
    return _gemm("f") is not None


def _add_on_host(gemm: Callable[..., None], total: numpy.ndarray, a: numpy.ndarray, b: numpy.ndarray) -> None:
    (k, m), n = a.shape, b.shape[1]
    # The library can read an array or its transpose, so neither has to be copied.
    a, a_is_transposed = _contiguous(a)
    b, b_is_transposed = _contiguous(b)
    transpose_a, a_width = (_NO_TRANSPOSE, k) if a_is_transposed else (_TRANSPOSE, m)
    transpose_b, b_width = (_TRANSPOSE, k) if b_is_transposed else (_NO_TRANSPOSE, n)
    pointers = [array.__array_interface__["data"][0] for array in (a, b, total)]
    gemm(
        *(_ROW_MAJOR, transpose_a, transpose_b, m, n, k),
        *(1.0, pointers[0], a_width, pointers[1], b_width),
        *(1.0, pointers[2], n),
    )


def _contiguous(array: numpy.ndarray) -> Tuple[numpy.ndarray, bool]:
    """Returns the array, or a C-contiguous copy unless its transpose is C-contiguous, and whether that is the case."""
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        return array, True
    return numpy.ascontiguousarray(array), False


@functools.lru_cache(maxsize=None)
def _gemm(dtype: str) -> Optional[Callable[..., None]]:
    """Returns ``cblas_sgemm`` or ``cblas_dgemm`` of the OpenBLAS in NumPy's wheel, or ``None`` if there is none."""
    if dtype not in "fd":
        return None
    real = {"f": ctypes.c_float, "d": ctypes.c_double}[dtype]
    name = {"f": "cblas_sgemm", "d": "cblas_dgemm"}[dtype]
    for symbol, integer in _spellings(name):
        for path in _libraries():
            try:
                gemm = getattr(ctypes.CDLL(str(path)), symbol)
            except (OSError, AttributeError):
                continue
            gemm.restype = None
            gemm.argtypes = (
                [ctypes.c_int] * 3
                + [integer] * 3
                + [real, ctypes.c_void_p, integer, ctypes.c_void_p, integer]
                + [real, ctypes.c_void_p, integer]
            )
            return gemm  # type: ignore[no-any-return]
    return None


def _libraries() -> Tuple[pathlib.Path, ...]:
    package = pathlib.Path(numpy.__file__).parent
    folders = package.parent / "numpy.libs", package / ".dylibs"  # in wheels for Linux and Windows, and for macOS
    return tuple(path for folder in folders for path in sorted(folder.glob("*openblas*")))


def _spellings(name: str) -> Tuple[Tuple[str, _Integer], ...]:
    """Returns the names of the function in the various NumPy wheels, with the type of its sizes."""
    return (
        (f"scipy_{name}64_", ctypes.c_int64),
        (f"{name}64_", ctypes.c_int64),
        (f"scipy_{name}", ctypes.c_int),
        (name, ctypes.c_int),
    )
