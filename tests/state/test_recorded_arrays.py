"""What is written to a recorded array can be undone bit by bit, and is written as to any other array."""

from __future__ import annotations

import copy
import pickle

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum.state.recorded_arrays import Journal, RecordedArray, Recording, can_be_recorded, is_alone
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, COLUMNS = 12, 7


def record(array):
    """Returns a recording view of an array, and the journal."""
    recording = Recording(array)
    recording.journals.append(Journal())
    return recording.view(), recording.journals[0]


def counting(dtype="float32"):
    return numpy.arange(ROWS * COLUMNS, dtype=dtype).reshape(ROWS, COLUMNS)


rows = st.integers(-ROWS, ROWS - 1)
slices = st.builds(slice, *[st.none() | st.integers(-ROWS, ROWS)] * 2, st.sampled_from([None, 1, 2, -1, -3]))
KEYS = st.one_of(
    rows,
    slices,
    st.just(...),
    st.lists(rows, min_size=1, max_size=5),
    st.lists(rows, min_size=1, max_size=5).map(numpy.array),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(numpy.array),
    st.tuples(slices, slices.map(lambda key: slice(None, None, key.step))),
    st.tuples(st.lists(rows, min_size=1, max_size=4), st.integers(-COLUMNS, COLUMNS - 1)),
    st.tuples(rows, st.integers(0, COLUMNS - 1)),
    st.tuples(st.just(...), st.none(), st.integers(0, COLUMNS - 1)),
)

VIEWS = {
    "itself": lambda a: a,
    "a row": lambda a: a[3],
    "some rows": lambda a: a[2:9:3],
    "rows in reverse": lambda a: a[::-1],
    "a column": lambda a: a[:, 2],
    "transposed": lambda a: a.T,
    "flattened": lambda a: a.reshape(-1),
    "by a function": lambda a: numpy.swapaxes(a, 0, 1)[1:3],
    "with an axis more": lambda a: a[:, None],
    "a part of a split": lambda a: numpy.split(a, 3)[1],
    "a row met in a loop": lambda a: list(a)[4],
    "its bytes": lambda a: a.view("uint8"),
    "its real part": lambda a: a.real,
}

# Each of these changes an array in place, by a number.
WRITES = {
    "fill": lambda a, n: a.fill(n),
    "put": lambda a, n: a.put([0, 1, -1], n),
    "sort": lambda a, n: a.sort(axis=0),
    "partition": lambda a, n: a.partition(0, axis=0),
    "byteswap": lambda a, n: a.byteswap(inplace=True),
    "setfield": lambda a, n: a.setfield(n, "uint8"),
    "flat": lambda a, n: a.flat.__setitem__(0, n),
    "all of flat": lambda a, n: setattr(a, "flat", n),
    "real": lambda a, n: setattr(a, "real", n),
    "in-place addition": lambda a, n: a.__iadd__(a.dtype.type(n)),
    "in-place product": lambda a, n: a.__imul__(a.dtype.type(n)),
    "ufunc with out": lambda a, n: numpy.subtract(n, a, out=a, casting="unsafe"),
    "ufunc with where": lambda a, n: numpy.add(a, a, out=a, where=a > n % 50),
    "accumulate": lambda a, n: numpy.add.accumulate(a.copy(), out=a),
    "at": lambda a, n: numpy.add.at(a, [0, 0, -1], a.dtype.type(n)),
    "copyto": lambda a, n: numpy.copyto(a, n, casting="unsafe"),
    "put as a function": lambda a, n: numpy.put(a, [0], n),
    "place": lambda a, n: numpy.place(a, numpy.asarray(a > n % 50), [n]),
    "putmask": lambda a, n: numpy.putmask(a, numpy.asarray(a > n % 50), n),
    "take with out": lambda a, n: numpy.take(a.copy(), numpy.arange(len(a))[::-1], 0, a),
    "clip as a method": lambda a, n: a.clip(3, 9, a),
    "cumsum with out": lambda a, n: numpy.cumsum(a.copy(), axis=0, dtype=a.dtype, out=a),
    "concatenate with out": lambda a, n: numpy.concatenate([a[1:], a[:1]], 0, a),
    "nan_to_num": lambda a, n: numpy.nan_to_num(numpy.negative(a, out=a), copy=False),
    "shuffle": lambda a, n: numpy.random.RandomState(n).shuffle(a),
    "swapped rows": lambda a, n: a.__setitem__([0, -1], a[[-1, 0]]),
    "overlapping rows": lambda a, n: a.__setitem__(slice(1, None), a[:-1]),
    "memory": lambda a, n: numpy.asarray(a.data).__setitem__(0, n),
    "a loop over rows": lambda a, n: [row.__setitem__(..., n) for row in a[:2].reshape(-1, 1)] and None,
    "a function of the caller's": lambda a, n: numpy.apply_along_axis(lambda part: part.fill(n) or 0, 0, a),
}


def write(target, what, number):
    """Writes to an array, and returns the class of the error if that is not possible."""
    try:
        with numpy.errstate(all="ignore"):
            if isinstance(what, str):
                WRITES[what](target, number)
            else:
                target[what] = number
    except (IndexError, TypeError, ValueError) as error:
        return type(error)
    return None


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), KEYS | st.sampled_from(sorted(WRITES)), st.integers(0, 99))))
def test_writes_take_effect_and_are_undone(writes):
    array, expected = counting(), counting()
    view, journal = record(array)
    for name, what, number in writes:
        assert write(VIEWS[name](view), what, number) == write(VIEWS[name](expected), what, number)
        assert array.tobytes() == expected.tobytes()
    for _ in range(2):
        journal.undo(array)
        assert array.tobytes() == counting().tobytes()
        view[3] = 5


