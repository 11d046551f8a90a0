"""Exact gradient accumulation for Chainer."""

from chainer_accum import _compat, _old_names, _requirement

_compat.restore_missing_names()
_old_names.restore_removed_names_if_asked()
_requirement.require_chainer()

from chainer_accum import _processes, _repairs  # noqa: E402

_processes.let_chainer_start_processes()
_repairs.repair_chainer()

from chainer_accum import extensions as extensions  # noqa: E402
from chainer_accum._old_names import restore_removed_names  # noqa: E402
from chainer_accum.accumulation import accumulate  # noqa: E402
from chainer_accum.cached_gradients import CachedGradientUpdater  # noqa: E402
from chainer_accum.diagnostics import check_equivalence  # noqa: E402
from chainer_accum.loops import setup_trainer_with_accumulation, train_model  # noqa: E402
from chainer_accum.optimizer import create_accumulating_optimizer  # noqa: E402
from chainer_accum.snapshots import load_snapshot  # noqa: E402
from chainer_accum.updater import AccumulatingUpdater  # noqa: E402

__version__ = "0.1.0"

# Not "extensions": that name is often taken already, by chainer.training.extensions.
__all__ = [
    "AccumulatingUpdater",
    "CachedGradientUpdater",
    "accumulate",
    "check_equivalence",
    "create_accumulating_optimizer",
    "load_snapshot",
    "restore_removed_names",
    "setup_trainer_with_accumulation",
    "train_model",
]
