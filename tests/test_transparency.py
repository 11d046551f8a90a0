"""The promise of the package: one update makes the step of StandardUpdater with the whole effective batch.

Parameters, optimizer state, epoch bookkeeping and observations are compared after several updates, for whatever can be
chosen: sizes, optimizers, hooks, weights, loss scales, kinds of examples and kinds of models.
"""

from __future__ import annotations

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    CountingUpdater,
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_model,
    make_updater,
    on_device,
    run,
    seed,
    serial,
    to_device,
    to_host,
)

BATCH = 24
WAYS = {
    "gathered": (6, {"accumulation_steps": 4}),
    "split": (24, {"micro_batch_size": 7}),
    "gathered and split": (8, {"accumulation_steps": 3, "micro_batch_size": 3}),
}
each_way = pytest.mark.parametrize("way", sorted(WAYS))


def compare(
    way,
    make_optimizer=lambda: optimizers.MomentumSGD(0.1),
    model=make_model,
    dataset=None,
    updates=6,
    tolerance=1e-6,
    prepare=lambda optimizer: None,
    options=None,
    **common,
):
    """Trains with and without accumulation, asserts that all is equal, and returns both updaters."""
    dataset = make_dataset() if dataset is None else dataset
    batch_size, accumulation = WAYS[way]
    updaters, steps = [], []
    for updater_class, size, kwargs in (
        (StandardUpdater, BATCH, {}),
        (AccumulatingUpdater, batch_size, {**accumulation, **(options or {})}),
    ):
        seed(0)
        updater = make_updater(updater_class, serial(dataset, size), make_optimizer(), model(), **kwargs, **common)
        prepare(updater.get_optimizer("main"))
        updaters.append(updater)
        steps.append(run(updater, updates))
    expected, actual = (updater.get_optimizer("main") for updater in updaters)
    assert_same_parameters(actual.target, expected.target, tolerance)
    assert_same_optimizer_state(actual, expected, tolerance)
    assert_same_steps(steps[1], steps[0])
    return updaters


@settings(max_examples=60)
@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    accumulation_steps=st.integers(1, 6),
    micro_batch_size=st.one_of(st.none(), st.integers(1, 20)),
    repeat=st.booleans(),
    shuffle=st.booleans(),
)
def test_any_sizes(size, batch_size, accumulation_steps, micro_batch_size, repeat, shuffle):
    results = []
    for updater_class, batch, kwargs in (
        (
            CountingUpdater,
            batch_size * accumulation_steps,
            {
                "batches": serial(make_dataset(size), batch_size, repeat=repeat),
                "accumulation_steps": accumulation_steps,
            },
        ),
        (
            AccumulatingUpdater,
            batch_size,
            {"accumulation_steps": accumulation_steps, "micro_batch_size": micro_batch_size},
        ),
    ):
        numpy.random.seed(0)
        iterator = serial(make_dataset(size), batch, repeat=repeat, shuffle=shuffle)
        updater = make_updater(updater_class, iterator, optimizers.MomentumSGD(0.1), **kwargs)
        steps = []
        try:
            for _ in range(4):
                steps.extend(run(updater, 1))
        except StopIteration:
            assert not repeat
        results.append((updater.get_optimizer("main"), updater.iteration, steps))
    (expected, expected_iteration, expected_steps), (actual, iteration, steps) = results
    assert iteration == expected_iteration
    assert_same_parameters(actual.target, expected.target)
    assert_same_optimizer_state(actual, expected)
    assert_same_steps(steps, expected_steps)


@each_way
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: optimizers.SGD(0.1),
        lambda: optimizers.MomentumSGD(0.1),
        lambda: optimizers.NesterovAG(0.1),
        lambda: optimizers.Adam(eps=1e-4),
        lambda: optimizers.AdaGrad(0.1, eps=1e-4),
        lambda: optimizers.AdaDelta(eps=1e-3),
        lambda: optimizers.RMSprop(eps=1e-4),
        lambda: optimizers.AdaBound(eps=1e-4),
    ],
    ids=["SGD", "MomentumSGD", "NesterovAG", "Adam", "AdaGrad", "AdaDelta", "RMSprop", "AdaBound"],
)
def test_optimizers(way, make_optimizer):
    compare(way, make_optimizer)


@each_way
def test_hooks_of_the_optimizer_run_once_per_update(way):
    def prepare(optimizer):
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
        optimizer.add_hook(chainer.optimizer_hooks.Lasso(0.001))
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.1))
        optimizer.add_hook(chainer.optimizer_hooks.GradientHardClipping(-0.05, 0.05))
        optimizer.calls = 0
        optimizer.add_hook(count, "count", timing="post")

    def count(optimizer):
        optimizer.calls += 1

    for updater in compare(way, prepare=prepare):
        assert updater.get_optimizer("main").calls == 6


