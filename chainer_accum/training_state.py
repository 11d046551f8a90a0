"""All that training changes, to go back to."""

from __future__ import annotations

from typing import Any, ContextManager

from chainer_accum.random_state import RandomState, devices_of
from chainer_accum.remembered import Remembered
from chainer_accum.touched_links import links_behind


class TrainingState:
    """Where a training is: all that its next updates will change.

    That is: the updater, its optimizers with their update rules and hyperparameters, their models with parameters,
    persistent values and other attributes, the positions of its iterators, and the random generators: those of Python,
    NumPy and CuPy, see :class:`~chainer_accum.random_state.RandomState`, and those that are attributes of an order
    sampler, an initializer or a link. Within :meth:`following`, links outside of these models that a loss function
    uses belong to it, too.

    Arrays are copied to host memory. Datasets, converters and hooks of an optimizer are left alone, and so is whatever
    else is not one of Chainer's kinds of objects, unless it belongs to a link.

    Args:
        updater (~chainer.training.Updater): Updater that trains.

    Raises:
        TypeError: If an iterator cannot be serialized.

    """

    def __init__(self, updater: Any) -> None:
        optimizers = updater.get_all_optimizers().values()
        self._remembered = Remembered()
        for root in (updater, *optimizers):  # not all of which are of Chainer's classes: an optimizer may be wrapped
            self._remembered.add(vars(root))
        for link in links_behind(vars(updater)):
            self._remembered.add(link)
        self._random_state = RandomState(devices_of(optimizer.target for optimizer in optimizers))

    def following(self) -> ContextManager[None]:
        """Context manager for updates, in which what they touch for the first time is remembered."""
        return self._remembered.following()

    def restore(self) -> None:
        """Puts everything back. It can be called any number of times."""
        self._remembered.restore()
        self._random_state.restore()
