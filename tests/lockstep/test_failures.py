"""What lockstep cannot do it refuses, and whatever raises, all is as before the window and the next one is right."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any, Callable, Dict, List, Type

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.dataset import concat_examples
from chainer.training import Trainer
from chainer_accum.extensions import GradientNoiseScale
from chainer_accum.lockstep import make_lockstep_policy
from chainer_accum.window import WindowOptions, window_class
from lockstep_helpers import (
    STORES,
    Net,
    as_option,
    assert_exact,
    assert_goes_on,
    assert_same_runs,
    classification,
    exact_or_refused,
    in_lockstep,
    lockstep_threads,
    make_vectors,
    unchanged,
    whole_batch,
)

from helpers import serial
from thread_ranks import run_ranks

ERRORS = (ConnectionError, KeyboardInterrupt, MemoryError, SystemExit)
NO_GRAPH = r"a loss function must not go back through the graph when passes run in lockstep, got backward\(\), chainer"
NO_GRADIENT = "the gradient of batch normalization must not be computed in a loss function whose passes run in lockst"


class Two(chainer.Chain):
    """Two normalizations of the same size, of which the examples decide what becomes.

    Args:
        apply (callable): Function that takes the model, the hidden values and the number of the pass, from 1.

    """

    def __init__(self, apply: Callable[[Any, Any, int], Any]) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(5, 8)
            self.one = L.BatchNormalization(8)
            self.other = L.BatchNormalization(8)
            self.wide = L.BatchNormalization(16)
            self.last = L.Linear(8, 3)
        self.apply = apply
        self.num_passes = [0]

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        self.num_passes[0] += 1
        return classification(self, self.last(self.apply(self, self.first(x), self.num_passes[0])), t)


def swap(model: Any, h: Any, number: int) -> Any:
    return model.other(model.one(h)) if number < 2 else model.one(model.other(h))


def choose(model: Any, h: Any, number: int) -> Any:
    return model.one(h) if number < 2 else model.other(h)


def leave_out(model: Any, h: Any, number: int) -> Any:
    return model.one(h) if number < 2 else h


def leave_out_first(model: Any, h: Any, number: int) -> Any:
    return model.one(h) if number > 1 else h


def once_more(model: Any, h: Any, number: int) -> Any:
    return model.one(h) if number < 2 else model.one(model.one(h))


def widen(model: Any, h: Any, number: int) -> Any:
    if number < 2:
        return model.one(h)
    return model.wide(F.concat([h, h]))[:, :8]


def axes(model: Any, h: Any, number: int) -> Any:
    h = F.reshape(h, (len(h), 4, 2))
    averages = numpy.zeros((4, 2)), numpy.ones((4, 2))
    if number > 2:
        averages = averages[0].T.copy(), averages[1].T.copy()
        h = F.transpose(h, (0, 2, 1))
    gamma, beta = numpy.ones(averages[0].shape), numpy.zeros(averages[0].shape)
    h = F.batch_normalization(h, gamma, beta, running_mean=averages[0], running_var=averages[1])
    return F.reshape(h, (len(h), 8))


def draw_instead(model: Any, h: Any, number: int) -> Any:
    return model.one(h) if number < 2 else F.dropout(model.one(F.dropout(h)))


def another_draw(model: Any, h: Any, number: int) -> Any:
    return model.one(F.dropout(h) if number < 2 else F.rrelu(h))


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize(
    "apply", [swap, choose, leave_out, leave_out_first, once_more, widen, axes, draw_instead, another_draw]
)
def test_micro_batches_that_call_other_layers_are_refused(apply: Any, store: str) -> None:
    run = in_lockstep(lambda: Two(apply), make_vectors(), lockstep=store)
    with pytest.raises(
        RuntimeError,
        match="all micro-batches of a lockstep window must call the same layers in the same order, got .* in the first "
        "micro-batch and .* in micro-batch [23]; let no layer depend on the examples, or set lockstep=None",
    ):
        run.update()


@pytest.mark.parametrize("apply, names", [(swap, ["/one", "/other"]), (widen, ["/one", "/wide", "(8,)", "(16,)"])])
def test_the_links_that_do_not_match_are_named(apply: Any, names: List[str]) -> None:
    run = in_lockstep(lambda: Two(apply), make_vectors())
    with pytest.raises(RuntimeError) as caught:
        run.update()
    assert [name for name in names if name not in str(caught.value)] == []


def penalty(model: Net, h: chainer.Variable, x: chainer.Variable) -> chainer.Variable:
    (gradient,) = chainer.grad([F.sum(h)], [x], enable_double_backprop=True)
    return F.sum(gradient**2)


def go_backward(model: Net, h: chainer.Variable, x: chainer.Variable) -> chainer.Variable:
    F.sum(h).backward()
    return h[0, 0]


def unchain(model: Net, h: chainer.Variable, x: chainer.Variable) -> chainer.Variable:
    h.unchain_backward()
    return h[0, 0]


class Going(Net):
    """Goes back through the graph, before or after the normalization."""

    def __init__(self, go: Callable[..., Any], is_across: bool) -> None:
        super().__init__()
        self.go = go
        self.is_across = is_across

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        x = chainer.Variable(x)
        h = self.normalization(self.first(x))
        y = self.last(F.tanh(h))
        extra = self.go(self, y, x) if self.is_across else self.go(self, F.tanh(self.first(F.exp(x))), x)
        return classification(self, y, t) + 0.1 * extra / len(t)


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("go", [penalty, go_backward, unchain])
def test_going_back_through_the_graph_is_refused(go: Any, store: str) -> None:
    run = in_lockstep(lambda: Going(go, is_across=True), make_vectors(), lockstep=store)
    with unchanged(run), pytest.raises(RuntimeError, match=f"{NO_GRAPH}|{NO_GRADIENT}"):
        run.update()


@pytest.mark.parametrize("go", [penalty, unchain])
def test_going_back_before_micro_batches_wait_is_exact(go: Any) -> None:
    assert_exact(lambda: Going(go, is_across=False), make_vectors())


@pytest.mark.parametrize("is_last", [True, False])
def test_going_back_within_a_later_block_of_layers_is_exact_or_refused(is_last: bool) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.normalization(self.first(x))
            y = self.last(F.tanh(h))
            (gradient,) = chainer.grad([F.sum(y)], [h], enable_double_backprop=True)
            loss = classification(self, y, t) + 0.1 * F.sum(gradient**2) / len(x)
            if not is_last:
                loss += 0.1 * F.sum(self.normalization(self.first(x)) ** 3) / len(x)
            return loss

    exact_or_refused(Model, make_vectors(), f"{NO_GRAPH}|{NO_GRADIENT}")


class Function(chainer.FunctionNode):
    """Multiplies by 2, and keeps a memory that it should not have."""

    generator = numpy.random.RandomState(0)
    calls: List[int] = []

    def __init__(self, what: str) -> None:
        self.what = what

    @property
    def label(self) -> str:
        return "Misbehaving"

    def forward(self, inputs: Any) -> Any:
        self.calls.append(1)
        factor = 2.0
        if self.what == "generator":
            factor = self.generator.uniform()
        elif self.what == "counter":
            factor = 1 / len(self.calls)
        elif self.what == "in place":
            inputs[0][...] *= 3
        return (inputs[0] * factor,)

    def backward(self, indexes: Any, grads: Any) -> Any:
        return (2 * grads[0],)


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("what", ["generator", "counter"])
def test_a_function_that_computes_something_else_each_time_is_named(what: str, store: str) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = Function(what).apply((self.first(x),))[0]
            return classification(self, self.last(F.tanh(self.normalization(h))), t)

    run = in_lockstep(Model, make_vectors(), lockstep=store)
    with unchanged(run), pytest.raises(
        RuntimeError, match="Misbehaving.* must return the same values when it is computed again from the same inputs"
    ):
        run.update()


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("where", ["example", "hidden", "normalized", "crossing"])
def test_values_that_are_changed_in_place_are_exact_or_refused(where: str, store: str) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            x = chainer.Variable(x.copy())
            if where == "example":
                x = Function("in place").apply((x,))[0]
            h = self.first(x)
            if where == "hidden":
                h = F.tanh(h)
                h.array *= 2
            y = self.normalization(h)
            if where == "crossing":
                h.array += 1
            if where == "normalized":
                y.array *= 2
            return classification(self, self.last(F.tanh(self.normalization(y + h))), t)

    exact_or_refused(Model, make_vectors(), "must return the same values when it is computed again", lockstep=store)


def forgetting(h: Any, model: Any) -> Any:
    return F.forget(model.normalization, h)


def dropping(h: Any, model: Any) -> Any:
    return model.normalization(F.forget(F.dropout, h))


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("apply, name", [(forgetting, "batch normalization"), (dropping, "a function that draws")])
def test_layers_inside_of_forget_are_refused(apply: Any, name: str, store: str) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            return classification(self, self.last(F.tanh(apply(self.first(x), self))), t)

    run = in_lockstep(Model, make_vectors(), lockstep=store)
    with unchanged(run), pytest.raises(
        RuntimeError,
        match=f"{name}.* must not run inside another function when passes run in lockstep, such as chainer.functions."
        "forget; call it directly: lockstep computes again instead of keeping a graph anyway|Forget must return the",
    ):
        run.update()


def test_other_layers_may_be_inside_of_forget() -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.normalization(F.forget(lambda y: F.tanh(self.first(y)), chainer.Variable(x)))
            return classification(self, F.forget(self.last, h), t)

    assert_exact(Model, make_vectors())


class Foreign(L.BatchNormalization):
    """Names an implementation of its own, as that of several nodes does."""

    def forward(self, x: Any, **kwargs: Any) -> Any:
        from chainer.functions.normalization import batch_normalization as module

        def select(function: Any, inputs: Any) -> Any:
            return module.GeneralBatchNormalizationImpl()

        function = module.BatchNormalization(self.eps, self.avg_mean, self.avg_var, self.decay, impl_selector=select)
        return function.apply((x, self.gamma, self.beta))[0]


REFUSED: Dict[str, Any] = {
    "batch renormalization has no exact counterpart": lambda: L.BatchRenormalization(8),
    "decorrelated batch normalization has no exact counterpart": lambda: L.DecorrelatedBatchNormalization(8, 2),
    "batch normalization must have Chainer's implementation": lambda: Foreign(8),
}


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("message", REFUSED)
def test_other_normalizations_of_the_batch_are_refused(message: str, store: str) -> None:
    run = in_lockstep(lambda: Net(REFUSED[message]()), make_vectors(), lockstep=store)
    with unchanged(run), pytest.raises(
        RuntimeError, match=f"{message}.*; use chainer.links.BatchNormalization, or set"
    ):
        run.update()


def test_a_normalization_that_may_be_of_each_example_is_refused() -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = F.transpose(self.first(x))  # 8 x examples
            ones = numpy.ones(len(x))
            return classification(self, self.last(F.transpose(F.batch_normalization(h, ones, 0 * ones))), t)

    run = in_lockstep(Model, make_vectors())
    with unchanged(run), pytest.raises(
        RuntimeError, match="batch normalization must have running averages .*; pass running_mean and running_var"
    ):
        run.update()


def test_values_that_are_not_finite_cannot_be_skipped() -> None:
    model = Net()
    optimizer = chainer.optimizers.SGD().setup(model)
    message = "nonfinite must not be 'skip' with lockstep, got 'skip': .*; use 'keep' or 'raise', or lockstep=None"
    with pytest.raises(ValueError, match=message):
        in_lockstep(Net, make_vectors(), nonfinite="skip")
    with pytest.raises(ValueError, match=message):
        chainer_accum.accumulate(optimizer, nonfinite="skip", lockstep="memory")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_values_that_are_not_finite_are_an_error(what: str) -> None:
    class Model(Net):
        is_finite = True

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            loss = super().forward(x, t)
            if self.is_finite:
                return loss
            return loss * numpy.inf if what == "loss" else loss + F.sqrt(0 * F.sum(self.first.W))

    actual = in_lockstep(Model, make_vectors(100), nonfinite="raise")
    expected = whole_batch(Model, make_vectors(100))
    for each in (actual, expected):
        each.update()
    actual.model.is_finite = False
    with numpy.errstate(all="ignore"), unchanged(actual), pytest.raises(FloatingPointError, match="not finite"):
        actual.update()
    actual.model.is_finite = True
    assert_goes_on(actual, expected)


def test_gradient_norms_of_micro_batches_are_refused(tmp_path: Any) -> None:
    message = "gradient norms of micro-batches must not be measured with lockstep, got gradient_norm_interval or Gradie"
    run = in_lockstep(Net, make_vectors())
    run.updater.gradient_norm_interval = 1
    with unchanged(run), pytest.raises(ValueError, match=message):
        run.update()
    run = in_lockstep(Net, make_vectors())
    trainer = Trainer(run.updater, (2, "iteration"), out=str(tmp_path))
    trainer.extend(GradientNoiseScale(interval=1))
    with pytest.raises(ValueError, match=message):
        trainer.run(show_loop_exception_msg=False)


def test_gradients_of_your_own_are_refused() -> None:
    model = Net()
    optimizer = chainer.optimizers.SGD().setup(model)
    x, t = concat_examples(make_vectors(10))
    with pytest.raises(
        ValueError, match="lockstep must be None for your own backward passes, got a window with lockst"
    ):
        with chainer_accum.accumulate(optimizer, lockstep="memory") as window:
            model(x, t).backward()
            window.add_gradients(weight=10)


def test_several_ranks_are_refused() -> None:
    pytest.importorskip("chainermn")
    from chainermn.optimizers import _MultiNodeOptimizer

    def program(communicator: Any) -> None:
        optimizer = _MultiNodeOptimizer(chainer.optimizers.SGD(), communicator, zero_fill=False).setup(Net())
        with pytest.raises(ValueError, match="lockstep must be None with a multi-node optimizer, got one with a comm"):
            chainer_accum.AccumulatingUpdater(serial(make_vectors(), 20), optimizer, lockstep="memory")

    run_ranks(1, program)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (
            True,
            TypeError,
            "lockstep must be None, 'memory', 'host', 'file' or a folder, got bool; use lockstep='memory'",
        ),
        (1, TypeError, "lockstep must be None, 'memory', 'host', 'file' or a folder, got int; use lockstep='memory'"),
        (b"file", TypeError, "lockstep must be None, .* got bytes; use lockstep='memory'"),
        (
            "disk",
            ValueError,
            "lockstep must be None, .* or an existing folder, got 'disk'; create the folder first",
        ),
        ("", ValueError, "lockstep must be None, .* or an existing folder, got ''; create the folder first"),
        (
            __file__,
            ValueError,
            "lockstep must be None, .* or an existing folder, got '.*'; create the folder first",
        ),
    ],
)
def test_another_argument_is_refused(value: Any, error: Type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        in_lockstep(Net, make_vectors(), lockstep=value)
    optimizer = chainer.optimizers.SGD().setup(Net())
    with pytest.raises(error, match=message):
        chainer_accum.accumulate(optimizer, lockstep=value)


def test_the_argument_is_set_once() -> None:
    run = in_lockstep(Net, make_vectors())
    with pytest.raises(AttributeError, match="lockstep cannot be set, got 'file'; pass it when the updater is created"):
        run.updater.lockstep = "file"


class Faulty(Net):
    """Raises at one moment of one pass.

    Attributes:
        moment: Number of the pass in the window, from 0, and where in it, or ``None``.
        error (type): What is raised.
        seen (list): Moments that came.

    """

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.second = L.Linear(8, 8)
            self.second_normalization = L.BatchNormalization(8)
        self.number = [0]
        self.moment: List[Any] = [None, ConnectionError]

    def arm(self, number: int, stage: str, error: Type[BaseException] = ConnectionError) -> None:
        self.number[0] = 0
        self.moment[:] = [(number, stage), error]

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        number = self.number[0]
        self.number[0] += 1
        self.fail(number, "start")
        h = self.passage(number, "backward, first", self.first(x))
        h = F.dropout(F.tanh(self.normalization(h)), 0.3)
        self.fail(number, "middle")
        h = self.passage(number, "backward, middle", self.second(h))
        h = self.second_normalization(h)
        y = self.passage(number, "backward, last", self.last(h))
        loss = classification(self, y, t)
        self.fail(number, "end")
        return loss

    def fail(self, number: int, stage: str) -> None:
        if self.moment[0] == (number, stage):
            self.moment[0] = None
            raise self.moment[1](stage)

    def passage(self, number: int, stage: str, h: chainer.Variable) -> chainer.Variable:
        return Passage(self, number, stage).apply((h,))[0]


class Passage(chainer.FunctionNode):
    """Passes values on, and may raise as the gradient comes back, or as it is computed again."""

    def __init__(self, model: Faulty, number: int, stage: str) -> None:
        self.model, self.number, self.stage = model, number, stage

    def forward(self, inputs: Any) -> Any:
        if self.model.moment[0] == (self.number, f"{self.stage}, again"):
            self.model.moment[0] = self.number, f"{self.stage}, again, now"
        else:
            self.model.fail(self.number, f"{self.stage}, again, now")
        return inputs

    def backward(self, indexes: Any, grads: Any) -> Any:
        self.model.fail(self.number, self.stage)
        return grads


STAGES = ("start", "middle", "end")
STAGES += ("backward, last", "backward, middle", "backward, first", "backward, middle, again", "backward, first, again")


@pytest.mark.parametrize("number, error", [(0, MemoryError), *[(1, error) for error in ERRORS], (2, KeyboardInterrupt)])
@pytest.mark.parametrize("stage", STAGES)
def test_whatever_raises_nothing_has_changed_and_the_next_update_is_right(number: int, stage: str, error: Any) -> None:
    kwargs: Dict[str, Any] = {"split_when_out_of_memory": False, "lockstep": "memory" if number else "file"}
    actual, expected = in_lockstep(Faulty, make_vectors(100), **kwargs), whole_batch(Faulty, make_vectors(100))
    for each in (actual, expected):
        each.update()
    actual.model.arm(number, stage, error)
    with unchanged(actual), pytest.raises(error, match=stage.split(", again")[0]):
        actual.update()
    assert_goes_on(actual, expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", range(3))
def test_an_update_begins_again_with_smaller_micro_batches_when_memory_runs_out(number: int, stage: str) -> None:
    actual, expected = in_lockstep(Faulty, make_vectors(100)), whole_batch(Faulty, make_vectors(100))
    for each in (actual, expected):
        each.update()
    actual.model.arm(number, stage, MemoryError)
    expected.update()
    with pytest.warns(RuntimeWarning, match="memory ran out for a micro-batch of . examples"):
        actual.update()
    assert actual.updater.micro_batch_size < 7
    assert_same_runs(actual, expected, 1e-10)


@pytest.mark.parametrize("stage", ["start", "middle", "end", "backward, middle", "backward, first, again"])
def test_the_first_update_may_fail_as_parameters_are_initialized(stage: str) -> None:
    class Model(Faulty):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                del self.last
                self.last = L.Linear(None, 3)

    run = in_lockstep(Model, make_vectors())
    run.model.arm(1, stage)
    with pytest.raises(ConnectionError):
        run.update()
    assert lockstep_threads() == []
    assert not run.model.normalization.avg_mean.any()
    assert run.optimizer.t == 0
    run.update(2)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("stage", ["start", "middle", "backward, last", "backward, first"])
@pytest.mark.parametrize("number", range(3))
def test_an_interrupt_while_a_pass_runs_leaves_all_as_before(number: int, stage: str) -> None:
    class Interrupt(BaseException):
        """Stands for a signal: it is not raised in the pass, but sent to the process."""

        def __new__(cls, *args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return super().__new__(cls)

    class Model(Faulty):
        def fail(self, number: int, stage: str) -> None:
            with contextlib.suppress(Interrupt):
                super().fail(number, stage)

    actual, expected = in_lockstep(Model, make_vectors(100)), whole_batch(Model, make_vectors(100))
    for each in (actual, expected):
        each.update()
    actual.model.arm(number, stage, Interrupt)
    with unchanged(actual), pytest.raises(KeyboardInterrupt):
        actual.update()
    assert_goes_on(actual, expected)


class Catching(Net):
    """Catches everything, as a model may do to try again."""

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        h = self.first(x)
        for _ in range(3):
            try:
                h = self.normalization(h)
                if len(x) == 6 and self.fails[0]:
                    raise ConnectionError
            except:  # noqa: E722
                if sys.exc_info()[0] is ConnectionError:
                    raise
        return classification(self, self.last(h), t)

    fails = [False]


@pytest.mark.parametrize("store", STORES)
def test_a_model_that_catches_everything_cannot_hang(store: str, tmp_path: Any) -> None:
    kwargs: Dict[str, Any] = {"lockstep": as_option(store, tmp_path)}
    actual, expected = in_lockstep(Catching, make_vectors(100), **kwargs), whole_batch(Catching, make_vectors(100))
    for each in (actual, expected):
        each.update()
    Catching.fails[0] = True
    try:
        with unchanged(actual), pytest.raises(ConnectionError):
            actual.update()
    finally:
        Catching.fails[0] = False
    assert_goes_on(actual, expected)


def test_a_model_that_catches_the_refusal_is_exact_or_refused() -> None:
    """What a refused layer leaves must not be what another one finds."""

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.first(x)
            with contextlib.suppress(RuntimeError):
                h = F.forget(self.normalization, h)
            return classification(self, self.last(self.normalization(h)), t)

    run = in_lockstep(Model, make_vectors())
    with contextlib.suppress(RuntimeError):
        run.update()
    assert lockstep_threads() == []


@pytest.mark.parametrize("store", ["memory", "file"])
def test_a_model_may_catch_what_a_function_raises(store: str) -> None:
    class Failing(chainer.FunctionNode):
        def forward(self, inputs: Any) -> Any:
            raise ConnectionError

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.first(x)
            with contextlib.suppress(ConnectionError):
                h = Failing().apply((h,))[0]
            return classification(self, self.last(F.tanh(self.normalization(h))), t)

    assert_exact(Model, make_vectors(), lockstep=store)


@pytest.mark.parametrize("store", ["memory", "file"])
def test_no_thread_is_left_after_many_windows_that_fail(store: str) -> None:
    run = in_lockstep(Faulty, make_vectors(), split_when_out_of_memory=False, lockstep=store)
    run.update()
    before = threading.active_count()
    with unchanged(run):
        for number in range(500):
            run.model.arm(number % 3, STAGES[number % len(STAGES)], ERRORS[number % len(ERRORS)])
            with pytest.raises(ERRORS[number % len(ERRORS)]):
                run.update()
            assert lockstep_threads() == []
    assert threading.active_count() == before
    run.update()


@pytest.mark.parametrize("loss", [None, 1.0, "vector"])
def test_a_loss_that_is_none_is_an_error(loss: Any) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> Any:
            h = self.normalization(self.first(x))
            return h if loss == "vector" else loss

    run = in_lockstep(Model, make_vectors())
    with unchanged(run), pytest.raises((TypeError, ValueError), match="loss"):
        run.update()


def test_a_block_that_raises_leaves_all_as_before() -> None:
    run = in_lockstep(Net, make_vectors())
    run.update()
    x, t = concat_examples(make_vectors(14))
    for place in range(3):
        with unchanged(run), pytest.raises(ConnectionError):
            with chainer_accum.accumulate(run.optimizer, lockstep="memory") as window:
                for start in (0, 7)[:place]:
                    window.add(run.model, x[start : start + 7], t[start : start + 7], weight=7)
                raise ConnectionError


def test_a_window_that_is_dropped_leaves_no_thread() -> None:
    """Whoever uses windows by themselves may forget one, but must then abandon it."""
    model = Net()
    optimizer = chainer.optimizers.SGD().setup(model)
    x, t = concat_examples(make_vectors(14))
    options = WindowOptions(lockstep=make_lockstep_policy("memory"))
    window = window_class(optimizer, options)(optimizer, options)
    window.add(model, x, t)
    window.abandon()
    window.abandon()
    assert lockstep_threads() == []
    with pytest.raises(RuntimeError, match="this window was updated or one of its backward passes failed"):
        window.add(model, x, t)


def test_a_reporter_has_the_observers_and_the_observation_that_it_had() -> None:
    model = Faulty()
    optimizer = chainer.optimizers.SGD(0.1).setup(model)
    updater = chainer_accum.AccumulatingUpdater(
        serial(make_vectors(), 20), optimizer, micro_batch_size=7, lockstep="memory"
    )
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    observers = dict(reporter._observer_names)
    with reporter:
        chainer.report({"before": 1})
        for number in range(3):
            for stage in STAGES:
                model.arm(number, stage)
                with pytest.raises(ConnectionError):
                    updater.update()
                assert reporter.observation == {"before": 1}
                assert reporter._observer_names == observers
                assert chainer.get_current_reporter() is reporter
        updater.update()
        assert reporter.observation.keys() == {"before", "main/loss", "main/accuracy"}


def test_hooks_of_the_user_see_the_forward_passes_and_stay() -> None:
    calls: List[str] = []

    class Hook(chainer.FunctionHook):
        name = "mine"

        def forward_preprocess(self, function: Any, in_data: Any) -> None:
            calls.append(function.label)

    class LinkHook(chainer.LinkHook):
        name = "mine"

        def forward_preprocess(self, args: Any) -> None:
            calls.append(args.link.name or "model")

    run = in_lockstep(Net, make_vectors())
    with Hook(), LinkHook():
        before = list(chainer.get_function_hooks().items()), list(chainer._get_link_hooks().items())
        run.update()
        assert (list(chainer.get_function_hooks().items()), list(chainer._get_link_hooks().items())) == before
    assert [calls.count(name) for name in ("model", "first", "normalization", "last")] == [3, 3, 3, 3]
    assert calls.count("BatchNormalization") == 3


def test_an_optimizer_hook_that_raises_leaves_no_thread() -> None:
    def fail(optimizer: Any) -> None:
        raise ConnectionError

    run = in_lockstep(Net, make_vectors())
    run.optimizer.add_hook(fail)
    with pytest.raises(ConnectionError):
        run.update()
    assert lockstep_threads() == []


def test_an_iterator_that_raises_in_the_middle_of_a_window_leaves_all_as_before() -> None:
    run = in_lockstep(Net, make_vectors(), batch_size=5, accumulation_steps=4, micro_batch_size=None)
    run.update()
    iterator = run.updater.get_iterator("main")
    original, count = iterator.next, [0]

    def fail() -> Any:
        count[0] += 1
        if count[0] == 3:
            raise ConnectionError
        return original()

    iterator.next = iterator.__next__ = fail
    with unchanged(run), pytest.raises(ConnectionError):
        run.update()
    assert lockstep_threads() == []
    run.update(2)


def test_a_converter_that_raises_in_the_middle_of_a_window_leaves_all_as_before() -> None:
    count = [0]

    def convert(batch: Any, device: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise ConnectionError
        return concat_examples(batch, device)

    actual = in_lockstep(Net, make_vectors(100), converter=convert)
    expected = whole_batch(Net, make_vectors(100))
    for each in (actual, expected):
        each.update()
    with unchanged(actual), pytest.raises(ConnectionError):
        actual.update()
    assert_goes_on(actual, expected)
