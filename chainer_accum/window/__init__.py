"""Windows: several weighted backward passes, followed by one ``optimizer.update()``.

A window knows losses, gradients and optimizers, but not iterators or examples. This subpackage imports
``state`` and ``observations``.
"""

from chainer_accum.window.blas import add_matrix_product, adds_products_in_place
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.options import SkipUpdate, WindowOptions
from chainer_accum.window.ranks import communicator_of, links_communicate
from chainer_accum.window.representations import Representations, by_name, copies_of
from chainer_accum.window.taken_gradients import is_taken, keep_for_others, mark_as_taken
from chainer_accum.window.terms import ReportWeight, total_loss
from chainer_accum.window.weighting import Weights
from chainer_accum.window.window import Window
from chainer_accum.window.windows import join_remaining_updates, join_update, window_class

__all__ = [
    "GradientNorms",
    "ReportWeight",
    "Representations",
    "SkipUpdate",
    "Weights",
    "Window",
    "WindowOptions",
    "add_matrix_product",
    "adds_products_in_place",
    "by_name",
    "communicator_of",
    "copies_of",
    "join_remaining_updates",
    "is_taken",
    "keep_for_others",
    "links_communicate",
    "mark_as_taken",
    "join_update",
    "total_loss",
    "window_class",
]
