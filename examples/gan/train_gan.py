"""Trains a small GAN on handwritten digits two ways, which should end in the same two networks.

(a) with the whole batch at once,
(b) with micro-batches, and both optimizers wrapped by create_accumulating_optimizer.

A GAN has two optimizers and its own updater, GANUpdater, which is the same both ways. So are seed, initial parameters,
the order of examples and the noise of each example. The program writes a table that compares the two, and a picture of
the digits that the two generators make of the same noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_iterator, make_parser, measure_peak_mib, positive, show_table
from handwritten_digits import load_all

SEED = 0
NOISE = 32  # random numbers from which the generator makes an image
GRID = 8  # rows and columns of generated digits in the picture


class Generator(chainer.Chain):
    """Makes images of 8 x 8 pixels from noise. It is smooth, so rounding errors stay small."""

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
    """Scores images: above zero, they look more like the data than like the generator's."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 16, ksize=4, stride=2, pad=1)
            self.conv2 = L.Convolution2D(16, 32, ksize=4, stride=2, pad=1)
            self.realness = L.Linear(32 * 2 * 2, 1)

    def forward(self, images: Any) -> chainer.Variable:
        return self.realness(F.tanh(self.conv2(F.tanh(self.conv1(images)))))


class GANUpdater(StandardUpdater):
    """Updates a generator and a discriminator with one batch. It does not know about accumulation.

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
        # One row per example, in order, so that each example has the same noise whatever the batch size.
        noise = self.device.send(self.random.standard_normal((len(real), NOISE)).astype(numpy.float32))

        fake = gen(noise)
        fake_score = dis(fake)
        gen_loss = F.mean(F.softplus(-fake_score))
        dis_loss = F.mean(F.softplus(-dis(real))) + F.mean(F.softplus(fake_score))

        # Both gradients first, then both updates. Optimizers change parameters in place, and the generator's gradient
        # passes through the discriminator. If the discriminator were updated first, that gradient would combine the
        # outputs of its old layers with its new weights. A large batch would do so for all examples; accumulation, only
        # for those of the last micro-batch, after which dis_optimizer updates. The two trainings would differ.
        gen.cleargrads()
        gen_loss.backward()
        dis.cleargrads()  # clears what the generator's loss left there
        fake.unchain()  # keeps the discriminator's loss from reaching the generator
        dis_loss.backward()
        gen_optimizer.update()
        dis_optimizer.update()

        chainer.report({"loss": gen_loss}, gen)
        chainer.report({"loss": dis_loss}, dis)


# The two ways. They differ only in the optimizers and in the size of the iterator's batches.


def large_batch(args: argparse.Namespace) -> GANUpdater:
    """(a) Each batch of the iterator is one update."""
    gen_optimizer, dis_optimizer = make_optimizers()
    iterator = make_iterator(load_images(args), args.batch_size)
    return GANUpdater(iterator, {"gen": gen_optimizer, "dis": dis_optimizer}, args.device)


def accumulated(args: argparse.Namespace) -> GANUpdater:
    """(b) Each batch of the iterator is one forward/backward pass; several are one update."""
    steps = args.batch_size // args.micro_batch_size
    gen_optimizer, dis_optimizer = make_optimizers()
    gen_optimizer = chainer_accum.create_accumulating_optimizer(gen_optimizer, accumulation_steps=steps)
    dis_optimizer = chainer_accum.create_accumulating_optimizer(dis_optimizer, accumulation_steps=steps)
    iterator = make_iterator(load_images(args), args.micro_batch_size)
    return GANUpdater(iterator, {"gen": gen_optimizer, "dis": dis_optimizer}, args.device)


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    gen: Generator
    dis: Discriminator
    log: List[Dict[str, float]]  # the log of LogReport, one entry per epoch
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
    show_table([make_row(result, results[0]) for result in results], args.out)
    draw_digits(results, args.device, args.out / "digits.png")
    print(f"\nGenerated digits: {args.out / 'digits.png'}")


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains a GAN on handwritten digits with and without gradient accumulation and compares.")
    parser.add_argument("--epoch", type=positive, default=30, help="number of epochs")
    parser.add_argument("--batch-size", type=positive, default=128, help="examples per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=positive, default=32, help="examples per forward/backward pass")
    args = parser.parse_args()
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size, for (b) to gather whole batches")
    return args


def load_images(args: argparse.Namespace) -> numpy.ndarray:
    """Returns as many images as fill whole effective batches, so that training ends with a complete window."""
    images, _ = load_all()
    return images[: len(images) // args.batch_size * args.batch_size]


def make_optimizers() -> List[chainer.Optimizer]:
    """Returns optimizers with a new generator and a new discriminator, always with the same initial parameters."""
    numpy.random.seed(SEED)
    return [chainer.optimizers.Adam(alpha=1e-3, beta1=0.5).setup(network()) for network in (Generator, Discriminator)]


def train_one_way(way: Callable[..., GANUpdater], steps: int, title: str, args: argparse.Namespace) -> Result:
    """Trains new networks with the updater that ``way`` makes; ``steps`` of its iterations are one update."""
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
    other = way(args)
    peak_mib = measure_peak_mib(lambda: [other.update() for _ in range(steps)], args.device)
    return Result(title, gen, dis, log, trainer.elapsed_time, peak_mib)


def make_row(result: Result, reference: Result) -> Dict[str, str]:
    last = result.log[-1]
    return {
        "one update takes": result.title,
        "generator differs from (a) by": f"{largest_difference(result.gen, reference.gen):.2g}",
        "discriminator by": f"{largest_difference(result.dis, reference.dis):.2g}",
        "generator loss": f"{last['gen/loss']:.5f}",
        "discriminator loss": f"{last['dis/loss']:.5f}",
        "peak memory": f"{result.peak_mib:.1f} MiB",
        "time": f"{result.seconds:.1f} s",
    }


def draw_digits(results: Sequence[Result], device: Any, path: Path) -> None:
    """Draws what the generators make of the same noise, next to digits of the data."""
    noise = numpy.random.RandomState(SEED + 1).standard_normal((GRID * GRID, NOISE)).astype(numpy.float32)
    cpu = chainer.get_device("@numpy")
    with chainer.no_backprop_mode():
        generated = [cpu.send(result.gen(device.send(noise)).array) for result in results]
    difference = abs(generated[1] - generated[0]).max()
    panels = [("data", load_all().images[: GRID * GRID])]
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
