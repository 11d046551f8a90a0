"""The data of most examples: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Tuple

import chainer_accum  # noqa: F401 - before chainer, which it makes importable on current Python and NumPy
import chainer
import numpy
from sklearn.datasets import load_digits

TRAINING_SHARE = 0.8


class Digits(NamedTuple):
    """Images of 8 x 8 pixels between 0 and 1, with a channel axis, and what they show."""

    images: numpy.ndarray
    labels: numpy.ndarray


def load_all() -> Digits:
    """Returns all digits in the order of scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    return Digits((images / 16).astype(numpy.float32).reshape(-1, 1, 8, 8), labels.astype(numpy.int32))


def load_split() -> Tuple[Digits, Digits]:
    """Returns the shuffled digits as a training and a validation part, which are always the same."""
    images, labels = load_all()
    order = numpy.random.RandomState(0).permutation(len(images))
    training, validation = numpy.split(order, [int(TRAINING_SHARE * len(order))])
    return Digits(images[training], labels[training]), Digits(images[validation], labels[validation])


def nearest_neighbour_accuracy(embed: Callable[[numpy.ndarray], Any]) -> float:
    """Returns the share of validation images that have the label of the training image nearest to them.

    Args:
        embed: Function that maps images to points, between which the distances are measured.

    """
    training, validation = load_split()
    with chainer.no_backprop_mode():
        known, unknown = (
            chainer.as_array(embed(part.images)).reshape(len(part.images), -1) for part in (training, validation)
        )
    distances = ((unknown[:, None] - known[None]) ** 2).sum(axis=2)
    return float((training.labels[distances.argmin(axis=1)] == validation.labels).mean())
