"""Does ``micro_batch_size='auto'`` stay within a limit on memory that the whole batch exceeds?

Random networks: fully connected or convolutional, of random widths, depths and batch sizes, trained by a random
optimizer. Each is first trained without a limit, by one example and by the whole batch, to know what both take. The
limit then leaves room for 5 to 40 % of the batch. Each run makes ten updates in a process of its own. The kernel kills
it if it takes more than its memory cgroup may have. Where no cgroup can be made, the parent process watches its
resident memory, and kills it above the limit.

- whole batch: ``micro_batch_size`` is the size of the batch, so that it is split only after a MemoryError;
- auto: ``micro_batch_size='auto'``, which reads the limit of the cgroup;
- auto, given a limit: the same with ``memory_limit``, a share of the cgroup, or the bytes if there is none;
- earlier auto: ``micro_batch_size='auto'`` of an earlier version, which did not measure memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Protocol, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from peaks import resident_mib
from workloads import describe_machine

MIB = 2**20
UPDATES = 10
SLACK = 8 * MIB  # what the kernel counts beside the memory of the program
WHOLE, AUTO, GIVEN, EARLIER = "whole batch", "auto", "auto, given a limit", "earlier auto"


class Network(NamedTuple):
    """A random network, the shape of an example, and the size of the batch."""

    layers: List[Any]
    shape: Tuple[int, ...]
    batch: int
    optimizer: chainer.GradientMethod


def draw(seed: int) -> Network:
    """Returns a random network. A batch takes from about 40 to 120 MiB."""
    generator = random.Random(seed)
    numpy.random.seed(seed)
    depth = generator.randint(1, 3)
    is_convolutional = generator.random() < 0.5
    if is_convolutional:
        side = generator.choice([16, 28, 32])
        widths = [generator.randint(1, 3), *(generator.randint(4, 16) for _ in range(depth))]
        shape: Tuple[int, ...] = (widths[0], side, side)
        area = side**2
    else:
        widths = [generator.randint(8, 256), *(generator.randint(512, 2048) for _ in range(depth))]
        shape, area = (widths[0],), 1
    layers: List[Any] = []
    floats = 9 * max(widths) if is_convolutional else 0  # the patches of an image
    for before, after in zip(widths, widths[1:]):
        functions = generator.choices([F.relu, F.tanh, F.sigmoid, F.dropout], k=generator.randint(2, 12))
        layers += [L.Convolution2D(before, after, 3, pad=1) if is_convolutional else L.Linear(before, after)]
        layers += functions
        floats += after * (1 + len(functions))
    layers.append(L.Linear(widths[-1] * area, 10))
    batch = generator.randint(40, 120) * MIB // (4 * floats * area)
    optimizers = [chainer.optimizers.SGD, chainer.optimizers.MomentumSGD, chainer.optimizers.Adam]
    return Network(layers, shape, batch, generator.choice(optimizers)())


def make_updater(network: Network, batch: int, updater_class: Any, **kwargs: Any) -> Any:
    """Returns an updater with a model and an iterator over random examples."""
    optimizer = network.optimizer.setup(L.Classifier(chainer.Sequential(*network.layers)))
    chainer.get_current_reporter().add_observer("main", optimizer.target)
    inputs = numpy.random.RandomState(0).standard_normal((network.batch, *network.shape)).astype("f")
    examples = [(x, numpy.int32(number % 10)) for number, x in enumerate(inputs)]
    return updater_class(SerialIterator(examples, batch, shuffle=False), optimizer, **kwargs)


# In the processes that are limited


def calibrate(seed: int) -> None:
    """Prints the peaks of training by one example and by the whole batch, and what of them are files, in bytes."""
    network = draw(seed)
    make_updater(network, 1, StandardUpdater).update()
    peaks = [resident_mib("VmHWM")]
    make_updater(network, network.batch, StandardUpdater).update()
    peaks.append(resident_mib("VmHWM"))
    print(json.dumps([int(mib * MIB) for mib in (*peaks, resident_mib("RssFile"))]))


def train(seed: int, way: str, memory_limit: Any) -> None:
    """Makes updates in one of the ways."""
    network = draw(seed)
    kwargs: Dict[str, Any] = {"micro_batch_size": network.batch if way == WHOLE else "auto"}
    if way == GIVEN:
        kwargs["memory_limit"] = memory_limit
    updater = make_updater(network, network.batch, chainer_accum.AccumulatingUpdater, **kwargs)
    for _ in range(UPDATES):
        updater.update()


# In the process that starts them


class Ceiling(Protocol):
    """How memory is limited. ``memory_limit`` is what a user would tell an updater about it."""

    name: str

    def memory_limit(self, num_bytes: int) -> Any: ...

    def run(self, command: List[str], env: Dict[str, str], num_bytes: int) -> int:
        """Runs a command and returns its exit status, which is negative if it was killed."""


class Cgroup:
    """A memory cgroup for each process, below that of this process."""

    name = "a memory cgroup"

    def __init__(self) -> None:
        own = {line.split(":")[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
        root = Path("/sys/fs/cgroup")
        is_first_version = "memory" in own
        path = own["memory" if is_first_version else ""].lstrip("/")
        self._folder = root / "memory" / path if is_first_version else root / path
        self._limit = "memory.limit_in_bytes" if is_first_version else "memory.max"
        with self._limited_to(2**30):  # raises OSError if this is not allowed
            pass

    def memory_limit(self, num_bytes: int) -> Any:
        return "90%"

    def run(self, command: List[str], env: Dict[str, str], num_bytes: int) -> int:
        with self._limited_to(num_bytes) as folder:

            def enter() -> None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

            return subprocess.run(command, env=env, preexec_fn=enter).returncode

    @contextlib.contextmanager
    def _limited_to(self, num_bytes: int) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="limited-", dir=self._folder))
        try:
            (folder / self._limit).write_text(str(num_bytes))
            yield folder
        finally:
            folder.rmdir()


class Watched:
    """A limit on the resident memory of a process, which is killed as soon as it is seen above."""

    name = "a watched ceiling"

    def memory_limit(self, num_bytes: int) -> Any:
        return num_bytes

    def run(self, command: List[str], env: Dict[str, str], num_bytes: int) -> int:
        process = subprocess.Popen(command, env=env)
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                if resident_mib("VmHWM", process.pid) * MIB > num_bytes:
                    process.kill()
            time.sleep(0.002)
        return process.returncode


def make_ceiling() -> Ceiling:
    """Returns a cgroup, or the watched ceiling where none can be made."""
    with contextlib.suppress(OSError, KeyError):
        return Cgroup()
    return Watched()


class Run(NamedTuple):
    """A network under a limit."""

    seed: int
    ceiling: Ceiling
    earlier: Optional[Path] = None

    @property
    def ways(self) -> List[str]:
        """The ways that can be compared. A watched ceiling cannot be read by the process."""
        ways = [WHOLE, GIVEN] if isinstance(self.ceiling, Watched) else [WHOLE, AUTO, GIVEN]
        return ways if self.earlier is None else [*ways, EARLIER]

    def outcomes(self) -> Dict[str, int]:
        """Returns the exit statuses by way, and prints them on the standard error stream."""
        num_bytes = self._choose_limit()
        outcomes = {way: self._train(way, num_bytes) for way in self.ways}
        print(f"seed {self.seed}, {num_bytes / MIB:.0f} MiB: {outcomes}", file=sys.stderr, flush=True)
        return outcomes

    def _choose_limit(self) -> int:
        calibrated = subprocess.run(self._command("calibrate"), stdout=subprocess.PIPE, check=True, env=_environment())
        one, whole, files = json.loads(calibrated.stdout)
        share = random.Random(self.seed).uniform(0.05, 0.4)
        num_bytes = one + share * (whole - one) + SLACK
        # A cgroup does not count pages of files that others have read before.
        return int(num_bytes if isinstance(self.ceiling, Watched) else num_bytes - files)

    def _train(self, way: str, num_bytes: int) -> int:
        command = self._command("train", way, self.ceiling.memory_limit(num_bytes))
        path = self.earlier if way == EARLIER else None
        return self.ceiling.run(command, _environment(path), num_bytes)

    def _command(self, *what: Any) -> List[str]:
        return [sys.executable, "-W", "ignore", __file__, "--process", json.dumps([self.seed, *what])]


def _environment(package: Optional[Path] = None) -> Dict[str, str]:
    """Returns an environment in which this version of the package is imported, or the one in a folder."""
    folder = Path(chainer_accum.__file__).parents[1] if package is None else package
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="how many networks are trained")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="how many are trained at a time")
    parser.add_argument("--earlier", type=Path, help="the folder that contains an earlier version of the package")
    parser.add_argument("--watched", action="store_true", help="make no cgroup")
    parser.add_argument("--process", type=json.loads, help="what a process of its own does, as JSON")
    args = parser.parse_args()
    if args.process is not None:
        seed, what, *others = args.process
        return calibrate(seed) if what == "calibrate" else train(seed, *others)
    ceiling = Watched() if args.watched else make_ceiling()
    print(f"# Training within a limit on memory\n\n{__doc__.split(chr(10), 2)[2].strip()}\n")
    print(f"Machine: {describe_machine()}. Memory is limited by {ceiling.name}.\n")
    runs = [Run(args.seed + number, ceiling, args.earlier) for number in range(args.runs)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as executor:
        outcomes = list(executor.map(Run.outcomes, runs))
    print_table(runs, outcomes)
    options = "" if args.earlier is None else " --earlier FOLDER`, where the folder has the package of commit 19420d3"
    print(f"\nMade by `python benchmarks/memory_limit.py --runs {args.runs}{options or '`'}.")


def print_table(runs: List[Run], outcomes: List[Dict[str, int]]) -> None:
    """Prints how many runs ended in which way."""
    print("| micro-batches | runs | finished | killed | failed |\n| --- |" + " ---: |" * 4)
    for way in runs[0].ways:
        statuses = [outcome[way] for outcome in outcomes]
        killed = sum(status < 0 for status in statuses)
        failed = sum(status > 0 for status in statuses)
        print(f"| {way} | {len(runs)} | {statuses.count(0)} | {killed} | {failed} |")


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
