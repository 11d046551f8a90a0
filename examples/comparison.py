"""What the examples share: options, iterators with a fixed order, measurements of a training, and a table of them."""

from __future__ import annotations

import argparse
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import chainer_accum  # noqa: F401 - before chainer, which it makes importable on current Python and NumPy
import chainer
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of every example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    return parser


def positive(text: str) -> int:
    """Converts the value of an option that must be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def make_iterator(dataset: Any, batch_size: int, seed: int = 0) -> SerialIterator:
    """Returns an iterator that shuffles the examples in the same way whatever the batch size."""
    return SerialIterator(dataset, batch_size, order_sampler=ShuffleOrderSampler(numpy.random.RandomState(seed)))


def measure_peak_mib(update: Callable[[], None], device: Any) -> float:
    """Returns the peak memory of an update in MiB, without the parameters and the state of the optimizer."""
    update()  # allocates what stays
    if device.xp is numpy:
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


def largest_difference(model: chainer.Link, reference: chainer.Link, attribute: str = "array") -> float:
    """Returns the largest absolute difference between the parameters of two models, or between their gradients."""
    cpu = chainer.get_device("@numpy")
    expected = {name: cpu.send(getattr(param, attribute)) for name, param in reference.namedparams()}
    return max(
        float(abs(cpu.send(getattr(param, attribute)) - expected[name]).max()) for name, param in model.namedparams()
    )


def show_table(rows: Sequence[Mapping[str, str]], folder: Path, text_columns: int = 1) -> None:
    """Prints a Markdown table and writes it to ``table.md``.

    Args:
        rows: For each row, the cells by the title of their column.
        folder: Folder for the file.
        text_columns: Number of columns at the left that hold text. The others hold numbers, which are aligned right.

    """
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    alignments = ["<"] * text_columns + [">"] * (len(widths) - text_columns)
    cells.insert(1, [("-" if side == "<" else ":").rjust(width, "-") for side, width in zip(alignments, widths)])
    lines = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, alignments, widths)] for row in cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
