"""A store returns the arrays that were put into it, bit for bit, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import sys
from typing import Any, Dict, List, Tuple

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum.lockstep.store import FileStore, HostStore, MemoryStore, check_store, make_store
from hypothesis import given
from hypothesis import strategies as st
from lockstep_helpers import (
    STORES,
    Net,
    as_option,
    assert_goes_on,
    assert_same_runs,
    classification,
    in_lockstep,
    make_vectors,
    unchanged,
    whole_batch,
)

DTYPES = ("float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool", "complex64")
each_store = pytest.mark.parametrize("store", STORES)


def open_store(store: str, folder: pathlib.Path) -> Any:
    return contextlib.closing(make_store(as_option(store, folder)))


def assert_same_array(actual: numpy.ndarray, expected: numpy.ndarray) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.tobytes() == expected.tobytes()


@each_store
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_comes_back_bit_for_bit(dtype: str, store: str, tmp_path: pathlib.Path) -> None:
    base = (numpy.random.RandomState(0).standard_normal((4, 6)) * 50).astype(dtype)
    arrays = [base, base.T, base[:, ::2], base[::-1], base[0, 0].reshape(()), base[:0], numpy.asfortranarray(base)]
    arrays.append(numpy.broadcast_to(base[0], (3, 6)))
    with open_store(store, tmp_path) as opened:
        kept = [opened.put(array) for array in arrays]
        for _ in range(2):
            for each, array in zip(kept, arrays):
                assert_same_array(each.get(), array)


@each_store
def test_values_that_are_not_finite_come_back_bit_for_bit(store: str, tmp_path: pathlib.Path) -> None:
    array = numpy.array([0x7FF8000000000001, 0xFFF0000000000000, 0x8000000000000000, 1], numpy.uint64).view("f8")
    with open_store(store, tmp_path) as opened:
        assert_same_array(opened.put(array).get(), array)


def test_what_a_file_returns_can_be_changed() -> None:
    array = numpy.arange(3.0)
    with contextlib.closing(FileStore(None)) as store:
        kept = store.put(array)
        kept.get()[...] = 0
        array[...] = 7
        assert kept.get().tolist() == [0, 1, 2]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 5), st.sampled_from(DTYPES)),
            st.tuples(st.sampled_from(["get", "free"]), st.integers(0, 30), st.none()),
        ),
        max_size=40,
    )
)
def test_any_order_of_putting_getting_and_freeing(operations: List[Tuple[str, int, Any]]) -> None:
    generator = numpy.random.RandomState(0)
    with contextlib.closing(FileStore(None)) as store:
        held: List[Tuple[Any, numpy.ndarray]] = []
        for operation, number, dtype in operations:
            if operation == "put":
                array = (generator.standard_normal((number, 2)) * 50).astype(dtype)
                held.append((store.put(array), array.copy()))
            elif held:
                kept, array = held[number % len(held)]
                if operation == "get":
                    assert_same_array(kept.get(), array)
                else:
                    kept.free()
                    kept.free()
                    del held[number % len(held)]
        for kept, array in held:
            assert_same_array(kept.get(), array)


def size_of(store: FileStore) -> int:
    return os.fstat(store._file.fileno()).st_size


def test_space_that_is_freed_is_used_again() -> None:
    with contextlib.closing(FileStore(None)) as store:
        for _ in range(10):
            kept = [store.put(numpy.zeros((4, size))) for size in (5, 7, 5)]
            for each in kept:
                each.free()
        assert size_of(store) == 4 * (5 + 7 + 5) * 8
        first = store.put(numpy.ones((4, 5)))
        second = store.put(numpy.full((4, 5), 2.0))
        assert (first.get() == 1).all() and (second.get() == 2).all()


def test_the_file_holds_nothing_but_the_bytes_of_the_arrays() -> None:
    with contextlib.closing(FileStore(None)) as store:
        store.put(numpy.zeros((3, 4), "f"))
        store.put(numpy.zeros(0))
        store.put(numpy.zeros((), "e"))
        assert size_of(store) == 3 * 4 * 4 + 2


def test_a_window_needs_no_more_room_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    close = FileStore.close

    def note_size(self: FileStore) -> None:
        if not self._file.closed:
            sizes.append(size_of(self))
        close(self)

    monkeypatch.setattr(FileStore, "close", note_size)
    run = in_lockstep(Net, make_vectors(), lockstep="file")
    run.update(4)
    assert len(sizes) == 4 and set(sizes) == {sizes[0]} and sizes[0] > 0


def open_files() -> List[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in names if name.startswith("/") and not name.startswith(("/dev", "/proc"))]


@pytest.mark.skipif(sys.platform != "linux", reason="files that are open are listed in /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_the_file_is_in_the_folder_that_was_named_and_gone_after_the_window(
    fails: bool, tmp_path: pathlib.Path
) -> None:
    seen = []

    def look(h: Any) -> Any:
        seen.append((list(tmp_path.iterdir()), [name for name in open_files() if name.startswith(str(tmp_path))]))
        if fails:
            raise ConnectionError
        return h

    before = open_files()
    run = in_lockstep(lambda: Net(look), make_vectors(), lockstep=str(tmp_path))
    with pytest.raises(ConnectionError) if fails else contextlib.nullcontext():
        run.update()
    names, files = seen[0]
    assert names == []  # it has no name, so it is gone even if the process is killed
    assert len(files) == 1
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_a_folder_may_be_a_path(tmp_path: pathlib.Path) -> None:
    runs = [in_lockstep(Net, make_vectors(), lockstep=tmp_path), whole_batch(Net, make_vectors())]
    for each in runs:
        each.update()
    assert_same_runs(*runs, tolerance=1e-12)


class FullDisk:
    """Stands for the file of a store, on a disk that has room for so many bytes only."""

    def __init__(self, file: Any, room: int, code: int) -> None:
        self._file, self._room, self._code = file, room, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        if len(data) > self._room:
            raise OSError(self._code, os.strerror(self._code))
        written = self._file.write(data[: max(len(data) // 2, 1)])  # as a file may do: only a part
        self._room -= written
        return written


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int, code: int = errno.ENOSPC) -> None:
    def init(self: FileStore, folder: Any) -> None:
        original(self, folder)
        self._file = FullDisk(self._file, room, code)

    original = FileStore.__init__
    monkeypatch.setattr(FileStore, "__init__", init)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_with_what_to_do(
    code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    fill_disk(monkeypatch, 100, code)
    with contextlib.closing(FileStore(tmp_path)) as store:
        kept = store.put(numpy.arange(10.0))
        with pytest.raises(
            OSError,
            match=r"lockstep needs 8,000 more bytes than there is room for in '.*'; free some space there, name "
            "another folder, lockstep='/path/to/folder', or keep the arrays in memory, lockstep='memory'",
        ) as caught:
            store.put(numpy.zeros(1000))
        assert caught.value.errno == code
        assert str(tmp_path) in str(caught.value)
        assert (kept.get() == numpy.arange(10)).all()


def test_another_error_of_a_file_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, 0, errno.EIO)
    with contextlib.closing(FileStore(None)) as store, pytest.raises(OSError, match="Input/output error"):
        store.put(numpy.zeros(10))


def test_a_file_that_is_cut_short_is_found() -> None:
    with contextlib.closing(FileStore(None)) as store:
        kept = store.put(numpy.zeros(1000))
        os.ftruncate(store._file.fileno(), 10)
        with pytest.raises(OSError, match="the temporary file of lockstep is shorter than what was written to it"):
            kept.get()


@pytest.mark.parametrize("room", [0, 500, 900, 2000, 3500])
def test_after_a_full_disk_nothing_has_changed_and_the_next_update_is_right(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual, expected = in_lockstep(Net, make_vectors(100), lockstep="file"), whole_batch(Net, make_vectors(100))
    for each in (actual, expected):
        each.update()
    with monkeypatch.context() as full, unchanged(actual):
        fill_disk(full, room)
        with pytest.raises(OSError, match="lockstep needs .* more bytes than there is room for"):
            actual.update()
    assert_goes_on(actual, expected)


def test_a_folder_that_is_removed_is_an_error_that_changes_nothing(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run = in_lockstep(Net, make_vectors(), lockstep=str(folder))
    folder.rmdir()
    with unchanged(run), pytest.raises(FileNotFoundError):
        run.update()
    folder.mkdir()
    run.update()


def test_each_argument_makes_its_store(tmp_path: pathlib.Path) -> None:
    stores: Dict[Any, type] = {"memory": MemoryStore, "host": HostStore, "file": FileStore, tmp_path: FileStore}
    for argument, kind in stores.items():
        check_store(argument)
        with contextlib.closing(make_store(argument)) as store:
            assert type(store) is kind
    check_store(None)


def test_a_store_can_be_closed_any_number_of_times(tmp_path: pathlib.Path) -> None:
    for name in STORES:
        store = make_store(as_option(name, tmp_path))
        store.put(numpy.zeros(3))
        store.close()
        store.close()


def test_variables_leave_memory_while_they_wait() -> None:
    """With a file, only the micro-batch that computes has its arrays in memory."""
    waiting: List[Any] = []
    seen = []

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            seen.append([h.array is None for h in waiting])
            h = self.first(x)
            waiting.append(h)
            y = self.last(F.tanh(self.normalization(h)))
            assert h.array is not None
            return classification(self, y, t)

    in_lockstep(Model, make_vectors(), lockstep="file").update()
    assert seen == [[], [True], [True, True]]
