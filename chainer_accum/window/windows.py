"""Which window an optimizer and its options need, and windows without micro-batches of their own."""

from __future__ import annotations

from typing import Type

import chainer

from chainer_accum.window.distributed import MultiNodeWindow
from chainer_accum.window.lockstep_window import LockstepWindow
from chainer_accum.window.options import DEFAULTS, WindowOptions
from chainer_accum.window.ranks import communicator_of
from chainer_accum.window.window import Window


def window_class(optimizer: chainer.Optimizer, options: WindowOptions = DEFAULTS) -> Type[Window]:
    """Returns the class of the windows that an optimizer and its options need.

    Raises:
        ValueError: If the optimizer is a multi-node one, and passes are to run in lockstep.

    """
    if communicator_of(optimizer) is None:
        return Window if options.lockstep is None else LockstepWindow
    if options.lockstep is not None:
        raise ValueError(
            "lockstep must be None with a multi-node optimizer, got one with a communicator: each rank would see the "
            "statistics of its own examples only; use MultiNodeBatchNormalization, or a single process"
        )
    return MultiNodeWindow


def join_update(optimizer: chainer.Optimizer, options: WindowOptions) -> bool:
    """Takes part in an update of the other ranks with a window that has no micro-batches.

    Returns:
        bool: Whether there was an update. There is none on a single process, or if no rank has a micro-batch.

    """
    if communicator_of(optimizer) is None:
        return False
    window = MultiNodeWindow(optimizer, options)
    window.update()
    chainer.report(window.observation)
    return window.has_data


def join_remaining_updates(optimizer: chainer.Optimizer, options: WindowOptions) -> None:
    """Takes part in the updates of the other ranks until all ranks call this."""
    while join_update(optimizer, options):
        pass
