"""A window gathers a number of iterator batches, or as many as have a number of tokens."""

from __future__ import annotations

import numpy
import pytest
from chainer_accum import TokenBudget
from chainer_accum.batches import MicroBatches, NumBatches, make_schedule
from chainer_accum.batches.gathering import NumTokens
from hypothesis import given
from hypothesis import strategies as st

from helpers import serial

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=30)


def gather(gathering, batches):
    """Returns how many of the batches are taken."""
    for number, batch in enumerate(batches):
        if not gathering.to_come:
            return number
        gathering.add(batch)
    return len(batches)


@given(st.integers(1, 9))
def test_a_number_of_batches_counts_down(number):
    assert gather(NumBatches(number), [[1]] * 20) == number


@given(st.integers(1, 200), st.lists(LENGTHS, min_size=1, max_size=30))
def test_batches_are_gathered_until_there_are_enough_tokens(num_tokens, batches):
    gathering = NumTokens(num_tokens, int)
    number = gather(gathering, batches)
    tokens = [sum(max(length, 1) for length in batch) for batch in batches]  # an empty sequence counts as well
    assert sum(tokens[: number - 1]) < num_tokens
    if number < len(batches):
        assert sum(tokens[:number]) >= num_tokens
        assert gathering.to_come == 0


@given(st.integers(1, 100), LENGTHS)
def test_more_batches_are_expected_as_large_as_the_largest_one(num_tokens, batch):
    gathering = NumTokens(num_tokens, int)
    assert gathering.to_come >= 1
    gathering.add(batch)
    tokens = sum(max(length, 1) for length in batch)
    assert gathering.to_come == max(-(-(num_tokens - tokens) // tokens), 0)


def test_the_longest_of_several_lengths_counts():
    gathering = NumTokens(12, tuple)
    gathering.add([(2, 5), (4, 1)])
    assert gathering.to_come == 1
    gathering.add([(3, 3)])
    assert gathering.to_come == 0


def test_a_batch_that_is_no_list_has_no_tokens():
    with pytest.raises(TypeError, match="to be counted by its tokens, a batch must be a list of examples, got a tuple"):
        NumTokens(4, len).add(numpy.zeros((2, 2)).shape)


def window(iterator, num_tokens, num_ranks=1, **kwargs):
    budget = TokenBudget(num_tokens, int)
    micro_batches = MicroBatches(iterator, make_schedule(1, budget, iterator, num_ranks).ask(None), **kwargs)
    return micro_batches, [micro_batch.examples for micro_batch in micro_batches]


def test_a_window_ends_with_the_batch_that_has_the_last_token():
    iterator = serial([5, 1, 2, 2, 7, 1, 3, 3], 2)
    assert window(iterator, 10)[1] == [[5, 1], [2, 2]]
    assert window(iterator, 8)[1] == [[7, 1]]
    assert window(iterator, 7)[1] == [[3, 3], [5, 1]]


def test_each_rank_gathers_its_share():
    assert window(serial([5, 1, 2, 2, 7, 1], 2), 13, num_ranks=2)[1] == [[5, 1], [2, 2]]


def test_a_window_ends_with_the_data_or_with_the_epoch():
    micro_batches, examples = window(serial([5, 1, 2], 2, repeat=False), 100)
    assert examples == [[5, 1], [2]] and micro_batches.num_examples == 3
    assert window(serial([5, 1, 2], 2), 100, epoch_boundary="flush")[1] == [[5, 1], [2, 5]]


def test_the_number_of_batches_depends_on_the_data_and_is_not_known_before():
    schedule = make_schedule(1, TokenBudget(10, int), serial([1], 1), 1)
    assert schedule.known(None) is None
    assert not schedule.is_always_one
    assert schedule.depends_on_data
    assert not make_schedule(2, None, serial([1], 1), 1).depends_on_data


@pytest.mark.parametrize("budget", [TokenBudget("auto", len), TokenBudget(4, len, across_window=True)])
def test_only_a_number_of_tokens_can_be_gathered(budget):
    with pytest.raises(
        ValueError, match="effective_batch_size must have a number of tokens and nothing else, got Token"
    ):
        make_schedule(1, budget, serial([1], 1), 1)


def test_tokens_as_well_as_steps_are_refused():
    with pytest.raises(
        ValueError, match="effective_batch_size must be None with accumulation_steps, got .*TokenBudget"
    ):
        make_schedule(2, TokenBudget(4, len), serial([1], 1), 1)
