"""Exact gradient accumulation for Chainer."""

from chainer_accum._compat import prepare_chainer, restore_removed_names

prepare_chainer()

from chainer_accum import extensions as extensions  # noqa: E402
from chainer_accum import functions as functions  # noqa: E402
from chainer_accum.accumulation import accumulate  # noqa: E402
from chainer_accum.batches import TokenBudget  # noqa: E402
from chainer_accum.cached_gradients import CachedGradientUpdater  # noqa: E402
from chainer_accum.diagnostics import check_equivalence  # noqa: E402
from chainer_accum.optimizer import create_accumulating_optimizer  # noqa: E402
from chainer_accum.state import load_snapshot  # noqa: E402
from chainer_accum.training import setup_trainer_with_accumulation, train_model  # noqa: E402
from chainer_accum.updater import AccumulatingUpdater  # noqa: E402

__version__ = "0.1.0.dev0"

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
