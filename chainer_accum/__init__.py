"""Exact gradient accumulation for Chainer."""

from chainer_accum._failed_import import CommandIfCalled

__version__ = "0.1.0.dev0"

with CommandIfCalled():
    from chainer_accum._compat import prepare_chainer, restore_removed_names

    prepare_chainer()

    from chainer_accum import extensions as extensions
    from chainer_accum import functions as functions
    from chainer_accum.accumulation import accumulate
    from chainer_accum.batches import TokenBudget
    from chainer_accum.cached_gradients import CachedGradientUpdater
    from chainer_accum.diagnostics import check_equivalence
    from chainer_accum.optimizer import create_accumulating_optimizer
    from chainer_accum.state import load_snapshot
    from chainer_accum.training import setup_trainer_with_accumulation, train_model
    from chainer_accum.updater import AccumulatingUpdater

# Not "extensions": programs often import chainer.training.extensions under that name.
__all__ = [
    "AccumulatingUpdater",
    "CachedGradientUpdater",
    "TokenBudget",
    "accumulate",
    "check_equivalence",
    "create_accumulating_optimizer",
    "load_snapshot",
    "restore_removed_names",
    "setup_trainer_with_accumulation",
    "train_model",
]
