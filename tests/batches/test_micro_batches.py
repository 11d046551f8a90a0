"""Iterator batches become micro-batches; no example is lost, doubled or read too early."""

from __future__ import annotations

import chainer
import numpy
import pytest
from chainer_accum.batches import MicroBatches as ReadMicroBatches
from chainer_accum.batches import NumBatches, make_micro_batch_size
from hypothesis import given
from hypothesis import strategies as st

from helpers import serial


@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    steps=st.integers(1, 5),
    micro_batch_size=st.one_of(st.none(), st.integers(1, 12)),
    flushes=st.booleans(),
    repeats=st.booleans(),
)
def test_every_example_comes_once_and_in_order(size, batch_size, steps, micro_batch_size, flushes, repeats):
    iterator = serial(range(size), batch_size, repeat=repeats)
    examples = []
    while len(examples) < 3 * size:
        try:
            window = MicroBatches(
                iterator, steps, make_micro_batch_size(micro_batch_size), epoch_boundary="flush" if flushes else "carry"
            )
        except StopIteration:
            break
        sizes = []
        for micro_batch in window:
            examples.extend(micro_batch.examples)
            sizes.append(len(micro_batch.examples))
            assert micro_batch.weight == sizes[-1]
        assert max(sizes) <= (micro_batch_size or batch_size)
        is_cut_short = iterator.is_new_epoch and (flushes or not repeats)
        assert sum(sizes) == steps * batch_size or is_cut_short and sum(sizes) < steps * batch_size
    expected = list(range(size)) * (len(examples) // size + 1)
    assert examples == (expected[: len(examples)] if repeats else list(range(size)))


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_batch_is_split_evenly_into_as_few_parts_as_can_be(batch_size, micro_batch_size):
    window = MicroBatches(serial(range(200), batch_size), 1, make_micro_batch_size(micro_batch_size))
    sizes = [len(micro_batch.examples) for micro_batch in window]
    assert len(sizes) == -(-batch_size // micro_batch_size)
    assert max(sizes) - min(sizes) <= 1


def MicroBatches(iterator, steps=1, *args, **kwargs):
    return ReadMicroBatches(iterator, NumBatches(steps), *args, **kwargs)


class Counting:
    """An iterator that counts how often it is asked, and raises when there is no more."""

    epoch = 0
    is_new_epoch = False
    epoch_detail = 0.0

    def __init__(self, *batches):
        self.batches = list(batches)
        self.calls = 0

    def next(self):
        self.calls += 1
        if not self.batches:
            raise StopIteration
        return self.batches.pop(0)


def test_a_batch_is_read_only_when_those_before_it_are_used_up():
    iterator = Counting([1, 2], [3, 4], [5, 6])
    micro_batches = MicroBatches(iterator, 2, make_micro_batch_size(1))
    calls = [iterator.calls for _ in micro_batches]
    assert calls == [1, 1, 2, 2]
    assert iterator.calls == 2


def test_the_end_of_the_data_ends_the_window():
    iterator = Counting([1, 2])
    assert [micro_batch.examples for micro_batch in MicroBatches(iterator, 3)] == [[1, 2]]
    with pytest.raises(StopIteration):
        MicroBatches(iterator, 3)


def test_a_regular_window_goes_on_as_it_begins():
    assert MicroBatches(Counting([1, 2, 3]), 4, make_micro_batch_size(2)).regular_weight == 12
    assert MicroBatches(Counting([1, 2, 3]), 4, make_micro_batch_size(2), sum).regular_weight == 24
    assert MicroBatches(Counting([0, 0]), 4, None, sum).regular_weight is None


def test_batches_to_come_are_expected_to_be_as_heavy_as_any_so_far():
    micro_batches = MicroBatches(Counting([1], [2, 3, 4], [5]), 3)
    expected = [micro_batches.expected_weight for _ in micro_batches]
    assert expected == [3, 1 + 3 + 3, 1 + 3 + 1]
    assert micro_batches.largest_weight == 3
    assert MicroBatches(Counting([1]), 3, likely_weight=7.0).expected_weight == 1 + 7 + 7


def test_what_has_been_read_is_counted():
    micro_batches = MicroBatches(Counting([1, 2, 3], [4]), 2, make_micro_batch_size(2))
    assert (micro_batches.num_examples, micro_batches.costliest) == (3, 0)
    assert len(list(micro_batches)) == 3
    assert (micro_batches.num_examples, micro_batches.costliest) == (4, 3)


def test_weight_func_sees_the_examples_of_a_micro_batch():
    weights = [
        micro_batch.weight for micro_batch in MicroBatches(Counting([1, 2, 3, 4]), 1, make_micro_batch_size(2), sum)
    ]
    assert weights == [3.0, 7.0]


def test_an_array_of_examples_is_split_like_a_list():
    micro_batches = MicroBatches(Counting(numpy.arange(6).reshape(3, 2)), 1, make_micro_batch_size(2))
    assert [micro_batch.examples.tolist() for micro_batch in micro_batches] == [[[0, 1]], [[2, 3], [4, 5]]]


def test_a_batch_that_is_no_list_needs_weight_func_and_nothing_more():
    batch = numpy.zeros((3, 2)), numpy.zeros(3)
    with pytest.raises(TypeError, match="must be a list of examples, got a tuple from the iterator; pass a w"):
        MicroBatches(Counting(batch))
    assert [micro_batch.weight for micro_batch in MicroBatches(Counting(batch), weight_func=lambda b: len(b[0]))] == [3]
    with pytest.raises(TypeError, match="must be a list of examples, got a tuple .*; use accumulation_steps"):
        list(MicroBatches(Counting(batch), 1, make_micro_batch_size(2), lambda b: len(b[0])))
    with pytest.raises(TypeError, match="got a dict"):
        MicroBatches(Counting({"x": numpy.zeros(3)}))


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_an_empty_batch_is_refused(micro_batch_size):
    with pytest.raises(ValueError, match="empty batch"):
        list(MicroBatches(Counting([]), 1, make_micro_batch_size(micro_batch_size)))


@pytest.mark.parametrize(
    "weight, error",
    [(-1.0, ValueError), (numpy.nan, ValueError), ("many", TypeError), (chainer.Variable(numpy.ones(())), TypeError)],
)
def test_a_weight_that_is_none_is_refused(weight, error):
    with pytest.raises(error, match="the value of weight_func must be"):
        MicroBatches(Counting([1, 2]), weight_func=lambda examples: weight)
