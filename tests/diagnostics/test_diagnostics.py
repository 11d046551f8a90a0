"""check_equivalence tells whether the accumulated step is the full-batch step, says why not, and leaves no trace."""

from __future__ import annotations

import copy
import functools
import itertools
import pathlib
import random
import re
import types

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, check_equivalence
from chainer import link_hooks, optimizers
from chainer_accum.diagnostics.equivalence import _split
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_dataset, make_model, serial

# Models and losses, each with what makes its accumulated step another one, if anything does.


def classifier(*middle, lossfun=F.softmax_cross_entropy):
    model = L.Classifier(chainer.Sequential(L.Linear(None, 8), *middle, F.tanh, L.Linear(8, 3)), lossfun)
    model.compute_accuracy = False
    return model


class ConvNet(chainer.Chain):
    """A small image classifier with the usual order of layers, whose biases before ``norm`` have no gradient."""

    def __init__(self, norm, lossfun=F.softmax_cross_entropy):
        super().__init__()
        self.lossfun = lossfun
        with self.init_scope():
            self.conv = L.Convolution2D(None, 6, ksize=3, pad=1)
            self.norm = norm
            self.fc = L.Linear(None, 3)

    def forward(self, x, t):
        h = F.relu(self.norm(self.conv(F.reshape(x, (-1, 1, 5, 5)))))
        return self.lossfun(self.fc(F.average_pooling_2d(h, 5)), t)


class InstanceNormalization(chainer.Chain):
    """Normalizes each channel of each image for itself, with Chainer's function for batches."""

    def forward(self, x):
        n, channels, height, width = x.shape
        ones, zeros = numpy.ones(n * channels, x.dtype), numpy.zeros(n * channels, x.dtype)
        h = F.batch_normalization(F.reshape(x, (1, n * channels, height, width)), ones, zeros)
        return F.reshape(h, x.shape)


class Tagger(chainer.Chain):
    """A recurrent network whose loss is a mean over the tokens of all sequences."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        with self.init_scope():
            self.embed = L.EmbedID(10, 4)
            self.lstm = L.NStepLSTM(1, 4, 5, dropout)
            self.scores = L.Linear(5, 3)

    def forward(self, words, tags):
        _, _, hidden = self.lstm(None, None, [F.dropout(self.embed(line), self.dropout) for line in words])
        return F.softmax_cross_entropy(self.scores(F.concat(hidden, axis=0)), F.concat(tags, axis=0))


class StatefulLSTM(chainer.Chain):
    """A recurrent network that remembers the call before, unless it is told to forget."""

    def __init__(self, forgets=False):
        super().__init__()
        self.forgets = forgets
        with self.init_scope():
            self.lstm = L.LSTM(None, 6)
            self.scores = L.Linear(6, 3)

    def forward(self, x, t):
        if self.forgets:
            self.lstm.reset_state()
        return F.softmax_cross_entropy(self.scores(self.lstm(x)), t)


class Embedding(chainer.Chain):
    """Metric learning: points that are compared with one another."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        with self.init_scope():
            self.point = L.Linear(5, 4)

    def forward(self, x, t):
        return self.loss(self.point(x), t)


def n_pair(points, t):
    """Each image has to tell its partner from the partners of all others."""
    first, second = F.split_axis(points, 2, axis=1)
    return F.softmax_cross_entropy(F.matmul(first, second, transb=True), numpy.arange(len(t), dtype=numpy.int32))


def hardest_triplet(points, t):
    """Each image against the farthest of all others and the nearest."""
    distances = F.sum((points[:, None] - points[None, :]) ** 2, axis=2)
    nearest = F.min(distances + 1e3 * numpy.eye(len(t), dtype=numpy.float32), axis=1)
    return F.mean(F.relu(F.max(distances, axis=1) - nearest + 0.2))


def triplet(points, t):
    """Triplets that come as one example each, with a margin that none of them keeps."""
    return F.triplet(points, points * 2, points[:, ::-1], margin=100)


def total(y, t):
    return F.sum(F.softmax_cross_entropy(y, t, reduce="no"))


def over_root(y, t):
    return total(y, t) / len(t) ** 0.5


def tiny(y, t):
    return F.softmax_cross_entropy(y, t) * y.dtype.type(1e-5)


def noisy(y, t):
    return F.softmax_cross_entropy(F.gaussian(y, numpy.zeros_like(y.array)), t)


def weighted_mean(y, pairs):
    t, importance = pairs
    return F.sum(F.softmax_cross_entropy(y, t, reduce="no") * importance) / importance.sum()


def make_importances(size=12):
    """Returns a dataset with a number for each example that says how much it counts."""
    importances = numpy.random.RandomState(2).rand(size).astype(numpy.float32)
    return [(x, t, importance) for (x, t), importance in zip(make_dataset(size), importances)]


def to_pairs(batch, device):
    x, *pair = chainer.dataset.concat_examples(batch, device)
    return x, pair


def make_images(size=13):
    return make_dataset(size, n_in=25)


