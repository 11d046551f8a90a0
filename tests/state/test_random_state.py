"""The state of random generators can be gone back to, also in another process."""

from __future__ import annotations

import random

import chainer_accum  # noqa: F401
import chainer
import numpy
import pytest
from chainer.serializers import DictionarySerializer, NpzDeserializer
from chainer_accum.state.random_state import RandomState, devices_of


def draw() -> list:
    return [random.random(), random.gauss(0, 1), *numpy.random.randn(3), numpy.random.randint(1000)]


def test_the_generators_go_back_as_often_as_asked() -> None:
    random.gauss(0, 1), numpy.random.randn(1)  # each keeps the second of a pair for the next call
    state = RandomState()
    expected = draw()
    for _ in range(2):
        state.restore()
        assert draw() == expected


def test_to_take_the_state_draws_nothing() -> None:
    state = RandomState()
    RandomState()
    actual = draw()
    state.restore()
    assert draw() == actual


def test_a_state_that_was_saved_and_loaded_gives_the_same_numbers() -> None:
    numpy.random.randn(1)
    state = RandomState()
    expected = draw()
    saved = DictionarySerializer()
    state.save(saved)
    RandomState.load(NpzDeserializer(saved.target)).restore()
    assert draw() == expected


def test_another_generator_of_numpy_can_be_saved() -> None:
    if not hasattr(numpy.random, "set_bit_generator"):
        pytest.skip("this NumPy has one global generator only")
    original = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(3))
    try:
        state = RandomState()
        expected = draw()
        saved = DictionarySerializer()
        state.save(saved)
        RandomState.load(NpzDeserializer(saved.target)).restore()
        assert draw() == expected
    finally:
        numpy.random.set_bit_generator(original)


def test_the_devices_of_links_are_listed_once() -> None:
    links = [chainer.links.Linear(2, 2), None, chainer.links.Linear(2, 2)]
    assert devices_of(links) == [chainer.get_device("@numpy")]
