"""Run Chainer's example programs with large batches and with accumulation, and compare what they train.

Usage: ``python tools/chainer_examples CHECKOUT [PROGRAM ...]``, where ``CHECKOUT`` is a copy of Chainer's
repository at v7.8.1. Each program runs its own code, from its command line on. Only the data are made up, and training
stops after a few updates. The result is in ``docs/migrating.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import pathlib
import random
import runpy
import shlex
import sys
import tempfile
import traceback
import warnings
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, NamedTuple, Optional
from unittest import mock

import chainer_accum
import chainer
import matplotlib.pyplot  # noqa: F401  here, so that it is imported once and not by each program
import numpy
import PIL.Image  # noqa: F401
from chainer.training import Trainer
from programs import PROGRAMS, Program

UPDATERS = ("StandardUpdater", "updater.StandardUpdater", "updaters.StandardUpdater")
OPTIMIZERS = ("AdaGrad", "Adam", "MomentumSGD", "SGD")


class Finished(Exception):
    """Leaves a program whose updates are made."""


class Models(NamedTuple):
    """The links that a program has set up an optimizer with, and their parameters at that time."""

    links: List[chainer.Link]
    before: Dict[str, numpy.ndarray]


def main() -> None:
    """Run the programs that the command line names, or all, and print a line of a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=pathlib.Path, help="copy of Chainer's repository, at v7.8.1")
    parser.add_argument("programs", nargs="*", metavar="program", help="part of a program's name; all by default")
    arguments = parser.parse_args()
    examples = arguments.checkout.resolve() / "examples"
    if not examples.is_dir():
        parser.error(f"checkout must be a copy of Chainer's repository, got {arguments.checkout} without examples/")
    print("| program | change | difference | without its options | check_equivalence |")
    print("| --- | --- | --- | --- | --- |")
    for program in PROGRAMS:
        if not arguments.programs or any(part in program.name for part in arguments.programs):
            print(f"| {' | '.join([program.name, f'`{program.change}`', *try_out(program, examples)])} |", flush=True)


def try_out(program: Program, examples: pathlib.Path) -> List[str]:
    """Return how far accumulation leads away from the large batch, with and without options, and what the check finds.

    The comparison is in test mode: no dropout, no added noise, no batch statistics. The check is in training mode, and
    without the options that the loss requires.

    """
    cells = []
    try:
        with chainer.using_config("train", False):
            cells.append(f"{measure(program, examples, program.change):.1g}")
            cells.append("-" if program.plain is None else f"{measure(program, examples, program.plain):.1g}")
        if program.change:
            result = check(program, examples)
            cells.append(", ".join(cause.name for cause in result.causes) or "equivalent")
    except Exception as error:  # the other programs are to run all the same
        traceback.print_exc()
        cells.append(f"{type(error).__name__}: {error}")
    return cells + ["-"] * (3 - len(cells))


def measure(program: Program, examples: pathlib.Path, options: str) -> float:
    """Return the largest difference in a parameter, as a share of the longest way that one has come."""
    whole, accumulated = run(program, examples), run(program, examples, options)
    expected, actual = parameters(whole.links), parameters(accumulated.links)
    longest = max(abs(expected[name] - before).max() for name, before in whole.before.items())
    return float(max(abs(actual[name] - array).max() for name, array in expected.items()) / longest)


def parameters(links: List[chainer.Link]) -> Dict[str, numpy.ndarray]:
    """Return copies of all parameters that are initialized, by number of the link and name."""
    named = [(f"{i}{name}", param) for i, link in enumerate(links) for name, param in link.namedparams()]
    return {name: param.array.copy() for name, param in named if param.array is not None}