def make_partly_labelled(size=12):
    """Returns a dataset of which the labels of some examples are to be ignored, and not the same share everywhere."""
    ignored = {0, 3, 7, 8, 9}
    return [(x, numpy.int32(-1 if i in ignored else t)) for i, (x, t) in enumerate(make_dataset(size))]


def make_sequences():
    rng = numpy.random.RandomState(1)
    return [
        (rng.randint(10, size=n).astype(numpy.int32), rng.randint(3, size=n).astype(numpy.int32))
        for n in (4, 1, 3, 5, 2, 2)
    ]


def make_float16(size=12):
    return [(x.astype(numpy.float16), t) for x, t in make_dataset(size)]


def count_valid(batch):
    return sum(t != -1 for _, t in batch)


def count_tokens(batch):
    return sum(len(tags) for _, tags in batch)


@chainer.dataset.converter()
def to_lists(batch, device):
    return [device.send(words) for words, _ in batch], [device.send(tags) for _, tags in batch]


def in_float16(make, *args, **kwargs):
    with chainer.using_config("dtype", numpy.float16):
        return make(*args, **kwargs)


def names(result):
    return [cause.name for cause in result.causes]


CLEAN = {
    "a lazy classifier": (classifier, make_dataset, {}),
    "two examples": (classifier, lambda: make_dataset(2), {}),
    "three examples": (classifier, lambda: make_dataset(3), {}),
    "micro-batches of one": (classifier, lambda: make_dataset(7), {"micro_batch_size": 1}),
    "a micro-batch size beyond the batch": (classifier, lambda: make_dataset(6), {"micro_batch_size": 100}),
    "group normalization": (lambda: ConvNet(L.GroupNormalization(2)), make_images, {}),
    "instance normalization by batch normalization": (lambda: ConvNet(InstanceNormalization()), make_images, {}),
    "layer normalization": (lambda: classifier(L.LayerNormalization(None)), make_dataset, {}),
    "triplets that are examples": (lambda: Embedding(triplet), make_dataset, {}),
    "an LSTM that forgets": (lambda: StatefulLSTM(forgets=True), make_dataset, {}),
    "float16": (functools.partial(in_float16, classifier), make_float16, {}),
}

# Each with the arguments that the message asks for, if there are such.
CAUSES = {
    "batch normalization in an MLP": (
        lambda: classifier(L.BatchNormalization(8)),
        make_dataset,
        {},
        ["batch normalization"],
        None,
    ),
    "lazy batch normalization": (
        lambda: classifier(L.BatchNormalization(axis=0)),
        make_dataset,
        {},
        ["batch normalization"],
        None,
    ),
    "batch normalization in a CNN": (
        lambda: ConvNet(L.BatchNormalization(6)),
        make_images,
        {},
        ["batch normalization"],
        None,
    ),
    "decorrelated batch normalization": (
        lambda: classifier(L.DecorrelatedBatchNormalization(8, groups=4)),
        make_dataset,
        {},
        ["batch normalization"],
        None,
    ),
    "dropout": (lambda: classifier(F.dropout), make_dataset, {}, ["randomness"], None),
    "dropout in a recurrent network": (
        lambda: Tagger(dropout=0.3),
        make_sequences,
        {"converter": to_lists, "weight_func": count_tokens},
        ["randomness"],
        None,
    ),
    "a sum": (lambda: classifier(lossfun=total), make_dataset, {}, ["sum"], {"loss_reduction": "sum"}),
    "a sum after instance normalization": (
        lambda: ConvNet(InstanceNormalization(), total),
        make_images,
        {},
        ["sum"],
        {"loss_reduction": "sum"},
    ),
    "a mean that was called a sum": (
        classifier,
        make_dataset,
        {"loss_reduction": "sum"},
        ["mean"],
        {"loss_reduction": "mean"},
    ),
    "a weight where none is needed": (
        classifier,
        make_dataset,
        {"weight_func": lambda batch: 1},
        ["mean"],
        {"weight_func": None},
    ),
    "ignored labels": (classifier, make_partly_labelled, {}, ["normalizer"], {"weight_func": count_valid}),
    "a wrong weight": (
        classifier,
        make_partly_labelled,
        {"weight_func": lambda batch: 2 * len(batch) + count_valid(batch)},
        ["normalizer"],
        {"weight_func": count_valid},
    ),
    "a mean over labels that was called a sum": (
        classifier,
        make_partly_labelled,
        {"loss_reduction": "sum"},
        ["normalizer"],
        {"loss_reduction": "mean", "weight_func": count_valid},
    ),
    "tokens": (
        Tagger,
        make_sequences,
        {"converter": to_lists},
        ["normalizer"],
        {"weight_func": count_tokens},
    ),
    "neither a mean nor a sum": (lambda: classifier(lossfun=over_root), make_dataset, {}, ["normalizer"], None),
    "an n-pair loss": (lambda: Embedding(n_pair), make_dataset, {}, ["comparison"], None),
    "a triplet loss with the hardest of the batch": (
        lambda: Embedding(hardest_triplet),
        make_dataset,
        {},
        ["comparison"],
        None,
    ),
    "a stateful LSTM": (StatefulLSTM, make_dataset, {}, ["state"], None),
    "a small loss in float16": (
        lambda: in_float16(classifier, lossfun=tiny),
        make_float16,
        {},
        ["float16"],
        None,
    ),
    "a small loss in mixed precision": (
        lambda: classifier(lossfun=tiny),
        make_float16,
        {},
        ["float16"],
        None,
    ),
    "a small loss where the model makes float16 itself": (
        lambda: classifier(lossfun=lambda y, t: tiny(F.cast(y, "float16"), t)),
        make_dataset,
        {},
        ["unknown"],
        None,
    ),
    "dropout and batch normalization": (
        lambda: classifier(L.BatchNormalization(8), F.dropout),
        make_dataset,
        {},
        ["randomness", "batch normalization"],
        None,
    ),
    "dropout, batch normalization and ignored labels": (
        lambda: classifier(L.BatchNormalization(8), F.dropout),
        make_partly_labelled,
        {},
        ["randomness", "batch normalization", "normalizer"],
        None,
    ),
    "batch normalization and a sum": (
        lambda: classifier(L.BatchNormalization(8), lossfun=total),
        make_dataset,
        {},
        ["batch normalization", "sum"],
        None,
    ),
    "dropout and a comparison": (
        lambda: Embedding(lambda points, t: n_pair(F.dropout(points), t)),
        make_dataset,
        {},
        ["randomness", "comparison"],
        None,
    ),
    "batch renormalization": (
        lambda: classifier(L.BatchRenormalization(8)),
        make_dataset,
        {},
        ["batch normalization"],
        None,
    ),
    "float16, dropout and a sum": (
        lambda: in_float16(classifier, F.dropout, lossfun=lambda y, t: total(y, t) * y.dtype.type(1e-6)),
        make_float16,
        {},
        ["float16", "randomness", "sum"],
        None,
    ),
    "float16 and a sum": (
        lambda: in_float16(classifier, lossfun=total),
        make_float16,
        {},
        ["sum"],
        {"loss_reduction": "sum"},
    ),
    "a weighted mean": (
        lambda: classifier(lossfun=weighted_mean),
        make_importances,
        {"converter": to_pairs},
        ["normalizer"],
        {"weight_func": lambda batch: sum(importance for _, _, importance in batch)},
    ),
    "noise that test mode leaves": (
        lambda: classifier(lossfun=noisy),
        make_dataset,
        {},
        ["randomness", "unknown"],
        None,
    ),
}


