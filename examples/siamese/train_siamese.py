"""Learns an embedding of handwritten digits from pairs, and shows for which losses accumulation is exact.

With a contrastive loss, an example is a pair of images. The loss is a mean over examples, so accumulation trains as
the large batch does. With an n-pair loss (Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss
Objective"), each image is compared with all others of the batch. In a micro-batch it is compared with fewer, which is a
different loss. The program writes a table that shows both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.training.updaters import StandardUpdater

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_iterator, make_parser, positive, show_table
from handwritten_digits import Digits, load_split, nearest_neighbour_accuracy

SEED = 0


class Embedding(chainer.Chain):
    """Maps images of 8 x 8 pixels to points. It is smooth, so rounding errors stay small."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(1, 16, ksize=3, pad=1)
            self.hidden = L.Linear(16 * 4 * 4, 64)
            self.point = L.Linear(64, 16)

    def forward(self, images: Any) -> chainer.Variable:
        h = F.average_pooling_2d(F.tanh(self.conv(images)), ksize=2)
        return self.point(F.tanh(self.hidden(h)))


class Siamese(chainer.Chain):
    """Embeds both images of each pair and compares them."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embedding = Embedding()

    def contrastive(self, first: Any, second: Any, same: Any) -> chainer.Variable:
        """A mean over pairs, each independent of the others."""
        return F.contrastive(self.embedding(first), self.embedding(second), same, margin=4.0)

    def n_pair(self, first: Any, second: Any, label: Any) -> chainer.Variable:
        """A mean over images. Each must tell its partner from the partners of all others in the batch."""
        similarities = F.matmul(self.embedding(first), self.embedding(second), transb=True)
        return F.softmax_cross_entropy(similarities, self.xp.arange(len(first), dtype=label.dtype))


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    model: Siamese
    first: Siamese  # the model after the first update, with its gradients
    accuracy: float


def main() -> None:
    args = parse_args()
    args.device.use()
    show_table(compare("contrastive", args) + compare("n_pair", args), args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser(
        "Learns an embedding of handwritten digits with and without gradient accumulation and compares."
    )
    parser.add_argument("--epoch", type=positive, default=10, help="number of epochs")
    parser.add_argument("--batch-size", type=positive, default=128, help="pairs per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=positive, default=16, help="pairs per forward/backward pass")
    return parser.parse_args()


def make_pairs(digits: Digits, loss: str) -> List[Tuple[Any, Any, Any]]:
    """Pairs each image with one of the same digit or, for half the pairs of the contrastive loss, of another."""
    random = numpy.random.RandomState(SEED)
    pairs = []
    for image, label in zip(*digits):
        is_same = loss == "n_pair" or random.rand() < 0.5
        partner = random.choice(numpy.flatnonzero((digits.labels == label) == is_same))
        pairs.append((image, digits.images[partner], numpy.int32(is_same)))
    return pairs


def compare(loss: str, args: argparse.Namespace) -> List[Dict[str, str]]:
    """Returns a row of the table for the whole batch and one for micro-batches."""
    whole = train(loss, None, args)
    return [make_row(result, whole) for result in (whole, train(loss, args.micro_batch_size, args))]


def train(loss: str, micro_batch_size: Optional[int], args: argparse.Namespace) -> Result:
    """Trains a new model, which always has the same initial parameters. Only the updater differs."""
    numpy.random.seed(SEED)
    model = Siamese()
    optimizer = chainer.optimizers.MomentumSGD(lr=0.02).setup(model)
    training, _ = load_split()
    iterator = make_iterator(make_pairs(training, loss), args.batch_size)
    options = {"device": args.device, "loss_func": getattr(model, loss)}
    if micro_batch_size is None:
        title = f"{loss}, whole batch"
        updater = StandardUpdater(iterator, optimizer, **options)
    else:
        title = f"{loss}, micro-batches of {micro_batch_size}"
        updater = chainer_accum.AccumulatingUpdater(iterator, optimizer, micro_batch_size=micro_batch_size, **options)
    updater.update()
    first = model.copy(mode="copy")
    while updater.epoch < args.epoch:
        updater.update()
    model.to_device("@numpy")
    return Result(title, model, first, nearest_neighbour_accuracy(model.embedding))


def make_row(result: Result, whole: Result) -> Dict[str, str]:
    return {
        "loss, batch": result.title,
        "first gradient differs by": f"{largest_difference(result.first, whole.first, 'grad'):.2g}",
        "of": f"{max(float(abs(param.grad).max()) for param in whole.first.params()):.2g}",
        "parameters differ by": f"{largest_difference(result.model, whole.model):.2g}",
        "accuracy of the nearest neighbour": f"{result.accuracy:.2%}",
    }


if __name__ == "__main__":
    main()
