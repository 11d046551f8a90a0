"""What the tests share: small data, a small model, and one way to run an updater."""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import re
import subprocess
import sys
from typing import Any, Dict, List, NamedTuple, Optional

import chainer_accum  # before chainer, which it makes importable
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.backends import cuda
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from chainer_accum.observations import Observations

BOOKKEEPING = ("iteration", "epoch", "is_new_epoch", "epoch_detail", "previous_epoch_detail")


# The device to train on, or None to leave everything where it is. It is the option --device.
DEVICE: Optional[str] = None


def seed(number: int) -> None:
    """Seeds the generators from which models, Chainer's functions and iterators draw."""
    random.seed(number)
    numpy.random.seed(number)
    if DEVICE is not None and DEVICE.startswith("@cupy"):
        cuda.cupy.random.seed(number)


def has_gpu() -> bool:
    """Returns whether CuPy is installed and finds a device. CuPy can be imported without any."""
    if not cuda.available:
        return False
    try:
        return bool(cuda.cupy.cuda.runtime.getDeviceCount() > 0)
    except cuda.cupy.cuda.runtime.CUDARuntimeError:  # there is no driver, or no device
        return False


def make_dataset(size: int = 50, n_in: int = 5, n_out: int = 3, seed: int = 1) -> List[Any]:
    """Returns ``size`` random examples of an input vector and a label."""
    random = numpy.random.RandomState(seed)
    inputs = random.standard_normal((size, n_in)).astype(numpy.float32)
    return list(zip(inputs, random.randint(n_out, size=size).astype(numpy.int32)))


def make_model(n_out: int = 3) -> L.Classifier:
    """Returns a small classifier, the same at every call, whose first layer is initialised lazily."""
    first, last = (chainer.initializers.LeCunNormal(rng=numpy.random.RandomState(seed)) for seed in (0, 1))
    return L.Classifier(
        chainer.Sequential(L.Linear(None, 8, initialW=first), F.relu, L.Linear(8, n_out, initialW=last))
    )


