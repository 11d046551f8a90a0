"""A loss that compares the examples of a batch makes the step of the whole batch, in the memory of a micro-batch."""

from __future__ import annotations

import functools
import tracemalloc
import warnings
import weakref

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import CachedGradientUpdater
from chainer import optimizers
from chainer.link_hooks import SpectralNormalization
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from helpers import (
    CountingUpdater,
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_updater,
    on_device,
    run,
    seed,
    serial,
    to_host,
)

BATCH = 24
WAYS = {
    "gathered": (6, {"accumulation_steps": 4}),
    "split": (24, {"micro_batch_size": 7}),
    "gathered and split": (8, {"accumulation_steps": 3, "micro_batch_size": 3}),
}
each_way = pytest.mark.parametrize("way", sorted(WAYS))


def initial(seed):
    return chainer.initializers.LeCunNormal(rng=numpy.random.RandomState(seed))


def make_mlp():
    return chainer.Sequential(L.Linear(5, 8, initialW=initial(0)), F.tanh, L.Linear(8, 4, initialW=initial(1)))


def make_lazy_mlp():
    return chainer.Sequential(L.Linear(None, 8), F.tanh, L.Linear(None, 4))


def make_dropout():
    if helpers.DEVICE is not None:
        pytest.skip("a GPU does not draw for a batch what it draws for its parts")
    return chainer.Sequential(
        L.Linear(5, 8, initialW=initial(0)), F.tanh, F.dropout, L.Linear(8, 4, initialW=initial(1))
    )


def make_cnn():
    return chainer.Sequential(
        lambda x: x[:, None, :, None] * x[:, None, None, :],
        L.Convolution2D(1, 4, 3, initialW=initial(0)),
        F.tanh,
        L.Linear(36, 4, initialW=initial(1)),
    )


class Model(chainer.Chain):
    """An encoder and a loss with a parameter of its own. Both report."""

    def __init__(self, make_body=make_mlp, loss="nt_xent"):
        super().__init__()
        with self.init_scope():
            self.body = make_body()
            self.log_scale = chainer.Parameter(1.0, (1, 1))
        self.loss = getattr(self, loss)

    def encode(self, x, t):
        z = self.body(x)
        chainer.report({"norm": F.mean(z**2)}, self)
        return z, t

    def encode_quietly(self, x, t):
        return self.body(x), t

    def encode_views(self, x, t):
        return self.body(x), self.body(x[:, ::-1])

    def n_pair(self, z, t):
        """Pairs each example with the one that follows it, and compares it with all."""
        return self.pairs(z, z[self.xp.roll(self.xp.arange(len(t)), -1)])

    def triplet(self, z, t):
        """Compares each example with the farthest one of its label and the nearest one of another."""
        z = F.normalize(z)
        distances = ((z.array[:, None] - z.array) ** 2).sum(axis=2)
        is_same = t[:, None] == t
        positive = self.xp.where(is_same, distances, -numpy.inf).argmax(axis=1)
        negative = self.xp.where(is_same, numpy.inf, distances).argmin(axis=1)
        return self.report(F.triplet(z, z[positive], z[negative], margin=0.5))

    def nt_xent(self, z, t):
        """Compares each example with all others; those of its label are to be nearest."""
        # Dropout may leave nothing of an example. With the default eps, the gradient of its norm is so large that
        # parameters diverge, and rounding with them.
        z = F.normalize(z, eps=0.1)
        similarities = F.exp(F.matmul(z, z, transb=True) * F.exp(self.log_scale))
        others = numpy.float32(1) - self.xp.eye(len(t), dtype=numpy.float32)
        same = others * (t[:, None] == t)
        share = (F.sum(similarities * same, axis=1) + 1e-3) / (F.sum(similarities * others, axis=1) + 1e-3)
        return self.report(-F.mean(F.log(share)))

    def pairs(self, first, second):
        """Each row of the one is to find its partner among all rows of the other."""
        similarities = F.matmul(first, second, transb=True) * F.exp(self.log_scale)
        return self.report(F.softmax_cross_entropy(similarities, self.xp.arange(len(first), dtype=numpy.int32)))

    def report(self, loss):
        chainer.report({"loss": loss}, self)
        return loss


