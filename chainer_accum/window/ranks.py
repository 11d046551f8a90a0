"""Which optimizers and models belong to several ranks of ChainerMN."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Optional

import chainer

if TYPE_CHECKING:
    from chainermn.communicators.communicator_base import CommunicatorBase


def communicator_of(optimizer: chainer.Optimizer) -> Optional[CommunicatorBase]:
    """Returns the communicator of a multi-node optimizer, or ``None`` for any other optimizer.

    Raises:
        ValueError: If the optimizer uses double buffering.

    """
    chainermn = sys.modules.get("chainermn.optimizers")  # if it is not imported, there is no such optimizer
    if chainermn is None:
        return None
    if isinstance(optimizer, chainermn._DoubleBufferingOptimizer):
        raise ValueError(
            "optimizer must not use double buffering, got double_buffering=True: it would update with the gradients of "
            "the previous window, and drop the first two; call create_multi_node_optimizer without it"
        )
    return optimizer.communicator if isinstance(optimizer, chainermn._MultiNodeOptimizer) else None


def links_communicate(optimizer: chainer.Optimizer) -> bool:
    """Returns whether forward passes of the model wait for those of other ranks."""
    return communicator_of(optimizer) is not None and any(map(_communicates, optimizer.target.links()))


def _communicates(link: chainer.Link) -> bool:
    return any(base.__module__.startswith("chainermn.") for base in type(link).__mro__)
