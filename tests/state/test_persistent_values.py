"""Persistent values and other attributes of links go back to what they were, at little cost."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import sys
import tracemalloc

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import link_hooks
from chainer.serializers import load_npz, save_npz
from chainer_accum.state.persistent_values import PersistentValues
from chainer_accum.state.random_state import RandomState
from chainer_accum.state.recorded_arrays import LARGE, RecordedArray
from hypothesis import given, settings
from hypothesis import strategies as st

COLUMNS = 64
ROWS = LARGE // 4 // COLUMNS
PACKAGE = os.path.dirname(chainer_accum.__file__) + os.sep


class Bank(chainer.Chain):
    """Has a persistent value that is large enough to be recorded, and one that is not."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(COLUMNS)
        self.add_persistent("bank", counting())
        self.add_persistent("position", 0)

    def forward(self, x):
        h = self.bn(x)
        self.bank[self.position : self.position + len(x)] = h.array
        self.position += len(x)
        return F.matmul(h, self.bank, transb=True)


def counting():
    return numpy.arange(ROWS * COLUMNS, dtype="f").reshape(ROWS, COLUMNS)


def make_x(seed=0):
    return numpy.random.RandomState(seed).randn(8, COLUMNS).astype("f")


def state_of(*links):
    """Returns copies of all persistent values."""
    return [copy.deepcopy(getattr(link, name)) for root in links for link in root.links() for name in link._persistent]


def assert_same(actual, expected):
    for value, other in zip(actual, expected):
        numpy.testing.assert_array_equal(value, other)


def assert_no_hooks():
    assert not chainer.get_function_hooks() and not chainer._get_link_hooks()


def test_values_go_back_as_often_as_asked():
    link = Bank()
    before, bank = state_of(link), id(link.bank)
    values = PersistentValues([link, None])
    for _ in range(3):
        with values.following():
            link(make_x())
            link(make_x(1))
        assert link.position == 16 and link.bn.avg_mean.any()
        values.restore()
        assert_same(state_of(link), before)
        assert id(link.bank) == bank and type(link.bank) is numpy.ndarray
    assert_no_hooks()


def test_without_a_restoration_values_are_those_of_the_passes():
    link, expected = Bank(), Bank()
    with PersistentValues([link]).following():
        link(make_x())
    expected(make_x())
    assert_same(state_of(link), state_of(expected))
    assert type(link.bank) is numpy.ndarray


def test_a_large_value_is_not_copied():
    link = Bank()
    link(make_x())
    tracemalloc.start()
    values = PersistentValues([link])
    with values.following():
        checkpoint = values.checkpoint()
        with checkpoint.following():
            link.bank[3] = 5
            link.bank[[5, 9]] += 1
        checkpoint.restore()
    values.restore()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGE / 4


def test_a_large_value_is_not_copied_in_the_windows_that_follow():
    link = Bank()
    gc.disable()  # nothing is to hold the array until then
    try:
        for _ in range(3):
            values = PersistentValues([link])
            with values.following(), values.checkpoint().following():
                assert isinstance(link.bank, RecordedArray)
                link(make_x())
    finally:
        gc.enable()


OTHERS = {
    "by a variable of the caller's": lambda link: link.bank,
    "by a view": lambda link: link.bank[3:5],
    "by another link": lambda link: vars(link.bn).setdefault("bank", link.bank),
    "by a variable in a graph": lambda link: F.matmul(make_x(), link.bank, transb=True),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_value_that_is_referred_to_otherwise_is_copied(name):
    link = Bank()
    other = OTHERS[name](link)
    values = PersistentValues([link])
    with values.following():
        assert not isinstance(link.bank, RecordedArray)
        link.bank[3] = 0
    values.restore()
    assert other is not None
    numpy.testing.assert_array_equal(link.bank, counting())


def test_an_array_that_is_referred_to_later_goes_back_as_a_whole():
    link = Bank()
    values = PersistentValues([link])
    with values.following():
        link.bank[3] = 0
    other = link.bank
    with values.following():
        other[4] = 0
    values.restore()
    numpy.testing.assert_array_equal(link.bank, counting())


def replace(link):
    link.bank[2] = 0
    link.bank = link.bank * 2


def rotate(link):
    link.bank = numpy.roll(link.bank, 1, axis=0)


def reverse(link):
    link.bank[2] = 0
    link.bank = link.bank[::-1]


def reshape(link):
    link.bank = link.bank.reshape(COLUMNS, ROWS)
    link.bank[3] = 0


def add_in_place(link):
    link.bank += 1


def keep_a_view(link):
    link.recent = link.bank[:5]
    link.recent[0] = 0


CHANGES = [replace, rotate, reverse, reshape, add_in_place, keep_a_view]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_value_may_be_set_anew(change, fails):
    link, expected = Bank(), Bank()
    values = PersistentValues([link])
    with values.following():
        change(link)
    if fails:
        values.restore()
    else:
        change(expected)
    assert vars(link).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        assert not isinstance(vars(link)[name], RecordedArray)
        assert not isinstance(value, numpy.ndarray) or (vars(link)[name] == value).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([*CHANGES, "open", "end", "fail"]), st.integers(0, ROWS - 1)), max_size=12))
