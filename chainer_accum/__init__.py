"""Exact gradient accumulation for Chainer."""

from chainer_accum import _compat

_compat.restore_missing_names()

from chainer_accum.updater import AccumulatingUpdater  # noqa: E402

__version__ = "0.1.0"

__all__ = ["AccumulatingUpdater"]
