"""With running_statistics='update', running averages move as one forward pass of the whole window would move them."""

from __future__ import annotations

import warnings

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.training.updaters import StandardUpdater
from chainer_accum.state.recorded_arrays import LARGE
from chainer_accum.window import Window, WindowOptions
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_dataset, make_updater, run, serial, slack, to_host


class FirstNormalized(chainer.Chain):
    """Normalizes its input, so that what goes through the link does not depend on how the batch is split."""

    def __init__(self, normalization, passes=1, forgets=False, finetunes=False):
        super().__init__()
        self.passes = passes
        self.forgets = forgets
        self.kwargs = {"finetune": True} if finetunes else {}
        with self.init_scope():
            self.normalization = normalization
            self.linear = L.Linear(5, 3, initialW=0.1)

    def forward(self, x, t):
        loss = 0
        for number in range(self.passes):
            h = x * (1.0 + number)
            h = F.forget(self.normalize, h) if self.forgets else self.normalize(h)
            loss += F.softmax_cross_entropy(self.linear(h), t)
        return loss

    def normalize(self, h):
        return self.normalization(h, **self.kwargs)


def averages(model):
    links = [link for link in model.links() if isinstance(link, L.BatchNormalization)]
    return [(to_host(link.avg_mean).copy(), to_host(link.avg_var).copy(), link.N) for link in links]


def assert_same_averages(actual, expected, tolerance=1e-6):
    tolerance = slack(tolerance)
    assert len(averages(actual)) == len(averages(expected)) > 0
    for (mean, var, count), (expected_mean, expected_var, expected_count) in zip(averages(actual), averages(expected)):
        numpy.testing.assert_allclose(mean, expected_mean, rtol=tolerance, atol=tolerance)
        numpy.testing.assert_allclose(var, expected_var, rtol=tolerance, atol=tolerance)
        assert count == expected_count


def train(updater_class, model, iterator, updates=3, **kwargs):
    updater = make_updater(updater_class, iterator, chainer.optimizers.SGD(0.0), model, **kwargs)
    run(updater, updates)
    return model


LINKS = {
    "BatchNormalization": lambda: L.BatchNormalization(5),
    "shaped by its first input": lambda: L.BatchNormalization(axis=0, initial_avg_mean=0.5, initial_avg_var=2.0),
    "without gamma and beta": lambda: L.BatchNormalization(5, use_gamma=False, use_beta=False),
    "with a slow decay": lambda: L.BatchNormalization(5, decay=0.999),
    "without a decay": lambda: L.BatchNormalization(5, decay=0.0),
    "that never moves": lambda: L.BatchNormalization(5, decay=1.0),
    "BatchRenormalization": lambda: L.BatchRenormalization(5, rmax=2.0, dmax=1.0),
}


@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"finetunes": True}, {"passes": 3, "finetunes": True}])
@pytest.mark.parametrize("name", LINKS)
def test_running_averages_are_those_of_the_whole_batch(name, options):
    data = make_dataset(50)
    expected = train(StandardUpdater, FirstNormalized(LINKS[name](), **options), serial(data, 20))
    model = FirstNormalized(LINKS[name](), **options)
    train(chainer_accum.AccumulatingUpdater, model, serial(data, 20), micro_batch_size=6, running_statistics="update")
    assert_same_averages(model, expected)


@pytest.mark.parametrize("name", ["BatchNormalization", "BatchRenormalization"])
def test_a_forward_pass_that_is_run_again_does_not_count(name):
    data = make_dataset(50)
    expected = train(StandardUpdater, FirstNormalized(LINKS[name]()), serial(data, 20))
    model = FirstNormalized(LINKS[name](), forgets=True)
    train(chainer_accum.AccumulatingUpdater, model, serial(data, 20), micro_batch_size=6, running_statistics="update")
    assert_same_averages(model, expected)


