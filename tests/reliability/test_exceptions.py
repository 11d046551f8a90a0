"""Whatever raises within a window, all is as before it, and the next window is right.

Once the optimizer updates, all is as StandardUpdater leaves it when the same raises there.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Type

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.iterators import SerialIterator
from chainer.serializers import DictionarySerializer
from chainer.training.updaters import StandardUpdater

from helpers import make_dataset

ERRORS = (ConnectionError, KeyboardInterrupt, MemoryError)


class Fault:
    """Counts how often a run comes to each stage, and raises at one of them, at the n-th time."""

    def __init__(self) -> None:
        self.disarm()

    def arm(self, stage: str, time: int = 1, error: Type[BaseException] = ConnectionError) -> None:
        self.disarm()
        self._stage, self._time, self._error = stage, time, error

    def disarm(self) -> None:
        self.counts: Dict[str, int] = {}
        self._stage: Optional[str] = None

    def __call__(self, stage: str) -> None:
        self.counts[stage] = self.counts.get(stage, 0) + 1
        if stage == self._stage and self.counts[stage] == self._time:
            raise self._error(stage)

    def spoils(self, stage: str) -> bool:
        """Returns whether what is there at this stage is to be replaced by something that is wrong."""
        try:
            self(stage)
        except ConnectionError:
            return True
        return False


class Passage(chainer.FunctionNode):
    """Passes values on, and comes to a stage as the gradients come back."""

    def __init__(self, fault: Fault, stage: str) -> None:
        self._fault, self._stage = fault, stage

    def forward(self, inputs: Any) -> Any:
        return inputs

    def backward(self, indexes: Any, grads: Any) -> Any:
        self._fault(self._stage)
        return grads


class FragileNumber(float):
    """A number that is reported, and hard to average."""

    fault: Fault

    def __mul__(self, other: float) -> float:
        self.fault("merging of observations")
        return float(self) * other


class Model(chainer.Chain):
    """A classifier with running averages, which do not act upon its loss."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault
        with self.init_scope():
            self.first = L.Linear(5, 8, initialW=chainer.initializers.Constant(0.1))
            self.normalization = L.BatchNormalization(8)
            self.last = L.Linear(8, 3, initialW=numpy.linspace(-1, 1, 24, dtype="f").reshape(3, 8))

    def forward(self, x: Any, t: Any) -> Any:
        self.fault("forward pass, first")
        h = self.passage(chainer.Variable(x), "backward pass, last")
        h = self.passage(self.first(h), "backward pass, middle")
        self.normalization(h)
        self.fault("forward pass, middle")
        loss = F.softmax_cross_entropy(self.passage(self.last(F.tanh(h)), "backward pass, first"), t)
        number = FragileNumber(loss.array)
        number.fault = self.fault
        chainer.report({"loss": loss, "number": number}, self)
        self.fault("forward pass, last")
        if self.fault.spoils("loss that is no Variable"):
            return loss.array
        if self.fault.spoils("loss that is no scalar"):
            return self.last(h)
        return loss

    def passage(self, h: chainer.Variable, stage: str) -> chainer.Variable:
        return Passage(self.fault, stage).apply((h,))[0]


class Iterator(SerialIterator):
    fault: Fault

    def next(self) -> Any:
        self.fault("iterator, before it reads")
        batch = super().next()
        self.fault("iterator, after it has read")
        return batch


class Optimizer(chainer.optimizers.MomentumSGD):
    fault: Fault

    def update(self, lossfun: Any = None, *args: Any, **kwargs: Any) -> None:
        self.fault("optimizer.update, before it does anything")
        super().update(lossfun, *args, **kwargs)

    def new_epoch(self, auto: bool = False) -> None:
        self.fault("new_epoch")
        super().new_epoch(auto)


class Reporter(chainer.Reporter):
    fault: Fault

    def report(self, values: Any, observer: Any = None) -> None:
        self.fault("report")
        super().report(values, observer)


