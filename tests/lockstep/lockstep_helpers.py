"""What the tests of lockstep share: data, two runs side by side, and a small network with batch normalization."""

from __future__ import annotations

import contextlib
import pathlib
import random
import re
import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer import optimizers
from chainer.serializers import DictionarySerializer
from chainer.training.updaters import StandardUpdater

from helpers import Step, assert_same_steps, make_updater, run, seed, serial

ONE_STEP, SEVERAL = 1e-12, 1e-10  # how far parameters may be from those of the whole batch
STORES = ("memory", "host", "file", "folder")
MakeModel = Callable[[], chainer.Chain]


def lockstep_threads() -> List[threading.Thread]:
    """Returns the threads of passes that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name == "chainer_accum"]


def make_vectors(size: int = 40, n_in: int = 5, n_out: int = 3) -> List[Any]:
    """Returns examples of an input vector in float64 and a label."""
    generator = numpy.random.RandomState(1)
    return list(zip(generator.standard_normal((size, n_in)), generator.randint(n_out, size=size).astype("i")))


def make_images(size: int = 40, shape: Tuple[int, ...] = (3, 6, 6), n_out: int = 3) -> List[Any]:
    """Returns examples of an image in float64 and a label."""
    generator = numpy.random.RandomState(2)
    return list(zip(generator.standard_normal((size, *shape)), generator.randint(n_out, size=size).astype("i")))


def make_momentum() -> chainer.Optimizer:
    return optimizers.MomentumSGD(0.02)


def as_option(store: str, folder: pathlib.Path) -> str:
    """Returns what to pass as ``lockstep``."""
    return str(folder) if store == "folder" else store


class Net(chainer.Chain):
    """A network of two layers with batch normalization in between, which reports.

    Args:
        between (callable): Function or link that is applied after the batch normalization.
        is_lazy (bool): Whether parameters are initialized in the first pass.
        nobias (bool): Whether the layer before the batch normalization has no bias.

    """

    def __init__(self, between: Callable[[Any], Any] = F.tanh, *, is_lazy: bool = False, nobias: bool = False) -> None:
        super().__init__()
        with self.init_scope():
            self.between = between
            self.first = L.Linear(None if is_lazy else 5, 8, nobias=nobias)
            self.normalization = L.BatchNormalization(8)
            self.last = L.Linear(None if is_lazy else 8, 3)

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        h = self.between(self.normalization(self.first(x)))
        return classification(self, self.last(h), t)


def classification(model: chainer.Link, y: chainer.Variable, t: Any) -> chainer.Variable:
    """Returns the loss of a classifier, and reports it."""
    loss = F.softmax_cross_entropy(y, t)
    chainer.report({"loss": loss, "accuracy": F.accuracy(y, t)}, model)
    return loss


def state_of(optimizer: chainer.Optimizer) -> Dict[str, Any]:
    """Returns copies of the state of an optimizer, and of all parameters and persistent values of its model."""
    serializer = DictionarySerializer()
    serializer["model"].save(optimizer.target)
    serializer["optimizer"].save(optimizer)
    return {name: numpy.copy(value) for name, value in serializer.target.items()}


class Run:
    """A training, with random generators that no other draws from.

    Args:
        updater_class (type): Class of the updater.
        make_model (callable): Function that returns the model.
        dataset (list): Examples.
        batch_size (int): Number of examples that the iterator returns.
        make_optimizer (callable): Function that returns the optimizer.
        **kwargs: Keyword arguments for the updater.

    Attributes:
        updater: The updater.
        steps (list): What could be seen after each update.

    """

    def __init__(
        self,
        updater_class: Any,
        make_model: MakeModel,
        dataset: Any,
        batch_size: int = 20,
        make_optimizer: Callable[[], chainer.Optimizer] = make_momentum,
        **kwargs: Any,
    ) -> None:
        seed(0)
        iterator = serial(dataset, batch_size, shuffle=True)
        self.updater = make_updater(updater_class, iterator, make_optimizer(), make_model(), **kwargs)
        self.steps: List[Step] = []
        self._leave()

    @property
    def model(self) -> Any:
        return self.optimizer.target

    @property
    def optimizer(self) -> Any:
        return self.updater.get_optimizer("main")

    def update(self, times: int = 1) -> None:
        """Updates so many times."""
        with self._drawing():
            self.steps += run(self.updater, times)

    def drop(self) -> None:
        """Reads the examples of an update, as one that fails does."""
        with self._drawing():
            self.updater.get_iterator("main").next()

    def draw(self) -> float:
        """Returns the number that NumPy's generator would give next."""
        generator = numpy.random.RandomState()
        generator.set_state(self._random_state[0])
        return generator.random_sample()

    def draw_as(self, other: Run) -> None:
        """Sets the generators to where they are in another run."""
        self._random_state = other._random_state

    def state(self) -> Dict[str, Any]:
        """Returns copies of all parameters and persistent values, and the state of the optimizer."""
        return state_of(self.optimizer)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        numpy.random.set_state(self._random_state[0])
        random.setstate(self._random_state[1])
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._random_state = numpy.random.get_state(), random.getstate()