class CountingUpdater(StandardUpdater):
    """StandardUpdater, but its optimizer counts each epoch that ends with one of the batches that make an update."""

    def __init__(self, *args: Any, batches: Any, accumulation_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches = batches
        self._accumulation_steps = accumulation_steps
        self._num_epochs = 0

    def update_core(self) -> None:
        super().update_core()
        for _ in itertools.islice(self._batches, self._accumulation_steps):
            self._num_epochs += bool(self._batches.is_new_epoch)
        self.get_optimizer("main").epoch = self._num_epochs


class Step(NamedTuple):
    """What can be seen of a training run after an update."""

    bookkeeping: Dict[str, Any]
    observation: Dict[str, Any]


def make_updater(updater_class: Any, iterator: Any, optimizer: Any, model: Any = None, **kwargs: Any) -> Any:
    """Returns an updater that trains ``model``, or the default one, with ``optimizer``."""
    optimizer.setup(make_model() if model is None else model)
    return updater_class(iterator, optimizer, **{"device": DEVICE, **kwargs})


def merge(reports: Any, rules: Any = None, weights: Any = None) -> Dict[str, Any]:
    """Returns the merged observation of micro-batches that report these dictionaries."""
    observations = Observations(rules)
    outer: Dict[str, Any] = {}
    with chainer.Reporter().scope(outer):
        for index, report in enumerate(reports):
            with observations.collecting() as observation:
                chainer.report(report)
            observations.add(observation, 1.0 if weights is None else weights[index])
    assert outer == {}
    return observations.merged()


def to_host(value: Any) -> Any:
    """Returns an array, or the array of a Variable, in host memory, and anything else as it is."""
    array = chainer.as_array(value)
    return array.get() if isinstance(array, cuda.ndarray) else array


def to_device(examples: Any) -> Any:
    """Returns the arrays of examples, on the device to train on."""
    return chainer.dataset.concat_examples(examples, DEVICE)


def on_device(link: Any) -> Any:
    """Returns the link, sent to the device to train on."""
    return link if DEVICE is None else link.to_device(DEVICE)


def slack(tolerance: float) -> float:
    """Returns how large a difference may be that rounding makes."""
    # A GPU adds up in an order that depends on the size of the batch. But where all is the same, the result is.
    return tolerance if DEVICE is None else 10 * tolerance


def run(updater: Any, updates: int) -> List[Step]:
    """Runs ``updates`` updates as a Trainer would and returns what can be seen after each."""
    optimizer = updater.get_optimizer("main")
    reporter = chainer.Reporter()
    reporter.add_observer("main", optimizer.target)
    reporter.add_observers("main", optimizer.target.namedlinks(skipself=True))
    steps = []
    for _ in range(updates):
        observation: Dict[str, Any] = {}
        with reporter.scope(observation):
            updater.update()
        bookkeeping = {name: getattr(updater, name) for name in BOOKKEEPING}
        bookkeeping["optimizer.epoch"] = optimizer.epoch
        bookkeeping["optimizer.t"] = optimizer.t
        steps.append(Step(bookkeeping, observation))
    return steps


def assert_same_parameters(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Asserts that two models have the same parameters and persistent values."""
    tolerance = slack(tolerance)
    expected_parameters = dict(expected.namedparams())
    for name, param in actual.namedparams():
        expected_array = expected_parameters.pop(name).array
        if expected_array is None:
            assert param.array is None, name
        else:
            numpy.testing.assert_allclose(
                to_host(param), to_host(expected_array), rtol=tolerance, atol=tolerance, err_msg=name
            )
    assert not expected_parameters


def assert_same_optimizer_state(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Asserts that the update rules of two optimizers have the same state, and the optimizers the same counters."""
    tolerance = slack(tolerance)
    assert (actual.t, actual.epoch) == (expected.t, expected.epoch)
    expected_params = dict(expected.target.namedparams())
    for name, param in actual.target.namedparams():
        rule, expected_rule = param.update_rule, expected_params[name].update_rule
        if rule is None:
            assert expected_rule is None, name
            continue
        assert rule.t == expected_rule.t
        assert (rule.state or {}).keys() == (expected_rule.state or {}).keys()
        for key, value in (rule.state or {}).items():
            numpy.testing.assert_allclose(
                to_host(value),
                to_host(expected_rule.state[key]),
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"{name}/{key}",
            )


def assert_same_steps(actual: List[Step], expected: List[Step], tolerance: float = 1e-5) -> None:
    """Asserts that two runs had the same bookkeeping and observations."""
    tolerance = slack(tolerance)
    assert [step.bookkeeping for step in actual] == [step.bookkeeping for step in expected]
    for step, expected_step in zip(actual, expected):
        assert step.observation.keys() == expected_step.observation.keys()
        for key, value in step.observation.items():
            assert type(value) is type(expected_step.observation[key]), key
            numpy.testing.assert_allclose(
                to_host(value),
                to_host(expected_step.observation[key]),
                rtol=tolerance,
                atol=tolerance,
                err_msg=key,
            )


def run_python(*arguments: str, path: Any = "", status: int = 0) -> str:
    """Runs a fresh interpreter, which is to end with the status, and returns what it prints."""
    paths = [str(path), str(pathlib.Path(chainer_accum.__file__).parent.parent)]
    process = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert process.returncode == status, process.stdout
    return process.stdout


def dead_links(path: pathlib.Path) -> List[str]:
    """Returns the links of a Markdown file that lead to no file, or to no heading of the file."""
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" in link or (target.exists() and not anchor):
            continue
        if not target.exists() or anchor not in map(_as_anchor, _headings(target)):
            dead.append(link)
    return dead


def table_below(text: str, heading: str) -> List[List[str]]:
    """Returns the rows of the first Markdown table below a heading, without its head."""
    lines = text[text.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def _headings(path: pathlib.Path) -> List[str]:
    return re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)


def _as_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def serial(dataset: Any, batch_size: int, **kwargs: Any) -> SerialIterator:
    """Returns a SerialIterator that goes through the examples in order unless told otherwise."""
    return SerialIterator(dataset, batch_size, **{"shuffle": False, **kwargs})


def ready_model(rank: int = 0) -> L.Classifier:
    """Returns a model whose parameters differ from rank to rank."""
    model = make_model()
    model(*chainer.dataset.concat_examples(make_dataset(2)))
    for param in model.params():
        param.array += rank
    return model
