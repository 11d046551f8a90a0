"""The step of a lockstep window is that of the whole batch, whatever normalizes in the network."""

from __future__ import annotations

import functools
import pathlib
import warnings
from typing import Any, Callable, Dict, List

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import optimizers
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_helpers import (
    ONE_STEP,
    SEVERAL,
    STORES,
    Net,
    Run,
    as_option,
    assert_exact,
    assert_same_runs,
    assert_same_states,
    classification,
    in_lockstep,
    make_images,
    make_vectors,
    state_of,
    whole_batch,
)

from helpers import CountingUpdater, serial

WIDTH = 4


class Network(chainer.Chain):
    """A convolution, one of the parts below, and a classifier.

    Args:
        make_part (callable): Function that returns a link or a function for images of ``WIDTH`` channels.

    """

    def __init__(self, make_part: Callable[[], Any]) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Convolution2D(3, WIDTH, 3, pad=1)
            part = make_part()
            if isinstance(part, chainer.Link):
                self.part = part
            self.last = L.Linear(None, 3)
        self.call = part

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        return classification(self, self.last(self.call(F.relu(self.first(x)))), t)


class Doubled(L.BatchNormalization):
    """A subclass with a forward method of its own."""

    def forward(self, x: Any, **kwargs: Any) -> chainer.Variable:
        return 2 * super().forward(x, **kwargs)


class ByFunction(chainer.Chain):
    """Batch normalization without the link, whose gamma is computed from a parameter, and which has no beta."""

    def __init__(self, has_averages: bool = True) -> None:
        super().__init__()
        self.averages = {}
        with self.init_scope():
            self.log_gamma = chainer.Parameter(0.1, (WIDTH,))
        if has_averages:
            self.add_persistent("mean", numpy.zeros(WIDTH))
            self.add_persistent("variance", numpy.ones(WIDTH))
            self.averages = {"running_mean": self.mean, "running_var": self.variance}

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        gamma = F.exp(self.log_gamma)
        return F.batch_normalization(x, gamma, numpy.zeros(WIDTH), decay=0.8, eps=1e-3, **self.averages)


class Conditional(chainer.Chain):
    """Batch normalization whose gamma and beta are computed by other layers."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.code = chainer.Parameter(chainer.initializers.Normal(1), (1, 3))
            self.to_gamma = L.Linear(3, WIDTH)
            self.to_beta = L.Linear(3, WIDTH)
            self.normalization = L.BatchNormalization(WIDTH, use_gamma=False, use_beta=False)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        code = F.tanh(self.code)
        gamma, beta = (F.reshape(to(code), (1, WIDTH, 1, 1)) for to in (self.to_gamma, self.to_beta))
        return F.relu(self.normalization(x) * F.broadcast_to(gamma, x.shape) + F.broadcast_to(beta, x.shape))


class Twice(chainer.Chain):
    """One link that is used at two places."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.convolution = L.Convolution2D(WIDTH, WIDTH, 3, pad=1)
            self.normalization = L.BatchNormalization(WIDTH)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.normalization(x))
        return F.relu(self.normalization(self.convolution(h)))


class Branches(chainer.Chain):
    """Three normalizations of the same input at one depth, of which the results are used in another order."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.branches = chainer.ChainList(*[L.BatchNormalization(WIDTH, decay=0.5) for _ in range(3)])
            self.join = L.BatchNormalization(3 * WIDTH)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        a, b, c = (branch(x) for branch in self.branches)
        return self.join(F.concat([F.relu(c), F.tanh(a), F.sigmoid(b) * a]))


class Block(chainer.Chain):
    """Residual block, with a projection where the width changes."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(n_in, n_out, 3, stride, pad=1, nobias=True)
            self.bn1 = L.BatchNormalization(n_out)
            self.conv2 = L.Convolution2D(n_out, n_out, 3, pad=1, nobias=True)
            self.bn2 = L.BatchNormalization(n_out)
            if (n_in, stride) != (n_out, 1):
                self.conv3 = L.Convolution2D(n_in, n_out, 1, stride, nobias=True)
                self.bn3 = L.BatchNormalization(n_out)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + (self.bn3(self.conv3(x)) if hasattr(self, "conv3") else x))


