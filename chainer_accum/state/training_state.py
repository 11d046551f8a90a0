"""TrainingState: stores everything that training changes, and restores it."""

from __future__ import annotations

from typing import ContextManager

from chainer.training.updaters import StandardUpdater

from chainer_accum.state.random_state import RandomState, devices_of
from chainer_accum.state.remembered import Remembered
from chainer_accum.state.touched_links import links_behind


class TrainingState:
    """Stored state of a training: everything that its next updates will change.

    This covers the updater, its optimizers with their update rules and hyperparameters, their models with parameters,
    persistent values and other attributes, the positions of its iterators, and the random generators. The latter are
    the global ones, see :class:`~chainer_accum.state.RandomState`, and those that are attributes of an order sampler,
    an initializer or a link. Inside :meth:`following`, other links that a loss function uses are covered as well.

    Arrays are copied to host memory. Datasets, converters and optimizer hooks are not restored, and neither is any
    other object that is not of Chainer's kinds, unless it belongs to a link.

    Args:
        updater (~chainer.training.Updater): Updater that trains.

    Raises:
        TypeError: If an iterator cannot be serialized.

    """

    def __init__(self, updater: StandardUpdater) -> None:
        optimizers = updater.get_all_optimizers().values()
        self._remembered = Remembered()
        for root in (updater, *optimizers):  # not all are of Chainer's classes: an optimizer may be wrapped
            self._remembered.add(vars(root))
        for link in links_behind(vars(updater)):
            self._remembered.add(link)
        self._random_state = RandomState(devices_of(optimizer.target for optimizer in optimizers))

    def following(self) -> ContextManager[None]:
        """Context manager for updates that also stores objects when they are first used."""
        return self._remembered.following()

    def restore(self) -> None:
        """Restores everything. It can be called any number of times."""
        self._remembered.restore()
        self._random_state.restore()
