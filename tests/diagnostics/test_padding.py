"""check_equivalence tells a model that reads padding from a loss that compares examples."""

from __future__ import annotations

import collections
import functools

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, check_equivalence
from chainer import optimizers
from chainer_accum.functions import whole_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import serial

LENGTHS = (4, 1, 3, 5, 2, 2, 9, 6)
LONGEST = max(LENGTHS)
DIMENSION = 3


def make_sequences(lengths=LENGTHS):
    """Returns sequences of vectors, each with a label."""
    random = numpy.random.RandomState(1)
    return [(random.standard_normal((n, DIMENSION)).astype("f"), numpy.int32(random.randint(3))) for n in lengths]


def pad(batch, device=None):
    """Pads to the longest of the sequences, as is usual."""
    return chainer.dataset.concat_examples(batch, device, padding=0)


def pad_fully(batch, device=None):
    """Pads to the longest of all sequences."""
    return pad([(numpy.pad(x, [(0, LONGEST - len(x)), (0, 0)], "constant"), *rest) for x, *rest in batch], device)


def pad_with_lengths(batch, device=None):
    x, t = pad(batch, device)
    return {"x": x, "t": t, "lengths": numpy.array([len(x) for x, _ in batch])}


class Model(chainer.Chain):
    """Maps padded sequences of vectors to scores: some features for each sequence, and a layer on top."""

    def __init__(self, features, lossfun=F.softmax_cross_entropy, *layers):
        super().__init__()
        self.features, self.lossfun = features, lossfun
        with self.init_scope():
            self.conv = L.ConvolutionND(1, DIMENSION, 6, ksize=3, pad=1, initial_bias=0.3)
            self.layers = chainer.Sequential(*layers, F.relu)
            self.lstm = L.LSTM(DIMENSION, 6)
            self.scores = L.Linear(6, 3)

    def forward(self, x, t, **lengths):
        return self.lossfun(self.scores(self.features(self, x, **lengths)), t)

    def convolve(self, x):
        return self.layers(self.conv(F.transpose(x, (0, 2, 1))))


def convolution(model, x):
    """Adds up what a convolution returns for all positions, padded ones included."""
    return F.sum(model.convolve(x), axis=2)


def mean(model, x):
    """Divides by the padded length."""
    return F.mean(model.convolve(x), axis=2)


def rnn(model, x):
    """Runs a recurrent network to the end of the padding."""
    model.lstm.reset_state()
    for step in range(x.shape[1]):
        h = model.lstm(x[:, step])
    return h


def masked(model, x, lengths):
    """Reads no padding."""
    h = model.convolve(x)
    mask = numpy.arange(x.shape[1]) < lengths[:, None, None]
    return F.sum(F.where(numpy.broadcast_to(mask, h.shape), h, numpy.zeros_like(h.array)), axis=2)


def total(y, t):
    return F.sum(F.softmax_cross_entropy(y, t, reduce="no"))


def by_label(y, t):
    """Divides by something else than the number of examples."""
    return total(y, t) / (t.sum() + len(t))


def n_pair(y, t):
    return F.softmax_cross_entropy(F.matmul(y, y, transb=True), numpy.arange(len(t), dtype=numpy.int32))


