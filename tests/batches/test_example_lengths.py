"""A TokenBudget takes a number and a function that returns lengths, and refuses everything else."""

from __future__ import annotations

import copy

import numpy
import pytest
from chainer_accum import TokenBudget
from chainer_accum.batches.token_budget import Lengths, lengths_of


@pytest.mark.parametrize("max_tokens", [1, 4096, numpy.int64(7), "auto"])
def test_the_budget_is_a_number_or_auto(max_tokens):
    budget = TokenBudget(max_tokens, len)
    assert (budget.max_tokens, budget.length_func, budget.across_window) == (max_tokens, len, False)


def test_it_shows_its_arguments_and_can_be_copied():
    budget = TokenBudget(8, len, across_window=True)
    assert repr(budget) == repr(copy.deepcopy(budget)) == "TokenBudget(8, <built-in function len>, across_window=True)"


@pytest.mark.parametrize("max_tokens", [2.0, True, None, "fast", numpy.array([1, 2]), [3], numpy.float32(4)])
def test_another_type_of_number_is_refused(max_tokens):
    with pytest.raises(
        TypeError, match="max_tokens must be an int of 1 or more, got .*; use 'auto' to find the fastest"
    ):
        TokenBudget(max_tokens, len)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_no_tokens_are_refused(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be an int of 1 or more, got {max_tokens}; use 'auto'"):
        TokenBudget(max_tokens, len)


def test_other_arguments_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="length_func must be callable, got 3; pass a function that returns the length"):
        TokenBudget(8, 3)
    with pytest.raises(TypeError, match="across_window must be True or False, got 1; use True to sort the examples"):
        TokenBudget(8, len, across_window=1)


@pytest.mark.parametrize(
    "value, expected",
    [
        (3, Lengths(3, (3,))),
        (0, Lengths(1, (0,))),  # an example of no tokens has a place in the batch, too
        (numpy.int32(3), Lengths(3, (3,))),
        (numpy.uint8(200), Lengths(200, (200,))),
        ((2, 5), Lengths(5, (2, 5))),
        ([5, numpy.int64(2)], Lengths(5, (5, 2))),
        ((0, 0), Lengths(1, (0, 0))),
    ],
)
def test_a_length_is_a_whole_number_or_several(value, expected):
    lengths = lengths_of("example", lambda example: value)
    assert lengths == expected
    assert all(type(each) is int for each in lengths.each)


@pytest.mark.parametrize(
    "value, error",
    [
        (3.0, TypeError),
        (numpy.float32(3), TypeError),
        (True, TypeError),
        (numpy.bool_(True), TypeError),
        (None, TypeError),
        ("abc", TypeError),
        ((2, "b"), TypeError),
        (numpy.array([2, 3]), TypeError),
        (-1, ValueError),
        ((2, -1), ValueError),
    ],
)
def test_anything_else_is_no_length(value, error):
    with pytest.raises(
        error, match="the value of length_func must be an int of 0 or more, got .*; return a length, or"
    ):
        lengths_of("example", lambda example: value)


def test_no_length_at_all_is_refused():
    with pytest.raises(ValueError, match=r"the value of length_func must have at least one length, got \(\); return a"):
        lengths_of("example", lambda example: ())


def test_a_length_function_does_not_say_that_the_data_has_ended():
    with pytest.raises(RuntimeError, match="length_func must not raise StopIteration, got it from <function"):
        lengths_of("example", lambda example: next(iter([])))