def call(function, arguments):
    if isinstance(arguments, dict):
        return function(**arguments)
    return function(*(arguments if isinstance(arguments, tuple) else (arguments,)))


def whole_loss(encode, loss, *args):
    return call(loss, encode(*args))


def joined_loss(encode, loss, micro_batch_size, *args):
    """The loss of the whole batch with the graphs of all micro-batches alive: what no memory is saved for."""
    parts = -(-len(args[0]) // micro_batch_size)
    ends = [len(args[0]) * part // parts for part in range(parts + 1)]
    outputs = [encode(*[arg[start:end] for arg in args]) for start, end in zip(ends, ends[1:])]
    return loss(*[F.concat([F.cast(each, numpy.float32) for each in column], axis=0) for column in zip(*outputs)])


def compare(
    way,
    make_model=Model,
    encode="encode",
    make_optimizer=lambda: optimizers.MomentumSGD(0.1),
    dataset=None,
    updates=6,
    prepare=lambda optimizer: None,
    make_loss=lambda model, encode: functools.partial(whole_loss, encode, model.loss),
    **common,
):
    """Trains with the whole batch and with cached gradients, asserts that all is equal, and returns both updaters."""
    dataset = make_dataset() if dataset is None else dataset
    batch_size, accumulation = WAYS[way] if isinstance(way, str) else way
    updaters, steps, drawn = [], [], []
    for updater_class, size in ((StandardUpdater, BATCH), (CachedGradientUpdater, batch_size)):
        seed(0)
        model = make_model()
        encoder = getattr(model, encode)
        if updater_class is StandardUpdater:
            kwargs = {"loss_func": make_loss(model, encoder)}
        else:
            kwargs = {"loss_func": model.loss, "encoder": encoder, **accumulation}
        updater = make_updater(updater_class, serial(dataset, size), make_optimizer(), model, **kwargs, **common)
        prepare(updater.get_optimizer("main"))
        updaters.append(updater)
        steps.append(run(updater, updates))
        drawn.append(numpy.random.rand())
    expected, actual = (updater.get_optimizer("main") for updater in updaters)
    assert_same_parameters(actual.target, expected.target)
    assert_same_persistent_values(actual.target, expected.target)
    assert_same_optimizer_state(actual, expected)
    assert_same_steps(steps[1], steps[0])
    assert drawn[1] == drawn[0]
    return updaters


def persistent_values(model):
    return {
        (name, key): numpy.copy(to_host(getattr(link, key)))
        for name, link in model.namedlinks()
        for key in link._persistent
    }


def assert_same_persistent_values(actual, expected, tolerance=1e-6):
    actual, expected = (each if isinstance(each, dict) else persistent_values(each) for each in (actual, expected))
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        numpy.testing.assert_allclose(value, expected[key], rtol=tolerance, atol=tolerance, err_msg=str(key))


@each_way
@pytest.mark.parametrize("make_body", [make_mlp, make_cnn, make_dropout, make_lazy_mlp])
@pytest.mark.parametrize("loss", ["n_pair", "triplet", "nt_xent"])
def test_the_step_is_that_of_the_whole_batch(way, make_body, loss):
    compare(way, functools.partial(Model, make_body, loss))


@pytest.mark.parametrize("loss", ["n_pair", "triplet", "nt_xent"])
def test_the_gradient_is_that_of_the_whole_batch_and_plain_accumulation_has_another(loss):
    grads = {}
    for name in ("whole", "cached", "plain"):
        model = Model(loss=loss)
        kwargs = {"loss_func": functools.partial(whole_loss, model.encode, model.loss)}
        if name == "cached":
            kwargs = {"loss_func": model.loss, "encoder": model.encode}
        if name != "whole":
            kwargs["micro_batch_size"] = 6
        updater_class = CachedGradientUpdater if name == "cached" else chainer_accum.AccumulatingUpdater
        make_updater(updater_class, serial(make_dataset(), BATCH), optimizers.SGD(), model, **kwargs).update()
        grads[name] = numpy.concatenate([to_host(param.grad).ravel() for _, param in sorted(model.namedparams())])
    numpy.testing.assert_allclose(grads["cached"], grads["whole"], rtol=1e-6, atol=1e-6)
    assert abs(grads["plain"] - grads["whole"]).max() > 0.05 * abs(grads["whole"]).max()


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 20),
    accumulation_steps=st.integers(1, 5),
    micro_batch_size=st.one_of(st.none(), st.integers(1, 20)),
    repeat=st.booleans(),
    shuffle=st.booleans(),
    make_body=st.sampled_from([make_mlp, make_dropout] if helpers.DEVICE is None else [make_mlp]),
)
def test_any_sizes(size, batch_size, accumulation_steps, micro_batch_size, repeat, shuffle, make_body):
    dataset = [(x.astype(numpy.float64), t) for x, t in make_dataset(size)]
    results = []
    for updater_class in (CountingUpdater, CachedGradientUpdater):
        seed(0)
        with chainer.using_config("dtype", numpy.float64):
            model = Model(make_body)
        kwargs, batch = {"loss_func": functools.partial(whole_loss, model.encode, model.loss)}, batch_size
        if updater_class is CountingUpdater:
            batch *= accumulation_steps
            kwargs["batches"] = serial(dataset, batch_size, repeat=repeat)
            kwargs["accumulation_steps"] = accumulation_steps
        else:
            kwargs = {
                "loss_func": model.loss,
                "encoder": model.encode,
                "accumulation_steps": accumulation_steps,
                "micro_batch_size": micro_batch_size,
            }
        sampler = chainer.iterators.ShuffleOrderSampler(numpy.random.RandomState(0)) if shuffle else None
        iterator = serial(dataset, batch, repeat=repeat, shuffle=None, order_sampler=sampler)
        updater = make_updater(updater_class, iterator, optimizers.MomentumSGD(0.1), model, **kwargs)
        steps = []
        try:
            for _ in range(4):
                steps.extend(run(updater, 1))
        except StopIteration:
            assert not repeat
        results.append((updater, steps, numpy.random.rand()))
    (expected, expected_steps, expected_draw), (actual, steps, draw) = results
    assert actual.iteration == expected.iteration
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target, 1e-12)
    assert_same_optimizer_state(actual.get_optimizer("main"), expected.get_optimizer("main"), 1e-12)
    assert_same_steps(steps, expected_steps, 1e-12)
    assert draw == expected_draw


