"""What a loss function returned: whether it can be differentiated, and where its gradient begins."""

from __future__ import annotations

from typing import Any, Optional

import chainer

from chainer_accum._devices import device_of

ALL_SKIPPED = (
    "no update: all micro-batches of the window that have a weight were skipped, as their losses or gradients are not "
    "finite; look at the learning rate and at the data"
)


def check_loss(loss: Any) -> None:
    """Raises TypeError for what is not a Variable, and ValueError for what has no single gradient to begin with."""
    if not isinstance(loss, chainer.Variable):
        raise TypeError(
            f"the loss function must return a chainer.Variable, got {type(loss).__name__}; "
            "return the loss as one scalar Variable"
        )
    shape = None if loss.array is None else loss.shape
    if shape is None or (loss.array.size != 1 and loss.grad is None and not _is_delegate(loss)):
        raise ValueError(
            f"the loss must be a scalar, got a Variable of shape {shape}; reduce it, for example with F.mean(loss)"
        )


def has_graph(loss: chainer.Variable) -> bool:
    """Returns whether a backward pass would do anything."""
    return loss.creator_node is not None or isinstance(loss, chainer.Parameter)


def is_constant(loss: chainer.Variable) -> bool:
    """Returns whether it is a Variable that was made of a number, not one that was computed without parameters."""
    return not has_graph(loss) and loss.requires_grad


def run_backward(loss: chainer.Variable, factor: float, loss_scale: Optional[float]) -> None:
    """Runs the backward pass of a loss, times ``factor``, as Chainer runs that of the loss.

    A gradient that the loss has been given is where it begins, and Chainer does not scale that.

    """
    given = loss.grad
    with device_of(loss.array):
        if given is None:
            loss.grad = loss.xp.full_like(loss.array, factor * float(loss_scale or 1))
        else:
            loss.grad = given.copy()
            loss.grad *= factor
    loss.backward(loss_scale=loss_scale)  # which records the scale, and no more, as there is a gradient
    if loss.creator_node is not None:
        loss.grad = given  # the function may return the same loss again


def describe(loss: chainer.Variable) -> str:
    """Returns the value of a loss for a message."""
    return str(float(loss.array)) if loss.array.ndim == 0 else f"an array of shape {loss.shape}"


def not_finite(number: int, finding: str) -> FloatingPointError:
    """Returns the error for a micro-batch, counted from 1, of which something is not finite."""
    return FloatingPointError(
        f"micro-batch {number} of the window is not finite: {finding}; look at its data and the learning rate, or use "
        "nonfinite='skip'"
    )


def _is_delegate(loss: chainer.Variable) -> bool:
    """Returns whether it is what ChainerMN has in the place of a loss that another process computes."""
    return loss.array.size == 0 and type(loss.creator).__module__.startswith("chainermn.")
