"""The state of the random generators that a Chainer program draws from, to go back to.

Python's and NumPy's can be read and written. CuPy's cannot be read: what can be known of it is the seed that it was
last given. So it gives itself one: it draws a seed, goes on from there, and can be sent back there.
"""

from __future__ import annotations

import json
import random
from typing import Any, Dict, Iterable, List, Optional

import chainer
import numpy
from chainer.backends import cuda


class RandomState:
    """Where Python's, NumPy's and CuPy's global random generators are.

    To take it leaves Python's and NumPy's generators as they are; CuPy's is seeded with a number that it drew.

    Args:
        devices: Devices whose generators are meant, those of the host apart. A device that is not a
            :class:`~chainer.backends.cuda.GpuDevice` has none of its own.

    """

    def __init__(self, devices: Iterable[Any] = ()) -> None:
        self._python = random.getstate()
        self._numpy: Dict[str, Any] = numpy.random.get_state(legacy=False)
        self._seeds: Dict[int, int] = {}
        for device in devices:
            if isinstance(device, cuda.GpuDevice):
                with chainer.using_device(device):
                    self._seeds[device.device.id] = int(cuda.cupy.random.randint(2**31 - 1))
        self._seed_devices()

    def restore(self) -> None:
        """Sends the generators back there. It can be called any number of times."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        self._seed_devices()

    def save(self, serializer: Any) -> None:
        """Saves the state with a serializer."""
        serializer("state", _to_array([self._python, _plain(self._numpy), list(self._seeds.items())]))

    @classmethod
    def load(cls, deserializer: Any) -> Optional[RandomState]:
        """Returns the state that was saved, or ``None`` if there is none. The generators are left alone."""
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


def devices_of(links: Iterable[Optional[chainer.Link]]) -> List[Any]:
    """Returns the devices of the parameters of some links, each once."""
    devices = {str(param.device): param.device for link in links if link is not None for param in link.params()}
    return list(devices.values())


def _to_array(state: Any) -> numpy.ndarray:
    # Serializers know arrays; not all of them know text, and none knows a tuple.
    return numpy.frombuffer(json.dumps(state).encode(), numpy.uint8)


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, (numpy.ndarray, numpy.generic)) else state
