"""Objects are put back in place, with all that they keep, and what is alive is left alone."""

from __future__ import annotations

import collections
import logging
import types
import weakref

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum.state.persistent_values import PersistentValues
from chainer_accum.state.recorded_arrays import LARGE
from chainer_accum.state.training_state import TrainingState


class Statistics:
    """An object of the user's."""

    def __init__(self):
        self.calls = [0]
        self.inner = types.SimpleNamespace(total=numpy.zeros(2))


def link_with(value):
    link = chainer.Link()
    link.value = value
    return link


KEPT = {
    "a number": (lambda: 3, lambda link: setattr(link, "value", 4)),
    "an array": (lambda: numpy.zeros(3), lambda link: link.value.fill(1)),
    "a list": (lambda: [1, [2]], lambda link: link.value[1].append(3)),
    "a dictionary": (lambda: {"a": {"b": 1}}, lambda link: link.value["a"].clear()),
    "an ordered dictionary": (lambda: collections.OrderedDict(a=1, b=2), lambda link: link.value.move_to_end("a")),
    "a set": (lambda: {1, 2}, lambda link: link.value.add(3)),
    "a tuple with an array": (lambda: (numpy.zeros(3),), lambda link: link.value[0].fill(1)),
    "a bounded queue": (lambda: collections.deque([1, 2], maxlen=2), lambda link: link.value.append(3)),
    "an object": (Statistics, lambda link: link.value.calls.append(1)),
    "an object within it": (Statistics, lambda link: link.value.inner.total.fill(1)),
    "a variable": (lambda: chainer.Variable(numpy.zeros(3)), lambda link: setattr(link.value, "grad", numpy.ones(3))),
}


def describe(value):
    if isinstance(value, chainer.Variable):
        return describe(value.array), describe(value.grad)
    if isinstance(value, (Statistics, types.SimpleNamespace)):
        return describe(vars(value))
    if isinstance(value, dict):
        return [(key, describe(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set, collections.deque)):
        return [describe(each) for each in value]
    return value.tolist() if isinstance(value, numpy.ndarray) else value


@pytest.mark.parametrize("name", sorted(KEPT))
def test_what_a_link_keeps_is_put_back_in_place(name):
    make, change = KEPT[name]
    link = link_with(make())
    value, before = link.value, describe(link.value)
    state = TrainingState()
    state.add(link)
    for _ in range(2):
        change(link)
        assert describe(link.value) != before
        state.restore()
        assert link.value is value and describe(value) == before


def test_what_a_library_keeps_is_left_alone():
    logger = logging.getLogger("test_stored_objects")
    state = TrainingState()
    state.add(link_with(logger))
    handler = logging.NullHandler()
    logger.addHandler(handler)
    state.restore()
    assert logger.handlers == [handler]
    logger.removeHandler(handler)


def test_a_parameter_with_another_dtype_is_put_back():
    link = L.Linear(3, 2)
    weight, array = link.W, link.W.array
    state = TrainingState()
    state.add(link)
    weight.array = array.astype("float64")
    state.restore()
    assert weight.array is array
    F.sum(link(numpy.ones((1, 3), "f"))).backward()
    assert weight.grad.dtype == "float32"


def test_a_link_is_stored_as_it_is_outside_of_a_window():
    link = chainer.Link()
    link.add_persistent("bank", numpy.zeros(LARGE))
    bank = weakref.ref(link.bank)
    state = TrainingState()
    with PersistentValues([link]).following():
        state.add(link)
        link.bank[3] = 1
    state.restore()
    assert link.bank is bank() and type(link.bank) is numpy.ndarray and not link.bank.any()


def test_what_turns_up_is_put_back_with_its_gradient():
    link, outside = L.Linear(3, 3), L.Linear(3, 3)
    gradient = numpy.full((3, 3), 5, "f")
    outside.W.grad = gradient
    weight = outside.W.array.copy()
    state = TrainingState()
    with state.following():
        F.sum(F.linear(link(numpy.ones((1, 3), "f")), outside.W)).backward()
        outside.W.array += 1
    assert outside.W.grad is not gradient and state.links == [link]
    state.restore()
    assert outside.W.grad is gradient and (gradient == 5).all()
    numpy.testing.assert_array_equal(outside.W.array, weight)
