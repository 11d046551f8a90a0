"""Prefetching copies to a device beside the computation, and neither of the two reads what is not there yet.

A kernel that runs for about a second on a stream holds back all that comes after it there, so that an order which is
not kept would be seen. Without a device these tests are skipped.
"""

from __future__ import annotations

import contextlib
import threading

import chainer_accum  # noqa: F401
import chainer
import numpy
import pytest
from chainer.backends import cuda
from chainer_accum.batches.prefetching import prepare_ahead

from helpers import has_gpu

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs CuPy and a GPU")

SIZE = 2**20
KERNEL = """
extern "C" __global__ void work(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


@pytest.fixture
def work():
    """Returns a function that gives the current stream about a second of work."""
    kernel = cuda.cupy.RawKernel(KERNEL, "work")

    def launch(cycles=2 * 10**9):
        kernel((1,), (1,), (numpy.int64(cycles),))

    launch(1)  # compiles it
    cuda.cupy.cuda.Device().synchronize()
    return launch


def ahead(items, prepare):
    return prepare_ahead(iter(items), prepare, chainer.get_device("@cupy:0"))


def test_a_copy_does_not_wait_for_what_has_been_computed_since_its_memory_was_taken(work):
    computing = cuda.cupy.cuda.get_current_stream()
    is_computing = []

    def prepare(value):
        copying = cuda.cupy.cuda.get_current_stream()
        array = cuda.cupy.empty(SIZE, "f")
        with computing:
            work()
        array.set(numpy.full(SIZE, value, "f"))
        copying.synchronize()
        is_computing.append(not computing.done)
        return array

    ((_, prepared),) = ahead([3], prepare)
    assert is_computing == [True]
    assert (prepared().get() == 3).all()


def test_what_computes_waits_for_the_copy(work):
    def prepare(value):
        work()
        return cuda.cupy.asarray(numpy.full(SIZE, value, "f"))

    sums = [prepared().sum() for _, prepared in ahead([1, 2, 3], prepare)]
    assert [float(each) for each in sums] == [SIZE, 2 * SIZE, 3 * SIZE]


def test_a_copy_waits_for_what_computes_with_the_array_whose_memory_it_gets(work):
    is_free = threading.Event()
    addresses = []

    def prepare(value):
        if value == 2:
            assert is_free.wait(60)
        array = cuda.cupy.asarray(numpy.full(SIZE, value, "f"))
        addresses.append(array.data.ptr)
        return [array]

    with contextlib.closing(ahead([1, 2], prepare)) as prepared:
        _, first = next(prepared)
        holder = first()
        work()
        total = holder[0].sum()  # which the device has not begun to compute
        holder.clear()
        is_free.set()
        _, second = next(prepared)
        assert addresses[0] == addresses[1]
        assert float(total) == SIZE
        assert float(second()[0].sum()) == 2 * SIZE


def test_an_exception_reaches_the_caller_and_the_thread_is_at_rest():
    def prepare(value):
        raise KeyError(value)

    ((_, prepared),) = ahead([1], prepare)
    with pytest.raises(KeyError):
        prepared()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chainer_accum")]
