"""Gradients that stay in their parameters after an optimizer has taken them.

A caller that runs the backward pass may hand its gradients to several optimizers, one after the other, and may or may
not clear them before the next pass. So they are not cleared as they are taken. Each parameter remembers which optimizer
has taken the gradient that it has, and the next backward pass that reaches it begins with none.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.variable import VariableNode

from chainer_accum._devices import device_of


def take_gradient(param: chainer.Parameter, optimizer: Any) -> Optional[Any]:
    """Returns the gradient of a parameter, or ``None`` if it has none that this optimizer has not taken yet."""
    grad = param.grad
    if grad is None or is_taken(param, optimizer):
        return None
    _mark_of(param).add(grad, optimizer)
    return grad


def take_gradients(
    params: Sequence[chainer.Parameter], optimizer: Any, is_first_update: bool
) -> List[Tuple[chainer.Parameter, Any]]:
    """Returns parameters with their gradients, as far as this optimizer has not taken these yet.

    Raises:
        RuntimeError: If there has been no backward pass for it.

    """
    taken = [(param, take_gradient(param, optimizer)) for param in params]
    new = [(param, grad) for param, grad in taken if grad is not None]
    is_stale = not new and any(param.grad is not None for param in params)
    if is_stale or (is_first_update and bool(new) and all(map(_is_as_born, (grad for _, grad in new)))):
        raise RuntimeError(
            "there must be a backward pass before its gradients are taken, got none since they were taken last or none "
            "at all; call loss.backward() first"
        )
    return new


def _is_as_born(grad: Any) -> bool:
    """Returns whether a gradient is that with which Chainer makes parameters, as far as it is known without waiting."""
    return type(grad) is numpy.ndarray and bool(numpy.isnan(grad).all())


def mark_as_taken(param: chainer.Parameter, optimizer: Any) -> None:
    """Takes note that the gradient that a parameter has is nothing new to an optimizer."""
    if param.grad is not None:
        _mark_of(param).add(param.grad, optimizer)


def is_taken(param: chainer.Parameter, optimizer: Any) -> bool:
    """Returns whether this optimizer has taken the gradient that the parameter has."""
    mark = _find_mark(param)
    return mark is not None and mark.is_of(param.grad) and optimizer in mark.takers


def keep_for_others(params: Iterable[chainer.Parameter], optimizer: Any) -> Callable[[], None]:
    """Returns a function that gives parameters their present gradients again, if other optimizers are to take these.

    In between, the optimizer gives them other gradients to update with.

    """
    kept = [(param, param.grad, mark, mark.takers) for param, mark in _shared(params) if is_taken(param, optimizer)]

    def put_back() -> None:
        for param, grad, mark, takers in kept:
            param.grad = grad
            mark.set(grad, takers)

    return put_back


class _Mark:
    """Who has taken a gradient of a parameter.

    Chainer calls it as a backward pass first meets the parameter, before a gradient from before is added to.

    Args:
        param (~chainer.Parameter): The parameter.

    """

    def __init__(self, param: chainer.Parameter) -> None:
        self._param = weakref.ref(param)
        self._grad: Optional[Any] = None  # a weak reference: the gradient is the parameter's
        self._summary: Any = None
        self.takers: Any = weakref.WeakSet()
        self.all_takers: Any = weakref.WeakSet()

    def is_in(self, grad: Any) -> bool:
        """Returns whether it is the array of the gradient that was taken."""
        return self._grad is not None and self._grad() is grad

    def is_of(self, grad: Any) -> bool:
        """Returns whether it is the gradient that was taken, and not another one that was written into its array."""
        if not self.is_in(grad):
            return False
        now, before = _summary(grad), self._summary
        return bool(((now == before) | (now != now) & (before != before)).all())

    def set(self, grad: Any, takers: Any) -> None:
        self._grad = weakref.ref(grad)
        self._summary = _summary(grad)
        self.takers = takers

    def add(self, grad: Any, optimizer: Any) -> None:
        if not self.is_of(grad):
            self.set(grad, weakref.WeakSet())
        self.takers.add(optimizer)
        self.all_takers.add(optimizer)

    def __call__(self) -> None:
        param = self._param()
        if param is not None:
            if param.grad is not None and self.is_in(param.grad):  # which does not wait for a device
                param.cleargrad()
            VariableNode._check_old_style_gradient(param.node)


def _summary(grad: Any) -> Any:
    """Returns two numbers, on the device of a gradient, that change when it does."""
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
        # Chainer has no public way to learn that a backward pass begins. It asks each leaf whether an old function has
        # left its gradient there.
        mark = param.node._check_old_style_gradient = _Mark(param)
    return mark
