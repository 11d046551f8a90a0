"""What does it save to add the gradient of a weight where it is born?

A backward pass through one function with one parameter, at the end of which the gradient is in a sum: either Chainer
makes the gradient and it is added, or it is added while it is computed, as a window does. Both run on the same graph,
in turns.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Callable, Dict, Iterator, Tuple

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import chainer.functions as F
import numpy
from chainer_accum.window.gradient_sums import GradientSums
from pairs import keep_freed_memory, measure, ratios
from workloads import describe_machine

MADE, BORN = "made, then added", "added where it is born"


def make_graphs() -> Iterator[Tuple[str, chainer.Link, chainer.Variable]]:
    """Returns an iterator over names, links with the parameter, and outputs."""
    for n, c_in, c_out in (32, 256, 256), (64, 1000, 1000), (16, 512, 2048):
        yield (f"linear, {c_in} → {c_out}, {n} examples", *make_graph(F.linear, draw(n, c_in), (c_out, c_in)))
    for n, c_in, c_out, size in (
        (32, 1, 16, 28),
        (32, 16, 32, 14),
        (16, 64, 64, 28),
        (8, 256, 256, 14),
        (8, 512, 512, 7),
    ):
        name = f"convolution, 3×3, {c_in} → {c_out} channels, {size}×{size}, {n} images"
        yield (name, *make_graph(convolve, draw(n, c_in, size, size), (c_out, c_in, 3, 3)))
    for ids, rows, width in (320, 1000, 256), (320, 10000, 256), (1280, 50000, 512):
        x = numpy.random.RandomState(0).randint(0, rows, ids)
        yield (f"embedding, {rows:,} × {width}, {ids:,} ids", *make_graph(F.embed_id, x, (rows, width)))


def make_graph(
    function: Callable[..., chainer.Variable], x: numpy.ndarray, shape: Tuple[int, ...]
) -> Tuple[chainer.Link, chainer.Variable]:
    """Returns a link with a weight of this shape, and what the function makes of ``x`` and the weight."""
    link = chainer.Link()
    with link.init_scope():
        link.weight = chainer.Parameter(draw(*shape))
    return link, function(x, link.weight)


def convolve(x: numpy.ndarray, weight: chainer.Parameter) -> chainer.Variable:
    return F.convolution_2d(x, weight, pad=1)


def draw(*shape: int) -> numpy.ndarray:
    """Returns normal random numbers."""
    return numpy.random.default_rng(0).standard_normal(shape, dtype=numpy.float32)


def make_contestants(link: chainer.Link, y: chainer.Variable) -> Dict[str, Callable[[], None]]:
    """Returns what is timed."""
    sums = {name: GradientSums(link) for name in (MADE, BORN)}
    gy = draw(*y.shape)

    def make_and_add() -> None:
        link.cleargrads()
        y.grad = gy
        y.backward()
        sums[MADE].take_from([link.weight])

    def add_where_born() -> None:
        y.grad = gy
        with sums[BORN].adding():
            y.backward()

    return {MADE: make_and_add, BORN: add_where_born}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how often each runs")
    args = parser.parse_args()
    keep_freed_memory()
    print(f"# Gradients of weights\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}.")
    print(f"{args.rounds} rounds: medians, and of the ratios round by round, with quartiles.")
    print("The C library keeps what is freed.\n")
    print(f"| function | {MADE} | {BORN} | ratio |\n| --- | --- | --- | --- |")
    for name, link, y in make_graphs():
        seconds = measure(make_contestants(link, y), args.rounds)
        times = (f"{statistics.median(seconds[each]) * 1e3:.2f} ms" for each in (MADE, BORN))
        print(f"| {name} | {' | '.join(times)} | {ratios(seconds[BORN], seconds[MADE])} |", flush=True)
    print(f"\nMade by `make bench`: `python benchmarks/weight_gradients.py --rounds {args.rounds}`.")


if __name__ == "__main__":
    main()
