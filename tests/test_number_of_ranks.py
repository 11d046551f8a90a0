"""With effective_batch_size, the same program takes the same steps on any number of ranks, also when it is resumed."""

from __future__ import annotations

import pathlib
import re
import types

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.iterators import SerialIterator
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset
from thread_ranks import make_multi_node, run_ranks

DATASET = [(x.astype(numpy.float64), t) for x, t in make_dataset(60)]
EFFECTIVE = 16

# How the documentation tells the ranks to read their data.
PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
(RECIPE,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class RankIterator" in block]
NAMESPACE = {"chainer": chainer}
exec(RECIPE, NAMESPACE)
RankIterator, shuffled = NAMESPACE["RankIterator"], NAMESPACE["shuffled"]


def make_model(rank=0):
    """Returns a model in float64 whose parameters differ from rank to rank until they are shared."""
    random = numpy.random.RandomState(rank)
    initial = [random.standard_normal(shape) for shape in ((8, 5), (3, 8))]
    with chainer.using_config("dtype", numpy.float64):
        return L.Classifier(
            chainer.Sequential(L.Linear(5, 8, initialW=initial[0]), F.tanh, L.Linear(8, 3, False, initial[1]))
        )


def adam():
    return optimizers.Adam(0.01)


def momentum_sgd():
    return optimizers.MomentumSGD(0.1)


def updates_of(updater, updates=None):
    """Updates so many times, or until the data ends, and returns what can be seen after each update."""
    seen = []
    while updates is None or len(seen) < updates:
        try:
            updater.update()
        except StopIteration:
            break
        seen.append((updater.iteration, updater.epoch_detail))
    return seen


class Run:
    """A run on one rank after another number of ranks, and StandardUpdater with the whole effective batch."""

    def __init__(self, path, size, make_optimizer=adam, repeat=True):
        self.path, self.dataset, self.make_optimizer, self.repeat = str(path), DATASET[:size], make_optimizer, repeat
        self.is_begun = False
        iterator = SerialIterator(self.dataset, EFFECTIVE, repeat, order_sampler=shuffled)
        self.expected = StandardUpdater(iterator, make_optimizer().setup(make_model()))

    def go_on(self, num_ranks, batch_size, updates=None, **kwargs):
        """Resumes on so many ranks from the snapshot of the last ones, and saves another one."""

        def program(comm):
            optimizer = make_multi_node(self.make_optimizer(), comm).setup(make_model(comm.rank))
            iterator = RankIterator(self.dataset, batch_size, comm, self.repeat)
            updater = AccumulatingUpdater(iterator, optimizer, effective_batch_size=EFFECTIVE, **kwargs)
            if self.is_begun:
                load_npz(self.path, updater)
            assert updater.accumulation_steps == EFFECTIVE // (batch_size * num_ranks)
            seen = updates_of(updater, updates)
            if comm.rank == 0:  # the others have loaded theirs, or the ranks could not have updated
                save_npz(self.path, updater)
            return seen, optimizer.actual_optimizer

        ranks = run_ranks(num_ranks, program)
        seen = updates_of(self.expected, updates)
        self.is_begun = True
        expected = self.expected.get_optimizer("main")
        for seen_by_rank, optimizer in ranks:
            assert seen_by_rank == seen
            if not self.repeat:  # a rank that reads nothing of the last batch does not count its epoch
                optimizer.epoch = expected.epoch
            assert_same_parameters(optimizer.target, expected.target, 1e-10)
            assert_same_optimizer_state(optimizer, expected, 1e-10)
        return seen


@pytest.mark.parametrize("make_optimizer", [adam, momentum_sgd])
def test_four_ranks_then_two_then_one_then_four_are_the_whole_batch_on_one(make_optimizer, tmp_path):
    # 50 is no multiple of 16, so updates cross the ends of epochs, and each snapshot is of another epoch.
    run = Run(tmp_path / "snapshot.npz", 50, make_optimizer)
    for num_ranks in (4, 2, 1, 4):
        run.go_on(num_ranks, batch_size=4, updates=5)
    assert run.expected.epoch == 6


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(EFFECTIVE, 60),
    stages=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 4)), min_size=1, max_size=3
    ),
    micro_batch_size=st.sampled_from([None, 1, 3]),
)
def test_any_numbers_of_ranks_and_batch_sizes_take_the_same_steps(tmp_path_factory, size, stages, micro_batch_size):
    run = Run(tmp_path_factory.mktemp("run") / "snapshot.npz", size)
    for num_ranks, batch_size, updates in stages:
        run.go_on(num_ranks, batch_size, updates, micro_batch_size=micro_batch_size)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_the_tail_of_data_that_does_not_repeat_is_the_last_update(tmp_path_factory, size, num_ranks, batch_size):
    run = Run(tmp_path_factory.mktemp("run") / "snapshot.npz", size, repeat=False)
    seen = run.go_on(num_ranks, batch_size)
    assert seen[-1] == (-(-size // EFFECTIVE), 1.0)


def test_the_tail_may_be_resumed_on_another_number_of_ranks(tmp_path):
    run = Run(tmp_path / "snapshot.npz", 35, repeat=False)
    run.go_on(4, batch_size=2, updates=2)
    assert run.go_on(2, batch_size=4) == [(3, 1.0)]


def test_each_order_is_another_one_and_follows_from_the_one_before():
    comm = types.SimpleNamespace(rank=0, size=1)
    iterator = RankIterator(list(range(40)), 40, comm)
    orders = [iterator.next() for _ in range(50)]
    assert len(set(map(tuple, orders))) == 50
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert [shuffled(numpy.array(order), 0).tolist() for order in orders[:-1]] == orders[1:]


@pytest.mark.parametrize("batch_size", [12, 6, 24])
def test_ranks_with_iterator_batches_of_different_sizes_read_equal_shares(batch_size):
    def program(comm):
        optimizer = make_multi_node(momentum_sgd(), comm).setup(make_model(comm.rank))
        iterator = SerialIterator(DATASET[30 * comm.rank :][:30], [12, batch_size][comm.rank], shuffle=False)
        updater = AccumulatingUpdater(iterator, optimizer, effective_batch_size=48)
        updater.update()
        return updater.accumulation_steps, updater.effective_batch_size

    assert run_ranks(2, program) == [(2, 24), (24 // batch_size, 24)]


def test_the_error_on_several_ranks_counts_the_examples_of_all():
    def program(comm):
        optimizer = make_multi_node(momentum_sgd(), comm).setup(make_model())
        AccumulatingUpdater(SerialIterator(DATASET, 12), optimizer, effective_batch_size=100)

    message = (
        r"must be a multiple of 48 \(iterator batches of 12 on 4 ranks\), got 100; use 96 or 144, or another batch"
    )
    with pytest.raises(ValueError, match=message):
        run_ranks(4, program)
