"""GradientNorms: the squared gradient norms of each micro-batch and of the whole window."""

from __future__ import annotations

from typing import Iterable, List

import chainer
import numpy

from chainer_accum._devices import Array, device_of


class GradientNorms:
    """Squared norms of gradients of mean losses, all at the same parameters and without loss scale.

    Each norm is a number or a zero-dimensional array on the device of the parameters. Computing it does not wait for
    the device.

    Attributes:
        weights (list): Weight of each micro-batch, such as its number of examples.
        micro_batches (list): The squared norm of the gradient of each micro-batch.
        window: The squared norm of the gradient of the window, before the hooks of the optimizer.

    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Removes all norms."""
        self.weights: List[float] = []
        self.micro_batches: List[Array] = []
        self.window: Array = None

    def add(self, grads: Iterable[Array], scale: float, weight: float) -> None:
        """Adds a micro-batch whose gradient, times ``scale``, has the parts ``grads``."""
        self.weights.append(weight)
        self.micro_batches.append(_squared_norm(grads, scale))

    def set_window(self, grads: Iterable[Array], scale: float) -> None:
        """Sets the norm of the window, whose gradient, times ``scale``, has the parts ``grads``."""
        self.window = _squared_norm(grads, scale)


def norm_of(grads: Iterable[Array], scale: float) -> Array:
    """Returns the norm of a gradient, which, times ``scale``, has the parts ``grads``, on their device."""
    squared = _squared_norm(grads, scale)
    with device_of(squared):
        return squared**0.5


def _squared_norm(arrays: Iterable[Array], scale: float) -> Array:
    """Returns the sum of the squares of all values, after dividing each by ``scale``."""
    total: Array = 0.0
    for array in arrays:
        with device_of(array):
            flat = array.ravel().astype(numpy.promote_types(array.dtype, numpy.float32), copy=False)
            total = total + chainer.backend.get_array_module(flat).vdot(flat, flat)
    with device_of(total):
        return total / scale**2
