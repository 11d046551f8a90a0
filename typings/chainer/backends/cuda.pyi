from typing import Any

from chainer import backend

# CuPy, or a stand-in for it.
available: bool
cupy: Any
memory_pool: Any
pinned_memory_pool: Any
ndarray: type[Any]
Stream: type[Any]

class GpuDevice(backend.Device):
    device: Any
    @staticmethod
    def from_device_id(device_id: int) -> GpuDevice: ...
