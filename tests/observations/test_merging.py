"""What micro-batches report becomes what the whole effective batch would have reported."""

from __future__ import annotations

import decimal
import fractions

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer.training.updaters import StandardUpdater
from chainer_accum.observations.merging import Observations
from chainer_accum.observations.reports import value_and_weight
from chainer_accum.observations.rules import ObservationRules
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_updater, merge, run, serial

reported = st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(0, 9)), min_size=1, max_size=6)


@given(reported)
def test_scalars_are_averaged_by_weight(values_and_weights):
    values, weights = zip(*values_and_weights)
    merged = merge([{"x": value} for value in values], weights=[float(weight) for weight in weights])
    expected = numpy.average(values, weights=weights) if any(weights) else values[-1]
    numpy.testing.assert_allclose(merged["x"], expected, rtol=1e-9, atol=1e-9)


def test_a_mean_is_over_the_micro_batches_that_reported_the_key():
    reports = [{"x": 1.0, "y": 1.0}, {"x": 2.0}, {"x": 6.0, "y": 4.0}]
    assert merge(reports, weights=[1.0, 1.0, 2.0]) == {"x": 15 / 4, "y": 3.0}


def test_of_what_is_no_scalar_the_last_stays():
    array = numpy.arange(3)
    reports = [{"text": "a", "array": numpy.zeros(3), "none": 1.0}, {"text": "b", "array": array, "none": None}]
    merged = merge(reports)
    assert merged["text"] == "b"
    assert merged["array"] is array
    assert merged["none"] is None


def test_rules_by_key():
    reports = [{"total": 3, "lr": 0.1, "loss": 1.0}, {"total": 4, "lr": 0.2, "loss": 3.0}]
    merged = merge(reports, {"total": "sum", "lr": "last", "loss": "mean"}, weights=[1.0, 3.0])
    assert merged == {"total": 7, "lr": 0.2, "loss": 2.5}


@pytest.mark.parametrize(
    "value, mean_dtype, sum_dtype",
    [
        (numpy.array(2, numpy.float16), numpy.float32, numpy.float32),
        (numpy.array(2, numpy.float32), numpy.float32, numpy.float32),
        (numpy.array(2, numpy.float64), numpy.float64, numpy.float64),
        (numpy.array(2, numpy.int32), numpy.float64, numpy.int64),
        (numpy.array(True), numpy.float32, numpy.int64),
        (numpy.float32(2), numpy.float32, numpy.float32),
        (numpy.int64(2), numpy.float64, numpy.int64),
    ],
    ids=lambda value: getattr(value, "__name__", None) or f"{type(value).__name__}-{value.dtype}",
)
def test_the_type_stays_and_the_dtype_is_wide_enough(value, mean_dtype, sum_dtype):
    for rule, dtype in (("mean", mean_dtype), ("sum", sum_dtype)):
        merged = merge([{"x": value}] * 3, {"x": rule})["x"]
        assert isinstance(merged, numpy.ndarray if isinstance(value, numpy.ndarray) else numpy.generic)
        assert merged.dtype == dtype
        assert merged == (value if rule == "mean" else 3 * int(value))
        assert merged.shape == ()


@pytest.mark.parametrize("dtype, merged_dtype", [("e", "f"), ("f", "f"), ("d", "d")])
@pytest.mark.parametrize("rule, expected", [("mean", 2), ("sum", 6)])
def test_a_variable_stays_a_variable(rule, expected, dtype, merged_dtype):
    merged = merge([{"x": chainer.Variable(numpy.array(2, dtype))}] * 3, {"x": rule})["x"]
    assert type(merged) is chainer.Variable
    assert (merged.dtype, merged.shape, float(merged.array)) == (merged_dtype, (), expected)


def test_python_numbers_stay_python_numbers():
    assert type(merge([{"x": 1.0}, {"x": 2.0}])["x"]) is float
    assert type(merge([{"x": 1}, {"x": 2}], {"x": "sum"})["x"]) is int


@pytest.mark.parametrize("value", [3, True, numpy.float16(0.1), numpy.array(7, "i"), (1.0, 5)])
def test_a_single_report_is_passed_on_as_it_is(value):
    for rule in ("mean", "sum", "last"):
        assert merge([{"x": value}], {"x": rule}, weights=[3.0])["x"] is value


def test_many_small_values_are_added_without_loss():
    merged = merge([{"x": numpy.array(0.1, numpy.float16)}] * 5000, {"x": "sum"})
    numpy.testing.assert_allclose(merged["x"], 5000 * float(numpy.float16(0.1)), rtol=1e-6)


