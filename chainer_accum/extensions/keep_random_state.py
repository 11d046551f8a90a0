"""KeepRandomState: a run that is resumed draws the random numbers that it would have drawn."""

from __future__ import annotations

import contextlib
from typing import Any, List, Optional

import chainer
from chainer.training import extension

from chainer_accum.random_state import RandomState, devices_of


class KeepRandomState(extension.Extension):
    """Trainer extension to save and restore the state of the random generators with the snapshots of the Trainer.

    The generators are the global ones of Python, of NumPy and, on the devices of the models, of CuPy. Chainer's
    snapshots leave them out, so that a run which shuffles or drops out is another run from where it is resumed. With
    this extension, it is the same.

    The state is restored as :meth:`~chainer.training.Trainer.run` begins, if a snapshot that has it was loaded. CuPy's
    state cannot be read: with each snapshot, its generators are seeded with numbers that they draw. cuDNN's dropout has
    a state of its own, which is not kept.

    """

    default_name = "keep_random_state"
    # So that it comes last, and after a snapshot extension that loads the latest snapshot by itself.
    priority = -1000
    trigger = None  # never: all is done as training begins, and with the snapshots

    def __init__(self) -> None:
        self._devices: Optional[List[Any]] = None  # until the Trainer runs
        self._loaded: Optional[RandomState] = None

    def initialize(self, trainer: Any) -> None:
        """Restores the state that was loaded."""
        updater = trainer.updater
        self._devices = devices_of(optimizer.target for optimizer in updater.get_all_optimizers().values())
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.restore()

    def serialize(self, serializer: Any) -> None:
        if isinstance(serializer, chainer.Serializer):
            if self._devices is not None:
                RandomState(self._devices).save(serializer)
            elif self._loaded is not None:
                self._loaded.save(serializer)
            return
        self._loaded = None
        with contextlib.suppress(KeyError, ValueError):  # a snapshot without it, in npz or HDF5
            self._loaded = RandomState.load(serializer)