def test_contexts_may_be_nested(steps):
    link = chainer.Chain()
    link.add_persistent("bank", counting())
    stack = []
    for step, row in steps:
        if step == "open":
            values = stack[-1][0].checkpoint() if stack and row % 2 else PersistentValues([link])
            state = {name: numpy.array(value) for name, value in vars(link).items() if name in ("bank", "recent")}
            context = values.following()
            context.__enter__()
            stack.append((values, state, context))
        elif step in ("end", "fail") and stack:
            values, state, context = stack.pop()
            context.__exit__(None, None, None)
            if step == "fail":
                values.restore()
                for name, value in state.items():
                    numpy.testing.assert_array_equal(getattr(link, name), value)
                assert hasattr(link, "recent") is ("recent" in state)
        elif callable(step) and step is not reshape:
            step(link)
            link.bank[row] = row
        assert isinstance(link.bank, RecordedArray) <= bool(stack)
    for *_, context in reversed(stack):
        context.__exit__(None, None, None)
    assert type(link.bank) is numpy.ndarray
    assert_no_hooks()


def test_a_link_is_copied_and_saved_as_it_is(tmp_path):
    link = Bank()
    with PersistentValues([link]).following():
        link.bank[3] = 7
        copies = [copy.deepcopy(link), pickle.loads(pickle.dumps(link)), Bank()]
        save_npz(tmp_path / "link.npz", link)
        load_npz(tmp_path / "link.npz", copies[-1])
    for each in copies:
        assert type(each.bank) is numpy.ndarray
        numpy.testing.assert_array_equal(each.bank, link.bank)


def test_what_is_loaded_within_a_context_is_undone(tmp_path):
    link, other = Bank(), Bank()
    other(make_x())
    save_npz(tmp_path / "link.npz", other)
    before = state_of(link)
    values = PersistentValues([link])
    with values.following():
        load_npz(tmp_path / "link.npz", link)
        assert_same(state_of(link), state_of(other))
    values.restore()
    assert_same(state_of(link), before)


# Links that are not known as a window begins.


def call(link, x):
    link(x)


def call_forward(link, x):
    link.forward(x)


def call_normalization(link, x):
    link.bn(x)


def call_forward_of_normalization(link, x):
    link.bn.forward(x)


def call_function(link, x):
    bn = link.bn
    F.batch_normalization(x, bn.gamma, bn.beta, running_mean=bn.avg_mean, running_var=bn.avg_var)


@pytest.mark.parametrize("use", [call, call_forward, call_normalization, call_forward_of_normalization, call_function])
@pytest.mark.parametrize("number", [1, 2])
def test_links_that_turn_up_are_put_back(use, number):
    link = Bank()
    before = state_of(link)
    values = PersistentValues([L.Linear(2, 2)])
    with values.following():
        checkpoint = values.checkpoint()
        for _ in range(number):
            with checkpoint.following():
                use(link, make_x())
    assert link.bn.avg_mean.any()
    assert type(link.bank) is numpy.ndarray
    checkpoint.restore()
    assert_same(state_of(link), before)
    use(link, make_x())
    values.restore()
    assert_same(state_of(link), before)


@pytest.mark.parametrize("use", [call, call_forward, call_normalization])
def test_links_that_are_called_are_put_back_without_a_look_at_functions(use):
    link = Bank()
    before = state_of(link)
    values = PersistentValues([])
    with values.following(functions=False):
        assert not chainer.get_function_hooks()
        use(link, make_x())
    values.restore()
    assert_same(state_of(link), before)


@pytest.mark.parametrize("make", [L.BatchRenormalization, lambda n: L.DecorrelatedBatchNormalization(n, groups=8)])
def test_relatives_of_batch_normalization_are_put_back(make):
    link = make(COLUMNS)
    before = state_of(link)
    values = PersistentValues([])
    with values.following():
        link.forward(make_x())
    values.restore()
    assert_same(state_of(link), before)


