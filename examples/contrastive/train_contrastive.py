"""Learns an embedding of handwritten digits without labels, with a batch that does not fit into memory.

Each image is moved and given noise twice, and each of these two views has to find the other among the views of all
images in the batch (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations"). A
larger batch has more to compare with. The program trains with the whole batch, with CachedGradientUpdater and by plain
accumulation, and writes a table that compares the three. Then it runs an update of the first two in a process whose
memory is limited.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, NamedTuple, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.datasets import TransformDataset
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_parser, measure_peak_mib, positive, show_table
from handwritten_digits import load_split, nearest_neighbour_accuracy

SEED = 0
STATM = Path("/proc/self/statm")  # on Linux, the memory that the process has


class Embedding(chainer.Chain):
    """Maps images of 8 x 8 pixels to directions. It is smooth, so rounding errors stay small."""

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
    """The two parts that CachedGradientUpdater needs: an encoder, and a loss of its outputs for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embedding = Embedding()
            self.log_scale = chainer.Parameter(numpy.log(10).item(), (1, 1))  # of the loss; it is learned

    def encode(self, first: Any, second: Any) -> Tuple[chainer.Variable, chainer.Variable]:
        return self.embedding(first), self.embedding(second)

    def loss(self, first: chainer.Variable, second: chainer.Variable) -> chainer.Variable:
        """Each view must find the other view of its image among those of all images."""
        similarities = F.matmul(first, second, transb=True)
        similarities *= F.broadcast_to(F.exp(self.log_scale), similarities.shape)
        partners = self.xp.arange(len(first), dtype=numpy.int32)
        there = F.softmax_cross_entropy(similarities, partners)
        back = F.softmax_cross_entropy(similarities.T, partners)
        return (there + back) / 2

    def forward(self, first: Any, second: Any) -> chainer.Variable:
        return self.loss(*self.encode(first, second))


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    model: Contrastive
    accuracy: float
    peak_mib: float
    seconds: float  # processor time


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
    results = [train(way, args) for way in WAYS]
    rows = [make_row(result, results[0]) for result in results]
    pixels = dict.fromkeys(rows[0], "")
    pixels["updater"] = "none: the pixels themselves"
    pixels["accuracy of the nearest neighbour"] = f"{nearest_neighbour_accuracy(lambda images: images):.2%}"
    show_table([*rows, pixels], args.out)
    print()
    for way in ("whole", "cached"):
        print(outcome_of_update_within_limit(way, args))


def parse_args() -> argparse.Namespace:
    parser = make_parser("Learns an embedding of handwritten digits with batches that do not fit, and compares.")
    parser.add_argument("--epoch", type=positive, default=10, help="number of epochs")
    parser.add_argument("--batch-size", type=positive, default=512, help="images per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=positive, default=32, help="images encoded at a time")
    parser.add_argument(
        "--memory-limit", type=positive, default=24, help="memory for one update of the second part, in MiB"
    )
    parser.add_argument("--update-within-limit", choices=WAYS, help=argparse.SUPPRESS)  # the program calls itself
    return parser.parse_args()


def two_views(image: numpy.ndarray) -> Tuple[numpy.ndarray, numpy.ndarray]:
    """Returns two views of the image: moved by up to a pixel, brighter or darker, and with noise."""

    def view() -> numpy.ndarray:
        moved = numpy.roll(image, numpy.random.randint(-1, 2, size=2), axis=(1, 2))
        noise = 0.2 * numpy.random.standard_normal(image.shape)
        return (moved * numpy.random.uniform(0.6, 1.4) + noise).astype(numpy.float32)

    return view(), view()


def make_updater(way: str, args: argparse.Namespace) -> Any:
    """Returns an updater with a new model, which always has the same initial parameters."""
    numpy.random.seed(SEED)
    training, _ = load_split()
    iterator = SerialIterator(TransformDataset(training.images, two_views), args.batch_size)
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
    """Trains, and measures the memory of an update afterwards, which is slow."""
    updater = make_updater(way, args)
    model = updater.get_optimizer("main").target
    start = time.process_time()
    while updater.epoch < args.epoch:
        updater.update()
    seconds = time.process_time() - start
    trained = model.copy(mode="copy")
    trained.to_device("@numpy")
    peak_mib = measure_peak_mib(updater.update, args.device)
    return Result(WAYS[way], trained, nearest_neighbour_accuracy(trained.embedding), peak_mib, seconds)


def make_row(result: Result, reference: Result) -> Dict[str, str]:
    return {
        "updater": result.title,
        "parameters differ by": f"{largest_difference(result.model, reference.model):.2g}",
        "accuracy of the nearest neighbour": f"{result.accuracy:.2%}",
        "peak memory": f"{result.peak_mib:.1f} MiB",
        "processor time": f"{result.seconds:.1f} s",
    }


def outcome_of_update_within_limit(way: str, args: argparse.Namespace) -> str:
    """Takes an update in a new process and returns a line that says how it went."""
    command = [sys.executable, __file__, *sys.argv[1:], "--update-within-limit", way]
    completed = subprocess.run(command, capture_output=True, encoding="utf-8")
    outcome = completed.stdout.strip() or f"ends with {completed.returncode}: {completed.stderr.strip()[-200:]}"
    return f"{WAYS[way]}, {args.batch_size} images within {args.memory_limit} MiB: {outcome}"


def update_within_limit(args: argparse.Namespace) -> None:
    """Takes an update that may allocate as much memory as the limit allows, and prints how it went."""
    if not STATM.exists():
        print("not tried: the memory of a process cannot be limited on this system")
        return
    import resource  # not on Windows

    updater = make_updater(args.update_within_limit, args)
    images = load_split()[0].images
    updater.get_optimizer("main").target(images[:2], images[:2])  # lets libraries allocate what they keep
    pages = int(STATM.read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + args.memory_limit * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        updater.update()
    except MemoryError as error:
        print(f"fails, {error or 'MemoryError'}")
    else:
        print("done")


if __name__ == "__main__":
    main()
