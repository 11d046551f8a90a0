"""Trainer extensions."""

from chainer_accum.extensions.accumulate import Accumulate

__all__ = ["Accumulate"]