@given(size=st.integers(2, 40), steps=st.integers(1, 4), batch=st.integers(2, 12), part=st.integers(1, 12))
def test_every_example_counts_once_whatever_the_split(size, steps, batch, part):
    data = make_dataset(size)
    updates = -(-size // (steps * batch))
    models = [FirstNormalized(L.BatchNormalization(5)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # batches of one example are meant to be among them
        expected = train(StandardUpdater, models[0], serial(data, steps * batch, repeat=False), updates)
        model = train(
            chainer_accum.AccumulatingUpdater,
            models[1],
            serial(data, batch, repeat=False),
            updates,
            accumulation_steps=steps,
            micro_batch_size=part,
            running_statistics="update",
        )
    assert_same_averages(model, expected, 1e-5)


def test_the_variance_between_micro_batches_is_part_of_it():
    x = numpy.repeat(numpy.array([[0.0], [10.0]], "f"), 8, axis=0)  # constant within each micro-batch
    model = L.BatchNormalization(1, decay=0.0)
    optimizer = chainer.optimizers.SGD().setup(model)
    with chainer_accum.accumulate(optimizer, running_statistics="update") as window:
        for part in (x[:8], x[8:]):
            window.add(lambda part=part: F.sum(model(part)))
    numpy.testing.assert_allclose(model.avg_mean, [5.0])
    numpy.testing.assert_allclose(model.avg_var, [x.var(ddof=1)], rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(numpy.float32, 1e-5), (numpy.float16, 2e-3)])
def test_images_count_their_pixels(dtype, tolerance):
    x = numpy.random.RandomState(0).randn(12, 3, 4, 4).astype("f") * 5 + 20
    x = x.astype(dtype)
    whole, split = L.BatchNormalization(3), L.BatchNormalization(3)
    whole(x)
    optimizer = chainer.optimizers.SGD(0).setup(split)
    with chainer_accum.accumulate(optimizer, running_statistics="update") as window:
        for part in (x[:5], x[5:9], x[9:]):
            window.add(lambda part=part: F.sum(F.cast(split(part), "float32")))
    numpy.testing.assert_allclose(split.avg_mean, whole.avg_mean, rtol=tolerance)
    numpy.testing.assert_allclose(split.avg_var, whole.avg_var, rtol=tolerance)


def test_by_default_each_forward_pass_moves_them():
    data = make_dataset(50)
    model = FirstNormalized(L.BatchNormalization(5))
    train(chainer_accum.AccumulatingUpdater, model, serial(data, 20), updates=1, micro_batch_size=5)
    expected = L.BatchNormalization(5)
    for start in range(0, 20, 5):
        expected(numpy.stack([x for x, _ in data[start : start + 5]]))
    assert_same_averages(model.normalization, expected)


def test_evaluation_within_a_window_sees_the_averages_from_before_it():
    model = L.BatchNormalization(5)
    optimizer = chainer.optimizers.SGD(0).setup(model)
    x = numpy.random.RandomState(0).randn(8, 5).astype("f")
    with chainer_accum.accumulate(optimizer, running_statistics="update") as window:
        for part in (x[:4], x[4:]):
            window.add(lambda part=part: F.sum(model(part)))
            with chainer.using_config("train", False):
                numpy.testing.assert_allclose(model(x).array, x, rtol=1e-4)
            assert model.avg_mean.sum() == 0
    assert model.avg_mean.sum() != 0


def test_a_pass_or_a_window_that_fails_moves_nothing_and_leaves_the_link_as_it_was():
    model = FirstNormalized(L.BatchNormalization(5))
    link = model.normalization
    attributes = [name for name in vars(link) if name != "_local_link_hooks"]
    before = [getattr(link, name) for name in attributes]
    ((mean, var, _),) = averages(model)
    optimizer = chainer.optimizers.SGD(0).setup(model)
    x, t = chainer.dataset.concat_examples(make_dataset(8))

    with pytest.raises(RuntimeError, match="of the forward"):
        with chainer_accum.accumulate(optimizer, running_statistics="update") as window:
            window.add(model, x, t)
            link.local_link_hooks["broken"] = BrokenHook()
            window.add(model, x, t)
    assert all(getattr(link, name) is value for name, value in zip(attributes, before))
    numpy.testing.assert_array_equal(link.avg_mean, mean)
    numpy.testing.assert_array_equal(link.avg_var, var)


def of_a_link(link, x):
    return link(x, finetune=True)


def of_no_link(link, x):
    return F.batch_normalization(x, link.gamma, link.beta, running_mean=link.avg_mean, running_var=link.avg_var)


@pytest.mark.parametrize("undoes_passes", [False, True])
@pytest.mark.parametrize("size", [5, LARGE // 4])
@pytest.mark.parametrize("normalize", [of_a_link, of_no_link])
def test_averages_that_moved_go_back_if_the_step_fails(normalize, size, undoes_passes):
    model, link = chainer.Chain(scale=L.Scale(W_shape=())), L.BatchNormalization(size)
    if normalize is of_a_link:
        with model.init_scope():
            model.link = link
    optimizer = chainer.optimizers.SGD(0).setup(model)
    moved = []

    def fail(optimizer):
        moved.append(link.avg_mean.any() and link.avg_var.any())
        raise RuntimeError("of the step")

    optimizer.add_hook(fail, "fail")
    x = numpy.arange(2 * size, dtype="f").reshape(2, size)
    averages = id(link.avg_mean), id(link.avg_var)  # something else that refers to a large array has it copied
    for undoes_all in (True, not undoes_passes):  # the same, since there is one pass
        window = Window(
            optimizer,
            WindowOptions(running_statistics="update"),
            undoes_passes=undoes_passes,
            looks_for_links=normalize is of_a_link,
        )
        window.add(lambda: F.sum(normalize(link, model.scale(x))))
        with pytest.raises(RuntimeError, match="of the step"):
            window.update()
        window.abandon(undoes_all)
        assert (id(link.avg_mean), id(link.avg_var)) == averages and link.N == 0
        assert not link.avg_mean.any() and (link.avg_var == 1).all()
    assert moved == [True, True]


class BrokenHook(chainer.LinkHook):
    name = "broken"

    def forward_preprocess(self, args):
        raise RuntimeError("of the forward pass")


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="running_statistics must be one of 'micro_batch', 'update', got 'batch'"):
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(make_dataset(), 4),
            chainer.optimizers.SGD(),
            running_statistics="batch",
        )


class Frozen(L.BatchNormalization):
    def forward(self, x, **kwargs):
        with chainer.using_config("train", False):
            return super().forward(x, **kwargs)


class FirstColumns(L.BatchNormalization):
    def forward(self, x, **kwargs):
        return F.concat([super().forward(x[:, :2], **kwargs), x[:, 2:]])


class Twice(L.BatchNormalization):
    def forward(self, x, **kwargs):
        super().forward(x, **kwargs)
        return super().forward(x * 2 + 1, **kwargs)


class TakesList(L.BatchNormalization):
    def forward(self, x, **kwargs):
        return super().forward(F.concat([x, x + 1], axis=0), **kwargs)[: len(x)]


class OnlyWhereThereIsSome(L.BatchNormalization):
    """Normalizes the examples of each kind by a call of its own, if there are any."""

    def forward(self, x, **kwargs):
        is_first = chainer.as_array(x)[:, 0] < 0
        parts = []
        if is_first.any():
            parts.append(super().forward(x[is_first], **kwargs))
        if not is_first.all():
            parts.append(super().forward(x[~is_first], **kwargs))
        return F.concat(parts, axis=0)


class Mapped(L.BatchNormalization):
    """Is called by C code, from one instruction that the interpreter may exchange as it warms up."""

    def forward(self, x, **kwargs):
        return sum(map(super().forward, [x]))


class ByFunction(L.BatchNormalization):
    def forward(self, x, **kwargs):
        gamma, beta, averages = self.gamma, self.beta, (self.avg_mean, self.avg_var)
        return F.batch_normalization(x, gamma, beta, running_mean=averages[0], running_var=averages[1], decay=0.7)


class Direct(chainer.Chain):
    """Calls ``forward`` of a link, which link hooks do not see."""

    def __init__(self, normalization):
        super().__init__()
        with self.init_scope():
            self.normalization = normalization

    def forward(self, x, **kwargs):
        return self.normalization.forward(x, **kwargs)


NORMALIZATIONS = {
    "twice": lambda: Twice(5),
    "frozen": lambda: Frozen(5),
    "first columns": lambda: FirstColumns(2),
    "list": lambda: TakesList(5),
    "conditional": lambda: OnlyWhereThereIsSome(5),
    "function": lambda: ByFunction(5),
    "mapped": lambda: Mapped(5),
    "called directly": lambda: Direct(L.BatchNormalization(5)),
    "renormalization": lambda: L.BatchRenormalization(5),
    "lazy": lambda: L.BatchNormalization(axis=0),
}


@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
@pytest.mark.parametrize("micro_batch_size", [1, 5, 7])
def test_statistics_are_those_of_what_is_normalized_whoever_calls_it(name, micro_batch_size):
    data = [(x.astype("d") * 3 + 1, t) for x, t in make_dataset(20)]
    models = []
    for updater_class, kwargs in (
        (StandardUpdater, {}),
        (chainer_accum.AccumulatingUpdater, {"micro_batch_size": micro_batch_size, "running_statistics": "update"}),
    ):
        with chainer.using_config("dtype", numpy.float64), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of batches of one example
            models.append(FirstNormalized(NORMALIZATIONS[name]()))
            train(updater_class, models[-1], serial(data, 20), updates=1, **kwargs)
    assert_same_averages(models[1], models[0], 1e-10)


def test_a_window_within_a_window_has_statistics_of_its_own():
    def make():
        return FirstNormalized(L.BatchNormalization(5))

    x, t = chainer.dataset.concat_examples(make_dataset(12))
    outer, inner, expected = make(), make(), make()
    optimizers = [chainer.optimizers.SGD(0.0).setup(model) for model in (outer, inner)]

    def loss_func(x, t):
        with chainer_accum.accumulate(optimizers[1], running_statistics="update") as window:
            window.add(inner, x * 2, t)
        return outer(x, t)

    with chainer_accum.accumulate(optimizers[0], running_statistics="update") as window:
        for part in (slice(0, 5), slice(5, 12)):
            window.add(loss_func, x[part], t[part], weight=part.stop - part.start)
    expected(x, t)
    assert_same_averages(outer, expected)
    other = make()
    for part in (slice(0, 5), slice(5, 12)):
        other(x[part] * 2, t[part])
    assert_same_averages(inner, other)


def test_a_window_that_does_not_collect_hides_its_passes_from_an_outer_one():
    x, t = chainer.dataset.concat_examples(make_dataset(12))
    outer, inner, expected = (FirstNormalized(L.BatchNormalization(5)) for _ in range(3))
    optimizers = [chainer.optimizers.SGD(0.0).setup(model) for model in (outer, inner)]
    seen = []

    def loss_func():
        chainer_accum.create_accumulating_optimizer(optimizers[1], 1).update(inner, x, t)
        seen.append(averages(inner)[0][0])
        return outer(x, t)

    with chainer_accum.accumulate(optimizers[0], running_statistics="update") as window:
        window.add(loss_func)
    expected(x, t)
    numpy.testing.assert_allclose(seen[0], averages(expected)[0][0], rtol=1e-6)


def test_fine_tuning_counts_once_per_window():
    models = []
    for updater_class, kwargs in (
        (StandardUpdater, {}),
        (chainer_accum.AccumulatingUpdater, {"micro_batch_size": 3, "running_statistics": "update"}),
    ):
        models.append(FirstNormalized(L.BatchNormalization(5), passes=2, finetunes=True))
        train(updater_class, models[-1], serial(make_dataset(24), 12), **kwargs)
    assert models[1].normalization.N == 6
    assert_same_averages(models[1], models[0], 1e-5)