@each_way
def test_adam_over_several_epochs(way):
    updaters = compare(way, make_optimizer=lambda: optimizers.Adam(eps=1e-4), updates=12)
    for updater in updaters:
        assert updater.epoch == 5
        model = updater.get_optimizer("main").target
        assert abs(model.log_scale.array - 1) > 1e-3  # the parameter of the loss has learned, too


@each_way
def test_hooks_and_loss_scaling(way):
    def prepare(optimizer):
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.1))

    compare(way, prepare=prepare, loss_scale=1024.0)


class Overflowing(Model):
    """Has a loss whose gradient overflows in the second update."""

    calls = 0

    def nt_xent(self, z, t):
        self.calls += 1
        return super().nt_xent(z, t) + F.sum(z) * numpy.float32(3e38 if self.calls == 2 else 0)


def test_an_overflow_skips_the_update():
    def prepare(optimizer):
        optimizer.loss_scaling()
        optimizer._loss_scale = 1024.0

    with pytest.warns(UserWarning, match="Non finite number found"), numpy.errstate(all="ignore"):
        updaters = compare("split", Overflowing, prepare=prepare, updates=3)
    for updater in updaters:
        assert updater.get_optimizer("main").target.body[0].W.update_rule.t == 2
    assert len({updater.get_optimizer("main")._loss_scale for updater in updaters}) == 1


def test_loss_scaling_saves_gradients_in_half_precision_from_vanishing():
    grads = []
    for loss_scale in (None, 2.0**12):
        with chainer.using_config("dtype", numpy.float16):
            model = chainer.Chain(body=L.Linear(5, 4, initialW=initial(0)))
        dataset = [(x.astype(numpy.float16), t) for x, t in make_dataset()]
        updater = make_updater(
            CachedGradientUpdater,
            serial(dataset, BATCH),
            optimizers.SGD(),
            model,
            encoder=lambda x, t, model=model: model.body(x),
            loss_func=lambda z: F.mean(F.matmul(z, z, transb=True)) * numpy.float16(1e-4),
            loss_scale=loss_scale,
            micro_batch_size=5,
        )
        updater.update()
        grads.append(to_host(model.body.W.grad).astype(numpy.float32) / (loss_scale or 1))
    assert model.body.W.grad.dtype == numpy.float16
    lossy, exact = grads
    assert (exact == 0).sum() == 0 and abs(lossy - exact).max() > 0.01 * abs(exact).max()


