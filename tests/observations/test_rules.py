"""The rules 'max', 'min' and 'concat' and functions make metrics of the whole batch that are no means."""

from __future__ import annotations

import copy
import pickle
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, CachedGradientUpdater, accumulate
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_accum.observations import ObservationRules, Observations
from chainer_accum.observations.reports import value_and_weight
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_dataset, make_model, make_updater, merge, run, serial

# The largest and the smallest value

numbers = st.floats(-1e3, 1e3, width=32) | st.sampled_from([numpy.nan, numpy.inf, -numpy.inf])
weighted_numbers = st.lists(st.tuples(numbers, st.integers(0, 2)), min_size=1, max_size=6)
REDUCTIONS = {"max": numpy.maximum, "min": numpy.minimum}
WEIGHTS = {"number": float, "array": lambda weight: chainer.Variable(numpy.array(weight, "f"))}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("form", [float, numpy.float32, numpy.array, lambda value: numpy.full(2, value, "f")])
@pytest.mark.parametrize("rule", REDUCTIONS)
@given(reported=weighted_numbers)
def test_an_extremum_is_that_of_all_values_that_count_and_nan_if_one_is(rule, form, weight, reported):
    merged = merge([{"x": (form(value), weight(each))} for value, each in reported], {"x": rule})["x"]
    counted = [value for value, each in reported if each > 0 or numpy.isfinite(value)]
    expected = REDUCTIONS[rule].reduce(counted) if counted else reported[-1][0]
    numpy.testing.assert_array_equal(merged[0], numpy.full(numpy.shape(form(0.0)), expected))
    assert float(chainer.as_array(merged[1])) == sum(each for _, each in reported)


@pytest.mark.parametrize("dtype", ["?", "u1", "i4", "u8", "e", "f", "d"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0, 3)])
@pytest.mark.parametrize("wrap", [numpy.asarray, chainer.Variable])
def test_an_extremum_keeps_its_type_and_dtype(dtype, shape, wrap):
    random = numpy.random.RandomState(0)
    arrays = [numpy.asarray(4 * random.uniform(-1, 1, shape)).astype(dtype) for _ in range(5)]
    for rule, reduction in REDUCTIONS.items():
        merged = merge([{"x": wrap(array)} for array in arrays], {"x": rule})["x"]
        assert type(merged) is type(wrap(arrays[0]))
        assert merged.dtype == dtype
        numpy.testing.assert_array_equal(chainer.as_array(merged), reduction.reduce(arrays))


def test_the_extremum_of_python_numbers_is_one():
    merged = merge([{"x": 2**80, "y": 0.5}, {"x": 1, "y": 2.5}], {"x": "max", "y": "min"})
    assert merged == {"x": 2**80, "y": 0.5}
    assert [type(value) for value in merged.values()] == [int, float]


# Concatenation


@pytest.mark.parametrize("dtype", ["?", "i4", "e", "f", "d", "F"])
@pytest.mark.parametrize("wrap", [numpy.asarray, chainer.Variable])
def test_concat_gives_the_array_of_the_whole_batch(dtype, wrap):
    whole = (10 * numpy.random.RandomState(0).uniform(size=(7, 2))).astype(dtype)
    for starts in ([0], [0, 3], [0, 0, 1, 5, 7]):
        reports = [{"x": wrap(whole[start:end])} for start, end in zip(starts, [*starts[1:], 7])]
        merged = merge(reports, {"x": "concat"})["x"]
        assert type(merged) is numpy.ndarray and merged.dtype == dtype
        numpy.testing.assert_array_equal(merged, whole)


@pytest.mark.parametrize(
    "form", [float, numpy.float64, numpy.array, lambda value: chainer.Variable(numpy.array(value))]
)
@pytest.mark.parametrize("values", [[1.5], [1.5, 2.5, 0.5]])
def test_concat_makes_an_array_of_scalars(form, values):
    merged = merge([{"x": form(value)} for value in values], {"x": "concat"})["x"]
    assert type(merged) is numpy.ndarray
    numpy.testing.assert_array_equal(merged, values)
    assert merge([{"x": (form(value), 2)} for value in values], {"x": "concat"})["x"].shape == (len(values),)


def test_concat_keeps_what_a_micro_batch_of_weight_zero_reported():
    merged = merge([{"x": numpy.ones(2)}, {"x": numpy.full(1, numpy.nan)}], {"x": "concat"}, [1.0, 0.0])["x"]
    numpy.testing.assert_array_equal(merged, [1, 1, numpy.nan])