def whole_batch(make_model: MakeModel, dataset: Any, **kwargs: Any) -> Run:
    """Returns a training with StandardUpdater."""
    return Run(StandardUpdater, make_model, dataset, **kwargs)


def in_lockstep(make_model: MakeModel, dataset: Any, **kwargs: Any) -> Run:
    """Returns a training in lockstep, with micro-batches of 7 examples unless told otherwise."""
    options = {"micro_batch_size": 7, "lockstep": "memory", **kwargs}
    return Run(chainer_accum.AccumulatingUpdater, make_model, dataset, **options)


def assert_same_states(actual: Dict[str, Any], expected: Dict[str, Any], tolerance: float) -> None:
    """Asserts that the states of two runs are as near as that."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == object:
            assert actual[name] == value, name
        else:
            numpy.testing.assert_allclose(actual[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_same_runs(actual: Run, expected: Run, tolerance: float) -> None:
    """Asserts that two runs have led to the same, and that the same random numbers come next."""
    assert_same_states(actual.state(), expected.state(), tolerance)
    assert_same_steps(actual.steps, expected.steps, tolerance)
    assert actual.draw() == expected.draw()


def assert_exact(
    make_model: MakeModel, dataset: Any, updates: int = 4, lockstep: str = "memory", **kwargs: Any
) -> Tuple[Run, Run]:
    """Asserts that a training in lockstep is the one of the whole batch, and returns both.

    Args:
        make_model (callable): Function that returns the model.
        dataset (list): Examples.
        updates (int): Number of updates.
        lockstep (str): Store.
        **kwargs: Keyword arguments for both trainings, but for ``micro_batch_size``.

    """
    of_window = {"micro_batch_size": kwargs.pop("micro_batch_size", 7), "lockstep": lockstep}
    expected = whole_batch(make_model, dataset, **kwargs)
    actual = in_lockstep(make_model, dataset, **of_window, **kwargs)
    for times, tolerance in ((1, ONE_STEP), (updates - 1, SEVERAL)):
        for each in (expected, actual):
            each.update(times)
        assert_same_runs(actual, expected, tolerance)
    return actual, expected


@contextlib.contextmanager
def unchanged(run: Run) -> Iterator[None]:
    """Asserts that nothing has changed when the context ends: no array, no attribute of a link, nothing global."""
    before, state = _surroundings(run), run.state()
    yield
    assert _surroundings(run) == before
    after = run.state()
    assert after.keys() == state.keys()
    for name, value in state.items():
        numpy.testing.assert_array_equal(after[name], value, err_msg=name)
    assert lockstep_threads() == []


def _surroundings(run: Run) -> List[Any]:
    return [
        [{name: id(value) for name, value in vars(link).items()} for link in run.model.links()],
        dict(vars(chainer.config._local)),
        list(chainer.get_function_hooks().items()),
        list(chainer._get_link_hooks().items()),
        list(chainer.reporter._get_reporters()),
        numpy.geterr(),
        (run.updater.iteration, run.optimizer.t, run.optimizer.epoch),
    ]


def assert_goes_on(actual: Run, expected: Run) -> None:
    """Asserts that a run goes on after an update that failed like one that has dropped the examples."""
    expected.drop()
    actual.draw_as(expected)
    for each in (actual, expected):
        each.update(2)
    assert_same_runs(actual, expected, SEVERAL)


def exact_or_refused(make_model: MakeModel, dataset: Any, message: str, before: int = 0, **kwargs: Any) -> None:
    """Asserts that an update in lockstep is that of the whole batch, or an error that changes nothing.

    Args:
        make_model (callable): Function that returns the model.
        dataset (list): Examples.
        message (str): Regular expression for the error.
        before (int): Number of updates before that one.
        **kwargs: Keyword arguments for :func:`in_lockstep`.

    """
    actual, expected = in_lockstep(make_model, dataset, **kwargs), whole_batch(make_model, dataset)
    for each in (actual, expected):
        each.update(before)
    with contextlib.ExitStack() as stack:
        stack.enter_context(unchanged(actual))
        try:
            actual.update()
        except RuntimeError as error:
            assert re.search(message, str(error)), error
            return
        stack.pop_all()
    expected.update()
    assert_same_runs(actual, expected, SEVERAL if before else ONE_STEP)