class PerPosition(chainer.Chain):
    """A linear model of each vector, whose gradients of differently padded batches differ by a factor only."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce
        with self.init_scope():
            self.layer = L.Linear(DIMENSION, 1, nobias=True)

    def forward(self, x, t, **lengths):
        y = self.layer(x, n_batch_axes=2)[:, :, 0]
        return self.reduce((y - numpy.float32(2)) * x[:, :, 0], **lengths)  # nothing where there is padding


def over_positions(losses):
    return F.mean(losses)


def over_tokens(losses, lengths):
    return F.sum(losses) / lengths.sum()


def names(result):
    return [cause.name for cause in result.causes]


def count_tokens(batch):
    return sum(len(x) for x, _ in batch)


def count_by_label(batch):
    return sum(t + 1 for _, t in batch)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Model(convolution),
        lambda: Model(mean),
        lambda: Model(rnn),
        lambda: PerPosition(over_positions),
    ],
    ids=["convolution", "mean of features", "recurrent network", "mean of losses"],
)
def test_a_model_that_reads_padding_is_found_and_padding_fully_helps(make, micro_batch_size):
    model, batch = make(), make_sequences()
    result = check_equivalence(model, batch, converter=pad, micro_batch_size=micro_batch_size)
    assert names(result) == ["padding"], result
    assert "- padding: The gradient of a micro-batch depends on the size to which its examples are padded" in str(
        result
    )
    assert check_equivalence(model, batch, converter=pad_fully, micro_batch_size=micro_batch_size)


def test_a_mask_helps_as_well():
    assert check_equivalence(Model(masked), make_sequences(), converter=pad_with_lengths)


@pytest.mark.parametrize(
    "make, kwargs, others, advice",
    [
        (lambda: Model(convolution, total), {}, ["sum"], {"loss_reduction": "sum"}),
        (lambda: Model(convolution), {"loss_reduction": "sum"}, ["mean"], {"loss_reduction": "mean"}),
        (lambda: Model(convolution, by_label), {}, ["normalizer"], {"weight_func": count_by_label}),
        (lambda: Model(convolution, by_label), {"weight_func": count_by_label}, [], {}),
        (lambda: Model(convolution), {"weight_func": count_by_label}, ["mean"], {"weight_func": len}),
    ],
    ids=["sum", "mean", "normalizer", "weight_func", "wrong weight_func"],
)
def test_what_else_is_wrong_is_found_in_spite_of_padding(make, kwargs, others, advice):
    model, batch = make(), make_sequences()
    assert names(check_equivalence(model, batch, converter=pad, **kwargs)) == ["padding", *others]
    assert names(check_equivalence(model, batch, converter=pad_fully, **kwargs)) == others
    assert names(check_equivalence(model, batch, converter=pad, **{**kwargs, **advice})) == ["padding"]


@pytest.mark.parametrize(
    "layer, name",
    [(lambda: L.BatchNormalization(6), "batch normalization"), (lambda: F.dropout, "randomness")],
    ids=["batch normalization", "dropout"],
)
def test_padding_is_found_in_spite_of_layers_that_are_in_the_way(layer, name):
    model = Model(convolution, F.softmax_cross_entropy, layer())
    assert names(check_equivalence(model, make_sequences(), converter=pad)) == [name, "padding"]
    assert names(check_equivalence(model, make_sequences(), converter=pad_fully)) == [name]


@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float64])
def test_padding_is_found_in_other_floats(dtype):
    batch = [(x.astype(dtype), t) for x, t in make_sequences()]
    with chainer.using_config("dtype", numpy.dtype(dtype)):
        result = check_equivalence(Model(rnn), batch, converter=pad)
    assert names(result) == ["padding"], result


# What is not about padding.


@pytest.mark.parametrize(
    "make, convert",
    [
        (lambda: Model(masked, n_pair), pad_with_lengths),
        (lambda: Model(convolution, n_pair), pad),  # which reads padding, but not only
        (lambda: Model(convolution, n_pair), pad_fully),
    ],
    ids=["masked", "reads padding", "padded fully"],
)
def test_a_comparison_of_sequences_of_different_lengths_is_still_one(make, convert):
    assert names(check_equivalence(make(), make_sequences(), converter=convert)) == ["comparison"]


def test_a_mean_over_tokens_that_reads_no_padding_is_a_normalizer():
    model, batch = PerPosition(over_tokens), make_sequences()
    assert names(check_equivalence(model, batch, converter=pad_with_lengths)) == ["normalizer"]
    assert check_equivalence(model, batch, converter=pad_with_lengths, weight_func=count_tokens)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=3, max_size=9),
    is_fixed=st.booleans(),
    lossfun=st.sampled_from([F.softmax_cross_entropy, total, by_label]),
)
def test_padding_is_blamed_only_if_the_parts_are_padded_differently(lengths, is_fixed, lossfun):
    lengths = [lengths[0]] * len(lengths) if is_fixed else sorted(lengths)
    result = check_equivalence(Model(convolution, lossfun), make_sequences(lengths), converter=pad, micro_batch_size=2)
    # With ascending lengths, the last part is padded like the batch. Is another part padded to another length?
    sizes = {max(lengths[start : start + 2]) for start in range(0, len(lengths), 2)}
    assert ("padding" in names(result)) == (len(sizes) > 1)


# What converters return.


Pair = collections.namedtuple("Pair", "x t")


@pytest.mark.parametrize(
    "arrange, forward",
    [
        (lambda x, t: {"x": x, "t": t}, None),
        (lambda x, t: (Pair(x, t),), lambda model, pair: model(pair.x, pair.t)),
        (lambda x, t: [x, {"t": t}], lambda model, both: model(both[0], **both[1])),
        (lambda x, t: (chainer.Variable(x), t, None), lambda model, x, t, _: model(x, t)),
        (lambda x, t: (x, list(t), x.shape[1]), lambda model, x, t, size: model(x[:, :size], numpy.array(t))),
    ],
    ids=["dictionary", "named tuple", "list", "variable", "list of labels and a number"],
)
def test_the_rows_of_whatever_a_converter_returns_are_found(arrange, forward):
    model = Model(convolution)
    loss_func = functools.partial(forward, model) if forward else None
    result = check_equivalence(
        model, make_sequences(), converter=lambda batch, device: arrange(*pad(batch, device)), loss_func=loss_func
    )
    assert names(result) == ["padding"], result


class Padded:
    """Arrays in an object that only the model understands."""

    def __init__(self, x, t):
        self.x, self.t = x, t


@pytest.mark.parametrize(
    "arrange, forward",
    [
        (lambda x, t: (x, Padded(x, t)), lambda model, x, both: model(both.x, both.t)),
        (lambda x, t: (x.transpose(1, 0, 2), t), lambda model, x, t: model(x.transpose(1, 0, 2), t)),
        (lambda x, t: (x.reshape(-1, DIMENSION), t), lambda model, x, t: model(x.reshape(len(t), -1, DIMENSION), t)),
    ],
    ids=["object", "time first", "one row for each position"],
)
def test_what_cannot_be_cut_by_example_stays_a_comparison(arrange, forward):
    model = Model(convolution)
    result = check_equivalence(
        model,
        make_sequences(),
        converter=lambda batch, device: arrange(*pad(batch, device)),
        loss_func=functools.partial(forward, model),
    )
    assert names(result) == ["comparison"], result


def test_a_model_that_refuses_longer_padding_stays_a_comparison():
    def forward(x, t, lengths):
        assert x.shape[1] == lengths.max()
        return model(x, t)

    model = Model(convolution)
    result = check_equivalence(model, make_sequences(), converter=pad_with_lengths, loss_func=forward)
    assert names(result) == ["comparison"], result


def test_the_converter_and_device_are_those_of_the_updater():
    devices = []

    @chainer.dataset.converter()
    def convert(batch, device):
        devices.append(device)
        return pad(batch, device)

    updater = AccumulatingUpdater(
        serial(make_sequences(), 8), optimizers.SGD().setup(Model(rnn)), convert, input_device="@numpy"
    )
    assert names(check_equivalence(updater, make_sequences())) == ["padding"]
    assert set(devices) == {chainer.get_device("@numpy")}


# Lockstep.


@pytest.mark.parametrize(
    "lossfun, layer",
    [
        (F.softmax_cross_entropy, L.BatchNormalization),
        (lambda y, t: whole_batch(n_pair, y, t), None),
    ],
    ids=["batch normalization", "a comparison in the whole batch"],
)
def test_padding_is_found_in_lockstep(lossfun, layer):
    model = Model(convolution, lossfun, *([layer(6)] if layer else []))
    result = check_equivalence(model, make_sequences(), converter=pad, lockstep="memory")
    assert names(result) == ["padding"], result
    assert check_equivalence(model, make_sequences(), converter=pad_fully, lockstep="memory")


def test_another_cause_in_lockstep_is_still_found():
    model = Model(convolution, n_pair)
    for convert in (pad, pad_fully):
        assert names(check_equivalence(model, make_sequences(), converter=convert, lockstep="memory")) == ["comparison"]
    model = Model(convolution, total)
    result = check_equivalence(model, make_sequences(), converter=pad, lockstep="memory")
    assert names(result) == ["padding", "sum"]