class TwoTowers(chainer.Chain):
    """One encoder for what comes in and one for what belongs to it, by name."""

    def __init__(self):
        super().__init__(image=make_mlp(), text=L.EmbedID(3, 4, initialW=initial(2)))

    def encode(self, x, t):
        return {"images": self.image(x), "texts": self.text(t), "labels": t}

    def loss(self, texts, images, labels):
        same = (labels[:, None] == labels).astype(numpy.float32)
        return F.mean((F.matmul(images, texts, transb=True) - same) ** 2)


@each_way
def test_two_towers_by_name(way):
    compare(way, TwoTowers)


@each_way
def test_two_views_through_one_encoder(way):
    compare(way, functools.partial(Model, loss="pairs"), "encode_views")


def test_the_target_of_the_optimizer_is_the_encoder_by_default():
    results = []
    for model in (make_mlp(), make_mlp()):
        updater = make_updater(
            CachedGradientUpdater,
            serial([x for x, _ in make_dataset()], BATCH),
            optimizers.SGD(0.1),
            model,
            encoder=model.forward if results else None,
            loss_func=lambda z: F.mean(F.matmul(z, z, transb=True) ** 2),
            micro_batch_size=5,
        )
        run(updater, 3)
        results.append(model)
    assert_same_parameters(*results, 0)
    assert (to_host(results[0][0].W) != make_mlp()[0].W.array).any()


def make_batch_normalization():
    return chainer.Sequential(make_mlp(), L.BatchNormalization(axis=0), L.BatchRenormalization(4))


def make_spectral_normalization():
    return chainer.Sequential(L.Linear(None, 8).add_hook(SpectralNormalization()), F.tanh)


def make_two_dropouts():
    return chainer.Sequential(F.dropout, make_dropout())


@pytest.mark.parametrize("make_body", [make_batch_normalization, make_spectral_normalization, make_two_dropouts])
def test_the_encoder_is_replayed_from_the_state_that_it_had(make_body):
    """Compares with all graphs at once, for these encoders do not treat a whole batch as they treat micro-batches."""

    def make_loss(model, encode):
        return functools.partial(joined_loss, encode, lambda z, t: model.loss(z, t.array), 7)

    compare("split", functools.partial(Model, make_body, "nt_xent"), "encode_quietly", make_loss=make_loss)


def test_persistent_values_move_and_stay_in_their_arrays():
    model = Model(make_batch_normalization)
    updater = make_cached(model, micro_batch_size=7)
    updater.update()
    arrays = {key: getattr(model.body[1], key) for key in ("avg_mean", "avg_var")}
    before = persistent_values(model)
    updater.update()
    for key, array in arrays.items():
        assert getattr(model.body[1], key) is array
        assert (to_host(array) != before["/body/1", key]).all()


def test_persistent_values_of_the_loss_move_once():
    class Centred(Model):
        def __init__(self):
            super().__init__()
            self.add_persistent("centre", numpy.zeros(4, numpy.float32))

        def nt_xent(self, z, t):
            self.centre += 0.5 * (z.array.mean(axis=0) - self.centre)
            return super().nt_xent(z - self.centre, t)

    compare("split", Centred)


def test_the_loss_function_may_draw_random_numbers():
    class Sampled(Model):
        def nt_xent(self, z, t):
            order = numpy.random.permutation(len(t))[:10]
            return super().nt_xent(z[order], t[order])

    compare("split", functools.partial(Sampled, make_dropout))


def test_a_converter_that_draws_random_numbers_draws_the_same_again():
    def convert(batch, device):
        x, t = chainer.dataset.concat_examples(batch)
        x += numpy.random.rand(len(x), 1)
        return chainer.dataset.to_device(device, x), chainer.dataset.to_device(device, t)

    compare("split", converter=convert)


def test_a_loss_that_learns_without_the_encoder():
    class Frozen(Model):
        def nt_xent(self, z, t):
            return super().nt_xent(chainer.Variable(z.array), t)

    _, updater = compare("split", Frozen)
    assert (updater.get_optimizer("main").target.body[0].W.grad == 0).all()


