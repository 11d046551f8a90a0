"""Checks of the loss that a loss function returned, and its backward pass."""

from __future__ import annotations

from typing import Optional

import chainer

from chainer_accum._devices import device_of

ALL_SKIPPED = (
    "no update: all micro-batches of the window that have a weight were skipped, because their losses or gradients are "
    "not finite; check the learning rate and the data"
)

OWN_PASS_MOVES = (
    "running_statistics must be 'micro_batch' for your own passes, got 'update'; they have moved the running averages "
    "already, so let window.add run them"
)


def check_loss(loss: object) -> None:
    """Raises TypeError unless the loss is a Variable, and ValueError unless it is a scalar or has a gradient."""
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
    """Returns whether a backward pass would have any effect."""
    return loss.creator_node is not None or isinstance(loss, chainer.Parameter)


def is_constant(loss: chainer.Variable) -> bool:
    """Returns whether the Variable was made from a number, not computed without parameters."""
    return not has_graph(loss) and loss.requires_grad


def run_backward(loss: chainer.Variable, factor: float, loss_scale: Optional[float]) -> None:
    """Runs the backward pass of a loss times ``factor``, as Chainer would for the loss itself.

    If the loss already has a gradient, the pass starts from that gradient, without loss scaling, as in Chainer.

    """
    given = loss.grad
    with device_of(loss.array):
        if given is None:
            loss.grad = loss.xp.full_like(loss.array, factor * float(loss_scale or 1))
        else:
            loss.grad = given.copy()
            loss.grad *= factor
    loss.backward(loss_scale=loss_scale)  # only records the scale, because there is a gradient
    if loss.creator_node is not None:
        loss.grad = given  # the function may return the same Variable again


def describe(loss: chainer.Variable) -> str:
    """Returns the value of a loss for an error message."""
    return str(float(loss.array)) if loss.array.ndim == 0 else f"an array of shape {loss.shape}"


def not_finite(number: int, finding: str) -> FloatingPointError:
    """Returns the error for a micro-batch, counted from 1, whose loss or gradient is not finite."""
    return FloatingPointError(
        f"micro-batch {number} of the window is not finite: {finding}; check its data and the learning rate, or use "
        "nonfinite='skip'"
    )


def has_updated(num_updates: int) -> RuntimeError:
    """Returns the error for an optimizer that has updated the parameters during a window."""
    return RuntimeError(
        f"the optimizer must not update within a window, got {num_updates} updates since it began; remove calls of "
        "optimizer.update(), which the window calls when it ends, and other windows"
    )


def _is_delegate(loss: chainer.Variable) -> bool:
    """Returns whether the Variable is ChainerMN's placeholder for a loss that another process computes."""
    return loss.array.size == 0 and type(loss.creator).__module__.startswith("chainermn.")
