"""Trains a small GAN on handwritten digits two ways, which should end in the same two networks.

(a) with the whole batch at once,
(b) with micro-batches, and both optimizers wrapped by create_accumulating_optimizer.

A GAN has two optimizers and an updater of its own, GANUpdater, which is the same both ways. So are seed, initial
parameters, the order of examples and the noise of each example. A table of what differs and what does not, and the
digits that the two generators draw from the same noise, go to the folder given by --out.
"""

from __future__ import annotations

import argparse
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

SEED = 0
NOISE = 32  # random numbers from which the generator makes an image
GRID = 8  # rows and columns of generated digits in the picture


class Generator(chainer.Chain):
    """Makes images of 8 x 8 pixels from noise. Smooth, so that rounding stays rounding."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.start = L.Linear(NOISE, 32 * 2 * 2)
            self.deconv1 = L.Deconvolution2D(32, 16, ksize=4, stride=2, pad=1)
            self.deconv2 = L.Deconvolution2D(16, 1, ksize=4, stride=2, pad=1)

    def forward(self, noise: Any) -> chainer.Variable:
        h = F.tanh(self.start(noise)).reshape(-1, 32, 2, 2)
        return F.sigmoid(self.deconv2(F.tanh(self.deconv1(h))))


class Discriminator(chainer.Chain):
    """Says how real images look: above zero, they are rather from the data than from the generator."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 16, ksize=4, stride=2, pad=1)
            self.conv2 = L.Convolution2D(16, 32, ksize=4, stride=2, pad=1)
            self.realness = L.Linear(32 * 2 * 2, 1)

    def forward(self, images: Any) -> chainer.Variable:
        return self.realness(F.tanh(self.conv2(F.tanh(self.conv1(images)))))


class GANUpdater(StandardUpdater):
    """Updates a generator and a discriminator with one batch. It knows nothing of accumulation.

    Args:
        iterator: Iterator for the real images.
        optimizers (dict): The optimizers ``'gen'`` and ``'dis'``.
        device: Device of the networks and the images.

    """

    def __init__(self, iterator: Any, optimizers: Dict[str, Any], device: Any) -> None:
        super().__init__(iterator, optimizers, device=device)
        self.random = numpy.random.RandomState(SEED)

    def update_core(self) -> None:
        gen_optimizer, dis_optimizer = self.get_optimizer("gen"), self.get_optimizer("dis")
        gen, dis = gen_optimizer.target, dis_optimizer.target
        real = self.converter(self.get_iterator("main").next(), self.device)
        # A row per example, one after another: however the examples are cut into batches, each gets the same noise.
        noise = self.device.send(self.random.standard_normal((len(real), NOISE)).astype(numpy.float32))

        fake = gen(noise)
        fake_score = dis(fake)
        gen_loss = F.mean(F.softplus(-fake_score))
        dis_loss = F.mean(F.softplus(-dis(real))) + F.mean(F.softplus(fake_score))

        # Both gradients first, then both updates. Optimizers change parameters in place, and the gradient of the
        # generator runs through the parameters of the discriminator. If the discriminator were updated before, that
        # gradient would be of a mixture: the outputs of the old layers, the weights of the new. With a large batch, all
        # examples would meet it; with accumulation, those of the last micro-batch of a window, since only there does
        # dis_optimizer really update. The two would be different trainings.
        gen.cleargrads()
        gen_loss.backward()
        dis.cleargrads()  # of what the generator's loss left there on its way
        fake.unchain()  # the discriminator's loss shall not reach the generator
        dis_loss.backward()
        gen_optimizer.update()
        dis_optimizer.update()

        chainer.report({"loss": gen_loss}, gen)
        chainer.report({"loss": dis_loss}, dis)


# The two ways. All that differs is the size of the iterator's batches and the optimizers.


def large_batch(args: argparse.Namespace) -> GANUpdater:
    """(a) Each batch of the iterator is one update."""
    gen_optimizer, dis_optimizer = make_optimizers()
    iterator = make_iterator(args.batch_size, args)
    return GANUpdater(iterator, {"gen": gen_optimizer, "dis": dis_optimizer}, args.device)


def accumulated(args: argparse.Namespace) -> GANUpdater:
    """(b) Each batch of the iterator is one forward/backward pass; several are one update."""
    steps = args.batch_size // args.micro_batch_size
    gen_optimizer, dis_optimizer = make_optimizers()
    gen_optimizer = chainer_accum.create_accumulating_optimizer(gen_optimizer, accumulation_steps=steps)
    dis_optimizer = chainer_accum.create_accumulating_optimizer(dis_optimizer, accumulation_steps=steps)
    iterator = make_iterator(args.micro_batch_size, args)
    return GANUpdater(iterator, {"gen": gen_optimizer, "dis": dis_optimizer}, args.device)


class Result(NamedTuple):
    """What one way of training led to."""

    title: str
    gen: Generator
    dis: Discriminator
    log: List[Dict[str, float]]  # of LogReport: one entry per epoch
    seconds: float
    peak_mib: float


