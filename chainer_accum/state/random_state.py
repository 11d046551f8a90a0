"""RandomState: the state of the random generators that a Chainer program uses.

The states of Python's and NumPy's generators can be read and written. CuPy's state cannot be read; only the last seed
is known. So CuPy's generator is seeded with a number that it draws itself, and is restored by setting that seed again.
"""

from __future__ import annotations

import json
import random
from typing import Any, Dict, Iterable, List, Optional

import chainer
import numpy
from chainer.backends import cuda


class RandomState:
    """The current state of the global random generators of Python, NumPy and CuPy.

    Storing it does not change Python's and NumPy's generators, but seeds CuPy's generators with numbers that they draw.

    Args:
        devices: Devices whose generators belong to the state, besides the host. Only a
            :class:`~chainer.backends.cuda.GpuDevice` has a generator of its own.

    """

    def __init__(self, devices: Iterable[chainer.backend.Device] = ()) -> None:
        self._python = random.getstate()
        self._numpy: Dict[str, Any] = numpy.random.get_state(legacy=False)
        self._seeds: Dict[int, int] = {}
        for device in devices:
            if isinstance(device, cuda.GpuDevice):
                with chainer.using_device(device):
                    self._seeds[device.device.id] = int(cuda.cupy.random.randint(2**31 - 1))
        self._seed_devices()

    def restore(self) -> None:
        """Restores the generators. It can be called any number of times."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        self._seed_devices()

    def checkpoint(self) -> RandomState:
        """Returns the current state of the same generators."""
        return RandomState(map(cuda.GpuDevice.from_device_id, self._seeds))

    def save(self, serializer: chainer.AbstractSerializer) -> None:
        """Saves the state with a serializer."""
        serializer("state", _to_array([self._python, _plain(self._numpy), list(self._seeds.items())]))

    @classmethod
    def load(cls, deserializer: chainer.AbstractSerializer) -> Optional[RandomState]:
        """Returns the saved state, or ``None`` if there is none. The generators are not changed."""
        saved = deserializer("state", None)
        if saved is None:
            return None
        (version, words, gauss), state, seeds = json.loads(bytes(saved).decode())
        state["state"] = {
            name: numpy.array(value, numpy.uint32) if isinstance(value, list) else value
            for name, value in state["state"].items()
        }
        loaded = cls()
        loaded._python, loaded._numpy, loaded._seeds = (version, tuple(words), gauss), state, dict(seeds)
        return loaded

    def _seed_devices(self) -> None:
        for device_id, seed in self._seeds.items():
            with chainer.using_device(cuda.GpuDevice.from_device_id(device_id)):
                cuda.cupy.random.seed(seed)


def devices_of(links: Iterable[Optional[chainer.Link]]) -> List[chainer.backend.Device]:
    """Returns the devices of the parameters of the links, each once."""
    devices = {str(param.device): param.device for link in links if link is not None for param in link.params()}
    return list(devices.values())


def _to_array(state: object) -> numpy.ndarray:
    # All serializers support arrays, not all support text, and none supports tuples.
    return numpy.frombuffer(json.dumps(state).encode(), numpy.uint8)


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, (numpy.ndarray, numpy.generic)) else state