@pytest.mark.parametrize("rule", ["concat", lambda values, weights: numpy.concatenate(values)])
def test_an_array_that_is_written_to_later_is_kept_as_it_was(rule):
    buffer = numpy.zeros(2)

    def reports():
        for _ in range(3):
            buffer[...] += 1
            yield {"x": buffer}

    numpy.testing.assert_array_equal(merge(reports(), {"x": rule})["x"], [1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("rule", ["concat", lambda values, weights: numpy.concatenate(values)])
@pytest.mark.parametrize("keeps_graph", [False, True])
def test_neither_a_graph_nor_the_array_behind_a_view_is_kept(rule, keeps_graph):
    alive, observations = [], Observations({"x": rule, "pair": lambda values, weights: len(values)})
    x = chainer.Variable(numpy.ones((2, 2), "f"))
    with chainer.using_config("keep_graph_on_report", keeps_graph), chainer.Reporter().scope({}):
        for _ in range(3):
            with observations.collecting() as observation:
                logits = F.exp(x)
                loss = F.sum(logits)
                chainer.report({"x": logits[:, 0], "pair": ("text", loss)})
                alive += [weakref.ref(loss.creator_node), weakref.ref(logits.array)]
            observations.add(observation, 1.0)
            del logits, loss, observation
            assert not any(reference() is not None for reference in alive)
        assert observations.merged()["pair"] == 3


@pytest.mark.parametrize(
    "values, error, message",
    [
        (["a", "b"], TypeError, "'x' must be a number or an array of numbers for the rule 'concat', got 'a'; report"),
        ([numpy.zeros(2), None], TypeError, "'x' must be .* got None; .* give this key a function of values and wei"),
        (
            [numpy.zeros((2, 3)), numpy.zeros((2, 4))],
            ValueError,
            r"except along axis 0, .*, got \(2, 3\), \(2, 4\); re",
        ),
        ([numpy.zeros(2), 1.0], ValueError, r"'x' must have the same shape in all micro-.*, got \(2,\), \(\); report"),
        ([numpy.zeros((2, 3)), numpy.zeros(6)], ValueError, r"got \(2, 3\), \(6,\); report an array whose other axes"),
    ],
)
def test_what_cannot_be_concatenated_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        merge([{"x": value} for value in values], {"x": "concat"})


class OtherModule:
    """Array module that notes what it is asked for, as CuPy would be."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(numpy, name)


@pytest.mark.parametrize("shape, asked", [((), {"asarray", "stack"}), ((2,), {"asarray", "concatenate"})])
def test_arrays_are_concatenated_by_their_own_module(shape, asked, monkeypatch):
    xp = OtherModule()
    monkeypatch.setattr(chainer.backend, "get_array_module", lambda *arrays: xp)
    merge([{"x": numpy.zeros(shape)}] * 2, {"x": "concat"})
    assert set(xp.asked) == asked


# Functions


def test_a_function_gets_the_values_and_their_weights():
    calls = []

    def rule(values, weights):
        calls.append((values, weights))
        return "merged"

    half = chainer.Variable(numpy.array(0.5, "f"))
    reports = [{"x": 1.0}, {}, {"x": (2.0, 7)}, {"x": half}, {"x": "text"}, {"x": (half, chainer.Variable(half.array))}]
    assert merge(reports, {"x": rule}, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"x": "merged"}
    assert calls == [([1.0, 2.0, 0.5, "text", 0.5], [1.0, 7, 4.0, 5.0, 0.5])]
    assert not any(isinstance(value, chainer.Variable) for value in calls[0][0] + calls[0][1])


def test_a_function_is_called_for_a_single_micro_batch():
    assert merge([{"x": 2.0}], {"x": lambda values, weights: (values, weights)}) == {"x": ([2.0], [1.0])}
    assert merge([{"y": 2.0}, {"x": 3.0}], {"x": lambda values, weights: len(values)})["x"] == 1


def test_a_function_hears_of_its_own_floating_point_errors():
    def rule(values, weights):
        return numpy.float64(values[0]) / 0

    with pytest.warns(RuntimeWarning, match="divide by zero"):
        assert merge([{"x": 1.0}], {"x": rule}) == {"x": numpy.inf}


def test_rules_can_be_copied_and_pickled():
    rules = ObservationRules({"x": first, "y": "max"})
    for each in (copy.deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert merge([{"x": 1.0, "y": 2.0}], each) == {"x": 1.0, "y": 2.0}


def first(values, weights):
    return values[0]


# Metrics of the whole batch


def f_score(values, weights):
    """Returns the F-score from arrays of true positives, false positives and false negatives."""
    hits, false_alarms, misses = numpy.sum(values, axis=0)
    return 2 * hits / max(2 * hits + false_alarms + misses, 1)


def area_under_curve(values, weights):
    """Returns how many pairs of a positive and a negative example are in the right order."""
    scores, labels = numpy.concatenate(values).T
    in_order = scores[labels == 1][:, None] > scores[labels == 0]
    return in_order.mean() if in_order.size else 0.5


def perplexity(values, weights):
    return numpy.exp(numpy.average(values, weights=weights))


RULES = {
    "main/loss": perplexity,
    "main/counts": f_score,
    "main/ranking": area_under_curve,
    "main/confusion": "sum",
    "main/labels": "concat",
    "main/score": "max",
    "main/vector": "min",
}


class Metrics(chainer.Chain):
    """Reports, for the examples that have a label, what metrics are made of."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.W = chainer.Parameter(numpy.linspace(-1, 1, 10).reshape(2, 5))

    def forward(self, x, t):
        y = F.linear(x, self.W)
        loss = F.softmax_cross_entropy(y, t)
        scores, labels = (y.array[:, 1] - y.array[:, 0])[t >= 0], t[t >= 0]
        guesses = (scores > 0).astype(int)
        confusion = numpy.bincount(2 * labels + guesses, minlength=4).reshape(2, 2)
        chainer.report({"loss": loss, "counts": confusion.ravel()[[3, 1, 2]], "confusion": confusion}, self)
        chainer.report({"ranking": numpy.stack([scores, labels], axis=1), "labels": labels}, self)
        if len(labels) == 0:  # as are means over no examples
            scores = numpy.full(1, numpy.nan)
        lowest = numpy.full(2, scores.min())
        chainer.report({"score": (scores.max(), len(labels)), "vector": (lowest, len(labels))}, self)
        return loss


class Blocks(StandardUpdater):
    """StandardUpdater, but its update is a block of micro-batches."""

    def __init__(self, *args, micro_batch_size, **options):
        super().__init__(*args)
        self.size, self.options = micro_batch_size, options

    def update_core(self):
        optimizer, batch = self.get_optimizer("main"), self.get_iterator("main").next()
        with accumulate(optimizer, observation_rules=RULES, **self.options) as window:
            for start in range(0, len(batch), self.size):
                x, t = chainer.dataset.concat_examples(batch[start : start + self.size])
                window.add(optimizer.target, x, t, weight=int((t >= 0).sum()))


WAYS = {
    "updater": (AccumulatingUpdater, {}),
    "updater in lockstep": (AccumulatingUpdater, {"lockstep": "memory"}),
    "updater that skips": (AccumulatingUpdater, {"nonfinite": "skip"}),
    "blocks": (Blocks, {}),
    "blocks in lockstep": (Blocks, {"lockstep": "memory"}),
    "blocks that skip": (Blocks, {"nonfinite": "skip"}),
}


def observations_of(updater_class, examples, batch_size, **kwargs):
    updater = updater_class(serial(examples, batch_size), chainer.optimizers.SGD(0.1).setup(Metrics()), **kwargs)
    return [step.observation for step in run(updater, 2)]


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
def test_metrics_are_those_of_the_whole_batch_however_it_is_split(way, data):
    labels = data.draw(st.lists(st.integers(-1, 1), min_size=1, max_size=16).filter(lambda labels: max(labels) >= 0))
    x = numpy.random.RandomState(0).standard_normal((len(labels), 5))
    examples = list(zip(x, numpy.array(labels, "i")))
    updater_class, kwargs = WAYS[way]
    kwargs = {**kwargs, "micro_batch_size": data.draw(st.integers(1, len(labels)))}
    steps = 1
    if updater_class is AccumulatingUpdater:
        steps = data.draw(st.sampled_from([k for k in range(1, len(labels) + 1) if len(labels) % k == 0]))
        kwargs.update(accumulation_steps=steps, observation_rules=RULES)
        kwargs["weight_func"] = lambda batch: sum(int(t) >= 0 for _, t in batch)
    actual = observations_of(updater_class, examples, len(labels) // steps, **kwargs)
    for merged, whole in zip(actual, observations_of(StandardUpdater, examples, len(labels))):
        assert merged.keys() >= whole.keys()
        for key, reported in whole.items():
            value, weight = value_and_weight(reported)
            rule = RULES[key]
            expected = rule([value], [1.0]) if callable(rule) else value
            merged_value, _ = value_and_weight(merged[key])
            numpy.testing.assert_allclose(merged_value, expected, rtol=1e-12, atol=1e-12, err_msg=key)


def test_an_update_of_a_single_pass_calls_the_function_too():
    examples = [(x.astype("d"), numpy.int32(t % 2)) for x, t in make_dataset(12)]
    (whole, _), (actual, _) = (
        observations_of(StandardUpdater, examples, 12),
        observations_of(AccumulatingUpdater, examples, 12, observation_rules=RULES),
    )
    assert actual["main/loss"] == pytest.approx(numpy.exp(float(whole["main/loss"].array)), rel=1e-12)
    assert actual["main/ranking"] == area_under_curve([whole["main/ranking"]], [1.0])


def test_a_micro_batch_that_is_skipped_has_no_part_in_a_metric():
    calls, factors = [], iter([1.0, numpy.nan, 3.0])
    model = make_model()

    def loss_func(x, t):
        factor = next(factors)
        chainer.report({"factor": factor, "first": x[:1, 0]})
        return model(x, t) * factor

    def rule(values, weights):
        calls.append((values, weights))
        return 0.0

    rules = {"factor": rule, "first": "concat"}
    kwargs = {"accumulation_steps": 3, "nonfinite": "skip", "loss_func": loss_func, "observation_rules": rules}
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(), 4), chainer.optimizers.SGD(0.1), model, **kwargs)
    (step,) = run(updater, 1)
    assert calls == [([1.0, 3.0], [4.0, 4.0])]
    assert step.observation["first"].shape == (2,)


def test_cached_gradients_give_the_function_what_the_encoder_reported():
    class Encoder(chainer.Chain):
        def __init__(self):
            super().__init__(linear=L.Linear(5, 2))

        def forward(self, x, t):
            chainer.report({"labels": t, "size": len(x)}, self)
            return self.linear(x)

    updater = make_updater(
        CachedGradientUpdater,
        serial(make_dataset(), 12),
        chainer.optimizers.SGD(0.1),
        Encoder(),
        loss_func=lambda y: F.sum(y),
        micro_batch_size=5,
        observation_rules={"main/labels": "concat", "main/size": lambda values, weights: list(zip(values, weights))},
    )
    (step,) = run(updater, 1)
    numpy.testing.assert_array_equal(step.observation["main/labels"], [t for _, t in make_dataset()[:12]])
    assert step.observation["main/size"] == [(4, 4.0), (4, 4.0), (4, 4.0)]


class Counting(chainer.Chain):
    """A classifier whose passes change a persistent value."""

    def __init__(self):
        super().__init__(classifier=make_model())
        self.add_persistent("passes", 0)

    def forward(self, x, t):
        self.passes += 1
        loss = self.classifier(x, t)
        chainer.report({"loss": loss}, self)
        return loss


FAILING_WAYS = {
    "one pass": {},
    "split": {"micro_batch_size": 2},
    "gathered": {"accumulation_steps": 3},
    "in lockstep": {"accumulation_steps": 3, "lockstep": "memory"},
    "block": {},
    "block in lockstep": {"lockstep": "memory"},
}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("way", FAILING_WAYS)
def test_a_function_that_raises_leaves_everything_as_before_the_update(way, error):
    calls = []

    def rule(values, weights):
        calls.append(weights)
        if len(calls) == 2:
            raise error
        return sum(map(float, values))

    def update_in_block():
        with accumulate(optimizer, **kwargs) as window:
            for _ in range(3):
                window.add(optimizer.target, *chainer.dataset.concat_examples(iterator.next()))

    kwargs = {"observation_rules": {"main/loss": rule}, **FAILING_WAYS[way]}
    iterator = serial(make_dataset(), 6)
    optimizer = chainer.optimizers.MomentumSGD(0.1).setup(Counting())
    is_block = way.startswith("block")
    update = update_in_block if is_block else AccumulatingUpdater(iterator, optimizer, **kwargs).update
    observation, reporter = {}, chainer.Reporter()
    reporter.add_observer("main", optimizer.target)
    reporter.add_observers("main", optimizer.target.namedlinks(skipself=True))
    with reporter.scope(observation):
        update()
        before = copy.deepcopy(optimizer.target)
        observation.clear()
        with pytest.raises(error):
            update()
        assert observation == {} and reporter.observation is observation
        assert optimizer.t == 1 and optimizer.target.passes == before.passes
        for actual, expected in zip(optimizer.target.params(), before.params()):
            numpy.testing.assert_array_equal(actual.array, expected.array)
        update()
    assert optimizer.t == 2 and set(observation) == {"main/loss", "main/classifier/loss", "main/classifier/accuracy"}


def test_a_log_leaves_out_the_arrays_and_has_the_numbers(tmp_path):
    optimizer = chainer.optimizers.SGD(0.1).setup(make_model())
    rules = {"main/loss": perplexity, "main/accuracy": "concat"}
    updater = AccumulatingUpdater(serial(make_dataset(48), 12), optimizer, micro_batch_size=4, observation_rules=rules)
    trainer = Trainer(updater, (2, "iteration"), out=str(tmp_path))
    trainer.extend(chainer.training.extensions.LogReport(trigger=(2, "iteration")))
    trainer.run()
    (entry,) = trainer.get_extension("LogReport").log
    assert "main/loss" in entry and "main/accuracy" not in entry
    assert trainer.observation["main/accuracy"].shape == (3,)