class Watched(Model):
    """Keeps an eye on what is called, and on what is alive as the encoder begins."""

    def __init__(self):
        super().__init__()
        self.calls, self.creators = [], []

    def encode(self, x, t):
        assert not any(creator() is not None for creator in self.creators)
        z, t = super().encode(x, t)
        chainer.report({"examples": len(x)}, self)
        self.calls.append((len(x), z.creator_node is not None))
        if z.creator_node is not None:
            self.creators.append(weakref.ref(z.creator_node))
        return z, t

    def nt_xent(self, z, t):
        assert isinstance(z, chainer.Variable) and isinstance(t, chainer.get_array_types())
        self.calls.append(("loss", len(z), len(t)))
        return super().nt_xent(z, t)


def make_cached(model, dataset=None, batch_size=BATCH, optimizer=None, **kwargs):
    """Returns a CachedGradientUpdater of a model with an encoder and a loss."""
    return make_updater(
        CachedGradientUpdater,
        serial(make_dataset() if dataset is None else dataset, batch_size),
        optimizer or optimizers.SGD(0.1),
        model,
        **{"encoder": model.encode, "loss_func": model.loss, **kwargs},
    )


@pytest.mark.parametrize("keep_graph_on_report", [False, True])
@pytest.mark.parametrize("number", [{"accumulation_steps": 2}, {"effective_batch_size": 20}], ids=["steps", "size"])
def test_the_encoder_runs_twice_and_keeps_one_graph_and_the_loss_once(keep_graph_on_report, number):
    model = Watched()
    updater = make_cached(model, batch_size=10, micro_batch_size=6, **number)
    with chainer.using_config("keep_graph_on_report", keep_graph_on_report):
        run(updater, 2)
    assert model.calls == 2 * [*[(5, False)] * 4, ("loss", 20, 20), *[(5, True)] * 4]
    assert updater.effective_batch_size == 20


def test_it_caches_even_if_accumulation_is_disabled():
    model = Watched()
    updater = make_cached(model, batch_size=10, accumulation_steps=2)
    updater.accumulation_steps = 1
    run(updater, 1)
    assert model.calls == [(10, False), ("loss", 10, 10), (10, True)]


def test_what_the_encoder_reports_is_observed_once_and_merged_by_the_rules():
    updater = make_cached(Watched(), micro_batch_size=7, observation_rules={"main/examples": "sum"})
    (step,) = run(updater, 1)
    assert step.observation["main/examples"] == BATCH
    assert sorted(step.observation) == ["main/examples", "main/loss", "main/norm"]


def test_what_is_never_initialized_makes_the_encoder_run_once_more_in_the_first_update_only():
    model = Watched()
    model.add_link("unused", L.Linear(None, 2))
    updater = make_cached(model, micro_batch_size=12)
    calls = []
    for _ in range(3):
        updater.update()
        calls.append(len(model.calls))
        model.calls.clear()
    assert calls == [6, 5, 5]


def test_an_output_without_values_is_passed_on():
    class Empty(Model):
        def encode(self, x, t):
            z, t = super().encode(x, t)
            return z, t, z[:, :0]

        def nt_xent(self, z, t, nothing):
            assert nothing.shape == (len(t), 0)
            return super().nt_xent(z, t)

    compare("split", Empty)


def test_it_runs_without_a_reporter_and_flushes_at_the_end_of_an_epoch():
    model = Watched()
    updater = make_cached(model, batch_size=20, accumulation_steps=2, epoch_boundary="flush")
    for _ in range(3):
        updater.update()
    assert [call[1] for call in model.calls if call[0] == "loss"] == [40, 20, 40]


def peak(updater_class, batch_size, **kwargs):
    """Returns the most bytes that an update holds at a time."""
    width, points = 64, 4
    dataset = [numpy.full(width, i % 7, numpy.float32) for i in range(batch_size)]

    def encoder(x):
        for layer in model:
            x = F.tanh(layer(x))
        return x[:, :points]  # a view of what is far larger

    def loss_func(z):
        return F.mean(z * F.broadcast_to(F.mean(z, axis=0, keepdims=True), z.shape))

    model = chainer.ChainList(*[L.Linear(width, width) for _ in range(8)])
    if updater_class is StandardUpdater:
        kwargs["loss_func"] = lambda x: loss_func(encoder(x))
    else:
        kwargs.update(encoder=encoder, loss_func=loss_func)
    updater = make_updater(updater_class, serial(dataset, batch_size), optimizers.SGD(), model, **kwargs)
    updater.update()
    tracemalloc.start()
    try:
        updater.update()
        return tracemalloc.get_traced_memory()[1], batch_size * points * 4
    finally:
        tracemalloc.stop()


