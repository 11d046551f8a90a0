"""Stores: where arrays wait that cross a cut of a tape: on their device, on the host, or in a file.

A store hands out one :class:`Kept` for each array. Reading it returns the array, bit for bit.
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Dict, List, Optional, Tuple, Union

import chainer
import numpy

from chainer_accum._devices import Array, device_of
from chainer_accum.state import DeferredSignals

StoreSpec = Union[str, "os.PathLike[str]", None]

_HOST = chainer.get_device("@numpy")


class Kept:
    """An array in a store.

    Args:
        array: The array.

    """

    def __init__(self, array: Array) -> None:
        self._array: Optional[Array] = array

    def get(self) -> Array:
        """Returns the array."""
        return self._array

    def free(self) -> None:
        """Gives the memory back. It can be called any number of times."""
        self._array = None


class MemoryStore:
    """Keeps arrays as they are.

    Attributes:
        takes_away (bool): Whether an array that was put into the store need not stay in memory.

    """

    takes_away = False

    def put(self, array: Array) -> Kept:
        """Keeps an array."""
        return Kept(array)

    def close(self) -> None:
        """Gives back everything that the store holds. It can be called any number of times."""


class HostStore(MemoryStore):
    """Keeps arrays of a device in host memory."""

    takes_away = True

    def put(self, array: Array) -> Kept:
        return Kept(array) if isinstance(array, numpy.ndarray) else _KeptOnHost(array)


class _KeptOnHost(Kept):
    def __init__(self, array: Array) -> None:
        super().__init__(_HOST.send(array))
        self._device = chainer.backend.get_device_from_array(array)

    def get(self) -> Array:
        return self._device.send(self._array)


class FileStore(MemoryStore):
    """Keeps arrays in a temporary file, which is gone as soon as it is closed, even if the process is killed.

    The file is read and written, not mapped into memory, since mapped pages would count as memory of the process.

    Args:
        folder: Folder for the file, or ``None`` for the system's folder for temporary files.

    """

    takes_away = True

    def __init__(self, folder: Union[str, os.PathLike[str], None]) -> None:
        self._folder = folder
        with DeferredSignals():  # an interrupt would leave the file open
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self._end = 0
        self._free: Dict[int, List[int]] = {}  # free positions in the file by size

    def put(self, array: Array) -> Kept:
        with device_of(array):
            return _KeptInFile(self, array)

    def write(self, data: numpy.ndarray) -> int:
        """Writes an array of bytes and returns its position."""
        size = data.nbytes
        positions = self._free.get(size)
        position = positions.pop() if positions else self._end
        view = data.data
        try:
            self._file.seek(position)
            while len(view) > 0:
                view = view[self._file.write(view) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            folder = tempfile.gettempdir() if self._folder is None else os.fspath(self._folder)
            raise OSError(
                error.errno,
                f"lockstep needs {size:,} more bytes than there is room for in {folder!r}; free some space there, name "
                "another folder, lockstep='/path/to/folder', or keep the arrays in memory, lockstep='memory'",
            ) from None
        self._end = max(self._end, position + size)
        return position

    def read(self, position: int, data: numpy.ndarray) -> None:
        """Fills an array of bytes from a position."""
        self._file.seek(position)
        view = data.data
        while len(view) > 0:
            count = self._file.readinto(view)
            if not count:
                raise OSError("the temporary file of lockstep is shorter than what was written to it")
            view = view[count:]

    def free(self, position: int, size: int) -> None:
        """Allows a part of the file to be written again."""
        self._free.setdefault(size, []).append(position)

    def close(self) -> None:
        self._file.close()


class _KeptInFile(Kept):
    def __init__(self, store: FileStore, array: Array) -> None:
        self._store = store
        self._device = chainer.backend.get_device_from_array(array)
        on_host = numpy.ascontiguousarray(_HOST.send(array))
        self._format: Tuple[Tuple[int, ...], numpy.dtype] = array.shape, on_host.dtype
        self._size = on_host.nbytes
        self._position: Optional[int] = store.write(on_host.reshape(-1).view(numpy.uint8)) if self._size else 0

    def get(self) -> Array:
        assert self._position is not None, "the array was freed"
        shape, dtype = self._format
        array: numpy.ndarray = numpy.empty(shape, dtype)
        if self._size:
            self._store.read(self._position, array.reshape(-1).view(numpy.uint8))
        return self._device.send(array)

    def free(self) -> None:
        if self._position is not None and self._size:
            self._store.free(self._position, self._size)
        self._position = None


def check_store(lockstep: StoreSpec) -> None:
    """Raises TypeError or ValueError unless :func:`make_store` can make a store of the argument."""
    if lockstep is None or lockstep in ("memory", "host", "file"):
        return
    if not isinstance(lockstep, (str, os.PathLike)):
        raise TypeError(
            f"lockstep must be None, 'memory', 'host', 'file' or a folder, got {type(lockstep).__name__}; use "
            "lockstep='memory' to keep what is needed in memory"
        )
    if not os.path.isdir(lockstep):
        raise ValueError(
            f"lockstep must be None, 'memory', 'host', 'file' or an existing folder, got {os.fspath(lockstep)!r}; "
            "create the folder first, or use lockstep='file' for the system's folder for temporary files"
        )


def make_store(lockstep: StoreSpec) -> MemoryStore:
    """Returns a new store for the argument ``lockstep``: ``'memory'``, ``'host'``, ``'file'`` or a folder."""
    if lockstep == "memory":
        return MemoryStore()
    if lockstep == "host":
        return HostStore()
    return FileStore(None if lockstep == "file" else lockstep)
