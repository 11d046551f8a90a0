"""A matrix product is added to a sum in place, by the library that NumPy calls where that can be had."""

from __future__ import annotations

import chainer_accum  # noqa: F401
import numpy
import pytest
from chainer_accum.window import blas as _blas
from hypothesis import given, settings
from hypothesis import strategies as st


def make_arrays(dtype, m=300, n=200, k=7):
    random = numpy.random.RandomState(0)
    return [random.standard_normal(shape).astype(dtype) for shape in ((m, n), (k, m), (k, n))]


def assert_adds(total, a, b):
    expected = total.astype("d") + a.T.astype("d").dot(b)
    array = total
    _blas.add_matrix_product(total, a, b)
    assert total is array
    tolerance = 1e-2 if a.dtype == numpy.float16 else 1e-4
    numpy.testing.assert_allclose(total, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60)
@given(
    *(st.sampled_from("efd"), st.integers(0, 40), st.integers(1, 300), st.integers(1, 400)),
    *(st.sampled_from("CF"), st.sampled_from("CF")),
)
def test_the_product_is_added_in_place(dtype, k, m, n, order_of_a, order_of_b):
    total, a, b = make_arrays(dtype, m, n, k)
    assert_adds(total, a.copy(order=order_of_a), b.copy(order=order_of_b))


@pytest.mark.parametrize(
    "arrays",
    [
        [make_arrays("f")[0], *make_arrays("d")[1:]],
        [make_arrays("f")[0], *make_arrays("e")[1:]],
        [make_arrays("f")[0].T.copy().T, *make_arrays("f")[1:]],
        [make_arrays("f")[0], numpy.broadcast_to(numpy.float32(1), (7, 300)), make_arrays("f")[2]],
        [make_arrays("f")[0], make_arrays("f", m=7, k=300)[1].T, make_arrays("f", k=14)[2][::2]],
    ],
    ids=[
        "wider factors",
        "narrower factors",
        "a sum by columns",
        "a factor that is broadcast",
        "factors that are views",
    ],
)
def test_any_arrays_will_do(arrays):
    assert_adds(*arrays)


@pytest.mark.parametrize("dtype, calls", [("f", 1), ("d", 1), ("e", 0)])
def test_a_large_product_goes_to_the_library(monkeypatch, dtype, calls):
    made = []
    gemm = _blas._gemm(dtype)
    if calls and gemm is None:
        pytest.skip("NumPy has not brought its own OpenBLAS here")
    monkeypatch.setattr(_blas, "_gemm", lambda _: gemm and (lambda *args: made.append(args) or gemm(*args)))
    assert_adds(*make_arrays(dtype))
    assert_adds(*make_arrays(dtype, m=3, n=3))
    assert len(made) == calls


def test_without_the_library_numpy_does_it(monkeypatch):
    monkeypatch.setattr(_blas, "_libraries", lambda: ())
    _blas._gemm.cache_clear()
    try:
        assert _blas._gemm("f") is None
        assert_adds(*make_arrays("f"))
    finally:
        _blas._gemm.cache_clear()