@each_way
@pytest.mark.parametrize("scale", [1.0, 128.0, 1000.0])
def test_static_loss_scaling(way, scale):
    compare(way, loss_scale=scale)


@each_way
def test_dynamic_loss_scaling(way):
    for updater in compare(way, prepare=lambda optimizer: optimizer.loss_scaling(interval=2)):
        assert updater.get_optimizer("main")._loss_scale == 2.0**6


class Overflowing(chainer.Chain):
    """A model with one example, recognised by a large input, whose gradient overflows."""

    def __init__(self):
        super().__init__(classifier=make_model())

    def forward(self, x, t):
        return self.classifier(x, t) + F.sum(self.classifier.predictor[2].W) * (
            numpy.float32(3e38) if (x > 50).any() else 0
        )


@each_way
def test_an_overflow_in_one_micro_batch_skips_the_update(way):
    dataset = make_dataset()
    dataset[30] = dataset[30][0] + numpy.float32(100), dataset[30][1]

    def prepare(optimizer):
        optimizer.loss_scaling()
        optimizer.update(optimizer.target, *to_device(dataset[:2]))
        optimizer._loss_scale = 1024.0

    with pytest.warns(UserWarning, match="Non finite number found"), numpy.errstate(all="ignore"):
        updaters = compare(way, prepare=prepare, model=Overflowing, dataset=dataset, updates=3)
    for updater in updaters:
        assert updater.get_optimizer("main").t == 4
        assert next(updater.get_optimizer("main").target.params()).update_rule.t == 3


@each_way
def test_frozen_and_disabled_parameters(way):
    def prepare(optimizer):
        optimizer.target(*to_device(make_dataset(2)))
        optimizer.target.predictor[0].disable_update()
        optimizer.target.predictor[2].b.update_rule = None
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.1))

    first, second = compare(way, prepare=prepare)
    assert second.get_optimizer("main").target.predictor[0].W.update_rule.t == 0


class Unused(chainer.Chain):
    """A model with a parameter that no loss reaches, and one that is never initialised."""

    def __init__(self):
        super().__init__(classifier=make_model(), unused=L.Linear(2, 2, initialW=1), uninitialised=L.Linear(None, 2))

    def forward(self, x, t):
        return self.classifier(x, t)


@each_way
def test_parameters_without_a_gradient(way):
    compare(way, model=Unused)


class Born(chainer.Chain):
    """A model that has parameters only once it has run, among them one that no optimizer knows."""

    def __init__(self):
        super().__init__(classifier=make_model())

    def forward(self, x, t):
        if not hasattr(self, "late"):
            with self.init_scope():
                self.late = chainer.Parameter(self.xp.full(5, 0.5, "f"))
        return self.classifier(x * F.broadcast_to(self.late, x.shape), t)


@each_way
def test_parameters_that_are_born_in_the_first_forward_pass(way):
    def prepare(optimizer):
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.1))  # counts all gradients

    for updater in compare(way, model=Born, prepare=prepare):
        late = updater.get_optimizer("main").target.late
        assert late.grad.any() and (late.array == 0.5).all()


class Aliased(chainer.Chain):
    """A model in which gradients are one array, or cannot be written to."""

    def __init__(self):
        super().__init__(classifier=make_model())
        with self.init_scope():
            self.a = chainer.Parameter(numpy.ones((5, 3), "f"))
            self.b = chainer.Parameter(numpy.ones((5, 3), "f"))
            self.c = chainer.Parameter(numpy.ones((5, 3), "f"))

    def forward(self, x, t):
        return self.classifier(x + F.sum(self.a + self.b) * 0.01, t) + F.sum(self.c)


@each_way
def test_gradients_that_are_one_array_or_read_only(way):
    compare(way, model=Aliased)


class OwnBackward(chainer.Chain):
    """A model whose loss function runs a backward pass of its own, as for adversarial training."""

    def __init__(self):
        super().__init__(classifier=make_model())

    def forward(self, x, t):
        x = chainer.Variable(x)
        self.classifier(x, t).backward()
        return self.classifier(x.array + numpy.float32(0.1) * numpy.sign(x.grad), t)


@each_way
def test_a_loss_function_that_runs_a_backward_pass_of_its_own(way):
    compare(way, model=OwnBackward)


