"""A batch is cut so that each example is in one micro-batch, and no micro-batch is above its limit."""

from __future__ import annotations

import functools

import numpy
import pytest
from chainer_accum import TokenBudget
from chainer_accum.batches import Load, MicroBatches, NumBatches, make_micro_batch_size, together
from chainer_accum.batches.cutting import Counted, Grouped, Measured
from hypothesis import given
from hypothesis import strategies as st

from helpers import serial


class Sequence:
    """An example that knows its length. Two are equal only if they are the same."""

    def __init__(self, length):
        self.length = length

    def __repr__(self):
        return f"Sequence({self.length})"


def length_of(example):
    return example.length


def sequences(lengths):
    return [Sequence(length) for length in lengths]


def parts(size, batch):
    return list(size.parts(size.arrange(batch)))


def cut(micro_batch_size, batch):
    """Returns the examples of each micro-batch."""
    return [part.examples for part in parts(make_micro_batch_size(micro_batch_size), batch)]


def lengths(examples):
    return [example.length for example in examples]


@st.composite
def batches(draw):
    """Draws lengths, and a budget that the longest one does not exceed."""
    drawn = draw(st.lists(st.integers(0, 30), min_size=1, max_size=40))
    return drawn, draw(st.integers(max(*drawn, 1), 200))


@given(batches(), st.booleans())
def test_each_example_is_in_one_micro_batch_within_the_budget(drawn, is_repeated):
    batch, budget = sequences(drawn[0]), drawn[1]
    batch = batch * 2 if is_repeated else batch
    size = make_micro_batch_size(TokenBudget(budget, length_of))
    arranged = size.arrange(batch)
    cut = list(size.parts(arranged))
    in_parts = [example for part in cut for example in part.examples]
    assert sorted(map(id, in_parts)) == sorted(map(id, batch))
    assert [batch[position] for position in arranged.order] == in_parts
    assert sorted(arranged.order) == list(range(len(batch)))
    assert lengths(in_parts) == sorted(lengths(batch), reverse=True)
    for part in cut:
        padded = max(*lengths(part.examples), 1) * len(part.examples)
        assert part.load.num_examples == len(part.examples)
        assert part.load.cost == padded <= budget
        assert part.load.num_tokens == sum(lengths(part.examples))
        assert part.load.num_positions == max(lengths(part.examples)) * len(part.examples)
    for part, following in zip(cut, cut[1:]):  # no part could have taken the next example, too
        assert max(*lengths(part.examples), 1) * (len(part.examples) + 1) > budget
        assert max(lengths(following.examples)) <= min(lengths(part.examples))


def test_no_micro_batch_is_above_its_budget_in_1000_random_windows():
    random = numpy.random.RandomState(0)
    for _ in range(1000):
        longest, steps = random.randint(1, 100), random.randint(1, 5)
        data = sequences(random.randint(0, longest + 1, size=random.randint(1, 60)).tolist())
        budget = TokenBudget(longest * random.randint(1, 20), length_of, across_window=bool(random.randint(2)))
        iterator = serial(data, random.randint(1, len(data) + 1))
        micro_batches = list(MicroBatches(iterator, NumBatches(steps), make_micro_batch_size(budget)))
        assert sum(len(each.examples) for each in micro_batches) == iterator.batch_size * steps
        for micro_batch in micro_batches:
            assert max(lengths(micro_batch.examples)) * len(micro_batch.examples) <= budget.max_tokens


def test_examples_of_the_same_length_keep_their_order():
    batch = sequences([2, 1, 2, 1, 2])
    assert cut(TokenBudget(100, length_of), batch) == [[batch[i] for i in (0, 2, 4, 1, 3)]]


def test_the_longest_of_several_lengths_counts_and_each_is_padded():
    batch = [(3, 1), (2, 5), (1, 1)]
    (part,) = parts(make_micro_batch_size(TokenBudget(15, tuple)), batch)
    assert part.examples == [(2, 5), (3, 1), (1, 1)]
    assert part.load == Load(num_examples=3, cost=15, num_tokens=13, num_positions=3 * 3 + 3 * 5)


def test_an_example_may_have_fewer_lengths_than_another():
    (part,) = parts(make_micro_batch_size(TokenBudget(15, tuple)), [(3, 2), (4,)])
    assert (part.load.num_tokens, part.load.num_positions) == (9, 2 * 4 + 2 * 2)


def test_an_example_that_is_longer_than_the_budget_is_named():
    with pytest.raises(ValueError, match="max_tokens must be at least .*, got 4 for an example of 5 tokens; increase"):
        cut(TokenBudget(4, length_of), sequences([1, 5, 3]))


@given(batches(), st.lists(st.integers(1, 200), max_size=5))
def test_a_budget_may_drop_below_the_longest_example_and_between_parts(drawn, budgets):
    batch = sequences(drawn[0])
    arranged = Measured(batch, length_of)
    start, sizes = 0, []
    while start < len(batch):
        budget = budgets.pop() if budgets else 1
        part = arranged.part(start, budget)
        assert part.load.cost <= budget or part.load.num_examples == 1
        sizes.append(part.load.num_examples)
        start += part.load.num_examples
    assert min(sizes) >= 1 and sum(sizes) == len(batch)