@pytest.mark.parametrize("name", sorted(CLEAN))
def test_a_model_without_a_cause_is_equivalent(name):
    make, make_batch, kwargs = CLEAN[name]
    result = check_equivalence(make(), make_batch(), **kwargs)
    assert result, result
    assert result.is_equivalent and not result.causes
    assert 0 <= result.deviation <= result.tolerance
    assert str(result) == repr(result) == result.message
    assert result.message.startswith("The accumulated step is the full-batch step: with micro-batches of ")


@pytest.mark.parametrize("dtype, tolerance", [("float16", 0.02), ("float32", 1e-4), ("float64", 1e-6)])
def test_the_tolerance_is_that_of_the_narrowest_float(dtype, tolerance):
    batch = [(x.astype(dtype), t) for x, t in make_dataset()]
    with chainer.using_config("dtype", numpy.dtype(dtype)):
        result = check_equivalence(classifier(), batch)
    assert result, result
    assert result.tolerance == tolerance
    assert result.deviation <= 30 * numpy.finfo(dtype).eps


@pytest.mark.parametrize("name", sorted(CAUSES))
def test_each_cause_is_found(name):
    make, make_batch, kwargs, expected, _ = CAUSES[name]
    with chainer.using_config("dtype", chainer.mixed16 if "mixed" in name else numpy.float32):
        result = check_equivalence(make(), make_batch(), **kwargs)
    assert names(result) == expected, result
    assert not result and result.deviation > result.tolerance
    assert result.message.startswith("The accumulated step is not the full-batch step: with micro-batches of ")
    for cause in result.causes:
        assert f"- {cause.name}: {cause.explanation} {cause.remedy}" in result.message


@pytest.mark.parametrize("name", sorted(name for name, case in CAUSES.items() if case[-1]))
def test_what_the_message_says_helps(name):
    make, make_batch, kwargs, _, advice = CAUSES[name]
    result = check_equivalence(make(), make_batch(), **kwargs)
    assert all(argument in result.message for argument in advice), result
    assert check_equivalence(make(), make_batch(), **{**kwargs, **advice})


def test_loss_scaling_helps_against_float16():
    optimizer = optimizers.SGD().setup(in_float16(classifier, lossfun=tiny))
    updater = AccumulatingUpdater(serial(make_float16(), 12), optimizer)
    assert names(check_equivalence(updater, make_float16())) == ["float16"]
    optimizer.loss_scaling(scale=2.0**14)
    assert check_equivalence(updater, make_float16())