class GradientPenalty(chainer.Chain):
    """A model whose loss needs double backpropagation."""

    def __init__(self):
        super().__init__(
            first=L.Linear(5, 8, initialW=chainer.initializers.Constant(0.1)), last=L.Linear(8, 1, initialW=0.3)
        )

    def forward(self, x, t):
        x = chainer.Variable(x)
        y = self.last(F.sigmoid(self.first(x)))
        (grad,) = chainer.grad([y], [x], enable_double_backprop=True)
        return F.mean(y) + F.mean(F.sum(grad**2, axis=1))


@each_way
def test_double_backpropagation(way):
    compare(way, model=GradientPenalty)


class Convolutional(chainer.Chain):
    """A convolutional network with group normalization, which does not mix examples."""

    def __init__(self):
        super().__init__()
        numpy.random.seed(0)
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 4, 3, pad=1)
            self.norm = L.GroupNormalization(2, 4)
            self.conv2 = L.DilatedConvolution2D(4, 4, 3, pad=2, dilate=2)
            self.last = L.Linear(16, 3)

    def forward(self, x, t):
        h = F.max_pooling_2d(F.relu(self.norm(self.conv1(x.reshape(-1, 1, 4, 4)))), 2)
        loss = F.softmax_cross_entropy(self.last(F.relu(self.conv2(h)).reshape(-1, 16)), t)
        chainer.report({"loss": loss}, self)
        return loss


@each_way
def test_a_convolutional_network(way):
    compare(way, model=Convolutional, dataset=make_dataset(n_in=16), tolerance=2e-6)


@each_way
def test_what_differs_is_rounding(way):
    """In float64, where rounding is 1e-16, so is the difference."""
    dataset = [(x.astype("d"), t) for x, t in make_dataset(n_in=16)]
    with chainer.using_config("dtype", numpy.float64):
        compare(way, model=Convolutional, dataset=dataset, updates=20, tolerance=1e-14)


class Tagger(chainer.Chain):
    """A recurrent tagger of sequences of words, whose loss is the mean over all tokens."""

    def __init__(self):
        super().__init__()
        numpy.random.seed(0)
        with self.init_scope():
            self.embed = L.EmbedID(10, 6)
            self.lstm = L.NStepLSTM(1, 6, 5, 0.0)
            self.last = L.Linear(5, 3)

    def forward(self, words, tags):
        _, _, hidden = self.lstm(None, None, [self.embed(sequence) for sequence in words])
        loss = F.softmax_cross_entropy(self.last(F.concat(hidden, axis=0)), self.xp.concatenate(tags))
        chainer.report({"loss": loss, "tokens": sum(len(sequence) for sequence in words)}, self)
        return loss


def make_sequences():
    random = numpy.random.RandomState(0)
    lengths = random.randint(1, 9, size=50)
    return [(random.randint(10, size=n).astype("i"), random.randint(3, size=n).astype("i")) for n in lengths]


@chainer.dataset.converter()
def convert_sequences(batch, device):
    words, tags = ([chainer.dataset.to_device(device, each) for each in column] for column in zip(*batch))
    return {"words": words, "tags": tags}


@each_way
def test_sequences_of_any_length_weighted_by_tokens(way):
    compare(
        way,
        model=Tagger,
        dataset=make_sequences(),
        converter=convert_sequences,
        options={
            "weight_func": lambda batch: sum(len(words) for words, _ in batch),
            "observation_rules": {"main/tokens": "sum"},
        },
    )


class StatelessUnrolled(chainer.Chain):
    """A recurrent network unrolled by hand, which uses each parameter once per time step."""

    def __init__(self):
        super().__init__()
        numpy.random.seed(0)
        with self.init_scope():
            self.lstm = L.LSTM(1, 200)
            self.last = L.Linear(200, 3)

    def forward(self, x, t):
        self.lstm.reset_state()
        for step in range(x.shape[1]):
            h = self.lstm(x[:, step : step + 1])
        return F.softmax_cross_entropy(self.last(h), t)


@each_way
def test_an_unrolled_recurrent_network(way):
    compare(way, model=StatelessUnrolled, updates=3)


@each_way
def test_labels_that_are_ignored_weighted_by_those_that_are_not(way):
    dataset = [(x, numpy.int32(-1) if index % 7 < 4 else t) for index, (x, t) in enumerate(make_dataset())]
    dataset[:8] = [(x, numpy.int32(-1)) for x, _ in dataset[:8]]  # micro-batches without any valid label
    compare(
        way,
        model=lambda: L.Classifier(make_model().predictor, accfun=lambda y, t: F.accuracy(y, t, ignore_label=-1)),
        dataset=dataset,
        options={"weight_func": lambda batch: sum(t != -1 for _, t in batch)},
    )


