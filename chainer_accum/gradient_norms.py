"""The squared norms of the gradients of a window: of each micro-batch's by itself, and of all together."""

from __future__ import annotations

from typing import Any, Iterable, List

import chainer
import numpy

from chainer_accum._devices import device_of


class GradientNorms:
    """Squared norms of gradients of mean losses, all at the same parameters and without any loss scale.

    Norms are scalars, or zero-dimensional arrays on the device of the parameters; none is waited for.

    Attributes:
        weights (list): What each micro-batch counts for, such as its number of examples.
        micro_batches (list): The squared norm of the gradient of each micro-batch.
        window: The squared norm of the gradient of the window, as it is before the hooks of the optimizer.

    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all norms."""
        self.weights: List[float] = []
        self.micro_batches: List[Any] = []
        self.window: Any = None

    def add(self, grads: Iterable[Any], scale: float, weight: float) -> None:
        """Adds a micro-batch, of whose gradient ``grads`` are the parts, times ``scale``."""
        self.weights.append(weight)
        self.micro_batches.append(_squared_norm(grads, scale))

    def set_window(self, grads: Iterable[Any], scale: float) -> None:
        """Sets the gradient of the window, of which ``grads`` are the parts, times ``scale``."""
        self.window = _squared_norm(grads, scale)


def _squared_norm(arrays: Iterable[Any], scale: float) -> Any:
    """Returns the sum of the squares of all values, each divided by ``scale``."""
    total: Any = 0.0
    for array in arrays:
        with device_of(array):
            flat = array.ravel().astype(numpy.promote_types(array.dtype, numpy.float32), copy=False)
            total = total + chainer.backend.get_array_module(flat).vdot(flat, flat)
    with device_of(total):
        return total / scale**2