def test_in_test_mode_only_the_rest_is_checked():
    model = classifier(L.BatchNormalization(8), F.dropout)
    with chainer.using_config("train", False):
        assert check_equivalence(model, make_dataset())
        assert names(check_equivalence(model, make_partly_labelled())) == ["normalizer"]


def test_the_message_says_what_micro_batches_count_for():
    batch = make_partly_labelled(13)
    assert [count_valid(part) for part in _split(batch, 5)] == [3, 2, 3]
    for weight_func, instead in ((None, "."), (lambda part: len(part) + 0.5, ", not like 5.5, 5.5 and 3.5.")):
        result = check_equivalence(classifier(), batch, micro_batch_size=5, weight_func=weight_func)
        assert f"micro-batches of 5, 5 and 3 examples count like 3, 2 and 3{instead} Set weight_func" in result.message


def test_the_message_says_which_parameter_deviates_by_how_much():
    def regularized(y, t):
        return F.softmax_cross_entropy(y, t) + F.sum(model.predictor[2].b ** 2) / len(t)

    model = classifier()
    model.lossfun = regularized
    model.predictor[2].b.array[...] = 1
    batch = make_dataset(9)
    result = check_equivalence(model, batch, micro_batch_size=6)
    # Micro-batches of 6 and 3 examples: the gradient of the second term is (6/9) 2/6 + (3/9) 2/3, and not 2/9.
    x, t = chainer.dataset.concat_examples(batch)
    model.cleargrads()
    model(x, t).backward()
    largest = max(abs(param.grad).max() for param in model.params())
    scale = max(abs(model.predictor[2].b.grad).max(), largest / 100)
    assert result.parameter == "/predictor/1/b"
    numpy.testing.assert_allclose(result.deviation, 2 / 9 / scale, rtol=1e-4)
    assert f"the gradient of /predictor/1/b deviates by {result.deviation:.2g} of its largest entry" in result.message


def test_a_gradient_that_is_zero_but_for_rounding_does_not_count():
    # Softmax does not feel what is added to all scores.
    model = classifier(lossfun=lambda y, t: F.softmax_cross_entropy(y + F.broadcast_to(model.shift, y.shape), t))
    with model.init_scope():
        model.shift = chainer.Parameter(0.0, (1, 1))
    assert check_equivalence(model, make_dataset())


def test_a_parameter_that_is_not_trained_does_not_count():
    model = classifier(L.BatchNormalization(8))
    optimizers.SGD().setup(model)
    for layer in model.predictor[:1]:
        layer.disable_update()
    assert check_equivalence(model, make_dataset()).parameter != "/predictor/0/W"
    for link in (model.predictor[1], model.predictor[3]):
        link.disable_update()
    model.predictor[0].enable_update()
    assert check_equivalence(model, make_dataset()).parameter.startswith("/predictor/0/")


def test_weights_that_are_no_counts_are_shown_in_units_of_an_example():
    batch = make_importances()
    result = check_equivalence(classifier(lossfun=weighted_mean), batch, converter=to_pairs)
    weights = numpy.array([sum(example[2] for example in part) for part in _split(batch, None)])
    first, second, third = (f"{weight:.3g}" for weight in len(batch) * weights / weights.sum())
    assert f"micro-batches of 5, 5 and 2 examples count like {first}, {second} and {third}." in result.message


def test_float16_is_found_whatever_the_converter_returns():
    class Model(chainer.Chain):
        def __init__(self):
            super().__init__()
            self.scale = numpy.float16(2e-6)
            with self.init_scope():
                self.scores = L.Linear(None, 3)
                self.bn = L.BatchNormalization(3)
                self.unused = L.Linear(None, 3)

        def forward(self, x, t):
            with chainer.using_config("train", False):
                return F.softmax_cross_entropy(self.bn(self.scores(F.stack(x))), t) * x[0].dtype.type(self.scale)

    def convert(batch, device):
        x, t = chainer.dataset.concat_examples(batch, device)
        return {"x": list(x), "t": t}

    result = check_equivalence(in_float16(Model), make_float16(), converter=convert)
    assert names(result) == ["float16"]


def test_a_micro_batch_without_a_loss_needs_the_weight_zero():
    def mean_of_valid(y, t):
        with numpy.errstate(invalid="ignore", divide="ignore"):
            losses = F.softmax_cross_entropy(y, t, reduce="no")
            return F.sum(losses) / numpy.float32((t != -1).sum())

    batch = [(x, numpy.int32(t if i < 10 else -1)) for i, (x, t) in enumerate(make_dataset(12))]
    result = check_equivalence(classifier(lossfun=mean_of_valid), batch, micro_batch_size=5)
    assert names(result) == ["normalizer"] and result.deviation == float("inf")
    assert "micro-batches of 5, 5 and 2 examples count like 1, 1 and 0." in result.message
    assert check_equivalence(classifier(lossfun=mean_of_valid), batch, micro_batch_size=5, weight_func=count_valid)


