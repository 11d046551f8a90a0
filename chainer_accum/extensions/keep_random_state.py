"""KeepRandomState: a Trainer extension that makes a resumed run draw the same random numbers."""

from __future__ import annotations

import contextlib
from typing import List, Optional

import chainer
from chainer.training import Trainer, extension

from chainer_accum.state import RandomState, devices_of


class KeepRandomState(extension.Extension):
    """Trainer extension that saves and restores the state of the random generators with the Trainer's snapshots.

    These are the global generators of Python, NumPy and, on the devices of the models, CuPy. Chainer's snapshots leave
    them out, so a resumed run that shuffles or uses dropout differs from one that was never interrupted. With this
    extension, both runs are the same.

    The state is restored when :meth:`~chainer.training.Trainer.run` begins, if a snapshot that contains it has been
    loaded. CuPy's state cannot be read. Instead, with each snapshot, each CuPy generator is seeded with a number that
    it draws itself. The state of cuDNN's dropout is not kept.

    """

    default_name = "keep_random_state"
    # Very low, so that it runs after a snapshot extension that loads the latest snapshot automatically.
    priority = -1000
    trigger = None  # never: it acts when training begins and with snapshots

    def __init__(self) -> None:
        self._devices: Optional[List[chainer.backend.Device]] = None  # until the Trainer runs
        self._loaded: Optional[RandomState] = None

    def initialize(self, trainer: Trainer) -> None:
        """Restores the state that was loaded, if any."""
        updater = trainer.updater
        self._devices = devices_of(optimizer.target for optimizer in updater.get_all_optimizers().values())
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.restore()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        if isinstance(serializer, chainer.Serializer):
            if self._devices is not None:
                RandomState(self._devices).save(serializer)
            elif self._loaded is not None:
                self._loaded.save(serializer)
            return
        self._loaded = None
        with contextlib.suppress(KeyError, ValueError):  # a snapshot without the state, in npz or HDF5
            self._loaded = RandomState.load(serializer)
