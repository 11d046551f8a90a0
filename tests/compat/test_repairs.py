"""What newer versions of NumPy and SciPy have broken in Chainer computes what it always did, on any stack."""

from __future__ import annotations

import types
from typing import Any

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import chainer.distributions as D
import chainer.functions as F
import numpy
import pytest
from chainer.dataset import concat_examples
from chainer.dataset.convert import ConcatWithAsyncTransfer
from chainer_accum._compat import repairs

NAMES = [repair.what for repair in repairs.REPAIRS]


@pytest.mark.parametrize("repair", repairs.REPAIRS, ids=NAMES)
def test_nothing_needs_a_repair_any_more(repair: Any) -> None:
    assert not repairs.is_needed(repair)


@pytest.mark.parametrize("as_variable", [False, True])
@pytest.mark.parametrize("batch_shape", [(), (1,), (2,), (2, 3)])
def test_log_prob_of_a_categorical_distribution_is_that_of_each_label(batch_shape: Any, as_variable: bool) -> None:
    logits = numpy.random.standard_normal((*batch_shape, 4)).astype(numpy.float32)
    labels = numpy.random.randint(4, size=(5, *batch_shape))
    logit = chainer.Variable(logits)
    log_prob = D.Categorical(logit=logit).log_prob(chainer.Variable(labels) if as_variable else labels)
    log_p = numpy.log(numpy.exp(logits) / numpy.exp(logits).sum(axis=-1, keepdims=True))
    expected = numpy.take_along_axis(numpy.broadcast_to(log_p, (5, *log_p.shape)), labels[..., None], -1)[..., 0]
    numpy.testing.assert_allclose(log_prob.array, expected, rtol=1e-5)
    (gradient,) = chainer.grad([F.sum(log_prob)], [logit])
    counts = (labels[..., None] == numpy.arange(4)).sum(axis=0)
    numpy.testing.assert_allclose(gradient.array, counts - 5 * numpy.exp(log_p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, padding, expected",
    [
        ("uint8", -1, 255),
        ("uint8", 300, 44),
        ("int8", 300, 44),
        ("uint16", -1, 2**16 - 1),
        ("uint64", -1, 2**64 - 1),
        ("int32", 2**40 + 5, 5),
        ("int32", -1, -1),
        ("uint8", True, 1),
        ("uint8", 3.7, 3),
        ("float32", -1, -1),
        ("float32", 0.5, 0.5),
        ("bool", -1, True),
    ],
)
def test_padding_is_taken_modulo_the_range_of_the_type(dtype: str, padding: Any, expected: Any) -> None:
    arrays = [numpy.array([1, 0], dtype), numpy.array([1], dtype), numpy.array([], dtype)]
    correct = numpy.array([[1, 0], [1, expected], [expected, expected]], dtype)
    examples = [(array, {"key": array}["key"]) for array in arrays]
    results = [
        F.pad_sequence(arrays, padding=padding).array,
        concat_examples(arrays, padding=padding),
        *concat_examples(examples, padding=padding),
        concat_examples([{"key": array} for array in arrays], padding={"key": padding})["key"],
        ConcatWithAsyncTransfer()(arrays, padding=padding),
    ]
    for result in results:
        assert result.dtype == dtype
        numpy.testing.assert_array_equal(result, correct)


def test_a_padding_of_a_sequence_to_a_length_is_one_too() -> None:
    padded = F.pad_sequence([numpy.array([[1, 2]], numpy.uint8)], length=2, padding=-1)
    numpy.testing.assert_array_equal(padded.array, [[[1, 2], [255, 255]]])


@pytest.mark.parametrize("dtype, low, high", [("uint8", 0, 255), ("int8", -128, 127), ("uint64", 0, 2**64 - 1)])
def test_constants_are_taken_modulo_the_range_of_the_type(dtype: str, low: int, high: int) -> None:
    x = chainer.Variable(numpy.array([low, low + 2], dtype))
    for result, expected in [
        (x - 1, [high, low + 1]),
        (-1 + x, [high, low + 1]),
        (x + 256, [low + 256, low + 258]),
        (x * -1, [-low, -low - 2]),
        (-1 - x, [-1 - low, -3 - low]),
        (x - 1.5, [high, low + 1]),
    ]:
        assert result.dtype == dtype
        assert [int(value) % (high - low + 1) for value in result.array] == [e % (high - low + 1) for e in expected]


def test_what_is_too_large_for_any_type_is_refused() -> None:
    with pytest.raises(OverflowError):
        chainer.Variable(numpy.zeros(1, numpy.uint8)) + 2**70
    with pytest.raises(OverflowError):
        F.pad_sequence([numpy.zeros(1, numpy.uint8)], length=2, padding=2**70)


def test_gradients_pass_through_padded_sequences() -> None:
    xs = [chainer.Variable(numpy.ones(length, numpy.float32)) for length in (3, 1)]
    padded = F.pad_sequence(xs, padding=-1)
    gradients = chainer.grad([F.sum(padded * padded * numpy.arange(6, dtype=numpy.float32).reshape(2, 3))], xs)
    assert [gradient.array.tolist() for gradient in gradients] == [[0, 2, 4], [6]]


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32])
def test_sparse_matrices_are_multiplied_as_dense_ones_are(dtype: Any, batch: Any) -> None:
    pytest.importorskip("scipy")  # without which Chainer cannot
    shape = (3, 3) if batch is None else (batch, 3, 3)
    dense, right = (numpy.random.randint(-2, 3, size=shape).astype(dtype) for _ in range(2))
    sparse = chainer.utils.to_coo(dense, requires_grad=True)
    right = chainer.Variable(right)
    product = F.sparse_matmul(sparse, right)
    assert product.dtype == dtype
    numpy.testing.assert_array_equal(product.array, dense @ right.array)
    gradients = chainer.grad([F.sum(product)], [right, sparse.data])
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    numpy.testing.assert_array_equal(gradients[0].array, numpy.broadcast_to(dense.sum(axis=-2)[..., None], right.shape))


def make_repair(monkeypatch: Any, call: Any) -> Any:
    """Returns the owner of a name, and makes its replacement the only repair."""
    owner = types.SimpleNamespace(name="original")
    repair = repairs.Repair("a call", "", lambda: call(owner), OverflowError, owner, "name", lambda name: [name])
    monkeypatch.setattr(repairs, "REPAIRS", [repair])
    return owner


def fails_unless_repaired(owner: Any) -> None:
    if owner.name == "original":
        raise OverflowError


def test_what_fails_is_replaced_once(monkeypatch: Any) -> None:
    owner = make_repair(monkeypatch, fails_unless_repaired)
    repairs.repair_chainer()
    repairs.repair_chainer()
    assert owner.name == ["original"]


def test_what_works_is_left_as_it_is(monkeypatch: Any) -> None:
    owner = make_repair(monkeypatch, lambda owner: None)
    repairs.repair_chainer()
    assert owner.name == "original"


def test_what_fails_for_another_reason_is_left_as_it_is(monkeypatch: Any) -> None:
    owner = make_repair(monkeypatch, lambda owner: {}["missing"])
    repairs.repair_chainer()
    assert owner.name == "original"


def test_what_fails_is_left_as_it_is_when_switched_off(monkeypatch: Any) -> None:
    monkeypatch.setenv("CHAINER_ACCUM_COMPAT", "0")
    owner = make_repair(monkeypatch, fails_unless_repaired)
    repairs.repair_chainer()
    assert owner.name == "original"