def test_a_random_generator_of_its_own_is_found():
    rng = numpy.random.RandomState(0)
    model = classifier(lossfun=lambda y, t: F.softmax_cross_entropy(y * rng.rand(*y.shape).astype(y.dtype), t))
    assert names(check_equivalence(model, make_dataset())) == ["state", "unknown"]


def test_a_random_generator_of_the_model_is_found_and_stays_as_it_is():
    class Noisy(L.Classifier):
        def forward(self, x, t):
            return super().forward(x + self.rng.rand() * self.rng.rand(*x.shape).astype(x.dtype), t)

    model = Noisy(L.Linear(5, 3))
    model.rng = numpy.random.RandomState(0)
    assert names(check_equivalence(model, make_dataset())) == ["state", "unknown"]
    assert model.rng.rand() == numpy.random.RandomState(0).rand()


@pytest.mark.parametrize("value", ["an array", "a variable without a graph", "an error"])
def test_a_model_without_a_loss_in_test_mode_has_unknown_causes(value):
    class Model(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.l = L.Linear(5, 3)

        def forward(self, x, t):
            y = F.dropout(self.l(x))
            if chainer.config.train:
                return F.softmax_cross_entropy(y, t)
            if value == "an error":
                raise RuntimeError
            return y.array if value == "an array" else F.accuracy(y, t)

    result = check_equivalence(Model(), make_dataset())
    assert names(result) == ["randomness", "unknown"]
    assert "Apart from that" not in result.message


def test_a_loss_may_look_at_the_gradient_of_a_parameter_that_it_has_just_initialized():
    model = make_model()

    def lossfun(x, t):
        loss = model(x, t)
        assert all(param.grad is None or param.grad.shape == param.shape for param in model.params())
        return loss

    assert check_equivalence(model, make_dataset(12), loss_func=lossfun)


def test_many_micro_batches_are_not_all_listed():
    result = check_equivalence(classifier(), make_dataset(40), micro_batch_size=2)
    assert "with micro-batches of 2, 2, 2, 2, 2, 2, 2, 2 and 13 more examples" in result.message


def test_the_page_shows_what_is_printed(tmp_path, capsys):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "not_exact.md").read_text(encoding="utf-8")
    model = make_model()
    namespace = {
        "chainer": chainer,
        "model": model,
        "optimizer": optimizers.SGD().setup(model),
        "out": str(tmp_path),
        "train_iter": serial(make_dataset(48), 12),
    }
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, namespace)
    (shown,) = re.findall(r"\n```\n(The accumulated step.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == shown


# What belongs to the user stays as it is.


def see_contents(link):
    """Returns all that a link holds, as objects and as numbers."""
    contents = {f"{name}/{key}": value for name, each in link.namedlinks() for key, value in vars(each).items()}
    return contents, copy.deepcopy({key: value for key, value in contents.items() if key.split("/")[-1] != "_children"})


def assert_same_contents(link, before):
    objects, numbers = before
    objects_now, numbers_now = see_contents(link)
    assert objects_now.keys() == objects.keys()
    assert all(objects_now[key] is value for key, value in objects.items())
    for key, value in numbers.items():
        if isinstance(value, chainer.Variable):
            numpy.testing.assert_equal(numbers_now[key].array, value.array)
            assert numbers_now[key].grad_var is value.grad_var is None or isinstance(value, chainer.Parameter)
        elif isinstance(value, numpy.ndarray):
            numpy.testing.assert_array_equal(numbers_now[key], value)


class Everything(chainer.Chain):
    """A model that draws, remembers and counts, and of which a part is not initialized yet."""

    def __init__(self):
        super().__init__()
        self.calls = []
        with self.init_scope():
            self.lazy = L.Linear(None, 6)
            self.bn = L.BatchNormalization(6)
            self.lstm = L.LSTM(6, 4)
            self.scores = L.Linear(4, 3).add_hook(link_hooks.SpectralNormalization())
        self.lstm(numpy.ones((20, 6), numpy.float32))

    def forward(self, x, t):
        self.calls.append(len(x))
        h = F.dropout(self.lstm(self.bn(self.lazy(x))), 0.5 * random.random())  # some of what it remembers must be left
        loss = F.softmax_cross_entropy(self.scores(h), t)
        chainer.report({"loss": loss}, self)
        return loss


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(fails):
    random.seed(0)  # a dropout ratio close to one would hide the rest
    numpy.random.seed(0)
    model = Everything()
    optimizer = optimizers.Adam().setup(model)
    iterator = serial(make_dataset(), 20)
    updater = AccumulatingUpdater(iterator, optimizer, micro_batch_size=8, weight_func=len)
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    observation = {"before": 1}
    before = see_contents(model)
    rules = {name: param.update_rule for name, param in model.namedparams()}
    states = random.getstate(), numpy.random.get_state()
    config = dict(vars(chainer.config._local)), chainer.config.train
    with reporter.scope(observation):
        if fails:
            with pytest.raises(ConnectionError):
                check_equivalence(updater, make_dataset(20), loss_func=failing_at_the_third_call(model))
        else:
            assert names(check_equivalence(updater, make_dataset(20)))[:2] == ["state", "randomness"]
    assert observation == {"before": 1}
    assert_same_contents(model, before)
    assert model.lazy.W.array is None and model.calls == []
    assert {name: param.update_rule for name, param in model.namedparams()} == rules
    assert all(rule is not None and rule.t == 0 for rule in rules.values())
    assert (optimizer.t, updater.iteration, iterator.epoch_detail) == (0, 0, 0)
    assert random.getstate() == states[0]
    numpy.testing.assert_equal(numpy.random.get_state(), states[1])
    assert (dict(vars(chainer.config._local)), chainer.config.train) == config
    updater.update()
    assert optimizer.t == 1


def failing_at_the_third_call(model):
    calls = []

    def loss_func(x, t):
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError
        return model(x, t)

    return loss_func


class Outside(chainer.Chain):
    """A link outside the model: it draws, normalizes, remembers and counts, and a part is not initialized yet."""

    def __init__(self):
        super().__init__()
        numpy.random.seed(0)
        self.calls = []
        with self.init_scope():
            self.bn = L.BatchNormalization(5)
            self.lstm = L.LSTM(5, 5)
            self.lazy = L.Linear(None, 5)
        self.lstm(numpy.ones((20, 5), numpy.float32))
        self.lstm.h.unchain_backward()
        self.lstm.c.unchain_backward()

    def forward(self, x):
        self.calls.append(len(x))
        return self.lazy(self.lstm(F.dropout(self.bn(x))))


def refer(way, model, link):
    """Returns a loss function that passes its input through another link, to which it refers in some way."""
    if way == "closure":
        return lambda x, t: model(link(x), t)
    if way == "default argument":
        return lambda x, t, link=link: model(link(x), t)
    if way == "keyword default":
        return functools.partial(lambda x, t, *, use: model(use(x), t), use=link)
    if way == "list":
        links = [[link]]
        return lambda x, t: model(links[0][0](x), t)
    if way == "dict":
        links = {"first": {"link": link}}
        return lambda x, t: model(links["first"]["link"](x), t)
    if way == "helper function":
        return functools.partial(lambda helper, x, t: model(helper(x), t), refer("closure", F.identity, link))
    if way == "bound method":
        call = link.forward
        return lambda x, t: model(call(x), t)
    if way == "attribute of an object":
        holder = types.SimpleNamespace(inner=types.SimpleNamespace(link=link))
        return lambda x, t: model(holder.inner.link(x), t)
    if way == "class":
        holder = type("Holder", (), {"link": link})
        return lambda x, t: model(holder.link(x), t)
    if way == "module":
        module = types.ModuleType("module")
        module.link = link
        return lambda x, t: model(module.link(x), t)
    if way == "generator":
        links = itertools.repeat(link)
        return lambda x, t: model(next(links)(x), t)
    raise ValueError(way)


WAYS = ["closure", "default argument", "keyword default", "list", "dict", "bound method", "attribute of an object"]
WAYS += ["class", "module", "generator"]


@pytest.mark.parametrize("way", WAYS)
def test_a_link_outside_the_model_is_not_changed(way):
    model, link = L.Classifier(L.Linear(5, 3)), Outside()
    loss_func = refer(way, model, link)
    before, rules = see_contents(link), [param.update_rule for param in link.params()]
    for _ in range(2):
        assert "state" in names(check_equivalence(model, make_dataset(20), loss_func=loss_func))
        assert_same_contents(link, before)
        assert link.calls == [] and link.lazy.W.array is None
        assert [param.update_rule for param in link.params()] == rules
    assert not chainer.get_function_hooks() and not chainer._get_link_hooks()


def test_a_link_outside_the_model_starts_each_pass_from_its_state():
    model, link = L.Classifier(L.Linear(5, 3)), Outside()
    links, seen = itertools.repeat(link), []

    def loss_func(x, t):
        outside = next(links)
        seen.append((len(outside.calls), outside.bn.avg_mean.tolist(), outside.lstm.h.array.tolist()))
        with chainer.using_config("train", False):
            return model(outside(x), t)

    start = 0, link.bn.avg_mean.tolist(), link.lstm.h.array.tolist()
    assert names(check_equivalence(model, make_dataset(20), loss_func=loss_func))[:1] == ["state"]
    assert seen.count(start) >= 3


def in_list(link):
    return [link]


def normalize(links, x):
    links[0].bn.forward(x)
    return x


def normalize_by_the_function(links, x):
    bn = links[0].bn
    return F.batch_normalization(x, bn.gamma, bn.beta, running_mean=bn.avg_mean, running_var=bn.avg_var)


def use_a_parameter(links, x):
    return x * F.broadcast_to(links[0].bn.gamma, x.shape)


def reset_a_state(links, x):
    links[0].lstm.reset_state()
    return links[0](x)


def clear_gradients(links, x):
    links[0].cleargrads()
    return links[0](x)


def follow_slowly(links, x):
    for param in links[0].bn.params():
        param.array *= 0.9
    return links[0](x)


def train(links, x):
    bn = links[0].bn
    optimizers.Adam().setup(bn).update(lambda: F.sum(bn(x) ** 2))
    return x


USES = [normalize, normalize_by_the_function, use_a_parameter, reset_a_state, clear_gradients, follow_slowly, train]


@pytest.mark.parametrize("use", USES)
def test_whatever_is_done_to_a_link_outside_the_model_is_undone(use):
    model, link = L.Classifier(L.Linear(5, 3)), Outside()
    for param in link.params(include_uninit=False):
        param.grad = numpy.full_like(param.array, 3)
    before = see_contents(link)
    grads = [(param, param.grad) for param in link.params(include_uninit=False)]
    links = [link]
    check_equivalence(model, make_dataset(20), loss_func=lambda x, t: model(use(links, x), t))
    assert_same_contents(link, before)
    assert all(param.grad is grad and (grad == 3).all() for param, grad in grads)


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_a_link_outside_the_model_is_put_back_after_an_error(error):
    model, link = L.Classifier(L.Linear(5, 3)), Outside()
    before = see_contents(link)
    links, calls = itertools.repeat(link), []

    def loss_func(x, t):
        calls.append(1)
        loss = model(next(links)(x), t)
        if len(calls) == 3:
            raise error
        return loss

    with pytest.raises(error):
        check_equivalence(model, make_dataset(20), loss_func=loss_func)
    assert_same_contents(link, before)
    assert not chainer.get_function_hooks() and not chainer._get_link_hooks()


def test_a_check_may_be_made_within_another():
    model, other, link = L.Classifier(L.Linear(5, 3)), L.Classifier(L.Linear(5, 3)), Outside()
    before, links, results = see_contents(link), itertools.repeat(link), []

    def normalized(x, t, model=other):
        return model(next(links).bn(x), t)

    def loss_func(x, t):
        if not results:
            results.append(check_equivalence(other, make_dataset(20), loss_func=normalized))
        return normalized(x, t, model)

    assert names(check_equivalence(model, make_dataset(20), loss_func=loss_func)) == ["batch normalization"]
    assert names(results[0]) == ["batch normalization"]
    assert_same_contents(link, before)


# What is checked, and how.


def test_the_settings_are_those_of_the_updater():
    devices = []

    @chainer.dataset.converter()
    def convert(batch, device):
        devices.append(device)
        return {"inputs": [device.send(x) for x, _ in batch], "labels": [device.send(t) for _, t in batch]}

    def loss_func(inputs, labels):
        sizes.append(len(inputs))
        return F.softmax_cross_entropy(model.predictor(F.stack(inputs)), F.stack(labels).array)

    sizes, model = [], make_model()
    updater = AccumulatingUpdater(
        serial(make_dataset(), 10),
        optimizers.SGD().setup(model),
        convert,
        loss_func=loss_func,
        input_device="@numpy",
        micro_batch_size=3,
        weight_func=count_valid,
    )
    assert check_equivalence(updater, make_partly_labelled())
    assert set(sizes) == {12, 3, 2, 1} and set(devices) == {chainer.get_device("@numpy")}
    sums = AccumulatingUpdater(
        serial(make_dataset(), 10), optimizers.SGD().setup(classifier(lossfun=total)), loss_reduction="sum"
    )
    assert check_equivalence(sums, make_dataset())
    assert names(check_equivalence(sums, make_dataset(), loss_reduction="mean")) == ["sum"]


def test_what_an_argument_says_is_tried_instead_of_what_the_updater_has():
    optimizer = optimizers.SGD().setup(classifier())
    updater = AccumulatingUpdater(serial(make_partly_labelled(), 12), optimizer, micro_batch_size=4)
    assert not check_equivalence(updater, updater.get_iterator("main").next())
    assert check_equivalence(updater, make_partly_labelled(), weight_func=count_valid)


def test_the_updater_of_setup_trainer_can_be_checked(tmp_path):
    trainer = chainer_accum.setup_trainer_with_accumulation(
        make_model(), serial(make_dataset(), 10), optimizers.SGD(), None, 2, 1, out=str(tmp_path)
    )
    assert check_equivalence(trainer.updater, make_dataset(20))


@settings(deadline=None)
@given(st.integers(2, 60), st.one_of(st.none(), st.integers(1, 70)))
def test_micro_batches_never_grow_and_are_not_all_of_one_size(size, micro_batch_size):
    batch = list(range(size))
    parts = _split(batch, micro_batch_size)
    sizes = [len(part) for part in parts]
    assert sum(parts, []) == batch
    assert len(parts) > 1 and min(sizes) > 0
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) == 1 or min(sizes) < max(sizes) <= (micro_batch_size or size)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.booleans(), min_size=6, max_size=14).filter(any))
def test_the_number_of_valid_labels_is_the_right_weight_whatever_is_ignored(is_valid):
    batch = [(x, numpy.int32(t if valid else -1)) for valid, (x, t) in zip(is_valid, make_dataset(len(is_valid)))]
    assert check_equivalence(make_model(), batch, weight_func=count_valid)
    parts = _split(batch, None)
    shares = [count_valid(part) / sum(is_valid) for part in parts]
    are_right = numpy.allclose(shares, [len(part) / len(batch) for part in parts])
    assert names(check_equivalence(make_model(), batch)) == ([] if are_right else ["normalizer"])


