"""A matrix product is added to a sum in place, by NumPy's own library or not at all."""

from __future__ import annotations

import chainer_accum  # noqa: F401
import numpy
import pytest
from chainer_accum import _blas
from hypothesis import given, settings
from hypothesis import strategies as st

has_library = pytest.mark.skipif(_blas._gemm("f") is None, reason="NumPy has not brought its own OpenBLAS here")


def make_arrays(dtype, m=300, n=200, k=7):
    random = numpy.random.RandomState(0)
    return [random.standard_normal(shape).astype(dtype) for shape in ((m, n), (k, m), (k, n))]


@has_library
@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["f", "d"]), st.integers(1, 40), st.integers(150, 300), st.integers(220, 400))
def test_the_product_is_added_in_place(dtype, k, m, n):
    total, a, b = make_arrays(dtype, m, n, k)
    expected = total + a.T.dot(b)
    array = total
    assert _blas.add_matrix_product(total, a, b)
    assert total is array
    numpy.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "arrays",
    [
        make_arrays("e"),
        make_arrays("f", m=3, n=3),
        make_arrays("f", k=0),
        [make_arrays("f")[0], *make_arrays("d")[1:]],
        [make_arrays("f")[0].T.copy().T, *make_arrays("f")[1:]],
        [make_arrays("f")[0], numpy.broadcast_to(numpy.float32(1), (7, 300)), make_arrays("f")[2]],
    ],
    ids=["float16", "small", "no examples", "mixed dtypes", "sum in another order", "gradient that is broadcast"],
)
def test_what_cannot_be_done_at_once_is_left_alone(arrays):
    total = arrays[0].copy()
    assert not _blas.add_matrix_product(*arrays)
    numpy.testing.assert_array_equal(arrays[0], total)


def test_without_the_library_it_declines(monkeypatch):
    monkeypatch.setattr(_blas, "_libraries", lambda: ())
    _blas._gemm.cache_clear()
    try:
        assert not _blas.add_matrix_product(*make_arrays("f"))
    finally:
        _blas._gemm.cache_clear()
