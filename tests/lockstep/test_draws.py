"""Random numbers in a lockstep window are those of the whole batch, bit for bit, and the same ones come next."""

from __future__ import annotations

import random
from typing import Any, Callable, Dict, List

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.dataset import concat_examples
from chainer.datasets import TransformDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_helpers import (
    Net,
    as_option,
    assert_exact,
    classification,
    exact_or_refused,
    in_lockstep,
    make_vectors,
    unchanged,
    whole_batch,
)


class Recording(Net):
    """A network that keeps what its drawing layer returned.

    Args:
        draw (callable): Function or link that draws.
        seen (list): Where to keep it.
        **kwargs: Keyword arguments for :class:`Net`.

    """

    def __init__(self, draw: Callable[[Any], Any], seen: List[Any], **kwargs: Any) -> None:
        super().__init__(draw, **kwargs)
        self.seen = seen

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        h = self.between(self.first(x))
        self.seen.append(h.array)
        h = self.between(F.tanh(self.normalization(h)))
        return classification(self, self.last(h), t)


class Zoneout(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.step = L.Linear(8, 8)

    def forward(self, h: chainer.Variable) -> chainer.Variable:
        return F.zoneout(h, F.tanh(self.step(h)), 0.4)


class Twice(chainer.Chain):
    """Draws several times, between functions that do not."""

    def forward(self, h: chainer.Variable) -> chainer.Variable:
        return F.dropout(F.gaussian(F.dropout(h, 0.2), F.tanh(h)), 0.5) + F.dropout(h, 0.1)


class Negatives(chainer.Chain):
    """Draws labels to compare with, in a function."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(5, 8)
            self.normalization = L.BatchNormalization(8)
            self.loss = L.NegativeSampling(8, [3, 2, 1, 5], 2)

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        loss = self.loss(F.tanh(self.normalization(self.first(x))), t) / len(t)
        chainer.report({"loss": loss}, self)
        return loss


DRAWS: Dict[str, Callable[[], Any]] = {
    "dropout": lambda: F.dropout,
    "dropout of nearly all": lambda: lambda h: F.dropout(h, 0.9),
    "gaussian": lambda: lambda h: F.gaussian(h, F.tanh(h)),
    "zoneout": Zoneout,
    "rrelu": lambda: F.rrelu,
    "dropconnect": lambda: L.SimplifiedDropconnect(8, 8),
    "several functions": Twice,
}


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_function_draws_for_each_example_what_it_draws_in_the_whole_batch(draw: str, store: str) -> None:
    seen: List[Any] = []
    actual, _ = assert_exact(lambda: Recording(DRAWS[draw](), seen), make_vectors(), lockstep=store)
    of_first_window = numpy.concatenate(seen[1:4])
    numpy.testing.assert_allclose(of_first_window, seen[0], rtol=1e-12, atol=1e-14)
    numpy.testing.assert_array_equal(of_first_window == 0, seen[0] == 0)  # the mask


def test_a_mask_that_is_shared_by_all_examples_is_drawn_once() -> None:
    def connect(h: chainer.Variable) -> chainer.Variable:
        return F.simplified_dropconnect(h, numpy.eye(8), use_batchwise_mask=False)

    seen: List[Any] = []
    assert_exact(lambda: Recording(connect, seen), make_vectors())


def test_a_mask_that_is_given_is_not_drawn() -> None:
    mask = numpy.linspace(0, 2, 8)

    def drop(h: chainer.Variable) -> chainer.Variable:
        return F.dropout(h, mask=numpy.broadcast_to(mask, h.shape))

    assert_exact(lambda: Net(drop), make_vectors())


def test_labels_are_drawn_for_negative_sampling() -> None:
    assert_exact(Negatives, make_vectors())


@pytest.mark.parametrize("store", ["memory", "file"])
def test_a_network_without_batch_normalization_draws_as_the_whole_batch(store: str) -> None:
    class Model(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.first = L.Linear(5, 8)
                self.last = L.Linear(8, 3)

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            return classification(self, self.last(F.dropout(F.relu(self.first(F.dropout(x, 0.2))), 0.5)), t)

    assert_exact(Model, make_vectors(), lockstep=store)


@pytest.mark.parametrize("draw", ["dropout", "gaussian", "several functions"])
def test_parameters_that_are_initialized_between_the_draws_of_the_first_window(draw: str) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.between(self.first(self.between(chainer.as_variable(x))))
            return classification(self, self.last(F.tanh(self.normalization(h))), t)

    assert_exact(lambda: Model(DRAWS[draw](), is_lazy=True), make_vectors())


class StochasticDepth(chainer.Chain):
    """A network that leaves out blocks at random.

    Args:
        draw (callable): Function that returns a number between 0 and 1.
        drops_before (bool): Whether dropout comes before each decision.

    """

    def __init__(self, draw: Callable[[], float], drops_before: bool = False) -> None:
        super().__init__()
        self.draw = draw
        self.drops_before = drops_before
        with self.init_scope():
            self.first = L.Linear(5, 8)
            self.blocks = chainer.ChainList(*[Block() for _ in range(3)])
            self.last = L.Linear(8, 3)

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        h = self.first(x)
        for block in self.blocks:
            if self.drops_before:
                h = F.dropout(h, 0.2)
            if self.draw() < 0.5:
                h = block(h)
        return classification(self, self.last(F.dropout(h, 0.3)), t)


class Block(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.linear = L.Linear(8, 8)
            self.normalization = L.BatchNormalization(8)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        return x + F.relu(self.normalization(self.linear(x)))


@pytest.mark.parametrize("drops_before", [False, True])
@pytest.mark.parametrize("draw", [numpy.random.rand, random.random])
def test_all_micro_batches_leave_out_the_same_blocks(draw: Callable[[], float], drops_before: bool) -> None:
    for _ in range(2):
        assert_exact(
            lambda: StochasticDepth(draw, drops_before),
            make_vectors(200),
            updates=5,
            batch_size=100,
            micro_batch_size=34,
        )


def test_a_decision_in_micro_batches_so_small_that_there_may_be_one_for_each_example_is_exact_or_refused() -> None:
    exact_or_refused(
        lambda: StochasticDepth(numpy.random.rand),
        make_vectors(),
        "got so many that there may be one for each example",
        micro_batch_size=3,
    )


def test_a_converter_draws_before_the_passes() -> None:
    def convert(batch: Any, device: Any) -> Any:
        x, t = concat_examples(batch, device)
        return x + 0.1 * numpy.random.standard_normal(x.shape), t

    assert_exact(lambda: Net(F.dropout), make_vectors(), converter=convert)


def test_a_dataset_draws_before_the_passes() -> None:
    def shift(example: Any) -> Any:
        x, t = example
        return numpy.roll(x, numpy.random.randint(5) + random.randrange(2)), t

    assert_exact(lambda: Net(F.dropout), TransformDataset(make_vectors(), shift))


def test_a_window_of_your_own_draws_as_the_whole_batch() -> None:
    x, t = concat_examples(make_vectors(20))
    ends = []
    for sizes in ([20], [7, 7, 6]):
        numpy.random.seed(0)
        model = Net(F.dropout)
        optimizer = chainer.optimizers.SGD(0.1).setup(model)
        for _ in range(2):
            with chainer_accum.accumulate(optimizer, lockstep="memory" if len(sizes) > 1 else None) as window:
                start = 0
                for size in sizes:
                    window.add(model, x[start : start + size], t[start : start + size], weight=size)
                    start += size
        ends.append((numpy.random.rand(), model.first.W.array))
    assert ends[0][0] == ends[1][0]
    numpy.testing.assert_allclose(ends[0][1], ends[1][1], rtol=0, atol=1e-12)


@settings(max_examples=15)
@given(
    layers=st.lists(
        st.sampled_from(["dropout", "gaussian", "rrelu", "normalize", "tanh", "linear", "lazy"]), max_size=7
    ),
    micro_batch_size=st.integers(2, 8),
    size=st.integers(20, 33),
)
def test_any_order_of_layers(layers: List[str], micro_batch_size: int, size: int) -> None:
    make: Dict[str, Callable[[], Any]] = {
        "dropout": lambda: F.dropout,
        "gaussian": lambda: lambda h: F.gaussian(h, F.tanh(h)),
        "rrelu": lambda: F.rrelu,
        "normalize": lambda: L.BatchNormalization(8),
        "tanh": lambda: F.tanh,
        "linear": lambda: L.Linear(8, 8),
        "lazy": lambda: L.Linear(None, 8),
    }
    assert_exact(
        lambda: Net(chainer.Sequential(*[make[name]() for name in layers])) if layers else Net(),
        make_vectors(size),
        updates=3,
        micro_batch_size=micro_batch_size,
    )


def noise(h: chainer.Variable) -> chainer.Variable:
    return h + 0.1 * numpy.random.standard_normal(h.shape)


def keep_some(h: chainer.Variable) -> chainer.Variable:
    return h * (numpy.random.rand(len(h), 1) < 0.7)


def keep_some_by_python(h: chainer.Variable) -> chainer.Variable:
    return h * numpy.array([[random.random() < 0.7] for _ in range(len(h))])


def shuffle(h: chainer.Variable) -> chainer.Variable:
    return h[numpy.random.permutation(len(h))]


def categories(h: chainer.Variable) -> chainer.Variable:
    return F.gumbel_softmax(F.log_softmax(h))


def sample(h: chainer.Variable) -> chainer.Variable:
    return chainer.distributions.Normal(h, log_scale=F.tanh(h)).sample()


PER_EXAMPLE: Dict[str, Callable[[Any], Any]] = {
    function.__name__: function for function in (noise, keep_some, keep_some_by_python, shuffle, categories, sample)
}


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_draws_for_each_example_outside_of_functions_are_refused(name: str, sizes: str) -> None:
    run = in_lockstep(lambda: Net(PER_EXAMPLE[name]), make_vectors(), micro_batch_size=10 if sizes == "equal" else 7)
    with unchanged(run), pytest.raises(
        RuntimeError,
        match="random numbers drawn outside of functions must be the same for all micro-batches of a lockstep window, "
        "got .*; .* in .* a function, such as F.dropout.*, or before the pass, in.* the converter",
    ):
        run.update()


def test_draws_of_which_the_number_depends_on_the_examples_are_refused() -> None:
    def wait(h: chainer.Variable) -> chainer.Variable:
        for _ in range(int((h.array > 1).sum()) % 4):
            numpy.random.rand()
        return h

    run = in_lockstep(lambda: Net(wait), make_vectors(100), batch_size=100, micro_batch_size=20)
    with pytest.raises(RuntimeError, match="got different ones, or a different number of them"):
        run.update()


def test_a_pass_that_draws_nothing_where_the_first_has_drawn_is_refused_after_the_first_window() -> None:
    updates = [0]

    def wait(h: chainer.Variable) -> chainer.Variable:
        if updates[0] > 0 and len(h) == 16:  # of 16, 16, 17, 17, 17 and 17
            numpy.random.rand()
        return h

    run = in_lockstep(lambda: Net(wait), make_vectors(100), batch_size=100, micro_batch_size=17)
    run.update()
    updates[0] += 1
    with pytest.raises(RuntimeError, match="got different ones, or a different number of them"):
        run.update()


def test_the_generators_are_as_before_a_window_that_fails_so_that_it_can_be_tried_again() -> None:
    """An update that raises drops its examples, but what it has drawn stays drawn, as in StandardUpdater."""
    is_failing = [True]

    def fail(h: chainer.Variable) -> chainer.Variable:
        if is_failing[0]:
            raise ConnectionError
        return h

    actual, expected = (make(lambda: Net(fail), make_vectors()) for make in (in_lockstep, whole_batch))
    for each in (actual, expected):
        with pytest.raises(ConnectionError):
            each.update()
    assert actual.draw() == expected.draw()
    is_failing[0] = False
    for each in (actual, expected):
        each.update(2)
    numpy.testing.assert_allclose(actual.model.first.W.array, expected.model.first.W.array, rtol=0, atol=1e-12)


def test_nothing_is_drawn_without_training() -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            with chainer.using_config("train", False):
                h = F.dropout(self.first(x))
            return classification(self, self.last(self.normalization(h)), t)

    assert_exact(Model, make_vectors())


@pytest.mark.parametrize("store", ["memory", "host", "file", "folder"])
def test_a_whole_run_with_dropout_is_that_of_the_whole_batch(store: str, tmp_path: Any) -> None:
    assert_exact(lambda: Net(lambda h: F.dropout(F.relu(h), 0.3)), make_vectors(), 12, as_option(store, tmp_path))
