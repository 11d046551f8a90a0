"""What passes touch is told of while they run, and links to which a loss function refers are found before."""

from __future__ import annotations

import functools
import types

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum.state.touched_links import Touches, links_behind

x = numpy.ones((4, 3), "f")


class Told:
    """Takes down what it is told of."""

    def __init__(self):
        self.known = {}
        self.links, self.arrays, self.parameters = [], [], []
        self.touches = Touches(self.known, self.take_down, parameters=True)

    def take_down(self, thing):
        if id(thing) not in self.known:
            kinds = {chainer.Link: self.links, numpy.ndarray: self.arrays, chainer.Parameter: self.parameters}
            next(taken for kind, taken in kinds.items() if isinstance(thing, kind)).append(thing)
            self.known[id(thing)] = thing

    def __enter__(self):
        self.touches.begin()
        return self

    def __exit__(self, *_):
        self.touches.end()


def test_a_link_is_told_of_once_with_all_below_it():
    link = chainer.Sequential(L.Linear(3, 3), L.BatchNormalization(3))
    with Told() as told:
        link(x)
        link(x)
    assert told.links == list(link.links()) and told.parameters == []
    link[0](x)
    assert len(told.links) == 3


def test_a_link_is_told_of_before_it_runs():
    link = L.BatchNormalization(3)
    seen = []
    touches = Touches({}, lambda each: seen.append(each.avg_mean.tolist()), functions=False)
    touches.begin()
    link(x)
    touches.end()
    assert seen[0] == [0, 0, 0]


def test_a_link_of_which_only_a_method_runs_is_told_of():
    class Encoder(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.l = L.Linear(3, 3)

        def encode(self, x):
            return self.l(x)

    lstm, encoder = L.LSTM(3, 3), Encoder()
    with Told() as told:
        lstm.forward(x)
        encoder.encode(x)
    assert {id(link) for link in told.links} == {id(each) for link in (lstm, encoder) for each in link.links()}


NORMALIZATIONS = {
    "batch normalization": lambda mean, var: F.batch_normalization(x, x[0], x[0], running_mean=mean, running_var=var),
    "batch renormalization": lambda mean, var: F.batch_renormalization(
        x, x[0], x[0], 1, 0, running_mean=mean, running_var=var, update_statistics=True
    ),
}


@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
def test_running_averages_of_a_function_are_told_of(name):
    averages = [numpy.zeros(3, "f"), numpy.ones(3, "f")]
    with Told() as told:
        NORMALIZATIONS[name](*averages)
    assert [id(array) for array in told.arrays] == [id(array) for array in averages]


def test_a_parameter_is_told_of_before_it_gets_a_gradient():
    parameter = chainer.Parameter(1.0, (3, 3))
    gradients = []
    touches = Touches({}, lambda each: gradients.append(each.grad.tolist()), parameters=True)
    parameter.grad = numpy.zeros((3, 3), "f")
    touches.begin()
    F.sum(F.matmul(x, parameter)).backward()
    touches.end()
    assert gradients == [[[0] * 3] * 3] and parameter.grad.any()


def test_several_may_be_active_and_end_in_any_order():
    first, second, link = Told(), Told(), L.Linear(3, 3)
    with first:
        second.touches.begin()
        link(x)
    assert len(chainer.get_function_hooks()) == 2
    second.touches.end()
    second.touches.end()
    assert first.links == second.links == [link]
    assert not chainer.get_function_hooks() and not chainer._get_link_hooks()


other = L.Linear(3, 3)


def call_other(x):
    return other(x)


def test_links_behind_a_loss_function_are_found():
    inner, link = L.Linear(3, 3), L.Linear(3, 3)
    link.helper = [inner]
    ways = [
        lambda: link(x),
        lambda x, link=link: link(x),
        lambda x, *, links=(link,): links[0](x),
        functools.partial(lambda first, x: first(x), link),
        functools.partial(lambda x, first: first(x), first={"link": link}),
        link.forward,
        types.SimpleNamespace(inner=types.SimpleNamespace(link=link)),
        lambda x: [each(x) for each in [link]],
        [{"link": (link,)}],
        link,
    ]
    for way in ways:
        assert {id(each) for each in links_behind(way)} == {id(link), id(inner)}
    assert links_behind(call_other) == links_behind(lambda x: call_other(x)) == [other]


def test_no_links_are_found_behind_what_refers_to_none():
    def not_yet():
        return later(x)  # noqa: F821

    assert links_behind(None, 3, F.relu, F.softmax_cross_entropy, not_yet, numpy, chainer.Variable(x), [x]) == []