def test_a_checkpoint_is_of_what_turned_up_as_it_is_then():
    link = Bank()
    values = PersistentValues([])
    with values.following():
        link(make_x())
        state = state_of(link)
        checkpoint = values.checkpoint()
        with checkpoint.following():
            link(make_x(1))
        checkpoint.restore()
    assert_same(state_of(link), state)


def test_random_generators_go_back_with_the_values_if_they_are_added():
    values = PersistentValues([])
    values.add(RandomState())
    first = numpy.random.rand()
    checkpoint = values.checkpoint()
    second = numpy.random.rand()
    for _ in range(2):
        checkpoint.restore()
        assert numpy.random.rand() == second
        values.restore()
        assert numpy.random.rand() == first


# States.


class Stateful(chainer.Chain):
    """Has a state, layers whose hooks normalize their weights, one of them without a shape yet, and a counter."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.lstm = L.LSTM(4, 3)
            self.bn = L.BatchNormalization(axis=0)
            self.last = L.Linear(3, 2).add_hook(link_hooks.SpectralNormalization())
            self.lazy = L.Linear(None, 2).add_hook(link_hooks.SpectralNormalization())
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen = x
        self.loss = F.sum(self.last(self.bn(self.lstm(x)))) + F.sum(self.lazy(x))
        return self.loss


def see(link):
    """Returns all attributes but parameters, which are initialized once, counters and hooks."""
    return {
        f"{path}.{name}": value.array.tolist() if isinstance(value, chainer.Variable) else repr(value)
        for path, each in link.namedlinks()
        for name, value in vars(each).items()
        if not isinstance(value, chainer.Parameter) and name not in ("_local_link_hooks", "calls")
    }


@pytest.mark.parametrize("calls", [0, 1])
def test_the_state_of_links_goes_back_too(calls):
    link = Stateful()
    x = numpy.ones((2, 4), "f")
    for _ in range(calls):
        link(x)
        link.lstm.h.unchain_backward()
    before = see(link)
    values = PersistentValues([link])
    with values.following():
        link(x)
        assert see(link) != before
    values.restore()
    assert see(link) == before and link.calls == calls + 1
    expected = copy.deepcopy(link)
    numpy.random.seed(0)
    loss = link(x).array
    numpy.random.seed(0)
    numpy.testing.assert_array_equal(loss, expected(x).array)


def test_no_graph_is_kept():
    link = Stateful()
    x = numpy.ones((2, 4), "f")
    node = link(x).creator_node
    link.lstm.reset_state()
    values = PersistentValues([link])
    references = sys.getrefcount(node)
    link(x)
    assert sys.getrefcount(node) == references - 1
    values.restore()
    assert link.loss.creator_node is None and link.loss.shape == ()


def test_a_weight_that_a_hook_has_replaced_is_back_after_an_error():
    link = L.Linear(2, 2).add_hook(link_hooks.SpectralNormalization())
    weight = link.W
    values = PersistentValues([link])
    with pytest.raises(chainer.utils.type_check.InvalidType), values.following():
        link(numpy.ones((3, 5), "f"))
    values.restore()
    assert link.W is weight


def test_a_value_that_cannot_be_written_is_left_alone():
    link = chainer.Link()
    link.add_persistent("constant", numpy.broadcast_to(numpy.float32(2), 3))
    values = PersistentValues([link])
    values.restore()
    assert (link.constant == 2).all()


# Interrupts.


def interrupt_after(function, number):
    """Calls a function, raises before one of the instructions in this package, and returns whether it got to that."""
    left = [number]

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # without which Python 3.12 does not see it in the frames to come
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            function()
    finally:
        sys.settrace(previous)
    return left[0] <= 0


# Python prints and forgets an exception that is raised while a generator is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_leave_nothing_behind():
    link, outside = Bank(), Bank()
    before = state_of(link, outside)
    interrupted, number = True, 0
    while interrupted:
        number += 61
        values = PersistentValues([link])

        def window(values=values):
            with values.following():
                checkpoint = values.checkpoint()
                with checkpoint.following():
                    link(make_x())
                    outside.forward(make_x())
                checkpoint.restore()
                link(make_x())

        interrupted = interrupt_after(window, number)
        interrupt_after(values.restore, 1 + number % 300)
        values.restore()
        assert_no_hooks()
        assert_same(state_of(link, outside), before)
        assert type(link.bank) is type(outside.bank) is numpy.ndarray
    assert number > 1000