def test_values_with_a_weight_of_their_own_keep_it():
    merged = merge([{"x": (1.0, 1)}, {"x": (4.0, 2)}], weights=[10.0, 1.0])
    assert merged["x"] == (3.0, 3)
    summary = chainer.DictSummary()
    summary.add(merged)
    assert summary.compute_mean() == {"x": 3.0}


# What chainer.DictSummary takes as a weight.
WEIGHTS = {
    "int": int,
    "float": float,
    "fraction": fractions.Fraction,
    "numpy.int64": numpy.int64,
    "numpy.uint8": numpy.uint8,
    "numpy.float16": numpy.float16,
    "numpy.float32": numpy.float32,
    "array": numpy.array,
    "float array": lambda weight: numpy.array(weight, "f"),
    "Variable": lambda weight: chainer.Variable(numpy.array(weight, "f")),
}

# The forms in which a number can be reported, made of a scalar of NumPy.
FORMS = {
    "number": lambda value: value.item(),
    "scalar": lambda value: value,
    "array": numpy.asarray,
    "Variable": lambda value: chainer.Variable(numpy.asarray(value)),
}


def summarize(*observations):
    """Returns what DictSummary, and so LogReport, makes of some observations."""
    summary = chainer.DictSummary()
    for observation in observations:
        summary.add(observation)
    return {key: float(mean) for key, mean in summary.compute_mean().items()}


