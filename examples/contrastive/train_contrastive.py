"""Learns an embedding of handwritten digits without labels, with a batch that does not fit into the memory it is given.

Two views of each image are made by moving it and adding noise, and each view has to find the other one of its image
among the views of all images in the batch (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations"). The larger the batch, the more there is to compare with. The program trains with the whole batch,
with CachedGradientUpdater and by plain accumulation, and leaves a table in the folder given by --out. Then it lets the
first two make an update in a process whose memory is limited.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any, Dict, NamedTuple, Sequence, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TransformDataset
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from sklearn.datasets import load_digits

SEED = 0
TRAINING_SHARE = 0.8
MIB = 2**20
STATM = Path("/proc/self/statm")  # on Linux, how much memory a process has


class Embedding(chainer.Chain):
    """Maps images of 8 x 8 pixels to directions. Smooth, so that rounding stays rounding."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 16, ksize=3, pad=1)
            self.conv2 = L.Convolution2D(16, 32, ksize=3, pad=1)
            self.point = L.Linear(32 * 4 * 4, 16)

    def forward(self, images: Any) -> chainer.Variable:
        h = F.average_pooling_2d(F.tanh(self.conv1(images)), ksize=2)
        return F.normalize(self.point(F.tanh(self.conv2(h))))


class Contrastive(chainer.Chain):
    """What CachedGradientUpdater asks for: an encoder, and a loss of what it returns for all examples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embedding = Embedding()
            self.log_scale = chainer.Parameter(numpy.log(10).item(), (1, 1))  # of the loss, and learned like the rest

    def encode(self, first: Any, second: Any) -> Tuple[chainer.Variable, chainer.Variable]:
        return self.embedding(first), self.embedding(second)

    def loss(self, first: chainer.Variable, second: chainer.Variable) -> chainer.Variable:
        """Each view is to find the other one of its image among those of all images."""
        similarities = F.matmul(first, second, transb=True)
        similarities *= F.broadcast_to(F.exp(self.log_scale), similarities.shape)
        partners = self.xp.arange(len(first), dtype=numpy.int32)
        there = F.softmax_cross_entropy(similarities, partners)
        back = F.softmax_cross_entropy(similarities.T, partners)
        return (there + back) / 2

    def forward(self, first: Any, second: Any) -> chainer.Variable:
        return self.loss(*self.encode(first, second))


class Result(NamedTuple):
    """What one way of training led to."""

    title: str
    model: Contrastive
    accuracy: float
    peak: int  # bytes
    seconds: float  # of the processor


WAYS = {
    "whole": "StandardUpdater, the whole batch",
    "cached": "CachedGradientUpdater",
    "plain": "AccumulatingUpdater, another loss",
}


def main() -> None:
    args = parse_args()
    args.device.use()
    if args.update_within_limit:
        update_within_limit(args)
        return
    table = make_table([train(way, args) for way in WAYS], nearest_neighbour_accuracy(lambda images: images))
    outcomes = "\n".join(outcome_of_update_within_limit(way, args) for way in ("whole", "cached"))
    print(f"{table}\n\n{outcomes}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learns an embedding of handwritten digits with batches that do not fit, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epoch", type=int, default=10, help="number of epochs")
    parser.add_argument("--batch-size", type=int, default=512, help="images per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="images encoded at a time")
    parser.add_argument("--memory-limit", type=int, default=24, help="memory for one update of the second part, in MiB")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    parser.add_argument("--update-within-limit", choices=WAYS, help=argparse.SUPPRESS)  # the program calls itself
    args = parser.parse_args()
    if min(args.epoch, args.batch_size, args.micro_batch_size, args.memory_limit) < 1:
        parser.error("--epoch, --batch-size, --micro-batch-size and --memory-limit must be 1 or more")
    return args


def load_images() -> Tuple[numpy.ndarray, numpy.ndarray]:
    """Returns the images of the digits, with pixels between 0 and 1, and their labels, in an order that is no order."""
    images, labels = load_digits(return_X_y=True)
    order = numpy.random.RandomState(SEED).permutation(len(images))
    return (images / 16).astype(numpy.float32).reshape(-1, 1, 8, 8)[order], labels.astype(numpy.int32)[order]


def two_views(image: numpy.ndarray) -> Tuple[numpy.ndarray, numpy.ndarray]:
    """Returns the image twice, each time moved by up to a pixel, brighter or darker, and with noise."""

    def view() -> numpy.ndarray:
        moved = numpy.roll(image, numpy.random.randint(-1, 2, size=2), axis=(1, 2))
        noise = 0.2 * numpy.random.standard_normal(image.shape)
        return (moved * numpy.random.uniform(0.6, 1.4) + noise).astype(numpy.float32)

    return view(), view()


def make_updater(way: str, args: argparse.Namespace) -> Any:
    """Returns an updater with a new model. All that differs from way to way is the updater."""
    numpy.random.seed(SEED)
    images, _ = load_images()
    training_images = images[: int(TRAINING_SHARE * len(images))]
    iterator = SerialIterator(TransformDataset(training_images, two_views), args.batch_size)
    model = Contrastive()
    optimizer = chainer.optimizers.Adam(alpha=0.003).setup(model)
    if way == "whole":
        return StandardUpdater(iterator, optimizer, device=args.device)
    if way == "plain":
        return chainer_accum.AccumulatingUpdater(
            iterator, optimizer, device=args.device, micro_batch_size=args.micro_batch_size
        )
    return chainer_accum.CachedGradientUpdater(
        iterator,
        optimizer,
        device=args.device,
        encoder=model.encode,
        loss_func=model.loss,
        micro_batch_size=args.micro_batch_size,
    )


def train(way: str, args: argparse.Namespace) -> Result:
    """Trains, and then makes one more update to measure its memory, which is slow."""
    updater = make_updater(way, args)
    model = updater.get_optimizer("main").target
    start = time.process_time()
    while updater.epoch < args.epoch:
        updater.update()
    seconds = time.process_time() - start
    trained = model.copy(mode="copy")
    trained.to_device("@numpy")
    tracemalloc.start()
    updater.update()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Result(WAYS[way], trained, nearest_neighbour_accuracy(trained.embedding), peak, seconds)


def nearest_neighbour_accuracy(embed: Any) -> float:
    """Returns how many of the other images have the label of the training image that is nearest to them."""
    images, labels = load_images()
    n_training = int(TRAINING_SHARE * len(images))
    with chainer.no_backprop_mode():
        points = chainer.as_array(embed(images)).reshape(len(images), -1)
    distances = ((points[n_training:, None] - points[None, :n_training]) ** 2).sum(axis=2)
    return float((labels[:n_training][distances.argmin(axis=1)] == labels[n_training:]).mean())


def make_table(results: Sequence[Result], accuracy_of_pixels: float) -> str:
    """Returns a Markdown table with one row per result; each is compared with the first."""
    lines = [
        "| updater | parameters differ by | accuracy of the nearest neighbour | peak memory | processor time |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    expected = parameters_of(results[0].model)
    for result in results:
        parameters = parameters_of(result.model)
        cells = [
            result.title,
            f"{max(float(abs(parameters[name] - expected[name]).max()) for name in expected):.2g}",
            f"{result.accuracy:.2%}",
            f"{result.peak / MIB:.1f} MiB",
            f"{result.seconds:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, f"| none: the pixels themselves | | {accuracy_of_pixels:.2%} | | |"])


def parameters_of(model: chainer.Link) -> Dict[str, numpy.ndarray]:
    return {name: param.array for name, param in model.namedparams()}


def outcome_of_update_within_limit(way: str, args: argparse.Namespace) -> str:
    """Has one update made in a process of its own and returns a line that says how it went."""
    command = [sys.executable, __file__, *sys.argv[1:], "--update-within-limit", way]
    completed = subprocess.run(command, capture_output=True, encoding="utf-8")
    outcome = completed.stdout.strip() or f"ends with {completed.returncode}: {completed.stderr.strip()[-200:]}"
    return f"{WAYS[way]}, {args.batch_size} images within {args.memory_limit} MiB: {outcome}"


def update_within_limit(args: argparse.Namespace) -> None:
    """Makes an update with no more memory than there is already and the limit, and prints how it went."""
    if not STATM.exists():
        print("not tried, for on this system the memory of a process cannot be limited")
        return
    import resource  # not on Windows

    updater = make_updater(args.update_within_limit, args)
    images, _ = load_images()
    updater.get_optimizer("main").target(images[:2], images[:2])  # so that libraries have allocated what they keep
    pages = int(STATM.read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + args.memory_limit * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        updater.update()
    except MemoryError as error:
        print(f"fails, {error or 'MemoryError'}")
    else:
        print("done")


if __name__ == "__main__":
    main()