def main() -> None:
    args = parse_args()
    args.device.use()
    steps = args.batch_size // args.micro_batch_size
    results = [
        train_one_way(large_batch, 1, f"(a) batches of {args.batch_size}", args),
        train_one_way(accumulated, steps, f"(b) {steps} micro-batches of {args.micro_batch_size}", args),
    ]
    table = make_table(results)
    print(table)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_digits(results, args.device, args.out / "digits.png")
    print(f"\nGenerated digits: {args.out / 'digits.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a GAN on handwritten digits with and without gradient accumulation and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epoch", type=int, default=30, help="number of epochs")
    parser.add_argument("--batch-size", type=int, default=128, help="examples per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="examples per forward/backward pass")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    if min(args.epoch, args.batch_size, args.micro_batch_size) < 1:
        parser.error("--epoch, --batch-size and --micro-batch-size must be 1 or more")
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size, for (b) to gather whole batches")
    return args


def load_images() -> numpy.ndarray:
    """Returns the images of the digits, with pixels between 0 and 1."""
    return (load_digits().images / 16).astype(numpy.float32)[:, None]


def make_iterator(size: int, args: argparse.Namespace) -> SerialIterator:
    """Returns an iterator with batches of ``size``, which gives the examples in the same order whatever the size."""
    images = load_images()
    # As many as make whole effective batches, for the last window to be complete as training ends.
    images = images[: len(images) // args.batch_size * args.batch_size]
    return SerialIterator(images, size, order_sampler=ShuffleOrderSampler(numpy.random.RandomState(SEED)))


def make_optimizers() -> List[chainer.Optimizer]:
    """Returns optimizers with a new generator and a new discriminator, which are always the same."""
    numpy.random.seed(SEED)
    return [chainer.optimizers.Adam(alpha=1e-3, beta1=0.5).setup(network()) for network in (Generator, Discriminator)]


def train_one_way(way: Callable[..., GANUpdater], steps: int, title: str, args: argparse.Namespace) -> Result:
    """Trains new networks with the updater that ``way`` makes, ``steps`` iterations of which are one update."""
    print(title)
    updater = way(args)
    trainer = Trainer(updater, (args.epoch, "epoch"), out=str(args.out / way.__name__))
    every = max(args.epoch // 10, 1), "epoch"
    trainer.extend(extensions.LogReport(trigger=every))
    columns = ["epoch", "iteration", "gen/loss", "dis/loss", "elapsed_time"]
    trainer.extend(extensions.PrintReport(columns), trigger=every)
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=1))
    trainer.run()
    print()
    gen, dis = (updater.get_optimizer(name).target for name in ("gen", "dis"))
    log = trainer.get_extension("LogReport").log
    return Result(title, gen, dis, log, trainer.elapsed_time, measure_peak_mib(way(args), steps))


def measure_peak_mib(updater: GANUpdater, steps: int) -> float:
    """Returns the MiB that an update needs at its peak, beside the parameters and the state of the optimizers."""

    def update() -> None:
        for _ in range(steps):
            updater.update()

    update()  # allocates what stays
    if updater.device.xp is numpy:
        tracemalloc.start()
        update()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    else:
        pool = chainer.backends.cuda.memory_pool
        pool.free_all_blocks()
        before = pool.total_bytes()
        update()
        peak = pool.total_bytes() - before
    return peak / 2**20


def largest_difference(network: chainer.Chain, reference: chainer.Chain) -> float:
    """Returns the largest absolute difference between two networks' parameters."""
    cpu = chainer.get_device("@numpy")
    expected = {name: cpu.send(param.array) for name, param in reference.namedparams()}
    return max(float(abs(cpu.send(param.array) - expected[name]).max()) for name, param in network.namedparams())


def make_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with one row per result."""
    rows = [
        [
            "one update takes",
            "generator differs from (a) by",
            "discriminator by",
            "generator loss",
            "discriminator loss",
            "peak memory",
            "time",
        ]
    ]
    for result in results:
        rows.append(
            [
                result.title,
                f"{largest_difference(result.gen, results[0].gen):.2g}",
                f"{largest_difference(result.dis, results[0].dis):.2g}",
                f"{result.log[-1]['gen/loss']:.5f}",
                f"{result.log[-1]['dis/loss']:.5f}",
                f"{result.peak_mib:.1f} MiB",
                f"{result.seconds:.1f} s",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    lines = [
        [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_digits(results: Sequence[Result], device: Any, path: Path) -> None:
    """Draws what the generators make of the same noise, beside some digits of the data."""
    noise = numpy.random.RandomState(SEED + 1).standard_normal((GRID * GRID, NOISE)).astype(numpy.float32)
    cpu = chainer.get_device("@numpy")
    with chainer.no_backprop_mode():
        generated = [cpu.send(result.gen(device.send(noise)).array) for result in results]
    difference = abs(generated[1] - generated[0]).max()
    panels = [("data", load_images()[: GRID * GRID])]
    panels += [(result.title, images) for result, images in zip(results, generated)]
    figure = Figure(figsize=(11, 4.3), constrained_layout=True)
    for axes, (title, images) in zip(figure.subplots(1, len(panels)), panels):
        framed = numpy.pad(images[:, 0], ((0, 0), (1, 1), (1, 1)))
        grid = framed.reshape(GRID, GRID, *framed.shape[1:]).transpose(0, 2, 1, 3)
        axes.imshow(grid.reshape(GRID * framed.shape[1], -1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title)
        axes.set_axis_off()
    figure.suptitle(f"Two generators and one noise: no pixel differs by more than {difference:.1g}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