def test_a_batch_without_a_valid_label_is_refused():
    batch = [(x, numpy.int32(-1)) for x, _ in make_dataset(6)]
    with pytest.raises(ValueError, match="the gradient of the whole batch must not be zero"):
        check_equivalence(make_model(), batch, weight_func=count_valid)


BAD_ARGUMENTS = {
    "a model that is none": (
        lambda: check_equivalence(F.sum, make_dataset()),
        TypeError,
        "model_or_updater must be a Link or an AccumulatingUpdater, got <function sum .*; pass the model, and the loss",
    ),
    "no list": (
        lambda: check_equivalence(make_model(), chainer.dataset.concat_examples(make_dataset())),
        TypeError,
        r"batch must be a list of examples, got \(array",
    ),
    "an empty batch": (
        lambda: check_equivalence(make_model(), []),
        ValueError,
        "batch must have two or more examples, got 0; pass as many as in an effective batch",
    ),
    "one example": (
        lambda: check_equivalence(make_model(), make_dataset(1)),
        ValueError,
        "batch must have two or more examples, got 1",
    ),
    "a model without parameters": (
        lambda: check_equivalence(chainer.Chain(), make_dataset()),
        ValueError,
        "the model must have a parameter to train, got Chain without one; assign",
    ),
    "a loss that is no Variable": (
        lambda: check_equivalence(make_model(), make_dataset(), loss_func=lambda x, t: 1.0),
        TypeError,
        "the loss function must return a chainer.Variable, got float",
    ),
    "a loss that is not a scalar": (
        lambda: check_equivalence(classifier(lossfun=lambda y, t: y), make_dataset()),
        ValueError,
        r"the loss must be a scalar, got a Variable of shape \(50, 3\)",
    ),
    "a loss without a graph": (
        lambda: check_equivalence(make_model(), make_dataset(), loss_func=lambda x, t: chainer.Variable(x[:1, 0])),
        ValueError,
        "the gradient of the whole batch must not be zero",
    ),
    "a loss that does not depend on the model": (
        lambda: check_equivalence(make_model(), make_dataset(), loss_func=lambda x, t: F.sum(x)),
        RuntimeError,
        "a loss must depend on the parameters of the optimizer's target, got none that depends on Classifier",
    ),
    "a gradient that is not finite": (
        lambda: check_equivalence(classifier(lossfun=lambda y, t: F.sum(y) * numpy.float32("inf")), make_dataset()),
        ValueError,
        r"the gradient of the whole batch must be finite, got (inf|nan|-inf) for /predictor/",
    ),
    "a gradient that is zero": (
        lambda: check_equivalence(classifier(lossfun=lambda y, t: 0 * F.sum(y)), make_dataset()),
        ValueError,
        "the gradient of the whole batch must not be zero, got zero for all parameters",
    ),
    "a converter that is none": (
        lambda: check_equivalence(make_model(), make_dataset(), converter=3),
        TypeError,
        "converter must be callable, got 3",
    ),
    "a loss function that is none": (
        lambda: check_equivalence(make_model(), make_dataset(), loss_func="mse"),
        TypeError,
        "loss_func must be callable, got 'mse'",
    ),
    "a micro-batch size of zero": (
        lambda: check_equivalence(make_model(), make_dataset(), micro_batch_size=0),
        ValueError,
        "micro_batch_size must be an int of 1 or more, got 0; use None",
    ),
    "a weight for weight_func": (
        lambda: check_equivalence(make_model(), make_dataset(), weight_func=2),
        TypeError,
        "weight_func must be callable, got 2",
    ),
    "a negative weight": (
        lambda: check_equivalence(make_model(), make_dataset(), weight_func=lambda batch: -1),
        ValueError,
        "the value of weight_func must be finite and not negative, got -1.0",
    ),
    "an unknown reduction": (
        lambda: check_equivalence(make_model(), make_dataset(), loss_reduction="max"),
        ValueError,
        "loss_reduction must be one of 'mean', 'sum', got 'max'",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_ARGUMENTS))
def test_a_bad_argument_is_refused(name):
    call, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_cached_gradient_updater_is_refused():
    optimizer = chainer.optimizers.SGD().setup(make_model())
    updater = chainer_accum.CachedGradientUpdater(serial(make_dataset(), 6), optimizer, loss_func=F.sum)
    with pytest.raises(TypeError, match="model_or_updater must not be a CachedGradientUpdater"):
        check_equivalence(updater, make_dataset(6))