@pytest.mark.parametrize("name", sorted(VIEWS))
@pytest.mark.parametrize("what", sorted(WRITES))
def test_each_way_of_writing_is_undone(name, what):
    array, expected = counting(), counting()
    view, journal = record(array)
    assert write(VIEWS[name](view), what, 7) == write(VIEWS[name](expected), what, 7)
    assert array.tobytes() == expected.tobytes()
    journal.undo(array)
    assert array.tobytes() == counting().tobytes()


@pytest.mark.parametrize("what", sorted(WRITES))
def test_each_write_changes_something(what):
    array = counting()[::-1].copy()
    WRITES[what](array, 7)
    assert array.tobytes() != counting()[::-1].tobytes()


def test_a_key_may_change_after_the_write():
    array = counting()
    view, journal = record(array)
    key = numpy.array([1, 2])
    view[key] = 0
    key[...] = 5
    journal.undo(array)
    numpy.testing.assert_array_equal(array, counting())


def test_rows_are_saved_and_no_more_until_a_copy_is_smaller():
    array = numpy.zeros((1000, 100))
    view, journal = record(array)
    view[[1, 5]] = 1
    view[7] += 1
    assert not journal.has_all
    view *= 2
    assert journal.has_all
    view[8] = 1
    journal.undo(array)
    assert not array.any()


def test_reading_saves_nothing():
    array = counting()
    view, journal = record(array)
    h = numpy.ones((2, COLUMNS), "f")
    h @ view.T, h.dot(view.T), numpy.dot(h, view.T), numpy.einsum("ij,kj->ik", h, view)
    numpy.where(view > 3, view, view), numpy.concatenate([view, h]), view.mean(axis=0), list(view), str(view)
    F.matmul(h, view, transb=True), F.embed_id(numpy.array([1, 2]), view)
    assert journal.nbytes == 0 and not journal.has_all


COMPUTED = {
    "a sum": lambda a: a + 1,
    "its negative": lambda a: -a,
    "rows by numbers": lambda a: a[[1, 2]],
    "rows by a mask": lambda a: a[a[:, 0] > 9],
    "a copy": lambda a: a.copy(),
    "another dtype": lambda a: a.astype("float64"),
    "a mean": lambda a: a.mean(axis=0),
    "a product": lambda a: a @ a.T,
    "rows taken": lambda a: a.take([0], axis=0),
    "by a function": lambda a: numpy.concatenate([a, a]),
    "a pickled one": lambda a: pickle.loads(pickle.dumps(a)),
    "a shallow copy": copy.copy,
    "a deep copy": copy.deepcopy,
    "what Chainer computes": lambda a: F.matmul(a, a, transb=True).array,
    "an embedding": lambda a: F.embed_id(numpy.array([1, 2]), a).array,
    "a gradient": lambda a: gradient_of(lambda x: F.sum(F.matmul(x, a, transb=True)), a.copy()),
}


def gradient_of(function, x):
    x = chainer.Variable(x)
    function(x).backward()
    return x.grad


@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_what_is_computed_is_a_plain_array(name):
    result = COMPUTED[name](record(counting())[0])
    assert type(result) is numpy.ndarray
    numpy.testing.assert_array_equal(result, COMPUTED[name](counting()))


def test_it_prints_like_an_array():
    assert repr(record(counting())[0]) == repr(counting())
    assert str(record(counting())[0]) == str(counting())


def test_a_view_that_outlives_the_journals_writes_to_the_array():
    array = counting()
    view, journal = record(array)
    view.recording.journals.clear()
    view[3] = 0
    assert not array[3].any() and journal.nbytes == 0


def test_two_journals_are_undone_one_after_the_other():
    array = counting()
    view, outer = record(array)
    view[1] = 50
    inner = Journal()
    view.recording.journals.append(inner)
    view[1:3] = 60
    inner.undo(array)
    assert (array[1] == 50).all() and (array[2] == counting()[2]).all()
    outer.undo(array)
    numpy.testing.assert_array_equal(array, counting())


def test_only_large_plain_arrays_can_be_recorded():
    large = numpy.zeros((1024, 1024), "f")
    assert can_be_recorded(large)
    read_only = numpy.broadcast_to(numpy.float32(0), (1024, 1024))
    others = [large[:10], large.T, read_only, large.astype(object), large.view(numpy.matrix), chainer.Variable(large)]
    assert not any(map(can_be_recorded, others))


def test_an_array_is_alone_if_nothing_else_refers_to_its_memory():
    for array in (numpy.zeros((4, 6)), numpy.arange(24).reshape(4, 6)):
        owner = {"bank": array}
        assert not is_alone(owner, "bank")
    del array
    assert is_alone(owner, "bank")
    for refer in (dict, lambda owner: owner["bank"].base, lambda owner: owner["bank"][1]):
        other = refer(owner)
        assert not is_alone(owner, "bank")
        del other
    assert is_alone(owner, "bank")


def test_the_class_is_that_of_views_only():
    view, _ = record(counting())
    assert all(isinstance(make(view), RecordedArray) for make in VIEWS.values())
