"""Diagnostics: whether the accumulated step of a model equals its full-batch step.

Models are tested by running them on a batch, and restored afterwards. This package uses the updaters as a program
would; nothing else in chainer_accum imports it.
"""

from chainer_accum.diagnostics.causes import Cause
from chainer_accum.diagnostics.equivalence import Equivalence, check_equivalence
from chainer_accum.diagnostics.programs import WrongProgram, check_program

__all__ = ["Cause", "Equivalence", "WrongProgram", "check_equivalence", "check_program"]
