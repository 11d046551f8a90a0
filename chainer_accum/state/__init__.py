"""Saving and restoring state: of passes, of a training, and of random generators; and snapshots.

This subpackage knows what a forward pass may change, but not windows. It imports no other subpackage.
"""

from chainer_accum.state.mixed_precision import serialize_mixed_precision
from chainer_accum.state.persistent_values import PersistentValues
from chainer_accum.state.random_state import RandomState, devices_of
from chainer_accum.state.signals import DeferredSignals
from chainer_accum.state.snapshots import load_snapshot
from chainer_accum.state.thread_state import ThreadState, hook_tables
from chainer_accum.state.touched_links import captured_by, links_behind
from chainer_accum.state.training_state import TrainingState
from chainer_accum.state.used_links import UsedLinks

__all__ = [
    "DeferredSignals",
    "PersistentValues",
    "RandomState",
    "ThreadState",
    "TrainingState",
    "UsedLinks",
    "captured_by",
    "devices_of",
    "hook_tables",
    "links_behind",
    "load_snapshot",
    "serialize_mixed_precision",
]
