"""What micro-batches report becomes what the whole effective batch would have reported."""

from __future__ import annotations

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum.observations import Observations
from hypothesis import given
from hypothesis import strategies as st


def merge(reports, rules=None, weights=None):
    """Returns the merged observation of micro-batches that report these dictionaries."""
    observations = Observations(rules)
    outer = {}
    with chainer.Reporter().scope(outer):
        for index, report in enumerate(reports):
            with observations.collecting() as observation:
                chainer.report(report)
            observations.add(observation, 1.0 if weights is None else weights[index])
    assert outer == {}
    return observations.merged()


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
        assert type(merged) is type(value) or isinstance(value, numpy.generic) and isinstance(merged, numpy.generic)
        assert merged.dtype == dtype
        assert merged == (value if rule == "mean" else 3 * int(value))
        assert merged.shape == ()
    variable = merge([{"x": chainer.Variable(value)}] * 3)["x"] if isinstance(value, numpy.ndarray) else None
    assert variable is None or type(variable) is chainer.Variable and variable.dtype == mean_dtype


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


def test_what_has_no_weight_may_be_nan():
    assert merge([{"x": 1.0}, {"x": float("nan")}, {"x": 2.0}], weights=[1.0, 0.0, 1.0]) == {"x": 1.5}
    assert merge([{"x": 1.0}, {"x": 2.0}], weights=[0.0, 0.0]) == {"x": 2.0}


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
    reports = [
        {"mean": value, "sum": value, "last": value, "variable": chainer.Variable(value), "own": (value, weight)}
    ]
    merged = merge(reports * 3, {"sum": "sum", "last": "last"}, weights=[1.0, 0.0, 2.0])
    assert numpy.asarray(merged["mean"]).view(numpy.ndarray).tobytes() == numpy.float32(1.5).tobytes()
    assert numpy.asarray(merged["sum"]).view(numpy.ndarray).tobytes() == numpy.float32(4.5).tobytes()
