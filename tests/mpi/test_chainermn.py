"""AccumulatingUpdater with ChainerMN's own optimizers, iterators, data sets, extensions and links, over MPI.

Each rank of a job runs these tests: ``mpiexec -n 2 python -m pytest --capture=sys tests/mpi``. ``make test-mpi`` makes
an environment with an MPI, and does so with two ranks and with four.
"""

from __future__ import annotations

import faulthandler
import sys

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, accumulate, create_accumulating_optimizer
from chainer import optimizers
from chainer.training import Trainer, extensions
from chainer.training.updaters import ParallelUpdater, StandardUpdater

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, ready_model, serial

pytest.importorskip("mpi4py", reason="needs MPI: make test-mpi")
import chainermn

# How many seconds a test may take. Where ranks wait for one another for ever, the job then ends with the stack of each.
PATIENCE = 60

DATASET = make_dataset(96)


@pytest.fixture(scope="module")
def comm():
    return chainermn.create_communicator("naive")


@pytest.fixture(autouse=True)
def _watchdog(comm):
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
    comm.mpi_comm.Barrier()  # so that no rank is a test ahead of another
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _no_experimental_warning(monkeypatch):
    """Keeps Chainer quiet about most of ChainerMN being experimental."""
    monkeypatch.setattr(chainer, "disable_experimental_feature_warning", True)


@pytest.fixture
def shared_path(comm, tmp_path):
    """Returns an empty folder, the same on all ranks."""
    return comm.bcast_obj(tmp_path if comm.rank == 0 else None)


def make_model(rank=0):
    """Returns a model with lazy parameters, which will differ from rank to rank."""
    initial = [chainer.initializers.LeCunNormal(rng=numpy.random.RandomState(10 * rank + i)) for i in range(2)]
    return L.Classifier(
        chainer.Sequential(L.Linear(None, 8, initialW=initial[0]), F.tanh, L.Linear(None, 3, initialW=initial[1]))
    )


def make_optimizer(comm, model=None, optimizer=None):
    optimizer = optimizers.MomentumSGD(0.1) if optimizer is None else optimizer
    multi_node = chainermn.create_multi_node_optimizer(optimizer, comm)
    return multi_node.setup(make_model(comm.rank) if model is None else model)


def counting(comm, monkeypatch):
    """Returns a list to which each all-reduce of gradients, or broadcast of parameters by ChainerMN, is added."""
    calls = []
    for name in "multi_node_mean_grad", "bcast_data":
        method = getattr(comm, name)
        monkeypatch.setattr(comm, name, lambda *args, method=method, name=name: calls.append(name) or method(*args))
    return calls


def train_alone(windows, model=None, optimizer=None):
    """Returns the optimizer of one process after updates with all examples of each window at once."""
    optimizer = optimizers.MomentumSGD(0.1) if optimizer is None else optimizer
    optimizer.setup(make_model() if model is None else model)
    for window in windows:
        optimizer.update(optimizer.target, *chainer.dataset.concat_examples(window))
    return optimizer


