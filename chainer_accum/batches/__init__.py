"""Micro-batches: iterator batches that are split, weighted, prefetched and converted.

It knows iterators and examples, but not gradients. It imports ``state`` and ``observations``.
"""

from chainer_accum.batches.arguments import Arguments
from chainer_accum.batches.epochs import EpochRecord
from chainer_accum.batches.micro_batches import EPOCH_BOUNDARIES, MicroBatch, MicroBatches, WeightFunc, count_examples
from chainer_accum.batches.prefetching import prepare_ahead, prepare_lazily
from chainer_accum.batches.schedules import Schedule, Steps, make_schedule
from chainer_accum.batches.sizes import MicroBatchSize, OutOfMemory, make_micro_batch_size, retryable_memory_errors

__all__ = [
    "EPOCH_BOUNDARIES",
    "Arguments",
    "EpochRecord",
    "MicroBatch",
    "MicroBatchSize",
    "MicroBatches",
    "OutOfMemory",
    "Schedule",
    "Steps",
    "WeightFunc",
    "count_examples",
    "make_micro_batch_size",
    "make_schedule",
    "prepare_ahead",
    "prepare_lazily",
    "retryable_memory_errors",
]
