"""Learns an embedding of handwritten digits from pairs, and shows for which losses accumulation is exact.

With a contrastive loss, an example is a pair of images: the loss is a mean over examples, and accumulated training is
that with the large batch. With an n-pair loss (Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss
Objective"), each image is compared with all others of the batch: cut into micro-batches, it is compared with fewer, and
that is another loss. A table that shows both goes to the folder given by --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training.updaters import StandardUpdater
from sklearn.datasets import load_digits

SEED = 0
TRAINING_SHARE = 0.8


class Embedding(chainer.Chain):
    """Maps images of 8 x 8 pixels to points. Smooth, so that rounding stays rounding."""

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
        """A mean over pairs, each of which is for itself."""
        return F.contrastive(self.embedding(first), self.embedding(second), same, margin=4.0)

    def n_pair(self, first: Any, second: Any, label: Any) -> chainer.Variable:
        """A mean over images, each of which has to tell its partner from the partners of all others in the batch."""
        similarities = F.matmul(self.embedding(first), self.embedding(second), transb=True)
        return F.softmax_cross_entropy(similarities, self.xp.arange(len(first), dtype=label.dtype))


class Result(NamedTuple):
    """What one way of training led to."""

    title: str
    model: Siamese
    gradient: Dict[str, numpy.ndarray]  # of the first update
    accuracy: float


def main() -> None:
    args = parse_args()
    args.device.use()
    table = make_table(compare("contrastive", args) + compare("n_pair", args))
    print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learns an embedding of handwritten digits with and without gradient accumulation and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epoch", type=int, default=10, help="number of epochs")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="pairs per forward/backward pass")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    if min(args.epoch, args.batch_size, args.micro_batch_size) < 1:
        parser.error("--epoch, --batch-size and --micro-batch-size must be 1 or more")
    return args


def load_images() -> Tuple[numpy.ndarray, numpy.ndarray]:
    """Returns the images of the digits, with pixels between 0 and 1, and their labels, in an order that is no order."""
    images, labels = load_digits(return_X_y=True)
    order = numpy.random.RandomState(SEED).permutation(len(images))
    return (images / 16).astype(numpy.float32).reshape(-1, 1, 8, 8)[order], labels.astype(numpy.int32)[order]


def make_pairs(images: numpy.ndarray, labels: numpy.ndarray, loss: str) -> List[Tuple[Any, Any, Any]]:
    """Returns a pair for each image, with one of the same digit or, for the contrastive loss, maybe of another."""
    random = numpy.random.RandomState(SEED)
    pairs = []
    for image, label in zip(images, labels):
        is_same = loss == "n_pair" or random.rand() < 0.5
        partner = random.choice(numpy.flatnonzero((labels == label) == is_same))
        pairs.append((image, images[partner], numpy.int32(is_same)))
    return pairs


def compare(loss: str, args: argparse.Namespace) -> List[Result]:
    """Trains with the whole batch and with micro-batches; all that differs is the updater."""
    images, labels = load_images()
    n_training = int(TRAINING_SHARE * len(images))
    pairs = make_pairs(images[:n_training], labels[:n_training], loss)

    def set_up() -> Tuple[SerialIterator, Siamese, chainer.Optimizer]:
        numpy.random.seed(SEED)
        model = Siamese()
        order_sampler = ShuffleOrderSampler(numpy.random.RandomState(SEED))
        iterator = SerialIterator(pairs, args.batch_size, order_sampler=order_sampler)
        return iterator, model, chainer.optimizers.MomentumSGD(lr=0.02).setup(model)

    results = []
    for title in ("whole batch", f"micro-batches of {args.micro_batch_size}"):
        iterator, model, optimizer = set_up()
        loss_func = getattr(model, loss)
        if title == "whole batch":
            updater = StandardUpdater(iterator, optimizer, device=args.device, loss_func=loss_func)
        else:
            updater = chainer_accum.AccumulatingUpdater(
                iterator, optimizer, device=args.device, loss_func=loss_func, micro_batch_size=args.micro_batch_size
            )
        updater.update()
        cpu = chainer.get_device("@numpy")
        gradient = {name: cpu.send(param.grad).copy() for name, param in model.namedparams()}
        while updater.epoch < args.epoch:
            updater.update()
        model.to_device("@numpy")
        results.append(Result(f"{loss}, {title}", model, gradient, nearest_neighbour_accuracy(model, n_training)))
    return results


def nearest_neighbour_accuracy(model: Siamese, n_training: int) -> float:
    """Returns how many of the other images have the label of the training image that is nearest to them."""
    images, labels = load_images()
    with chainer.no_backprop_mode():
        points = model.embedding(images).array
    distances = ((points[n_training:, None] - points[None, :n_training]) ** 2).sum(axis=2)
    return float((labels[:n_training][distances.argmin(axis=1)] == labels[n_training:]).mean())


def largest_difference(arrays: Dict[str, numpy.ndarray], reference: Dict[str, numpy.ndarray]) -> float:
    """Returns the largest absolute difference between arrays of the same name."""
    return max(float(abs(arrays[name] - reference[name]).max()) for name in reference)


def make_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with one row per result; every second one is compared with the one before it."""
    lines = [
        "| loss, batch | first gradient differs by | of | parameters differ by | accuracy of the nearest neighbour |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for number, result in enumerate(results):
        whole = results[number - number % 2]
        parameters, expected = (
            {name: param.array for name, param in model.namedparams()} for model in (result.model, whole.model)
        )
        cells = [
            result.title,
            f"{largest_difference(result.gradient, whole.gradient):.2g}",
            f"{max(abs(grad).max() for grad in whole.gradient.values()):.2g}",
            f"{largest_difference(parameters, expected):.2g}",
            f"{result.accuracy:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
