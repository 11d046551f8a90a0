"""share_parameters: gives all ranks of ChainerMN the same parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Tuple

import chainer
import numpy

from chainer_accum._devices import device_of

if TYPE_CHECKING:
    from chainermn.communicators.communicator_base import CommunicatorBase


def share_parameters(target: chainer.Link, communicator: CommunicatorBase) -> bool:
    """Gives all ranks the same parameters. Each comes from the first rank that has initialized it.

    Returns:
        bool: Whether any rank had different values.

    """
    params: List[Tuple[str, chainer.Parameter]] = sorted(target.namedparams())
    shapes = {name: param.shape for name, param in params if param.array is not None}
    roots: Dict[str, Tuple[int, Tuple[int, ...]]] = {}
    for rank, shapes_there in enumerate(communicator.bcast_obj(communicator.gather_obj(shapes))):
        for name, shape in shapes_there.items():
            roots.setdefault(name, (rank, shape))
    host = chainer.get_device("@numpy")
    differs = False
    for name, param in params:
        if name not in roots:
            continue
        root, shape = roots[name]
        own = None if param.array is None else host.send(param.array)
        values = communicator.bcast_obj(own if communicator.rank == root else None, root=root)
        if own is None:
            param.initialize(shape)
        elif not numpy.array_equal(own, values):
            differs = True
        with device_of(param.array):
            param.array[...] = param.device.send(values)
    return bool(communicator.allreduce_obj(int(differs)))