def test_the_memory_is_that_of_a_micro_batch_and_the_representations():
    if helpers.DEVICE is not None:
        pytest.skip("what is measured is host memory")
    (small, _), (large, representations) = (
        peak(CachedGradientUpdater, size, micro_batch_size=64) for size in (128, 2048)
    )
    whole, _ = peak(StandardUpdater, 2048)
    assert large - small < 4 * representations  # with their gradient, the graph of the loss and the list of examples
    assert large < 0.15 * whole


STAGES = ("convert", "encode", "loss", "loss backward", "convert again", "encode again", "backward")


class Fragile(Model):
    """Raises at a given stage of the second micro-batch."""

    def __init__(self, stage):
        super().__init__(make_batch_normalization)
        self.stage = stage
        self.is_armed = False
        self.conversions = 0

    def at(self, *stages):
        if self.is_armed and self.stage in stages:
            raise ConnectionError(self.stage)

    def convert(self, batch, device):
        self.conversions += 1
        if self.conversions in (2, 6):
            self.at("convert" if self.conversions == 2 else "convert again")
        return chainer.dataset.concat_examples(batch, device)

    def encode(self, x, t):
        z, t = super().encode(x, t)
        if self.conversions in (2, 6):
            self.at("encode" if self.conversions == 2 else "encode again")
        if self.is_armed and self.stage == "backward" and self.conversions == 6:
            z.creator_node.backward = lambda *args: self.at("backward")
        return z, t

    def nt_xent(self, z, t):
        loss = super().nt_xent(z, t)
        self.at("loss")
        if self.is_armed and self.stage == "loss backward":
            loss.creator_node.backward = lambda *args: self.at("loss backward")
        return loss


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_leaves_everything_as_it_was_and_the_next_update_is_right(stage):
    updaters = []
    for each in (stage, None):
        model = Fragile(each)
        model.conversions = 100
        momentum = optimizers.MomentumSGD(0.1)
        updater = make_cached(model, make_dataset(60), 20, momentum, converter=model.convert, micro_batch_size=5)
        run(updater, 1)
        updaters.append(updater)
    updater, reference = updaters
    optimizer, expected = (each.get_optimizer("main") for each in updaters)
    model = optimizer.target
    model.is_armed, model.conversions = True, 0
    observation = {}
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    before = persistent_values(model)
    with pytest.raises(ConnectionError, match=f"^{stage}$"), reporter.scope(observation):
        updater.update()
    assert observation == {}
    assert updater.iteration == 1
    assert_same_parameters(model, expected.target, 0)
    assert_same_optimizer_state(optimizer, expected, 0)
    assert_same_persistent_values(model, before, 0)
    model.is_armed, model.stage, model.conversions = False, None, 100
    reference.get_iterator("main")._state = updater.get_iterator("main")._state
    run(updater, 2)
    run(reference, 2)
    assert_same_parameters(model, expected.target, 0)
    assert_same_optimizer_state(optimizer, expected, 0)
    assert_same_persistent_values(model, expected.target, 0)


def own_noise(model):
    generator = numpy.random.RandomState(0)
    return lambda x, t: model(x + model.xp.asarray(generator.standard_normal(x.shape), numpy.float32))


def counting(model):
    calls = []
    return lambda x, t: (calls.append(1), model(x * numpy.float32(1 + 0.1 * len(calls))))[1]