def shards(comm):
    """Returns what scatter_dataset gives each of the ranks."""
    ends = [len(DATASET) * rank // comm.size for rank in range(comm.size + 1)]
    return [DATASET[start:end] for start, end in zip(ends, ends[1:])]


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_an_update_is_one_all_reduce_and_the_first_one_counts(comm, monkeypatch, steps):
    calls = counting(comm, monkeypatch)
    dataset = chainermn.scatter_dataset(DATASET if comm.rank == 0 else None, comm)
    optimizer = make_optimizer(comm)
    updater = AccumulatingUpdater(serial(dataset, 4), optimizer, auto_new_epoch=False, accumulation_steps=steps)
    updates = 24 // comm.size // steps
    for _ in range(updates):
        updater.update()

    size = 4 * steps
    windows = [sum((shard[i * size : (i + 1) * size] for shard in shards(comm)), []) for i in range(updates)]
    expected = train_alone(windows)
    assert calls == ["multi_node_mean_grad"] * updates
    assert optimizer.t == updater.iteration == updates
    assert_same_parameters(optimizer.target, expected.target)
    assert_same_optimizer_state(optimizer, expected)


def test_an_effective_batch_of_24_examples_is_the_same_on_any_number_of_ranks(comm):
    optimizer = make_optimizer(comm)
    updater = AccumulatingUpdater(serial(DATASET[comm.rank :: comm.size], 3), optimizer, effective_batch_size=24)
    for _ in range(4):
        updater.update()
        assert (updater.accumulation_steps, updater.effective_batch_size) == (8 // comm.size, 24 // comm.size)
    expected = train_alone([DATASET[start : start + 24] for start in range(0, 96, 24)])
    assert_same_parameters(optimizer.target, expected.target)


def test_ranks_with_other_weights_make_the_step_of_one_process(comm):
    tokens = [(numpy.arange(1 + i % 5, dtype="f"), numpy.float32(i)) for i in range(20)]

    def convert(batch, device=None):
        return numpy.concatenate([x for x, _ in batch]), numpy.concatenate([numpy.full(len(x), t) for x, t in batch])

    def mean_over_tokens(model):
        return lambda x, t: F.mean_squared_error(model(x[:, None]), t[:, None].astype("f"))

    def make_layer():
        return L.Linear(1, 1, initialW=numpy.ones((1, 1)))

    model = make_layer()
    mine = tokens[comm.rank :: comm.size]
    updater = AccumulatingUpdater(
        serial(mine, len(mine)),
        make_optimizer(comm, model, optimizers.SGD(1e-4)),
        convert,
        loss_func=mean_over_tokens(model),
        micro_batch_size=2,
        weight_func=lambda batch: sum(len(x) for x, _ in batch),
    )
    updater.update()

    expected = make_layer()
    optimizers.SGD(1e-4).setup(expected).update(mean_over_tokens(expected), *convert(tokens))
    assert_same_parameters(model, expected)


def test_a_rank_whose_data_ends_early_neither_hangs_nor_biases_the_others(comm):
    sizes = [5 + 6 * rank for rank in range(comm.size)]
    starts = numpy.cumsum([0, *sizes])
    shards = [DATASET[start : start + size] for start, size in zip(starts, sizes)]
    iterator = serial(shards[comm.rank], 3, repeat=False)
    updater = AccumulatingUpdater(iterator, make_optimizer(comm), accumulation_steps=2)
    with pytest.raises(StopIteration):
        while True:
            updater.update()

    updates = -(-sizes[-1] // 6)
    expected = train_alone([sum((shard[6 * i : 6 * i + 6] for shard in shards), []) for i in range(updates)])
    assert updater.iteration == updates
    assert_same_parameters(updater.get_optimizer("main").target, expected.target)


def test_a_trainer_ends_on_all_ranks_though_their_epochs_differ(comm, shared_path):
    dataset = chainermn.scatter_dataset(DATASET[:7] if comm.rank == 0 else None, comm, force_equal_length=False)
    updater = AccumulatingUpdater(serial(dataset, 1), make_optimizer(comm), accumulation_steps=1)
    Trainer(updater, (2, "epoch"), out=str(shared_path)).run()
    assert updater.iteration == 2 * len(dataset)
    assert updater.get_optimizer("main").t == 2 * -(-7 // comm.size)
    assert_all_ranks_agree(comm, updater.get_optimizer("main").target)


def assert_all_ranks_agree(comm, model):
    for name, param in sorted(model.namedparams()):
        first, *others = comm.bcast_obj(comm.gather_obj(param.array))
        for other in others:
            numpy.testing.assert_array_equal(other, first, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loss_scaling_goes_the_same_way_on_all_ranks(comm, dtype):
    with chainer.using_config("dtype", dtype):
        optimizer = optimizers.SGD(0.1)
        optimizer.loss_scaling()
        multi_node = make_optimizer(comm, optimizer=optimizer)
        for _ in range(4):
            with accumulate(multi_node) as window:
                for start in range(comm.rank):  # the first rank has no micro-batch
                    examples = DATASET[4 * start : 4 * start + 4]
                    window.add(multi_node.target, *batch_in(dtype, examples), weight=4)
    scales = comm.bcast_obj(comm.gather_obj(multi_node._loss_scale))
    assert set(scales) == {16.0 if comm.size > 1 else 1.0}
    assert_all_ranks_agree(comm, multi_node.target)


def batch_in(dtype, examples):
    x, t = chainer.dataset.concat_examples(examples)
    return x.astype(dtype), t


def test_an_optimizer_that_accumulates_wraps_a_multi_node_one(comm, monkeypatch):
    calls = counting(comm, monkeypatch)
    optimizer = create_accumulating_optimizer(
        chainermn.create_multi_node_optimizer(optimizers.MomentumSGD(0.1), comm), 2
    )
    optimizer.setup(make_model(comm.rank))
    for start in range(0, 24, 4):
        optimizer.update(optimizer.target, *chainer.dataset.concat_examples(shards(comm)[comm.rank][start : start + 4]))
    windows = [sum((shard[start : start + 8] for shard in shards(comm)), []) for start in (0, 8, 16)]
    assert calls == ["multi_node_mean_grad"] * 3
    assert_same_parameters(optimizer.target, train_alone(windows).target)


# Links that communicate in each pass.


def normalized(rank, norm):
    return L.Classifier(chainer.Sequential(norm, ready_model(rank).predictor))


def test_batch_normalization_over_ranks_sees_the_micro_batches_of_all(comm):
    model = normalized(comm.rank, chainermn.links.MultiNodeBatchNormalization(5, comm))
    mine = shards(comm)[comm.rank]
    updater = AccumulatingUpdater(serial(mine, 8), make_optimizer(comm, model), micro_batch_size=4)
    for _ in range(2):
        updater.update()

    expected = optimizers.MomentumSGD(0.1).setup(normalized(0, L.BatchNormalization(5)))
    for start in (0, 8):
        with accumulate(expected) as window:
            for begin in (start, start + 4):
                examples = sum((shard[begin : begin + 4] for shard in shards(comm)), [])
                window.add(expected.target, *chainer.dataset.concat_examples(examples))
    assert_same_parameters(model, expected.target, tolerance=2e-5)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (4, 0)])
def test_ranks_that_would_wait_in_batch_normalization_fail_instead(comm, sizes):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model = normalized(0, chainermn.links.MultiNodeBatchNormalization(5, comm))
    optimizer = make_optimizer(comm, model)
    size = sizes[min(comm.rank, 1)]
    with pytest.raises(RuntimeError, match="each rank must have the same number of micro-batches"):
        with accumulate(optimizer) as window:
            for start in range(0, size, 4):
                window.add(model, *chainer.dataset.concat_examples(DATASET[start : start + 4]))
    assert optimizer.t == 0


class FirstHalf(chainermn.MultiNodeChainList):
    def __init__(self, comm, layer):
        super().__init__(comm=comm)
        self.add_link(layer, rank_in=None, rank_out=1)


class SecondHalf(chainermn.MultiNodeChainList):
    def __init__(self, comm, layer):
        super().__init__(comm=comm)
        self.add_link(layer, rank_in=0, rank_out=None)


def test_a_model_may_be_spread_over_ranks(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    pair = comm.split(comm.rank // 2, comm.rank)
    first = L.Linear(5, 8, initialW=numpy.eye(8, 5))
    last = L.Linear(8, 3, initialW=numpy.eye(3, 8))
    if pair.rank == 0:
        model = FirstHalf(pair, first)
        loss_func = lambda x, t: model(x)  # noqa: E731
    else:
        model = SecondHalf(pair, last)
        loss_func = lambda x, t: F.softmax_cross_entropy(model(), t)  # noqa: E731
    optimizer = optimizers.MomentumSGD(0.1).setup(model)
    iterator = chainermn.iterators.create_synchronized_iterator(
        chainer.iterators.SerialIterator(DATASET[:20], 8, shuffle=True), pair
    )
    updater = AccumulatingUpdater(iterator, optimizer, loss_func=loss_func, micro_batch_size=3)
    batches = []
    updater.converter = lambda batch, device: batches.extend(batch) or chainer.dataset.concat_examples(batch)
    for _ in range(3):
        updater.update()

    whole = chainer.Sequential(first.copy(mode="init"), last.copy(mode="init"))
    whole[0].W.array[...], whole[1].W.array[...] = numpy.eye(8, 5), numpy.eye(3, 8)
    reference = optimizers.MomentumSGD(0.1).setup(L.Classifier(whole))
    for start in range(0, len(batches), 8):
        reference.update(reference.target, *chainer.dataset.concat_examples(batches[start : start + 8]))
    assert_same_parameters(first if pair.rank == 0 else last, whole[pair.rank])


# What else ChainerMN has.


NUMPY = tuple(map(int, numpy.__version__.split(".")[:2]))


@pytest.mark.skipif(NUMPY >= (2, 4), reason="ChainerMN's iterator fails with this NumPy, as the next test shows")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
def test_ranks_may_share_the_batches_of_one_iterator(comm):
    iterator = chainermn.iterators.create_multi_node_iterator(serial(DATASET[:20], 6), comm)
    updater = AccumulatingUpdater(iterator, make_optimizer(comm), accumulation_steps=2, micro_batch_size=4)
    for _ in range(3):
        updater.update()
    examples = DATASET[:20] + DATASET[:20]  # the last batch of an epoch wraps, as that of SerialIterator does
    expected = train_alone([examples[12 * i : 12 * i + 12] for i in range(3)])
    assert_same_parameters(updater.get_optimizer("main").target, expected.target)


@pytest.mark.skipif(NUMPY < (2, 4), reason="ChainerMN's iterator works with this NumPy, as the test before shows")
def test_the_iterator_that_shares_batches_fails_with_this_numpy(comm):
    own = comm.split(0, comm.rank)  # for what the first rank sends, nobody reads
    if comm.rank > 0:
        with pytest.raises(TypeError, match="only 0-dimensional arrays can be converted"):
            chainermn.iterators.create_multi_node_iterator(serial(DATASET[:20], 6), own)
    else:
        chainermn.iterators.create_multi_node_iterator(serial(DATASET[:20], 6), own)


def make_trainer(comm, path, autoload=False):
    dataset = chainermn.scatter_dataset(DATASET if comm.rank == 0 else None, comm)
    iterator = chainer.iterators.SerialIterator(dataset, 4, shuffle=False)
    updater = AccumulatingUpdater(iterator, make_optimizer(comm), accumulation_steps=2)
    trainer = Trainer(updater, (4, "iteration"), out=str(path))
    model = updater.get_optimizer("main").target
    evaluator = extensions.Evaluator(serial(DATASET[:10], 10, repeat=False), model)
    trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm), trigger=(2, "iteration"))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
    snapshot = chainermn.extensions.multi_node_snapshot(
        comm, extensions.snapshot(autoload=autoload, filename="snapshot_{.updater.iteration}"), [0]
    )
    trainer.extend(snapshot, trigger=(2, "iteration"))
    return trainer


def test_a_run_that_is_resumed_from_a_multi_node_snapshot_loses_no_window(comm, shared_path, monkeypatch):
    whole = make_trainer(comm, shared_path / "whole")
    whole.run()
    interrupted = make_trainer(comm, shared_path / "interrupted")
    interrupted.stop_trigger = chainer.training.get_trigger((2, "iteration"))
    interrupted.run()
    resumed = make_trainer(comm, shared_path / "interrupted", autoload=True)
    calls = counting(comm, monkeypatch)
    resumed.run()

    optimizer, expected = (trainer.updater.get_optimizer("main") for trainer in (resumed, whole))
    assert resumed.updater.iteration == optimizer.t == 4
    assert calls == ["multi_node_mean_grad"] * 2
    assert_same_parameters(optimizer.target, expected.target, tolerance=0)
    assert_same_optimizer_state(optimizer, expected, tolerance=0)


def test_an_evaluator_reports_the_same_on_all_ranks(comm):
    updater = AccumulatingUpdater(serial(shards(comm)[comm.rank], 4), make_optimizer(comm), accumulation_steps=3)
    updater.update()
    model = updater.get_optimizer("main").target
    mine = serial(shards(comm)[comm.rank], 4, repeat=False)
    evaluator = chainermn.create_multi_node_evaluator(extensions.Evaluator(mine, model), comm)
    reports = comm.bcast_obj(comm.gather_obj(float(evaluator()["main/loss"])))
    with chainer.using_config("train", False):
        loss = float(model(*chainer.dataset.concat_examples(DATASET)).array)
    assert reports == [pytest.approx(loss, rel=1e-5)] * comm.size


def test_double_buffering_is_refused_on_the_host_by_chainermn(comm):
    with pytest.raises(ValueError, match="does not support double buffering"):
        chainermn.create_multi_node_optimizer(optimizers.SGD(0.1), comm, double_buffering=True)


@pytest.mark.skipif(chainer.backends.cuda.available, reason="the flat communicator works with CuPy")
def test_the_flat_communicator_needs_cupy(comm):
    with pytest.raises(RuntimeError, match="Cupy is not available"):
        chainermn.create_communicator("flat", comm.mpi_comm)


# The way here from the updaters for several devices of one process.


@pytest.mark.parametrize(
    "make_parallel, make_mine",
    [
        (lambda n: optimizers.SGD(0.1), lambda n: optimizers.SGD(0.1 * n)),
        (lambda n: optimizers.Adam(eps=0.01), lambda n: optimizers.Adam(eps=0.01 / n)),
    ],
    ids=["SGD", "Adam"],
)
def test_parallel_updater_is_the_ranks_with_another_learning_rate_or_eps(comm, make_parallel, make_mine):
    def make_its_model():
        return L.Classifier(L.Linear(5, 3, initialW=numpy.eye(3, 5)))

    devices = {name: chainer.get_device("@numpy") for name in ["main", *map(str, range(1, comm.size))]}
    parallel = ParallelUpdater(
        serial(DATASET, 4 * comm.size), make_parallel(comm.size).setup(make_its_model()), concat, devices=devices
    )
    mine = DATASET[comm.rank :: comm.size]  # ParallelUpdater deals the examples out to its devices
    optimizer = make_optimizer(comm, make_its_model(), make_mine(comm.size))  # and adds up their gradients
    updater = AccumulatingUpdater(serial(mine, 2), optimizer, accumulation_steps=2)
    for _ in range(3):
        parallel.update()
        updater.update()
    assert_same_parameters(optimizer.target, parallel.get_optimizer("main").target, tolerance=1e-5)


def concat(batch, device):
    return chainer.dataset.concat_examples(batch)


def test_what_chainermn_does_by_itself_is_what_is_said_of_it(comm):
    """ChainerMN by itself drops the first update, and weighs ranks alike."""
    optimizer = make_optimizer(comm, ready_model(comm.rank), optimizers.SGD(0.1))
    updater = StandardUpdater(serial(DATASET[: 2 + comm.rank], 2 + comm.rank), optimizer)
    updater.update()
    assert optimizer.t == 0
    assert_same_parameters(optimizer.target, ready_model())