class Run(NamedTuple):
    """An updater, and what is to fail in it."""

    updater: Any
    fault: Fault

    @property
    def iterator(self) -> Any:
        return self.updater.get_iterator("main")

    @property
    def optimizer(self) -> Any:
        return self.updater.get_optimizer("main")

    def update(self, observation: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Updates as a Trainer does, and returns the observation."""
        observation = {} if observation is None else observation
        reporter = Reporter()
        reporter.fault = self.fault
        reporter.add_observer("main", self.optimizer.target)
        with reporter.scope(observation):
            self.updater.update()
        return {key: float(chainer.as_array(value)) for key, value in observation.items()}

    def state(self, *, persistent: bool = True) -> Dict[str, Any]:
        """Returns copies of all that a window may change only as a whole; the iterator goes on in any case."""
        serializer = DictionarySerializer()
        self.optimizer.serialize(serializer["optimizer"])
        self.optimizer.target.serialize(serializer["model"])
        state = {name: numpy.copy(value) for name, value in serializer.target.items()}
        state["iteration"] = self.updater.iteration
        if not persistent:
            state = {name: value for name, value in state.items() if "normalization" not in name}
        return state

    def bookkeeping(self) -> List[Any]:
        names = ("previous_epoch_detail", "is_new_epoch", "accumulation_steps", "effective_batch_size")
        return [getattr(self.updater, name) for name in names]


def make_run(make_updater: Callable[..., Any], batch_size: int, **kwargs: Any) -> Run:
    """Returns a run that has made an update already, so that momentum and all other state is there."""
    fault = Fault()
    optimizer = Optimizer(0.1).setup(Model(fault))
    iterator = Iterator(make_dataset(60), batch_size, shuffle=False)
    optimizer.fault = iterator.fault = fault
    optimizer.add_hook(lambda _: fault("hook before the update"), "before", timing="pre")
    optimizer.add_hook(lambda _: fault("hook after the update"), "after", timing="post")
    for param in optimizer.target.params():
        param.update_rule.add_hook(lambda *_: fault("update rule of a parameter"), "rule", timing="pre")

    @chainer.dataset.converter()
    def convert(batch: Any, device: Any) -> Any:
        fault("converter")
        return chainer.dataset.concat_examples(batch, device)

    run = Run(make_updater(fault, iterator, optimizer, converter=convert, **kwargs), fault)
    run.update()
    return run


def accumulating(fault: Fault, iterator: Any, optimizer: Any, *, steps: int = 1, **kwargs: Any) -> Any:
    def weigh(batch: Any) -> Any:
        fault("weight_func")
        return numpy.nan if fault.spoils("weight that is NaN") else len(batch)

    def schedule(updater: Any) -> int:
        fault("schedule of accumulation_steps")
        return 0 if fault.spoils("accumulation_steps that are 0") else steps

    return chainer_accum.AccumulatingUpdater(
        iterator, optimizer, accumulation_steps=schedule, weight_func=weigh, **kwargs
    )


def standard(fault: Fault, *args: Any, **kwargs: Any) -> Any:
    return StandardUpdater(*args, **kwargs)


# By what they are of the 24 examples: batch size and arguments.
WAYS: Dict[str, Dict[str, Any]] = {
    "gathered": {"batch_size": 6, "steps": 4},
    "split": {"batch_size": 24, "micro_batch_size": 6, "split_when_out_of_memory": False},
    "gathered and split": {"batch_size": 12, "steps": 2, "micro_batch_size": 6},
    "gathered, statistics of the window": {"batch_size": 6, "steps": 4, "running_statistics": "update"},
    "split, statistics of the window, all finite": {
        "batch_size": 24,
        "micro_batch_size": 6,
        "split_when_out_of_memory": False,
        "running_statistics": "update",
        "nonfinite": "raise",
    },
}
SPOILT = (
    "accumulation_steps that are 0",
    "weight that is NaN",
    "loss that is no Variable",
    "loss that is no scalar",
)
STAGES_BEFORE_THE_UPDATE = (
    "schedule of accumulation_steps",
    "iterator, before it reads",
    "iterator, after it has read",
    "weight_func",
    "converter",
    "forward pass, first",
    "forward pass, middle",
    "forward pass, last",
    "backward pass, first",
    "backward pass, middle",
    "backward pass, last",
    "merging of observations",
    *SPOILT,
)
STAGES_OF_THE_UPDATE = (
    "optimizer.update, before it does anything",
    "hook before the update",
    "update rule of a parameter",
    "hook after the update",
    "new_epoch",
)
every_way = pytest.mark.parametrize("way", WAYS)


def assert_same(actual: Dict[str, Any], expected: Dict[str, Any], tolerance: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        numpy.testing.assert_allclose(actual[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def times_of(stage: str, way: str) -> List[int]:
    """Returns at which of the times that a window comes to a stage it is to fail: the first, a middle and the last."""
    count = counts_of(way)[stage]
    return sorted({1, (count + 1) // 2, count})


@functools.lru_cache(maxsize=None)
def counts_of(way: str) -> Dict[str, int]:
    run = make_run(accumulating, **WAYS[way])
    run.fault.disarm()
    run.update()
    return run.fault.counts


def errors_at(stage: str) -> Sequence[Type[BaseException]]:
    """Returns what is raised at the first, a middle and the last time; what is spoilt is for the window to find."""
    return ERRORS if stage not in SPOILT else (ConnectionError,) * 3


@every_way
@pytest.mark.parametrize("stage", STAGES_BEFORE_THE_UPDATE)
def test_before_the_update_it_changes_nothing_and_the_next_window_is_that_of_the_examples_that_follow(
    stage: str, way: str, record_property: Any
) -> None:
    for error, time in zip(errors_at(stage), times_of(stage, way)):
        run, expected = (make_run(accumulating, **WAYS[way]) for _ in range(2))
        before, bookkeeping = run.state(), run.bookkeeping()
        observation = {"before": 1.0}
        run.fault.arm(stage, time, error)
        with pytest.raises((TypeError, ValueError) if stage in SPOILT else error):
            run.update(observation)
        assert observation == {"before": 1.0}
        assert_same(run.state(), before)
        assert run.bookkeeping() == bookkeeping
        run.fault.disarm()
        expected.iterator._state = run.iterator._state
        for _ in range(2):
            assert run.update() == expected.update()
            assert_same(run.state(), expected.state())
        record_property("exceptions", 1)


@every_way
def test_a_reporter_that_raises_in_a_pass_changes_nothing(way: str, record_property: Any) -> None:
    for time in (1, 2, 4):  # the fifth report is that of the window
        run = make_run(accumulating, **WAYS[way])
        before, observation = run.state(), {}
        run.fault.arm("report", time)
        with pytest.raises(ConnectionError):
            run.update(observation)
        assert observation == {}
        assert_same(run.state(), before)
        record_property("exceptions", 1)


@every_way
@pytest.mark.parametrize("stage", STAGES_OF_THE_UPDATE)
def test_in_the_update_it_does_what_it_does_in_standard_updater(stage: str, way: str, record_property: Any) -> None:
    for error, time in zip(ERRORS, (1, 2, 4) if stage == "update rule of a parameter" else (1,)):
        runs = [make_run(standard, 24), make_run(accumulating, **WAYS[way])]
        for run in runs:
            run.update()  # so that an epoch ends with the next one
            before = run.state(persistent=False)
            run.fault.arm(stage, time, error)
            with pytest.raises(error):
                run.update()
            run.fault.disarm()
            assert run.updater.iteration == 2
        if stage in STAGES_OF_THE_UPDATE[:2]:
            assert_same(runs[1].state(persistent=False), before)
        assert_same(*[run.state(persistent=False) for run in runs], tolerance=1e-6)
        observations = [run.update() for run in runs]
        assert_same(*[run.state(persistent=False) for run in runs], tolerance=1e-6)
        assert observations[1] == pytest.approx(observations[0], rel=1e-5)
        record_property("exceptions", 1)


STAGES_OF_A_CALL = [stage for stage in STAGES_BEFORE_THE_UPDATE if "pass" in stage or "loss" in stage]
PARTS = [chainer.dataset.concat_examples(make_dataset(48)[start : start + 6]) for start in range(0, 48, 6)]


@pytest.mark.parametrize("stage", STAGES_OF_A_CALL)
def test_an_accumulating_optimizer_drops_the_call_or_if_it_was_a_backward_pass_the_window(
    stage: str, record_property: Any
) -> None:
    for error, failing in zip(errors_at(stage), (4, 5, 7)):  # the first, second and last call of the second window
        fault = Fault()
        optimizers = [
            chainer_accum.create_accumulating_optimizer(chainer.optimizers.Adam(), 4).setup(Model(each))
            for each in (fault, Fault())
        ]
        for number, part in enumerate(PARTS[:failing]):
            if number < 4 or "backward" not in stage:
                optimizers[1].update(optimizers[1].target, *part)
            optimizers[0].update(optimizers[0].target, *part)
        before = parameters_and_state(optimizers[0])
        fault.arm(stage, 1, error)
        with pytest.raises((TypeError, ValueError) if stage in SPOILT else error):
            optimizers[0].update(optimizers[0].target, *PARTS[failing])
        assert_same(parameters_and_state(optimizers[0]), before)
        fault.disarm()
        for part in PARTS[:4]:
            for optimizer in optimizers:
                optimizer.update(optimizer.target, *part)
        assert optimizers[0].t == 2
        assert_same(*map(parameters_and_state, optimizers))
        record_property("exceptions", 1)


@pytest.mark.parametrize("stage", [*STAGES_OF_A_CALL, "body of the block"])
def test_a_block_that_raises_leaves_parameters_and_optimizer_as_they_were(stage: str, record_property: Any) -> None:
    for error, time in zip(errors_at(stage), (1, 2, 4)):
        fault = Fault()
        optimizer = chainer.optimizers.Adam().setup(Model(fault))
        optimizer.update(optimizer.target, *PARTS[0])
        before = parameters_and_state(optimizer)
        fault.arm(stage, time, error)
        with pytest.raises((TypeError, ValueError) if stage in SPOILT else error):
            with chainer_accum.accumulate(optimizer) as window:
                for part in PARTS[:4]:
                    window.add(optimizer.target, *part)
                    fault("body of the block")
        assert_same(parameters_and_state(optimizer), before)
        record_property("exceptions", 1)


def parameters_and_state(optimizer: Any) -> Dict[str, Any]:
    serializer = DictionarySerializer()
    getattr(optimizer, "actual_optimizer", optimizer).serialize(serializer["optimizer"])
    state = {name: numpy.copy(value) for name, value in serializer.target.items()}
    return {**state, **{name: param.array.copy() for name, param in optimizer.target.namedparams()}}