def check(program: Program, examples: pathlib.Path) -> chainer_accum.diagnostics.Equivalence:
    """Return what ``check_equivalence`` finds for the program's updater, without the options that it needs."""
    found = []

    def check_updater(updater: chainer_accum.AccumulatingUpdater) -> None:
        batch = updater.get_iterator("main").next()
        kwargs: Dict[str, Any] = {}
        if isinstance(batch, tuple):  # of arrays, where a list of examples is wanted
            batch = list(zip(*batch))
            kwargs = {
                "converter": lambda batch, device: updater.converter(tuple(map(numpy.array, zip(*batch))), device),
                "weight_func": len,
            }
        found.append(chainer_accum.check_equivalence(updater, batch, **kwargs))

    run(program, examples, program.change if program.plain is None else program.plain, check_updater)
    return found[0]


def run(
    program: Program,
    examples: pathlib.Path,
    options: Optional[str] = None,
    use: Optional[Callable[[chainer_accum.AccumulatingUpdater], None]] = None,
) -> Models:
    """Run a program, as it is or with the options of its change, and return what it trains.

    Where the program would run its trainer, the updates are made; or ``use``, if given, is called with the updater.

    """
    steps = 1 if options is None else program.steps
    batch_size = program.batch_size // steps
    path = examples / program.path
    models = Models([], {})
    set_up = chainer.Optimizer.setup

    def note_and_set_up(optimizer: chainer.Optimizer, link: chainer.Link) -> Any:
        models.links.append(link)
        models.before.update(parameters(models.links))
        return set_up(optimizer, link)

    def train(trainer: Trainer, **kwargs: Any) -> None:
        if use is not None:
            use(trainer.updater)
        else:
            for _ in range(program.updates * (1 if program.change else steps)):
                trainer.updater.update()
        raise Finished

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(in_empty_folder())
        enter(mock.patch.object(sys, "path", [str(path.parent), *sys.path]))
        enter(mock.patch.object(sys, "argv", [str(path), *shlex.split(program.arguments.format(batch=batch_size))]))
        enter(mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in program.absent}))
        enter(mock.patch.object(chainer.Optimizer, "setup", note_and_set_up))
        enter(mock.patch.object(chainer.iterators, "MultiprocessIterator", SerialIterator))
        enter(mock.patch.object(Trainer, "run", train))
        enter(chainer.using_config("dtype", program.dtype))
        enter(contextlib.redirect_stdout(io.StringIO()))
        enter(warnings.catch_warnings())
        enter(contextlib.suppress(Finished))
        warnings.simplefilter("ignore")
        if options is not None:
            enter(accumulating(program.steps, **eval(f"dict({options})")))
        program.make_data(enter)
        random.seed(0)
        numpy.random.seed(0)
        namespace = runpy.run_path(str(path), run_name="__main__" if program.drive is None else "driven")
        if program.drive is not None:
            program.drive(namespace, batch_size)
    return models


def accumulating(steps: int, **options: Any) -> ContextManager[None]:
    """Context manager in which a program accumulates: in its updater if there are options, else in its optimizers."""
    if options:
        make_updater = functools.partial(chainer_accum.AccumulatingUpdater, **options)
        return patched(chainer.training, dict.fromkeys(UPDATERS, make_updater))

    def wrapped(optimizer_class: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: chainer_accum.create_accumulating_optimizer(
            optimizer_class(*args, **kwargs), steps
        )

    return patched(chainer.optimizers, {name: wrapped(getattr(chainer.optimizers, name)) for name in OPTIMIZERS})


@contextlib.contextmanager
def patched(module: Any, names: Mapping[str, Any]) -> Iterator[None]:
    """Context manager in which names of a module stand for other objects."""
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(mock.patch(f"{module.__name__}.{name}", value))
        yield


@contextlib.contextmanager
def in_empty_folder() -> Iterator[None]:
    """Context manager in which the current folder is a new one."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


class SerialIterator(chainer.iterators.SerialIterator):
    """Stands in for ``MultiprocessIterator``, whose processes would outlive the program."""

    def __init__(self, dataset: Any, batch_size: int, repeat: bool = True, shuffle: bool = True, **_: Any) -> None:
        super().__init__(dataset, batch_size, repeat, shuffle)


if __name__ == "__main__":
    main()
