"""Micro-batches: iterator batches that are split, weighted, prefetched and converted.

It knows iterators and examples, but not gradients. It imports ``state`` and ``observations``.
"""

from chainer_accum.batches.arguments import Arguments
from chainer_accum.batches.cutting import Load, costliest_to_cut, count_examples, together
from chainer_accum.batches.epochs import EpochRecord
from chainer_accum.batches.gathering import Gathering, NumBatches
from chainer_accum.batches.memory import MemoryLimit
from chainer_accum.batches.micro_batches import EPOCH_BOUNDARIES, MicroBatch, MicroBatches, WeightFunc
from chainer_accum.batches.prefetching import prepare_ahead, prepare_lazily
from chainer_accum.batches.schedules import Schedule, Steps, make_schedule
from chainer_accum.batches.sizes import Limit, MicroBatchSize, OutOfMemory
from chainer_accum.batches.token_budget import TokenBudget
from chainer_accum.batches.tuning import make_micro_batch_size

__all__ = [
    "EPOCH_BOUNDARIES",
    "Arguments",
    "EpochRecord",
    "Gathering",
    "Limit",
    "Load",
    "MemoryLimit",
    "MicroBatch",
    "MicroBatchSize",
    "MicroBatches",
    "NumBatches",
    "OutOfMemory",
    "Schedule",
    "Steps",
    "TokenBudget",
    "WeightFunc",
    "costliest_to_cut",
    "count_examples",
    "make_micro_batch_size",
    "make_schedule",
    "prepare_ahead",
    "prepare_lazily",
    "together",
]