@pytest.mark.parametrize("limit, sizes", [(None, [10]), (10, [10]), (9, [5, 5]), (4, [3, 3, 4]), (1, [1] * 10)])
def test_a_number_of_examples_cuts_evenly_and_keeps_the_order(limit, sizes):
    batch = sequences(range(10))
    cut_parts = cut(limit, batch)
    assert list(map(len, cut_parts)) == sizes
    assert sum(cut_parts, []) == batch
    assert Counted(batch).order == []


@pytest.mark.parametrize("batch", [(1, 2), {"x": 1}, 7])
@pytest.mark.parametrize(
    "arrange", [functools.partial(Measured, length_func=len), functools.partial(Grouped, function=list)]
)
def test_a_batch_that_is_no_list_cannot_be_cut(arrange, batch):
    with pytest.raises(TypeError, match="to be split, a batch must be a list of examples, got a .* from the iterator"):
        arrange(batch)


@pytest.mark.parametrize("micro_batch_size", [4, TokenBudget(8, len), lambda examples: [examples[::2], examples[1::2]]])
def test_a_batch_may_be_an_array(micro_batch_size):
    batch = numpy.arange(12).reshape(6, 2)
    cut_parts = cut(micro_batch_size, batch)
    assert len(cut_parts) == 2
    assert sorted(tuple(row) for part in cut_parts for row in part) == list(map(tuple, batch))


def in_pairs(examples):
    return [examples[start : start + 2] for start in range(0, len(examples), 2)]


@pytest.mark.parametrize(
    "function",
    [
        in_pairs,
        lambda examples: tuple(map(tuple, in_pairs(examples))),
        lambda examples: (pair for pair in in_pairs(examples)),
        lambda examples: map(iter, in_pairs(examples)),
        lambda examples: [numpy.array(pair, dtype=object) for pair in in_pairs(examples)],
    ],
)
def test_a_function_may_return_lists_of_any_kind(function):
    batch = sequences(range(5))
    assert cut(function, batch) == in_pairs(batch)


def test_the_function_gets_a_list_of_its_own():
    batch = sequences(range(4))

    def take(examples):
        assert type(examples) is list
        return [[examples.pop()] for _ in range(4)]

    assert cut(take, batch) == [[example] for example in reversed(batch)]
    assert len(batch) == 4


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_an_example_that_is_in_a_batch_twice_is_returned_twice(indices, random):
    distinct = sequences(range(4))
    batch = [distinct[index] for index in indices]

    def shuffled(examples):
        random.shuffle(examples)
        return [examples]

    arranged = make_micro_batch_size(shuffled).arrange(batch)
    (part,) = make_micro_batch_size(shuffled).parts(arranged)
    assert sorted(arranged.order) == list(range(len(batch)))
    assert [batch[position] for position in arranged.order] == part.examples
    if len(batch) > 1:
        with pytest.raises(ValueError, match="1 missing"):
            cut(lambda examples: [examples[1:]], batch)


def raise_stop_iteration(examples):
    raise StopIteration


def raise_key_error(examples):
    raise KeyError("bucket")


@pytest.mark.parametrize(
    "function, error, message",
    [
        (lambda examples: [examples[1:]], ValueError, "got 1 missing from <function"),
        (lambda examples: [examples, examples[:2]], ValueError, "got 2 too many from <function"),
        (lambda examples: [examples[:-1], examples[:1]], ValueError, "got 1 too many and 1 missing from <function"),
        (lambda examples: [[Sequence(1) for _ in examples]], ValueError, "got 5 too many and 5 missing .* not copies"),
        (lambda examples: [examples, []], ValueError, "got an empty list from <function"),
        (lambda examples: [[], examples[1:]], ValueError, "got 1 missing from <function"),
        (lambda examples: [], ValueError, "got 5 missing from <function"),
        (lambda examples: None, TypeError, "must return lists of examples, got None from <function"),
        (lambda examples: 3, TypeError, "must return lists of examples, got 3 from <function"),
        (
            lambda examples: examples,
            TypeError,
            r"must return lists of examples, got \[Sequence\(0\), .*; return a list",
        ),
        (raise_stop_iteration, RuntimeError, "micro_batch_size must not raise StopIteration, got it from <function"),
        (raise_key_error, KeyError, "bucket"),
    ],
)
def test_a_function_that_does_not_return_each_example_once_is_refused(function, error, message):
    with pytest.raises(error, match=message):
        cut(function, sequences(range(5)))


def test_a_group_is_cut_further_only_when_memory_runs_out():
    batch = sequences(range(9))
    size = make_micro_batch_size(lambda examples: [examples[:5], examples[5:]])
    assert size.limit is None
    assert [len(part.examples) for part in parts(size, batch)] == [5, 4]
    size.lower(5)
    assert size.limit == 3
    cut_parts = [part.examples for part in parts(size, batch)]
    assert list(map(len, cut_parts)) == [2, 3, 2, 2] and sum(cut_parts, []) == batch


def test_the_load_of_passes_that_run_together_is_that_of_the_costliest():
    loads = [Load(1, 10, 10, 10), Load(5, 10, 8, 10), Load(9, 9, 9, 9)]
    assert together(loads) == Load(5, 10, 27, 10)  # the costliest of which one can be cut