class Bottleneck(chainer.Chain):
    """Residual block of three convolutions."""

    def __init__(self, n_in: int, n_out: int, is_first: bool) -> None:
        super().__init__()
        n_mid = n_out // 2
        shapes = [(n_in, n_mid, 1), (n_mid, n_mid, 3), (n_mid, n_out, 1)]
        with self.init_scope():
            self.convolutions = chainer.ChainList(
                *[L.Convolution2D(a, b, size, pad=size // 2, nobias=True) for a, b, size in shapes]
            )
            self.normalizations = chainer.ChainList(*[L.BatchNormalization(b) for _, b, _ in shapes])
            if is_first:
                self.projection = L.Convolution2D(n_in, n_out, 1, nobias=True)
                self.normalization = L.BatchNormalization(n_out)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = x
        for index, (convolution, normalization) in enumerate(zip(self.convolutions, self.normalizations)):
            h = normalization(convolution(h if index == 0 else F.relu(h)))
        return F.relu(h + (self.normalization(self.projection(x)) if hasattr(self, "projection") else x))


class Discriminator(chainer.Chain):
    """The discriminator of Chainer's DCGAN example, without its noise."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.c0 = L.Convolution2D(WIDTH, 4, 3, 1, 1)
            self.c1 = L.Convolution2D(4, 8, 4, 2, 1)
            self.c2 = L.Convolution2D(8, 8, 3, 1, 1)
            self.bn1 = L.BatchNormalization(8, use_gamma=False)
            self.bn2 = L.BatchNormalization(8, use_gamma=False)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.leaky_relu(self.c0(x))
        h = F.leaky_relu(self.bn1(self.c1(h)))
        return F.leaky_relu(self.bn2(self.c2(h)))


class Teacher(chainer.Chain):
    """A student that is compared with a teacher, whose running averages move though nothing goes back through it."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.student = Block(WIDTH, WIDTH)
            self.teacher = Block(WIDTH, WIDTH)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        with chainer.no_backprop_mode():
            target = self.teacher(x)
        h = self.student(x)
        return F.concat([h, (h - target) ** 2])


class Frozen(Block):
    """A block of which one normalization has a fixed gamma and beta, and the other also fixed averages."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.bn1.disable_update()
        self.bn2.disable_update()

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.bn1(self.conv1(x)))
        with chainer.using_config("train", False):
            return F.relu(self.bn2(self.conv2(h)) + x)


class FineTuned(chainer.Chain):
    """Averages that are those of all batches so far."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.normalization = L.BatchNormalization(WIDTH)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        return F.tanh(self.normalization(x, finetune=True))


class Groups(chainer.Chain):
    """Normalizations of each example by itself, which do not wait for anything, next to one that does."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.groups = L.GroupNormalization(2)
            self.layer = L.LayerNormalization()
            self.batch = L.BatchNormalization(WIDTH)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = self.batch(F.relu(self.groups(x)))
        return self.layer(F.reshape(h, (len(h), -1)))


class Crossing(chainer.Chain):
    """Values of all kinds that are computed before the passes wait, and used afterwards."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.normalization = L.BatchNormalization(WIDTH)
            self.embedding = L.EmbedID(WIDTH, WIDTH)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        labels = F.argmax(x, axis=1)[:, 0, 0]
        fixed = chainer.Variable(x.array[:, :, :1] > 0.5, requires_grad=False)
        values = {"view": x[:, 1:3], "array": x.array.mean(axis=(2, 3)), "list": list(F.separate(x, axis=2))}
        h = self.normalization(x) * F.cast(fixed, numpy.float64)
        h = self.normalization(h + F.broadcast_to(values["list"][2][:, :, None], h.shape))
        h = h * F.broadcast_to(F.mean(values["view"], axis=(1, 2, 3), keepdims=True), h.shape)
        return F.mean(h, axis=(2, 3)) * values["array"] + self.embedding(labels)


def sequence(*layers: Any) -> Callable[[], chainer.Sequential]:
    return lambda: chainer.Sequential(*[layer() for layer in layers])


def normalization(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return functools.partial(L.BatchNormalization, *args, **kwargs)


PARTS: Dict[str, Callable[[], Any]] = {
    "link": normalization(WIDTH),
    "subclass": lambda: Doubled(WIDTH),
    "function": ByFunction,
    "function without running averages": lambda: ByFunction(has_averages=False),
    "axes 0 and 2": normalization(axis=(0, 2), size=(WIDTH, 6)),
    "axis 0": normalization(axis=0, size=(WIDTH, 6, 6)),
    "all axes but 1, of unknown size": normalization(axis=(0, 2, 3)),
    "no gamma": normalization(WIDTH, use_gamma=False),
    "no beta": normalization(WIDTH, use_beta=False, eps=0.1),
    "neither": normalization(WIDTH, use_gamma=False, use_beta=False, decay=0.3),
    "computed gamma and beta": Conditional,
    "link used twice": Twice,
    "several at one depth": Branches,
    "frozen": Frozen,
    "finetune": FineTuned,
    "teacher without backprop": Teacher,
    "skip": lambda: Block(WIDTH, WIDTH),
    "projection": sequence(lambda: Block(WIDTH, 8, 2), lambda: Block(8, 8)),
    "InceptionBN": lambda: L.InceptionBN(WIDTH, 2, 2, 3, 2, 3, "avg", 2),
    "InceptionBN with a stride": lambda: L.InceptionBN(WIDTH, 0, 2, 3, 2, 3, "max", stride=2),
    "DCGAN discriminator": Discriminator,
    "normalizations of single examples": Groups,
    "values of all kinds": Crossing,
}


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("part", PARTS)
def test_a_network_takes_the_step_of_the_whole_batch(part: str, store: str) -> None:
    assert_exact(lambda: Network(PARTS[part]), make_images(), lockstep=store)


def resnet50() -> chainer.Sequential:
    """Returns a network with as many normalizations as the one of that name, and few channels."""
    layers: List[Any] = [L.BatchNormalization(WIDTH), F.relu]
    n_in = WIDTH
    for n_out, depth in ((4, 3), (4, 4), (6, 6), (6, 3)):
        for index in range(depth):
            layers.append(Bottleneck(n_in, n_out, index == 0))
            n_in = n_out
    return chainer.Sequential(*layers)


@pytest.mark.parametrize("store", ["memory", "file"])
def test_a_network_of_53_normalizations_takes_the_step_of_the_whole_batch(store: str) -> None:
    dataset = make_images(40, (3, 4, 4))
    actual, _ = assert_exact(lambda: Network(resnet50), dataset, 3, store, micro_batch_size=10)
    assert sum(isinstance(link, L.BatchNormalization) for link in actual.model.links()) == 53


class TwoHeads(chainer.Chain):
    """Two losses from one trunk; one head normalizes."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.trunk = L.Linear(5, 8)
            self.normalization = L.BatchNormalization(8)
            self.head = L.Linear(8, 3)
            self.other = L.Linear(8, 4)
            self.other_normalization = L.BatchNormalization(4)
            self.back = L.Linear(4, 5)

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        h = F.tanh(self.normalization(self.trunk(x)))
        reconstruction = F.mean_squared_error(self.back(F.relu(self.other_normalization(self.other(h)))), x)
        chainer.report({"reconstruction": reconstruction}, self)
        return classification(self, self.head(h), t) + 0.5 * reconstruction


@pytest.mark.parametrize("store", STORES)
def test_two_heads_take_the_step_of_the_whole_batch(store: str, tmp_path: pathlib.Path) -> None:
    assert_exact(TwoHeads, make_vectors(), lockstep=as_option(store, tmp_path))


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("is_variable", [False, True])
def test_examples_that_are_normalized_themselves(is_variable: bool, store: str) -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.of_input = L.BatchNormalization(5)

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            return super().forward(self.of_input(chainer.Variable(x) if is_variable else x), t)

    assert_exact(Model, make_vectors(), lockstep=store)


def test_sequences_of_any_length_are_normalized_over_all_their_steps() -> None:
    """Micro-batches of as many sequences have another number of values each; the loss is a mean over steps."""
    lengths = numpy.random.RandomState(5).randint(1, 6, size=40)
    dataset = [(numpy.tile(x, (length, 1)) * length, t) for (x, t), length in zip(make_vectors(), lengths)]

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            labels = numpy.repeat(t, [len(each) for each in x])
            return super().forward(F.concat(x, axis=0), labels)

    def convert(batch: Any, device: Any) -> Any:
        return [x for x, _ in batch], numpy.array([t for _, t in batch])

    def count_steps(batch: Any) -> int:
        return sum(len(x) for x, _ in batch)

    actual = in_lockstep(Model, dataset, converter=convert, weight_func=count_steps)
    expected = whole_batch(Model, dataset, converter=convert)
    for each in (actual, expected):
        each.update(4)
    assert_same_runs(actual, expected, SEVERAL)


@pytest.mark.parametrize("is_training", [True, False])
def test_averages_that_are_used_do_not_move(is_training: bool) -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            with chainer.using_config("train", is_training):
                return super().forward(x, t)

    actual, _ = assert_exact(Model, make_vectors())
    assert actual.model.normalization.avg_mean.any() == is_training


@pytest.mark.parametrize("make_optimizer", [optimizers.SGD, optimizers.Adam, optimizers.RMSprop, optimizers.AdaDelta])
def test_the_optimizer_has_the_state_of_the_whole_batch(make_optimizer: Callable[[], chainer.Optimizer]) -> None:
    # The gradient of the bias would be 0 but for rounding, which Adam would make large.
    assert_exact(lambda: Net(nobias=True), make_vectors(), make_optimizer=make_optimizer)


def test_parameters_that_are_initialized_in_the_first_window() -> None:
    assert_exact(lambda: Net(is_lazy=True), make_vectors())


def test_float32_is_as_near_as_its_rounding() -> None:
    dataset = [(x.astype(numpy.float32), t) for x, t in make_images()]
    with chainer.using_config("dtype", numpy.dtype("float32")):
        runs = [make(lambda: Network(PARTS["projection"]), dataset) for make in (in_lockstep, whole_batch)]
        for each in runs:
            each.update(2)
        assert_same_runs(*runs, tolerance=1e-4)
        assert {param.dtype for param in runs[0].model.params()} == {numpy.dtype("float32")}


def test_mixed_precision_is_as_near_as_its_rounding() -> None:
    dataset = [(x.astype(numpy.float16), t) for x, t in make_vectors()]
    with chainer.using_config("dtype", chainer.mixed16):
        runs = [make(Net, dataset) for make in (in_lockstep, whole_batch)]
        for each in runs:
            each.optimizer.loss_scaling(8)
            each.update(2)
        assert_same_runs(*runs, tolerance=1e-2)


def test_examples_that_are_gathered_from_several_batches() -> None:
    dataset = make_vectors(50)
    steps = 3
    actual = in_lockstep(Net, dataset, batch_size=7, accumulation_steps=steps, micro_batch_size=4)
    expected = Run(
        CountingUpdater, Net, dataset, batch_size=7 * steps, batches=serial(dataset, 7), accumulation_steps=steps
    )
    for tolerance in (ONE_STEP, SEVERAL):
        for each in (actual, expected):
            each.update(2)
        assert_same_runs(actual, expected, tolerance)


def test_an_epoch_that_ends_with_a_short_batch() -> None:
    runs = []
    for updater_class, kwargs in (
        (chainer_accum.AccumulatingUpdater, {"micro_batch_size": 4, "lockstep": "memory"}),
        (chainer.training.updaters.StandardUpdater, {}),
    ):
        each = Run(updater_class, Net, make_vectors(33), **kwargs)
        each.updater.get_iterator("main")._repeat = False
        each.update(2)
        with pytest.raises(StopIteration):
            each.update()
        runs.append(each)
    assert_same_runs(*runs, tolerance=ONE_STEP)


def test_prefetching_changes_nothing() -> None:
    actual, expected = in_lockstep(Net, make_vectors(), prefetch=True), whole_batch(Net, make_vectors())
    for each in (actual, expected):
        each.update(4)
    assert_same_runs(actual, expected, SEVERAL)


def test_the_scale_of_the_loss_changes_nothing() -> None:
    runs = [make(Net, make_vectors()) for make in (in_lockstep, whole_batch)]
    for each in runs:
        each.optimizer.loss_scaling(1024)
        each.update(4)
    assert_same_runs(*runs, tolerance=SEVERAL)


def test_a_scale_that_adapts_changes_nothing() -> None:
    runs = [make(Net, make_vectors()) for make in (in_lockstep, whole_batch)]
    for each in runs:
        each.optimizer.loss_scaling(interval=1, scale=2.0**1020)
        with numpy.errstate(all="ignore"):
            each.update(6)
    assert_same_runs(*runs, tolerance=SEVERAL)


def test_running_statistics_that_move_once_are_those_that_lockstep_moves() -> None:
    actual = in_lockstep(Net, make_vectors(), running_statistics="update")
    expected = whole_batch(Net, make_vectors())
    for each in (actual, expected):
        each.update(4)
    assert_same_runs(actual, expected, SEVERAL)


def test_the_search_for_a_size_changes_nothing_but_what_it_reports() -> None:
    actual = in_lockstep(lambda: Net(F.dropout), make_vectors(), micro_batch_size="auto")
    expected = whole_batch(lambda: Net(F.dropout), make_vectors())
    for each in (actual, expected):
        each.update(6)
    assert_same_states(actual.state(), expected.state(), SEVERAL)
    assert actual.draw() == expected.draw()
    assert actual.updater.micro_batch_timings


def test_reports_are_merged_by_their_rules() -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            chainer.report({"first": float(x[-1, 0]), "n": len(x), "row": x.sum(axis=0)}, self)
            loss = super().forward(x, t)
            chainer.report({"mean": float(x.mean())}, self)
            return loss

    rules = {"main/n": "sum", "main/first": "last", "main/row": "sum"}
    actual = in_lockstep(Model, make_vectors(), observation_rules=rules)
    expected = whole_batch(Model, make_vectors())
    for each in (actual, expected):
        each.update(3)
    for step, expected_step in zip(actual.steps, expected.steps):
        assert step.observation.keys() == expected_step.observation.keys()
        for key, value in expected_step.observation.items():
            value, merged = chainer.as_array(value), chainer.as_array(step.observation[key])
            numpy.testing.assert_allclose(merged, value, rtol=ONE_STEP, atol=ONE_STEP, err_msg=key)


def test_a_loss_without_a_graph_has_a_gradient_of_zero() -> None:
    """As with a loss that some examples do not have. The whole batch is a mean over micro-batches here."""

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            loss = super().forward(x, t)
            return loss if len(x) == 6 else chainer.Variable(loss.array)

    class Whole(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            y = self.last(self.between(self.normalization(self.first(x))))
            classification(self, y, t)
            return F.softmax_cross_entropy(y[:6], t[:6]) * 0.3

    actual, expected = in_lockstep(Model, make_vectors()), whole_batch(Whole, make_vectors())
    for each in (actual, expected):
        each.update(3)
    assert_same_states(actual.state(), expected.state(), SEVERAL)


class Summed(Net):
    """A loss that is the sum over its examples."""

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        y = self.last(self.between(self.normalization(self.first(x))))
        loss = F.sum(F.softmax_cross_entropy(y, t, reduce="no")) / 10
        chainer.report({"loss": loss}, self)
        return loss


def test_micro_batches_of_one_example_do_not_warn_that_their_variance_is_0() -> None:
    assert_exact(Net, make_vectors(), batch_size=3, micro_batch_size=1)


@settings(max_examples=30)
@given(
    batch_size=st.integers(2, 24),
    micro_batch_size=st.integers(1, 9),
    size=st.integers(24, 40),
    reduction=st.sampled_from(["mean", "sum"]),
    store=st.sampled_from(["memory", "file"]),
)
def test_any_size_of_batches_and_micro_batches(
    batch_size: int, micro_batch_size: int, size: int, reduction: str, store: str
) -> None:
    kwargs: Dict[str, Any] = {"loss_reduction": reduction, "lockstep": store, "micro_batch_size": micro_batch_size}
    if reduction == "sum":
        kwargs["observation_rules"] = {"main/loss": "sum"}
    make_model = Summed if reduction == "sum" else Net
    actual = in_lockstep(make_model, make_vectors(size), batch_size=batch_size, **kwargs)
    expected = whole_batch(make_model, make_vectors(size), batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for each in (actual, expected):
            each.update(3)
    assert_same_runs(actual, expected, SEVERAL)


@settings(max_examples=30)
@given(data=st.data(), k=st.integers(1, 5), store=st.sampled_from(["memory", "file"]))
def test_any_weights_of_any_number_of_micro_batches(data: st.DataObject, k: int, store: str) -> None:
    """The weight of a micro-batch is its number of valid labels, which may be 0."""
    labels = [
        data.draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))
        for size in data.draw(st.lists(st.integers(1, 4), min_size=k, max_size=k))
    ]
    labels[-1][-1] = 0  # the mean over no label at all is 0 / 0
    num_examples = sum(map(len, labels))
    if num_examples == 1:
        labels[0].append(1)
        num_examples += 1
    x = numpy.random.RandomState(3).standard_normal((num_examples, 5))
    states, observations = [], []
    for is_whole in (False, True):
        numpy.random.seed(0)
        model = Net()
        optimizer = optimizers.MomentumSGD(0.02).setup(model)
        groups: List[List[int]] = [sum(labels, [])] if is_whole else labels
        reporter = chainer.Reporter()
        reporter.add_observer("main", model)
        for _ in range(2):
            observation: Dict[str, Any] = {}
            block = chainer_accum.accumulate(optimizer, lockstep=None if is_whole else store)
            with reporter.scope(observation), warnings.catch_warnings(), block as window:
                warnings.simplefilter("ignore", UserWarning)
                start = 0
                for group in groups:
                    t = numpy.array(group, "i")
                    rows = x[start : start + len(group)]
                    window.add(model, rows, t, weight=int((t >= 0).sum()))
                    start += len(group)
        states.append(state_of(optimizer))
        observations.append(float(chainer.as_array(observation["main/loss"])))
    assert_same_states(*states, tolerance=SEVERAL)
    assert observations[0] == pytest.approx(observations[1], abs=SEVERAL)