@each_way
def test_an_effective_batch_without_any_weight(way):
    dataset = [(x, numpy.int32(-1)) for x, _ in make_dataset()]
    compare(
        way,
        model=lambda: L.Classifier(make_model().predictor, accfun=lambda y, t: F.accuracy(y, t, ignore_label=-1)),
        dataset=dataset,
        options={"weight_func": lambda batch: 0},
    )


class Sum(chainer.Chain):
    """A model whose loss is a sum over examples."""

    def __init__(self):
        super().__init__(classifier=make_model())

    def forward(self, x, t):
        loss = F.sum(F.softmax_cross_entropy(self.classifier.predictor(x), t, reduce="no"))
        chainer.report({"loss": loss, "mean": loss / len(x)}, self)
        return loss


@each_way
def test_losses_that_are_sums(way):
    compare(
        way,
        lambda: optimizers.SGD(0.01),
        model=Sum,
        options={"loss_reduction": "sum", "observation_rules": {"main/loss": "sum"}},
    )


@each_way
@pytest.mark.parametrize("kind", ["tuple", "dict", "array"])
def test_kinds_of_examples(way, kind):
    model = make_model()

    def loss_func(*args, **kwargs):
        if kind == "dict":
            return F.sum(model.predictor(kwargs["weight"])) / len(kwargs["weight"]) + F.mean(kwargs["label"])
        return F.sum(model.predictor(args[0])) / len(args[0])

    # "weight" is the name of an argument on the way to the loss function, too.
    examples = {
        "tuple": lambda x, t: (x, t),
        "dict": lambda x, t: {"weight": x, "label": numpy.float32(t)},
        "array": lambda x, t: x,
    }[kind]
    models = [make_model(), make_model()]

    def next_model():
        nonlocal model
        model = models.pop()
        return model

    compare(way, model=next_model, dataset=[examples(x, t) for x, t in make_dataset()], loss_func=loss_func)


@each_way
@pytest.mark.parametrize("style", ["old", "new"])
def test_styles_of_converters(way, style):
    devices = []

    def convert(batch, device):
        devices.append(device)
        return chainer.dataset.concat_examples(batch, device)

    converter = convert if style == "old" else chainer.dataset.converter()(convert)
    compare(way, converter=converter, device="@numpy", updates=2)
    assert {type(device) for device in devices} == {int if style == "old" else chainer.backend.CpuDevice}


@each_way
def test_half_precision(way):
    def model():
        with chainer.using_config("dtype", numpy.float16):
            model = make_model()
            model(numpy.zeros((1, 5), "e"), numpy.zeros(1, "i"))
        return model

    dataset = [(x.astype("e"), t) for x, t in make_dataset()]

    def prepare(optimizer):
        optimizer.use_fp32_update()

    batch_size, accumulation = WAYS[way]
    results = []
    for updater_class, size, kwargs in ((StandardUpdater, BATCH, {}), (AccumulatingUpdater, batch_size, accumulation)):
        updater = make_updater(
            updater_class, serial(dataset, size), optimizers.SGD(0.1), model(), loss_scale=128.0, **kwargs
        )
        prepare(updater.get_optimizer("main"))
        run(updater, 4)
        results.append(updater.get_optimizer("main").target)
    assert_same_parameters(results[1], results[0], 4e-3)
    assert {param.array.dtype.char for param in results[1].params()} == {"e"}


class Generator(chainer.Chain):
    def __init__(self):
        super().__init__()
        numpy.random.seed(0)
        with self.init_scope():
            self.l1 = L.Linear(5, 16)
            self.l2 = L.Linear(16, 5)

    def forward(self, z):
        return self.l2(F.relu(self.l1(z)))


@each_way
def test_a_generator_trained_through_a_discriminator_of_another_optimizer(way):
    """The loss reaches links that are not the target: their parameters must stay as they are."""
    numpy.random.seed(1)
    discriminator = on_device(L.Linear(5, 1))
    weights = discriminator.W.array.copy()
    discriminator.cleargrads()
    generators = [Generator(), Generator()]

    def next_model():
        nonlocal generator
        generator = generators.pop()
        return generator

    generator = None

    def loss_func(x, t):
        return F.mean(F.softplus(-discriminator(generator(x))))

    compare(way, model=next_model, loss_func=loss_func)
    numpy.testing.assert_array_equal(to_host(discriminator.W), to_host(weights))
