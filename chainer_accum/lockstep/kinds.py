"""Kinds of functions: which look at the whole batch, and which cannot be made exact."""

from __future__ import annotations

import sys
import types
from typing import Any, Callable, Optional, Tuple

import chainer
import chainer.functions as F
from chainer.functions.normalization.batch_normalization import BatchNormalization, _impl_selector
from chainer.functions.normalization.batch_renormalization import BatchRenormalizationFunction
from chainer.functions.normalization.decorrelated_batch_normalization import DecorrelatedBatchNormalization

from chainer_accum._devices import Array
from chainer_accum.lockstep.moments import axis_of

_REFUSED = (
    "{} has no exact counterpart when passes run in lockstep, since it {}; use chainer.links.BatchNormalization, or "
    "set lockstep=None"
)


def check_exact(function: chainer.FunctionNode) -> None:
    """Raises RuntimeError if a function normalizes a batch in a way that cannot be made exact."""
    if isinstance(function, chainer.FunctionAdapter) and isinstance(function.function, BatchRenormalizationFunction):
        raise RuntimeError(_REFUSED.format("batch renormalization", "normalizes by running averages as well"))
    if isinstance(function, DecorrelatedBatchNormalization):
        raise RuntimeError(_REFUSED.format("decorrelated batch normalization", "needs the covariance of the batch"))
    if isinstance(function, BatchNormalization) and function._impl_selector is not _impl_selector:
        raise RuntimeError(
            "batch normalization must have Chainer's implementation when passes run in lockstep, got a function with "
            "an implementation of its own, such as that of MultiNodeBatchNormalization; use "
            "chainer.links.BatchNormalization, or set lockstep=None"
        )


def axis_of_function(function: BatchNormalization, in_data: Tuple[Array, ...]) -> Tuple[int, ...]:
    """Returns the axes over which a function takes its statistics."""
    x, gamma, _ = in_data
    return axis_of(x.ndim, gamma.ndim, function.axis)


def looks_at_batch(function: BatchNormalization, in_data: Tuple[Array, ...], num_examples: Optional[int]) -> bool:
    """Returns whether a function takes statistics over examples.

    Without running averages, it may serve for another normalization, such as that of groups of channels.

    Raises:
        RuntimeError: If this cannot be known.

    """
    x, gamma, _ = in_data
    axis = axis_of_function(function, in_data)
    if function.running_mean is not None:
        return True
    if 0 not in axis or (x.shape[0] == 1 and (num_examples != 1 or _is_called_by(F.group_normalization))):
        return False
    num_statistics = gamma.shape[0] if gamma.ndim > 0 else 1
    may_be_per_example = num_examples is not None and num_statistics % num_examples == 0
    if may_be_per_example and (x.shape[0] % num_examples != 0 or x.shape[0] == 1):
        raise RuntimeError(
            "batch normalization must have running averages when passes run in lockstep, if it may normalize each "
            f"example by itself, got running_mean=None for an input of shape {x.shape}, {num_statistics} statistics "
            f"and {num_examples} examples; pass running_mean and running_var, or set lockstep=None"
        )
    return True


def _is_called_by(function: Callable[..., Any]) -> bool:
    """Returns whether a function of Chainer is running."""
    frame: Optional[types.FrameType] = sys._getframe(1)
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False
