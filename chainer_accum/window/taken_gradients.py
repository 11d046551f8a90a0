"""Gradients that stay in their parameters after an optimizer has taken them.

A caller that runs its own backward pass may hand its gradients to several optimizers in turn, and may or may not clear
them before the next pass. So taking gradients does not clear them. Instead, each parameter records which optimizers
have taken its gradient, and the next backward pass that reaches the parameter starts without it.
"""

from __future__ import annotations

import weakref
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.variable import VariableNode

from chainer_accum._devices import Array, device_of


def take_gradient(param: chainer.Parameter, optimizer: chainer.Optimizer) -> Optional[Array]:
    """Returns the gradient of a parameter, or ``None`` if it has none or this optimizer has already taken it."""
    grad = param.grad
    if grad is None or is_taken(param, optimizer):
        return None
    _mark_of(param).add(grad, optimizer)
    return grad


def take_gradients(
    params: Sequence[chainer.Parameter], optimizer: chainer.Optimizer, is_first_update: bool
) -> List[Tuple[chainer.Parameter, Array]]:
    """Returns parameters with their gradients, except gradients that this optimizer has already taken.

    Raises:
        RuntimeError: If there was no backward pass before.

    """
    taken = [(param, take_gradient(param, optimizer)) for param in params]
    new = [(param, grad) for param, grad in taken if grad is not None]
    is_stale = not new and any(param.grad is not None for param in params)
    if is_stale or (is_first_update and bool(new) and all(map(_is_as_born, (grad for _, grad in new)))):
        raise RuntimeError(
            "there must be a backward pass before gradients are taken, got none since they were last taken, or none at "
            "all; call loss.backward() first"
        )
    return new


def _is_as_born(grad: Array) -> bool:
    """Returns whether a gradient is still Chainer's initial NaN, as far as known without waiting for a device."""
    return type(grad) is numpy.ndarray and bool(numpy.isnan(grad).all())


def mark_as_taken(param: chainer.Parameter, optimizer: chainer.Optimizer) -> None:
    """Marks the present gradient of a parameter as taken by an optimizer."""
    if param.grad is not None:
        _mark_of(param).add(param.grad, optimizer)


def is_taken(param: chainer.Parameter, optimizer: chainer.Optimizer) -> bool:
    """Returns whether this optimizer has taken the present gradient of the parameter."""
    mark = _find_mark(param)
    return mark is not None and mark.is_of(param.grad) and optimizer in mark.takers


def keep_for_others(params: Iterable[chainer.Parameter], optimizer: chainer.Optimizer) -> Callable[[], None]:
    """Returns a function that restores the present gradients of parameters, if other optimizers are to take them.

    In between, the optimizer sets other gradients to update with.

    """
    kept = [(param, param.grad, mark, mark.takers) for param, mark in _shared(params) if is_taken(param, optimizer)]

    def put_back() -> None:
        for param, grad, mark, takers in kept:
            param.grad = grad
            mark.set(grad, takers)

    return put_back


class _Mark:
    """Record of which optimizers have taken a gradient of a parameter.

    Chainer calls it when a backward pass first reaches the parameter, before it adds to an old gradient.

    Args:
        param (~chainer.Parameter): The parameter.

    """

    def __init__(self, param: chainer.Parameter) -> None:
        self._param = weakref.ref(param)
        self._grad: Optional[weakref.ref[Array]] = None  # a weak reference: the parameter owns the gradient
        self._summary: Array = None
        self.takers: weakref.WeakSet[chainer.Optimizer] = weakref.WeakSet()
        self.all_takers: weakref.WeakSet[chainer.Optimizer] = weakref.WeakSet()

    def is_in(self, grad: Array) -> bool:
        """Returns whether the array is that of the gradient that was taken."""
        return self._grad is not None and self._grad() is grad

    def is_of(self, grad: Array) -> bool:
        """Returns whether the gradient is the one that was taken, not a new one written into the same array."""
        if not self.is_in(grad):
            return False
        now, before = _summary(grad), self._summary
        return bool(((now == before) | (now != now) & (before != before)).all())

    def set(self, grad: Array, takers: weakref.WeakSet[chainer.Optimizer]) -> None:
        self._grad = weakref.ref(grad)
        self._summary = _summary(grad)
        self.takers = takers

    def add(self, grad: Array, optimizer: chainer.Optimizer) -> None:
        if not self.is_of(grad):
            self.set(grad, weakref.WeakSet())
        self.takers.add(optimizer)
        self.all_takers.add(optimizer)

    def __call__(self) -> None:
        param = self._param()
        if param is not None:
            if param.grad is not None and self.is_in(param.grad):  # is_in does not wait for a device
                param.cleargrad()
            VariableNode._check_old_style_gradient(param.node)


def _summary(grad: Array) -> Array:
    """Returns two numbers, on the device of a gradient, that change when the gradient does."""
    xp = chainer.backend.get_array_module(grad)
    with device_of(grad), numpy.errstate(all="ignore"):
        flat, dtype = grad.ravel(), numpy.promote_types(grad.dtype, numpy.float32)
        return xp.stack([flat.sum(dtype=dtype), flat[::2].sum(dtype=dtype)])


def _find_mark(param: chainer.Parameter) -> Optional[_Mark]:
    mark: Optional[_Mark] = vars(param.node).get("_check_old_style_gradient")
    return mark


def _shared(params: Iterable[chainer.Parameter]) -> Iterator[Tuple[chainer.Parameter, _Mark]]:
    for param in params:
        mark = _find_mark(param)
        if mark is not None and len(mark.all_takers) > 1:
            yield param, mark


def _mark_of(param: chainer.Parameter) -> _Mark:
    mark = _find_mark(param)
    if mark is None:
        # Chainer has no public notification that a backward pass begins. But it calls this method of each leaf, to look
        # for gradients of old-style functions.
        mark = param.node._check_old_style_gradient = _Mark(param)
    return mark
