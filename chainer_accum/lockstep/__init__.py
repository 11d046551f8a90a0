"""Passes in lockstep: micro-batches that wait for one another wherever a layer looks at the whole batch.

It knows losses and graphs, but not weights, optimizers or iterators. It imports ``state`` and ``observations``.
"""

from chainer_accum.lockstep.crossing import checksum
from chainer_accum.lockstep.draws import Draws, NeedsCare
from chainer_accum.lockstep.lockstep import Lockstep, LockstepPolicy, make_lockstep_policy, run_alone
from chainer_accum.lockstep.moments import Moments
from chainer_accum.lockstep.passes import Pass, current_pass
from chainer_accum.lockstep.store import StoreSpec

__all__ = [
    "Draws",
    "Lockstep",
    "LockstepPolicy",
    "Moments",
    "NeedsCare",
    "Pass",
    "StoreSpec",
    "checksum",
    "current_pass",
    "make_lockstep_policy",
    "run_alone",
]