def test_what_has_no_weight_may_be_nan():
    assert merge([{"x": 1.0}, {"x": float("nan")}, {"x": 2.0}], weights=[1.0, 0.0, 1.0]) == {"x": 1.5}
    assert merge([{"x": 1.0}, {"x": 2.0}], weights=[0.0, 0.0]) == {"x": 2.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_has_a_weight_of_zero_may_be_nan(weight, form):
    weight, form = WEIGHTS[weight], FORMS[form]
    nan, value = form(numpy.float32("nan")), form(numpy.float32(2.5))
    for reports in ([(nan, weight(0)), (value, weight(3))], [(value, weight(3)), (nan, weight(0))]):
        merged = merge([{"x": report} for report in reports])
        assert summarize(merged) == {"x": 2.5}
        assert summarize(merged, {"x": (form(numpy.float32(4.0)), weight(1))}) == {"x": 2.875}
        weights = [report[1] for report in reports]  # the other way to be averaged by them
        assert summarize(merge([{"x": report[0]} for report in reports], weights=weights)) == {"x": 2.5}
        assert summarize(merge([{"x": report} for report in reports], {"x": "sum"})) == {"x": 2.5}
    nothing = merge([{"x": (nan, weight(0))}] * 2)["x"]
    assert numpy.isnan(float(chainer.as_array(nothing[0]))) and float(nothing[1]) == 0


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_of_their_own_are_added_without_loss(weight):
    reports = [{"x": (1.0, WEIGHTS[weight](200))}, {"x": (2.0, WEIGHTS[weight](200))}] * 200
    value, total = merge(reports)["x"]
    assert (value, float(total)) == (1.5, 80000)


@pytest.mark.parametrize("weights", [[1e308] * 4, [5e-324] * 3, [1e-45, 1e308], [1e308, 1e-45], [1e-300, 1.0, 1e300]])
def test_weights_of_any_size_make_a_mean(weights):
    values = [float(index) for index in range(1, len(weights) + 1)]
    for one in (float, numpy.float64):
        merged = merge([{"x": one(value)} for value in values], weights=weights)
        expected = numpy.average(values, weights=[weight / max(weights) for weight in weights])
        assert merged["x"] == pytest.approx(expected, rel=1e-12)


def test_a_sum_keeps_the_weight_that_its_parts_have():
    merged = merge([{"x": (6.0, 3)}, {"x": (4.0, 2)}], {"x": "sum"})
    assert merged == {"x": (10.0, 5)}


def test_a_sum_takes_nan_from_what_has_a_weight_and_finite_values_from_all():
    nan = float("nan")
    assert merge([{"x": 2}, {"x": 3}], {"x": "sum"}, weights=[1.0, 0.0]) == {"x": 5}
    assert merge([{"x": 2.0}, {"x": nan}], {"x": "sum"}, weights=[1.0, 0.0]) == {"x": 2.0}
    assert numpy.isnan(merge([{"x": 2.0}, {"x": nan}], {"x": "sum"}, weights=[1.0, 1.0])["x"])


def test_values_may_change_their_type_between_micro_batches():
    zero, half = 0, numpy.array(0.5, "f")
    for reports in ([zero, half], [half, zero], [zero, chainer.Variable(half)], [numpy.int32(0), 0.5], [0.5, False]):
        assert float(chainer.as_array(merge([{"x": report} for report in reports])["x"])) == 0.25
        merged = merge([{"x": report} for report in reports], {"x": "sum"})["x"]
        assert float(chainer.as_array(merged)) == 0.5
    assert merge([{"x": numpy.array(2, "i")}, {"x": 1e300}])["x"] == 5e299
    assert merge([{"x": numpy.array(2, "i")}, {"x": numpy.array(1, "u8")}], {"x": "sum"})["x"] == 3
    assert merge([{"x": numpy.array(1j)}, {"x": numpy.array(1, "f")}])["x"] == 0.5 + 0.5j


def test_large_integers_are_added_without_loss():
    large = 2**62 + 1
    for dtype in (numpy.int64, numpy.uint64):
        merged = merge([{"x": numpy.array(large, dtype)}, {"x": numpy.array(2, dtype)}], {"x": "sum"})["x"]
        assert merged.dtype == dtype and merged == large + 2
    assert merge([{"x": 2**80}, {"x": 1}], {"x": "sum"}) == {"x": 2**80 + 1}
    assert merge([{"x": numpy.uint8(200)}] * 2, {"x": "sum"}) == {"x": 400}


def test_infinity_is_reported_without_a_warning():
    inf = numpy.array(numpy.inf, "f")
    assert merge([{"x": inf}, {"x": numpy.array(1, "f")}])["x"] == numpy.inf
    assert numpy.isnan(merge([{"x": inf}, {"x": -inf}])["x"])
    assert merge([{"x": numpy.array(3e38, "f")}] * 2, {"x": "sum"})["x"] == numpy.inf


def test_a_pair_that_is_no_value_with_a_weight_is_passed_on():
    array = numpy.arange(3.0)
    for pair in [("a", 1), (1.0, "a"), (array, 2), (1.0, array), (), (1.0,), (None, None), (1.0, None)]:
        assert merge([{"x": 0.5}, {"x": pair}])["x"] is pair
    assert merge([{"x": decimal.Decimal(1)}] * 2) == {"x": decimal.Decimal(1)}


def test_the_last_value_with_a_weight_can_be_asked_for():
    assert merge([{"x": (1.0, 2)}, {"x": (float("nan"), 0)}, {"x": (2.0, 3)}], {"x": "last"}) == {"x": (2.0, 3)}


@pytest.mark.parametrize("dtype", ["?", "u1", "i4", "i8", "e", "f", "d", "F"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (0, 3)])
@pytest.mark.parametrize("wrap", [numpy.asarray, chainer.Variable], ids=["array", "Variable"])
def test_arrays_are_merged_elementwise_by_a_rule(dtype, shape, wrap):
    random = numpy.random.RandomState(0)
    arrays = [(200 * random.uniform(size=shape)).astype(dtype) for _ in range(5)]
    weights = [1.0, 2.0, 0.0, 3.0, 2.0]
    reports = [{"x": wrap(array)} for array in arrays]
    wide = numpy.array(arrays, numpy.promote_types(dtype, "d"))
    for rule, expected in (("sum", wide.sum(axis=0)), ("mean", numpy.average(wide, axis=0, weights=weights))):
        merged = merge(reports, {"x": rule}, weights)["x"]
        assert type(merged) is type(reports[0]["x"])
        assert merged.shape == shape and merged.dtype == numpy.promote_types(
            dtype, numpy.int64 if rule == "sum" and wide.dtype.kind != "c" and dtype in "?u1i4i8" else numpy.float32
        )
        numpy.testing.assert_allclose(chainer.as_array(merged), expected, rtol=1e-6)
    numpy.testing.assert_array_equal(chainer.as_array(merge(reports)["x"]), arrays[-1])


def test_arrays_with_a_weight_of_their_own_are_merged_by_a_rule():
    nan, ones = numpy.full(2, numpy.nan), numpy.ones(2)
    for weight in WEIGHTS.values():
        value, total = merge(
            [{"x": (nan, weight(0))}, {"x": (ones, weight(1))}, {"x": (4 * ones, weight(2))}], {"x": "mean"}
        )["x"]
        numpy.testing.assert_array_equal(value, [3, 3])
        assert float(total) == 3


def test_many_small_elements_are_added_without_loss():
    merged = merge([{"x": numpy.full(2, 0.1, "e")}] * 5000, {"x": "sum"})["x"]
    numpy.testing.assert_allclose(merged, 5000 * float(numpy.float16(0.1)), rtol=1e-6)


@pytest.mark.parametrize("rule", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("first, second", [((3,), (2,)), ((3,), ()), ((), (1,)), ((2, 3), (3,))])
def test_shapes_that_differ_are_refused_by_a_rule(rule, first, second):
    message = rf"'main/x' must have the same shape in all micro-batches for the rule '{rule}', got \({first}\) and"
    message = message.replace(rf"\({first}\)", str(first).replace("(", r"\(").replace(")", r"\)"))
    with pytest.raises(
        ValueError, match=message + r".*; report a value whose shape does not depend on .* the rule 'last'"
    ):
        merge([{"main/x": numpy.zeros(first)}, {"main/x": numpy.zeros(second)}], {"main/x": rule})


@pytest.mark.parametrize("value", ["text", None, [1.0, 2.0], decimal.Decimal(1), numpy.array(["a"]), ("a", 1)])
def test_what_cannot_be_added_is_refused_by_a_rule(value):
    with pytest.raises(
        TypeError, match="'x' must be a number or an array of numbers for the rule 'sum', got .* 'last'"
    ):
        merge([{"x": value}], {"x": "sum"})


def test_what_a_failing_micro_batch_reported_is_dropped():
    observations = Observations()
    outer = {"before": 1}
    with chainer.Reporter().scope(outer):
        with observations.collecting() as observation:
            chainer.report({"x": 1.0})
        observations.add(observation, 1.0)
        with pytest.raises(RuntimeError), observations.collecting():
            chainer.report({"x": 5.0})
            raise RuntimeError
        chainer.report({"after": 2})
    assert observations.merged() == {"x": 1.0}
    assert outer == {"before": 1, "after": 2}


def test_without_a_reporter_there_is_nothing_to_merge():
    observations = Observations()
    with observations.collecting() as observation:
        chainer.report({"x": 1.0})
    observations.add(observation, 1.0)
    assert observations.merged() == {}


def test_a_graph_that_is_kept_on_report_is_that_of_the_last_micro_batch_alone():
    x = chainer.Variable(numpy.ones((), "f"))
    observations = Observations()
    alive = []
    with chainer.using_config("keep_graph_on_report", True), chainer.Reporter().scope({}):
        for factor in (1.0, 2.0, 3.0):
            with observations.collecting() as observation:
                alive.append(sum(value._last.creator_node is not None for value in observations._values.values()))
                chainer.report({"x": F.exp(x * factor)})
            observations.add(observation, 1.0)
        merged = observations.merged()["x"]
    assert alive == [0, 0, 0]
    assert merged.creator_node.label == "exp"
    numpy.testing.assert_allclose(merged.array, numpy.exp([1, 2, 3]).mean(), rtol=1e-6)


def test_the_graph_of_a_value_with_a_weight_is_dropped():
    x = chainer.Variable(numpy.ones((), "f"))
    observations = Observations()
    with chainer.Reporter().scope({}):
        for _ in range(3):
            with observations.collecting() as observation:
                chainer.report({"x": (F.exp(x), 2 * x), "text": ("a", F.exp(x))})
            observations.add(observation, 1.0)
            assert all(item.creator_node is not None for item in observation["x"])
            del observation
        merged = observations.merged()
    assert merged["x"][0].creator_node is None and float(merged["x"][1]) == 6
    assert merged["text"][1].creator_node is None
    single = merge([{"x": (F.exp(x), 1)}])["x"]
    assert single[0].creator_node is None


class OnDevice(numpy.ndarray):
    """An array that cannot be read by the host, as one whose value a device has yet to compute."""

    def _read(self, *args):
        raise AssertionError("the host waited for the value")

    __float__ = __int__ = __bool__ = __index__ = item = tolist = _read


def test_the_host_does_not_wait_for_a_value():
    value = numpy.array(1.5, "f").view(OnDevice)
    with pytest.raises(AssertionError):
        float(value)
    weight = numpy.array(2.0, "f").view(OnDevice)
    nothing, nan = numpy.array(0, "f").view(OnDevice), numpy.array(numpy.nan, "f").view(OnDevice)
    reports = [
        {"mean": value, "last": value, "own": (value, weight), "vector": value.reshape(1), "variable": (value, 2)},
        {"mean": value, "last": value, "own": (nan, nothing), "vector": value.reshape(1), "variable": (2.5, weight)},
        {"mean": value, "last": value, "own": (value, chainer.Variable(weight)), "vector": value.reshape(1)},
    ]
    reports = [{**report, "sum": value, "nan": nan, "variable sum": chainer.Variable(value)} for report in reports]
    for report, extremum in zip(reports, [(value, weight), (nan, nothing), (2 * value, weight)]):
        report.update({"max": extremum, "min": extremum, "all": value, "rows": value.reshape(1), "function": extremum})
    rules = {"sum": "sum", "variable sum": "sum", "last": "last", "vector": "sum", "nan": "sum", "max": "max"}
    rules.update({"min": "min", "all": "concat", "rows": "concat", "function": lambda values, weights: weights[2]})
    merged = merge(reports, rules, weights=[1.0, 0.0, 2.0])
    (own, own_weight), (variable, variable_weight) = merged["own"], merged["variable"]
    for actual, expected in [
        (merged["mean"], 1.5),
        (merged["sum"], 4.5),
        (merged["variable sum"].array, 4.5),
        (merged["vector"], 4.5),
        (own, 1.5),
        (own_weight, 4),
        (variable, 2),
        (variable_weight, 4),
        (merged["max"][0], 3),
        (merged["max"][1], 4),
        (merged["min"][0], 1.5),
        (merged["all"], [1.5] * 3),
        (merged["rows"], [1.5] * 3),
        (merged["function"], 2),
    ]:
        numpy.testing.assert_array_equal(numpy.asarray(actual).view(numpy.ndarray), expected)
    assert merged["last"] is value
    empty = merge([{"x": (value, nothing)}] * 2)["x"]
    numpy.testing.assert_array_equal(numpy.asarray(empty[0]).view(numpy.ndarray), 1.5)


@pytest.mark.parametrize(
    "rules, error, message",
    [
        ("sum", TypeError, "observation_rules must be a dict, got 'sum'; map keys such as 'main/loss' to a rule"),
        ({("x",): "sum"}, TypeError, r"a key of observation_rules must be a str, got \('x',\)"),
        ({"x": "median"}, ValueError, r"observation_rules\['x'\] must be one of 'mean', .* 'concat', got 'median'"),
        ({"x": 1}, TypeError, r"observation_rules\['x'\] must be callable, got 1; pass a function of values and weigh"),
        ({"x": len}, TypeError, r"observation_rules\['x'\] must be a function of a list of values and .* <built-in"),
        ({"x": max}, TypeError, r"must be a function of a list .* max>; write one such as .* or use one of 'mean', "),
        ({"x": lambda values: 1}, TypeError, r"must be a function of a list of values and a list of weights, got <"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, error, message):
    with pytest.raises(error, match=message):
        ObservationRules(rules)


def test_a_rule_for_a_key_that_never_comes_is_a_warning_once():
    rules = ObservationRules({"n_correct": "sum", "main/loss": "mean"})
    merge([{}], rules)  # nothing was reported, and nothing said
    message = (
        "observation_rules has a rule for 'n_correct', which was not reported; did you mean 'main/n_correct'[?] "
        "These keys were reported: 'main/loss', 'main/n_correct'"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        merge([{"main/loss": 1.0}, {"main/n_correct": 2}], rules)
    assert len(caught) == 1
    merge([{"main/loss": 1.0}], rules)


def test_a_rule_for_a_key_that_came_once_is_no_warning():
    rules = ObservationRules({"x": "sum"})
    merge([{"x": 1.0, 3: 2.0}], rules)
    merge([{"y": 1.0}], rules)
    with pytest.warns(RuntimeWarning, match="'x', which was not reported; did you mean '3'[?]"):
        merge([{3: 2.0}], ObservationRules({"x": "sum"}))


def test_without_a_reporter_no_key_is_missed():
    observations = Observations(ObservationRules({"x": "sum"}))
    with observations.collecting() as observation:
        chainer.report({"y": 1.0})
    observations.add(observation, 1.0)
    assert observations.merged() == {}


class Reporting(chainer.Chain):
    """A model that reports in all ways what is true of the examples that have a label, in randomly chosen forms."""

    def __init__(self, random, forms, weights, dtype):
        super().__init__()
        self.random, self.forms, self.weights, self.dtype = random, forms, weights, dtype
        with self.init_scope():
            self.factor = chainer.Parameter(numpy.ones(()))

    def pick(self, functions):
        return functions[self.random.randint(len(functions))]

    def form(self, value):
        return self.pick(self.forms)(value)

    def forward(self, x, t):
        labelled = x[t >= 0]
        total, count = labelled.sum(), self.pick(self.weights)(len(labelled))
        with numpy.errstate(invalid="ignore"):
            mean = self.dtype(total / numpy.float64(len(labelled)))
        counts = numpy.bincount(t + 1, minlength=4)
        observation = {
            "all": self.form(self.dtype(x.mean())),
            "own": (self.form(mean), count),
            "own sum": (self.form(self.dtype(total)), count),
            "sum": self.form(self.dtype(x.sum())),
            "count": self.form(numpy.uint8(len(labelled))),
            "counts": counts,
            "few": chainer.Variable(counts.astype("u1")).array,
            "vector": chainer.Variable(numpy.full(2, x.mean()).astype(self.dtype)),
            "own vector": (numpy.full(2, mean), count),
        }
        if len(labelled) > 0:
            observation["some"] = (self.form(mean), count)
        chainer.report(observation, self)
        return F.mean(self.factor * x)


REPORTING_RULES = {"own sum": "sum", "sum": "sum", "count": "sum", "counts": "sum", "few": "sum"}
REPORTING_RULES.update({"vector": "mean", "own vector": "mean"})


@given(data=st.data())
def test_what_is_reported_is_what_the_whole_batch_would_have_reported(data):
    labels = data.draw(st.lists(st.integers(-1, 2), min_size=2, max_size=24).filter(lambda labels: max(labels) >= 0))
    steps = data.draw(st.sampled_from([k for k in range(1, len(labels) + 1) if len(labels) % k == 0]))
    forms = data.draw(st.lists(st.sampled_from(list(FORMS.values())), min_size=1, max_size=3))
    # With weights in float16, DictSummary itself would lose digits of what the whole batch reports.
    names = st.sampled_from(sorted(WEIGHTS.keys() - {"numpy.float16"}))
    weights = [WEIGHTS[name] for name in data.draw(st.lists(names, min_size=1, max_size=3))]
    dtype = data.draw(st.sampled_from([numpy.float16, numpy.float32, numpy.float64]))
    kwargs = {
        "accumulation_steps": steps,
        "micro_batch_size": data.draw(st.none() | st.integers(1, len(labels) // steps)),
        "observation_rules": {f"main/{key}": rule for key, rule in REPORTING_RULES.items()},
    }
    values = numpy.random.RandomState(0).uniform(-2, 2, len(labels))
    examples = list(zip(values, numpy.array(labels, "i")))

    def observations(updater_class, batch_size, **kwargs):
        model = Reporting(numpy.random.RandomState(0), forms, weights, dtype)
        optimizer = chainer.optimizers.SGD(0.1)
        updater = make_updater(updater_class, serial(examples, batch_size), optimizer, model, device=None, **kwargs)
        return [step.observation for step in run(updater, 2)]

    expected = observations(StandardUpdater, len(labels))
    actual = observations(AccumulatingUpdater, len(labels) // steps, **kwargs)
    tolerance = {numpy.float16: 1e-2, numpy.float32: 1e-5, numpy.float64: 1e-12}[dtype]
    of_means = max(tolerance, 1e-5)  # as there are weights in float32
    with numpy.errstate(over="ignore"):  # of uint8, in the variance
        means, expected_means = summarize(*actual), summarize(*expected)
    assert means.keys() == expected_means.keys()
    for key, mean in means.items():
        numpy.testing.assert_allclose(mean, expected_means[key], rtol=of_means, atol=of_means, err_msg=key)
    for observation, expected_observation in zip(actual, expected):
        assert observation.keys() == expected_observation.keys()
        for key, reported in observation.items():
            value, weight = value_and_weight(reported)
            expected_value, expected_weight = value_and_weight(expected_observation[key])
            numpy.testing.assert_allclose(value, expected_value, rtol=tolerance, atol=tolerance, err_msg=key)
            assert weight == expected_weight


def test_a_function_may_say_what_each_value_weighs():
    first, second = numpy.array(1.0), numpy.array(3.0)
    observations = Observations()
    for value in (first, second):
        observations.add({"a": value, "b": value}, lambda reported: 3.0 if reported is second else 1.0)
    observations.add({"a": (5.0, 0.0)}, lambda reported: 1 / 0 if reported is first else 1.0)
    assert observations.merged()["b"] == 2.5
