"""Functions of the whole effective batch, for layers and losses that compare examples."""

from __future__ import annotations

from typing import Any, Callable, Union

import chainer

from chainer_accum._arguments import check_callable
from chainer_accum._devices import Array
from chainer_accum.lockstep import current_pass

__all__ = ["sum_over_batch", "whole_batch"]


def whole_batch(function: Callable[..., Any], *inputs: Union[chainer.Variable, Array]) -> Any:
    """Applies a function to the inputs of all micro-batches put together, and returns the rows of this micro-batch.

    In a window that runs in lockstep, the micro-batches wait here for one another. Each input is concatenated along its
    first axis. The function is called once, and its graph alone is kept for the whole batch. Gradients come back the
    same way, so a layer or a loss that compares examples is exact:

    .. code-block:: python

        def forward(self, x):
            z = self.encoder(x)
            return F.mean(whole_batch(self.contrastive_losses, z))

    Anywhere else, such as with ``StandardUpdater`` or in an evaluation, this is ``function(*inputs)``. A window without
    lockstep calls the function with each micro-batch alone.

    Args:
        function (callable): Function of as many arguments as there are inputs. It returns a Variable or a tuple of
            Variables, each with one row for each row of the first input, or a scalar.
        *inputs (:class:`~chainer.Variable` or :ref:`ndarray`): What this micro-batch hands in, of shape ``(n, ...)``.

    Returns:
        The rows of what the function returned that belong to this micro-batch. A scalar belongs to all of them, so if
        the loss is a mean, it is the same for the window.

    Raises:
        TypeError: If the function cannot be called, or an input is of another type.
        ValueError: If an input is a scalar, or the function returns another number of rows.

    """
    check_callable("function", function, "pass a function of the inputs")
    current = current_pass()
    return function(*inputs) if current is None else current.whole_batch(function, inputs)


def sum_over_batch(*values: chainer.Variable) -> Any:
    """Returns the sums of Variables over all micro-batches, which each micro-batch has computed from its examples.

    This merges statistics: a layer computes sums over its examples, adds them up here, and goes on with those of the
    whole batch. For instance, the mean of ``x`` over the batch is

    .. code-block:: python

        total, count = sum_over_batch(F.sum(x, axis=0), chainer.Variable(x.xp.full((), len(x), x.dtype)))
        mean = total / F.broadcast_to(count, total.shape)

    Gradients are added up over the micro-batches as well. Outside a window that runs in lockstep, the values are
    returned as they are.

    Args:
        *values (:class:`~chainer.Variable`): Values of any shape, the same in all micro-batches.

    Returns:
        A Variable, or a tuple of Variables if there are several.

    """
    current = current_pass()
    if current is None:
        return values[0] if len(values) == 1 else values
    rows = [chainer.functions.expand_dims(value, axis=0) for value in values]
    return current.whole_batch(_sums, rows, is_shared=True)


def _sums(*rows: chainer.Variable) -> Any:
    sums = tuple(chainer.functions.sum(each, axis=0) for each in rows)
    return sums[0] if len(sums) == 1 else sums