def other_shape(model):
    calls = []
    return lambda x, t: (calls.append(1), model(x)[: 6 - len(calls) // 4])[1]


def stateful(model):
    lstm = on_device(L.LSTM(5, 5))
    return lambda x, t: model(lstm(x))


@pytest.mark.parametrize("make_encoder", [own_noise, counting, other_shape, stateful])
def test_an_encoder_that_cannot_be_replayed_is_refused(make_encoder):
    model = make_mlp()
    updater = make_updater(
        CachedGradientUpdater,
        serial(make_dataset(), BATCH),
        optimizers.SGD(0.1),
        model,
        encoder=make_encoder(model),
        loss_func=lambda z: F.mean(F.matmul(z, z, transb=True)),
        micro_batch_size=7,
    )
    before = model.copy(mode="copy")
    with pytest.raises(RuntimeError, match="encoder must return the same .*, got something else; draw random numbers"):
        updater.update()
    assert_same_parameters(model, before, 0)


def test_representations_that_are_not_finite_are_left_to_the_optimizer():
    _, updater = compare("split", dataset=[(x * numpy.float32("nan"), t) for x, t in make_dataset()], updates=2)
    assert numpy.isnan(updater.get_optimizer("main").target.body[0].W.array).all()


BAD_RESULTS = {
    "a number": (lambda z, t: 3.0, TypeError, "encoder must return Variables and arrays, got float; return a tuple"),
    "a list": (lambda z, t: [z, t], TypeError, "encoder must return Variables and arrays, got list; return a tuple"),
    "a tuple of one of these": (lambda z, t: (z, "a"), TypeError, "got Variable, str; return a tuple or a dict"),
    "a mean": (lambda z, t: (z, F.mean(z)), ValueError, "encoder must return one row per example, got a scalar; "),
    "arrays alone": (lambda z, t: (z.array, t), TypeError, "encoder must return a Variable, got ndarray, ndarray; "),
}


@pytest.mark.parametrize("name", sorted(BAD_RESULTS))
def test_what_an_encoder_cannot_return(name):
    change, error, message = BAD_RESULTS[name]
    model = Model()
    updater = make_cached(model, encoder=lambda x, t: change(*model.encode(x, t)), micro_batch_size=7)
    with pytest.raises(error, match=message):
        updater.update()
    assert updater.iteration == 0


@pytest.mark.parametrize(
    "loss_func, error, message",
    [
        (lambda z, t: z, ValueError, "the loss must be a scalar, got a Variable of shape"),
        (lambda z, t: 1.0, TypeError, "the loss function must return a chainer.Variable, got float"),
        (lambda z, t: chainer.Variable(z.array.mean(keepdims=True)), RuntimeWarning, "all losses .* are constants"),
        (lambda z, t: F.mean(z.array), RuntimeError, "a loss must depend on the parameters of the optimizer's target"),
    ],
)
def test_what_a_loss_function_cannot_return(loss_func, error, message):
    updater = make_cached(Model(), loss_func=loss_func, micro_batch_size=7)
    with pytest.raises(error, match=message):
        updater.update()


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (
            {},
            TypeError,
            "loss_func must be callable, got None; pass a function of what the encoder returns",
        ),
        (
            {"loss_func": len, "encoder": 3},
            TypeError,
            "encoder must be callable, got 3; pass a function of",
        ),
        ({"loss_func": len, "loss_reduction": "mean"}, TypeError, "loss_reduction"),
        ({"loss_func": len, "micro_batch_size": 0}, ValueError, "micro_batch_size must be an int of 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_updater(CachedGradientUpdater, serial(make_dataset(), 6), optimizers.SGD(), **kwargs)


@pytest.mark.parametrize("make_body", [make_mlp, lambda: chainer.Sequential(L.Linear(None, 4, initialW=initial(0)))])
@pytest.mark.parametrize("micro_batch_size", [10, "auto"])
def test_a_micro_batch_that_does_not_fit_is_encoded_in_smaller_ones(micro_batch_size, make_body):
    models = []
    for limit in (None, 3):
        model = Model(make_body)
        sizes = []

        def encode(x, t, model=model, sizes=sizes, limit=limit):
            sizes.append(len(x))
            if limit is not None and len(x) > limit:
                raise MemoryError("no room")
            return model.encode(x, t)

        updater = make_updater(
            CachedGradientUpdater,
            serial(make_dataset(20), 10),
            optimizers.SGD(0.1),
            model,
            encoder=encode,
            loss_func=model.loss,
            micro_batch_size=micro_batch_size,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if limit else "error", RuntimeWarning)
            run(updater, 4)
        models.append(model)
    assert_same_parameters(*models)
    assert [size for size in sizes if size > 3] == ([10, 5] if micro_batch_size == 10 else [5, 4])
