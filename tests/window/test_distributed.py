"""Windows over ranks make the step of one process that has the examples of all."""

from __future__ import annotations

import contextlib
import threading

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, TokenBudget, accumulate, create_accumulating_optimizer
from chainer import optimizers
from chainer.serializers import load_npz, save_npz
from chainer.training import Trainer
from chainer_accum.window.distributed import MultiNodeWindow
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.options import WindowOptions
from chainer_accum.window.window import Window
from chainer_accum.window.windows import window_class
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, make_model, ready_model, serial
from thread_ranks import make_multi_node, run_ranks

DATASET = make_dataset(48)
OK = contextlib.nullcontext()


def lazy_model(rank=0):
    """Returns a model whose parameters will differ from rank to rank."""
    random = numpy.random.RandomState(rank)
    initial = [chainer.initializers.LeCunNormal(rng=random) for _ in range(2)]
    return L.Classifier(
        chainer.Sequential(L.Linear(None, 8, initialW=initial[0]), F.tanh, L.Linear(None, 3, initialW=initial[1]))
    )


def momentum_sgd():
    return optimizers.MomentumSGD(0.1)


def train(optimizer, windows, **kwargs):
    """Updates once for each window, which is a list of micro-batches, which are lists of examples."""
    for micro_batches in windows:
        with accumulate(optimizer, **kwargs) as window:
            for examples in micro_batches:
                window.add(optimizer.target, *chainer.dataset.concat_examples(examples), weight=len(examples))
    return optimizer


def train_both(windows, make_its_model=ready_model, make_optimizer=momentum_sgd, zero_fill=True, **kwargs):
    """Trains ranks with windows of their own, and one process with all of them; returns their optimizers."""

    def program(communicator):
        optimizer = make_multi_node(make_optimizer(), communicator, zero_fill)
        optimizer.setup(make_its_model(communicator.rank))
        return train(optimizer, windows[communicator.rank], **kwargs)

    merged = [sum(each, []) for each in zip(*windows)]
    expected = train(make_optimizer().setup(make_its_model(0)), merged, **kwargs)
    return run_ranks(len(windows), program), expected


def split(examples, *sizes):
    ends = numpy.cumsum(sizes)
    return [examples[end - size : end] for size, end in zip(sizes, ends)]


# Looking at the gradient of all ranks before the update.


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("norm_of_all_is_over", [True, False])
def test_all_ranks_skip_by_the_gradient_and_the_loss_of_all(loss_reduction, norm_of_all_is_over):
    windows = [[split(DATASET[:5], 2, 3), split(DATASET[5:9], 4)], [split(DATASET[9:10], 1), []]]
    seen = {}

    def train_and_look(optimizer, windows, name):
        def skip(window):
            seen.setdefault(name, []).append((float(window.gradient_norm), float(window.loss)))
            return norm_of_all_is_over and len(seen[name]) == 1

        return train(optimizer, windows, skip_update=skip, loss_reduction=loss_reduction)

    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model())
        return train_and_look(optimizer, windows[communicator.rank], communicator.rank)

    actual = run_ranks(2, program)
    expected = train_and_look(momentum_sgd().setup(ready_model()), [sum(each, []) for each in zip(*windows)], "one")
    numpy.testing.assert_allclose(seen[0], seen["one"], rtol=1e-5)
    assert seen[0] == seen[1]
    for optimizer in actual:
        assert optimizer.t == expected.t == 2 - norm_of_all_is_over
        assert_same_parameters(optimizer.target, expected.target)
        assert_same_optimizer_state(optimizer.actual_optimizer, expected)


def test_ranks_that_do_not_agree_on_skipping_raise_and_change_nothing():
    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model())
        with pytest.raises(
            RuntimeError, match="skip_update must return the same on all ranks, got True on only 1 of 2"
        ):
            train(optimizer, [split(DATASET[:4], 4)], skip_update=lambda window: communicator.rank == 1)
        return optimizer

    for optimizer in run_ranks(2, program):
        assert optimizer.t == 0
        assert_same_parameters(optimizer.target, ready_model(), 0)


def test_a_block_without_an_update_leaves_the_gradient_of_all_ranks():
    parts = [split(DATASET[:5], 2, 3), split(DATASET[5:6], 1)]

    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model())
        train(optimizer, [parts[communicator.rank]], update=False)
        return {name: param.grad.copy() for name, param in optimizer.target.namedparams()}, optimizer

    optimizer = momentum_sgd().setup(ready_model())
    optimizer.update(optimizer.target, *chainer.dataset.concat_examples(DATASET[:6]))
    for grads, of_rank in run_ranks(2, program):
        assert of_rank.t == 0
        for name, param in optimizer.target.namedparams():
            numpy.testing.assert_allclose(grads[name], param.grad, rtol=1e-5, atol=1e-6)


# Exact over ranks.


sizes_of_a_window = st.lists(st.integers(1, 4), max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(sizes_of_a_window, min_size=2, max_size=2), min_size=1, max_size=3),
    is_lazy=st.booleans(),
    zero_fill=st.booleans(),
)
def test_the_step_is_that_of_one_process_with_the_examples_of_all_ranks(sizes, is_lazy, zero_fill):
    examples = iter(DATASET * 2)
    windows = [[[[next(examples) for _ in range(n)] for n in window] for window in rank] for rank in sizes]
    if is_lazy:  # the parameters are those of the first rank that has them
        windows[0][0].append([next(examples)])

    actual, expected = train_both(windows, lazy_model if is_lazy else ready_model, zero_fill=zero_fill)

    for optimizer in actual:
        assert_same_parameters(optimizer.target, expected.target)
        assert_same_optimizer_state(optimizer, expected)


def test_losses_that_are_sums_are_added_up():
    def make_its_model(rank):
        model = ready_model(rank)
        model.lossfun = lambda x, t: F.sum(F.softmax_cross_entropy(x, t, reduce="no"))
        return model

    windows = [[split(DATASET, 4, 5)], [split(DATASET[9:], 2)]]
    actual, expected = train_both(windows, make_its_model, lambda: optimizers.SGD(0.01), loss_reduction="sum")
    for optimizer in actual:
        assert_same_parameters(optimizer.target, expected.target)


def test_without_any_weight_the_gradient_is_zero():
    def program(communicator):
        optimizer = make_multi_node(optimizers.SGD(1), communicator).setup(ready_model())
        with accumulate(optimizer) as window:
            window.add(optimizer.target, *chainer.dataset.concat_examples(DATASET[:3]), weight=0)
        assert_same_parameters(optimizer.target, ready_model())
        return optimizer.t

    assert run_ranks(2, program) == [1, 1]


def test_a_gradient_of_any_memory_layout_reaches_the_other_ranks():
    def make_its_model(rank):
        model = ready_model()
        layer = model.predictor[0]
        layer.W.array = numpy.asfortranarray(layer.W.array)
        model.lossfun = lambda x, t: F.softmax_cross_entropy(x, t) + F.sum(F.transpose(layer.W) ** 2)
        return model

    windows = [[split(DATASET, 4, 5)], [split(DATASET[9:], 2)]]
    actual, expected = train_both(windows, make_its_model)
    for optimizer in actual:
        assert_same_parameters(optimizer.target, expected.target)


# The loss scale.


def test_a_rank_without_data_undoes_the_loss_scale_as_well():
    def scaled_sgd():
        optimizer = optimizers.SGD(0.1)
        optimizer.loss_scaling(scale=128.0)
        return optimizer

    actual, expected = train_both([[split(DATASET, 4, 5)], [[]]], make_optimizer=scaled_sgd)
    for optimizer in actual:
        assert_same_parameters(optimizer.target, expected.target)


@pytest.mark.filterwarnings("ignore:Non finite number found", "ignore:invalid value")
def test_an_overflow_on_one_rank_skips_the_update_on_all():
    def program(communicator):
        optimizer = optimizers.SGD(0.1)
        optimizer.loss_scaling()
        optimizer = make_multi_node(optimizer, communicator).setup(ready_model())
        seen = []
        for update in range(3):
            factor = numpy.float32("inf") if (communicator.rank, update) == (1, 1) else 1
            before = [param.array.copy() for param in optimizer.target.params()]
            with accumulate(optimizer) as window:
                x, t = chainer.dataset.concat_examples(DATASET[:3])
                window.add(lambda x, t, factor: factor * optimizer.target(x, t), x, t, factor)
            after = [param.array for param in optimizer.target.params()]
            seen.append((optimizer._loss_scale, all(map(numpy.array_equal, before, after))))
        return seen

    first, second = run_ranks(2, program)
    assert first == second
    assert [is_skipped for _, is_skipped in first] == [False, True, False]
    assert first[1][0] == first[0][0] / 2


# How often the ranks meet.


def test_a_window_is_two_numbers_and_one_all_reduce_whatever_k():
    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model(communicator.rank))
        train(optimizer, [split(DATASET, 4)])
        del communicator.collectives[:]
        train(optimizer, [split(DATASET, *[2] * k) for k in (1, 4, 16)])
        return communicator.collectives

    assert run_ranks(2, program) == [["allreduce of 16 bytes", "mean_grad"] * 3] * 2


def test_only_while_parameters_are_uninitialized_is_there_one_more_number():
    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(lazy_model())
        optimizer.target.add_link("unused", L.Linear(None, 3))
        train(optimizer, [split(DATASET, 4)])
        del communicator.collectives[:]
        train(optimizer, [split(DATASET, 4)])
        return communicator.collectives

    assert run_ranks(2, program) == [["allreduce of 8 bytes", "allreduce of 16 bytes", "mean_grad"]] * 2


# No window is lost.


@pytest.mark.parametrize("make_its_model", [ready_model, lazy_model])
def test_the_first_window_counts(make_its_model):
    windows = [[split(DATASET, 4, 5)], [split(DATASET[9:], 2)]]
    actual, expected = train_both(windows, make_its_model)
    for optimizer in actual:
        assert optimizer.t == 1
        assert_same_parameters(optimizer.target, expected.target)


class Growing(chainer.Chain):
    """Batches of three examples pass through a layer that the others do not know of."""

    def __init__(self, rank, late):
        super().__init__()
        with self.init_scope():
            self.norm = L.BatchNormalization(5)
            self.base = ready_model(rank).predictor
            self.late = L.Linear(None, 3, initialW=numpy.full((3, 5), late, "f"))

    def forward(self, x, t):
        h = self.norm(x)
        loss = F.softmax_cross_entropy(self.base(h) + self.late(h) if len(x) == 3 else self.base(h), t)
        chainer.report({"loss": loss})
        return loss


# The first window; one in which rank 1 initializes a parameter after other passes; and one with data on rank 0 only.
GROWING = [
    [split(DATASET, 4), split(DATASET, 5, 4), split(DATASET, 3)],
    [split(DATASET[4:], 4), split(DATASET[9:], 2, 3, 3), []],
]


def test_the_window_in_which_one_rank_initializes_a_parameter_counts():
    def program(communicator):
        model = Growing(communicator.rank, communicator.rank)
        return train(make_multi_node(momentum_sgd(), communicator).setup(model), GROWING[communicator.rank])

    # The parameters are those of rank 0, but for the one that rank 1 was the first to have.
    expected = train(momentum_sgd().setup(Growing(0, 1)), [sum(each, []) for each in zip(*GROWING)])
    for optimizer in run_ranks(2, program):
        assert optimizer.t == 3
        assert_same_parameters(optimizer.target, expected.target)


def test_passes_that_are_repeated_report_nothing_and_move_running_averages_once():
    parts = [split(DATASET, 4, 3), split(DATASET[7:], 3, 2)]

    def program(communicator):
        model = Growing(0, communicator.rank)
        window = MultiNodeWindow(make_multi_node(momentum_sgd(), communicator).setup(model))
        alone = L.BatchNormalization(5)
        reporter = chainer.Reporter()
        with reporter.scope({}):
            for examples in parts[communicator.rank]:
                x, t = chainer.dataset.concat_examples(examples)
                window.add(model, x, t, weight=len(x))
                alone(x)
        during_update = {}
        with reporter.scope(during_update):
            window.update()
        assert during_update == {}
        numpy.testing.assert_allclose(model.norm.avg_mean, alone.avg_mean, rtol=1e-6)
        numpy.testing.assert_allclose(model.norm.avg_var, alone.avg_var, rtol=1e-6)
        return model

    expected = train(momentum_sgd().setup(Growing(0, 0)), [sum(parts, [])]).target
    for model in run_ranks(2, program):
        assert_same_parameters(model, expected)


def test_ranks_that_begin_alike_repeat_nothing():
    def program(communicator):
        model = lazy_model()
        calls = []
        model.lossfun = lambda x, t: calls.append(len(t)) or F.softmax_cross_entropy(x, t)
        train(make_multi_node(momentum_sgd(), communicator).setup(model), [split(DATASET, 3, 2)])
        return calls

    assert run_ranks(2, program) == [[3, 2]] * 2


# Backward passes of the caller's own, which the window cannot repeat.


def test_gradients_of_different_parameters_are_refused_and_may_be_computed_again():
    def program(communicator):
        optimizer = create_accumulating_optimizer(make_multi_node(momentum_sgd(), communicator), 2)
        optimizer.setup(ready_model(communicator.rank))
        parts = split(DATASET[5 * communicator.rank :], 2, 3)
        for attempt in range(2):
            with pytest.raises(RuntimeError, match="same parameters before a backward pass") if attempt == 0 else OK:
                for examples in parts:
                    loss = optimizer.target(*chainer.dataset.concat_examples(examples))
                    optimizer.target.cleargrads()
                    loss.backward()
                    optimizer.update_weighted(len(examples))
        return optimizer

    expected = train(momentum_sgd().setup(ready_model()), [split(DATASET, 10)])
    for optimizer in run_ranks(2, program):
        assert optimizer.t == 1
        assert_same_parameters(optimizer.target, expected.target)


def test_gradients_of_a_parameter_that_is_born_different_are_refused():
    def program(communicator):
        optimizer = create_accumulating_optimizer(make_multi_node(momentum_sgd(), communicator), 2)
        model = optimizer.setup(Growing(0, communicator.rank)).target
        with pytest.raises(RuntimeError, match="run the pass again"):
            for examples in split(DATASET, 2, 3):
                x, t = chainer.dataset.concat_examples(examples)
                loss = model(x, t)
                optimizer.target.cleargrads()
                loss.backward()
                optimizer.update()

    run_ranks(2, program)


def test_a_window_begun_with_different_parameters_is_not_resumed(tmp_path):
    def program(communicator):
        def set_up(rank):
            multi_node = make_multi_node(momentum_sgd(), communicator)
            return create_accumulating_optimizer(multi_node, 2).setup(lazy_model(rank))

        x, t = chainer.dataset.concat_examples(DATASET[:4])
        saved, loaded = set_up(communicator.rank), set_up(5)
        saved.update(saved.target, x, t)
        for name, each in ("model", saved.target), ("optimizer", saved):
            save_npz(str(tmp_path / f"{name}{communicator.rank}"), each, compression=False)
        for name, each in ("model", loaded.target), ("optimizer", loaded):
            load_npz(str(tmp_path / f"{name}{communicator.rank}"), each)
        with pytest.raises(RuntimeError, match="same parameters before a backward pass that cannot be repeated"):
            loaded.update(loaded.target, x, t)

    run_ranks(2, program)


# Ranks without data.


def make_updater(communicator, size, repeat=True, **kwargs):
    optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model(communicator.rank))
    start = communicator.rank * 20
    iterator = serial(DATASET[start : start + size], 4, repeat=repeat)
    return AccumulatingUpdater(iterator, optimizer, **kwargs)


SIZES = [7, 20, 4]


@pytest.mark.parametrize("steps, updates", [(1, 5), (2, 3)])
def test_ranks_whose_data_ends_early_take_part_until_no_rank_has_any(steps, updates):
    def program(communicator):
        updater = make_updater(communicator, SIZES[communicator.rank], repeat=False, accumulation_steps=steps)
        for _ in range(updates):
            updater.update()
        with pytest.raises(StopIteration):
            updater.update()
        assert updater.iteration == updater.get_optimizer("main").t == updates
        assert updater.epoch_detail == 1
        assert updater.effective_batch_size == (4 if communicator.rank == 1 else 0)
        return updater.get_optimizer("main")

    windows = []
    for update in range(updates):
        window = []
        for rank, size in enumerate(SIZES):
            examples = DATASET[20 * rank : 20 * rank + size][4 * steps * update : 4 * steps * (update + 1)]
            window += [examples[start : start + 4] for start in range(0, len(examples), 4)]
        windows.append(window)
    expected = train(momentum_sgd().setup(ready_model()), windows)
    for optimizer in run_ranks(3, program):
        assert_same_parameters(optimizer.target, expected.target)


@pytest.mark.parametrize("repeat", [True, False])
def test_a_rank_that_stops_training_early_takes_part_to_the_end(tmp_path, repeat):
    def program(communicator):
        updater = make_updater(communicator, SIZES[communicator.rank], repeat, accumulation_steps=1)
        Trainer(updater, (1, "epoch"), out=str(tmp_path)).run()
        return updater.iteration, updater.get_optimizer("main")

    (iterations, ranks) = zip(*run_ranks(3, program))
    assert iterations == (2, 5, 1)
    assert [optimizer.t for optimizer in ranks] == [5, 5, 5]
    for optimizer in ranks[1:]:
        assert_same_parameters(optimizer.target, ranks[0].target)


def test_a_rank_that_fails_does_not_go_on(tmp_path):
    def program(communicator):
        updater = make_updater(communicator, 8, accumulation_steps=1)
        updater.loss_func = lambda x, t: 1 / 0
        with pytest.raises(ZeroDivisionError):
            Trainer(updater, (1, "epoch"), out=str(tmp_path)).run(show_loop_exception_msg=False)
        return communicator.collectives

    (collectives,) = run_ranks(1, program)
    assert not any(each.startswith("allreduce of") for each in collectives)


def test_a_block_without_micro_batches_takes_part():
    actual, expected = train_both([[split(DATASET, 4, 5), []], [[], []]])
    for optimizer in actual:
        assert optimizer.t == 1
        assert_same_parameters(optimizer.target, expected.target)


# Collective decisions.


class Communicating(L.Linear):
    """Meets the other ranks in each forward pass, as MultiNodeBatchNormalization does."""

    __module__ = "chainermn.links"

    def __init__(self, communicator):
        super().__init__(5, 5, initialW=numpy.eye(5))
        self.communicator = communicator

    def forward(self, x):
        self.communicator.allreduce(numpy.zeros(5))
        return super().forward(x)


def communicating(communicator):
    model = L.Classifier(chainer.Sequential(Communicating(communicator), ready_model().predictor))
    return make_multi_node(momentum_sgd(), communicator).setup(model)


def test_ranks_whose_links_communicate_make_the_same_passes():
    def program(communicator):
        return train(communicating(communicator), [split(DATASET[8 * communicator.rank :], 3, 5 - communicator.rank)])

    expected = L.Classifier(chainer.Sequential(L.Linear(5, 5, initialW=numpy.eye(5)), ready_model().predictor))
    expected = train(momentum_sgd().setup(expected), [[DATASET[:8] + DATASET[8:15]]])
    for optimizer in run_ranks(2, program):
        assert_same_parameters(optimizer.target, expected.target)


@pytest.mark.parametrize("sizes", [[(3, 2), (5,)], [(), (1,)], [(2, 2, 2), (2, 2)]])
def test_ranks_that_would_wait_for_one_another_fail_instead(sizes):
    def program(communicator):
        optimizer = communicating(communicator)
        message = (
            r"the same number of micro-batches .* got micro-batch \d on only 1 of 2 ranks; give all ranks the same"
        )
        with pytest.raises(RuntimeError, match=message):
            train(optimizer, [split(DATASET, *sizes[communicator.rank])])
        assert optimizer.t == 0

    run_ranks(2, program)


def test_a_pass_that_failed_is_not_repeated_where_links_communicate():
    def program(communicator):
        optimizer = communicating(communicator)
        window = MultiNodeWindow(optimizer)
        with pytest.raises(MemoryError):
            window.add(raise_memory_error)
        with pytest.raises(RuntimeError, match="begin a new window"):
            window.add(optimizer.target, *chainer.dataset.concat_examples(DATASET[:2]))

    run_ranks(1, program)


def test_a_pass_that_failed_may_be_repeated_where_they_do_not():
    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(lazy_model(communicator.rank))
        window = MultiNodeWindow(optimizer)
        if communicator.rank == 1:
            with pytest.raises(MemoryError):
                window.add(raise_memory_error)
        for examples in split(DATASET, *[(4,), (2, 2)][communicator.rank]):
            window.add(optimizer.target, *chainer.dataset.concat_examples(examples), weight=len(examples))
        window.update()
        return optimizer

    expected = train(momentum_sgd().setup(lazy_model()), [[DATASET[:4]]])
    for optimizer in run_ranks(2, program):
        assert_same_parameters(optimizer.target, expected.target)


@pytest.mark.filterwarnings("ignore:memory ran out:RuntimeWarning")
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_rank_that_runs_out_of_memory_begins_its_window_again_and_the_others_wait(prefetch):
    def program(communicator):
        model = ready_model(communicator.rank)

        def loss_func(x, t):
            if communicator.rank == 1 and len(x) > 3:
                raise_memory_error()
            return model(x, t)

        optimizer = make_multi_node(momentum_sgd(), communicator).setup(model)
        examples = DATASET[24 * communicator.rank : 24 * (communicator.rank + 1)]
        updater = AccumulatingUpdater(
            serial(examples, 12), optimizer, loss_func=loss_func, micro_batch_size=12, prefetch=prefetch
        )
        for _ in range(3):
            updater.update()
        assert updater.micro_batch_size == (12, 3)[communicator.rank]
        return optimizer

    first, second = DATASET[:12] + DATASET[24:36], DATASET[12:24] + DATASET[36:]
    expected = train(momentum_sgd().setup(ready_model()), [[first], [second], [first]])
    for optimizer in run_ranks(2, program):
        assert_same_parameters(optimizer.target, expected.target)


def test_where_links_communicate_or_parameters_are_new_a_window_cannot_begin_again():
    def program(communicator):
        for optimizer in (
            communicating(communicator),
            make_multi_node(momentum_sgd(), communicator).setup(lazy_model(communicator.rank)),
        ):
            updater = AccumulatingUpdater(
                serial(DATASET, 8), optimizer, loss_func=lambda x, t: raise_memory_error(), micro_batch_size=8
            )
            with pytest.raises(MemoryError, match="stands in for"):
                updater.update()

    run_ranks(1, program)


def test_the_ranks_cannot_each_cut_or_gather_as_they_like_where_links_communicate():
    refused = [("micro_batch_size", value) for value in ("auto", TokenBudget(8, len), lambda examples: [examples])]
    refused += [("effective_batch_size", TokenBudget(8, len))]
    message = "micro_batch_size and effective_batch_size must be numbers or None if links of the model communicate, got"

    def program(communicator):
        for name, value in refused:
            with pytest.raises(ValueError, match=message):
                AccumulatingUpdater(serial(DATASET, 8), communicating(communicator), **{name: value})
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model())
        updater = AccumulatingUpdater(serial(DATASET, 8), optimizer, micro_batch_size="auto")
        for _ in range(12):
            updater.update()
        return optimizer.t

    assert run_ranks(2, program) == [12, 12]


def test_cached_gradients_are_refused():
    def program(communicator):
        optimizer = make_multi_node(momentum_sgd(), communicator).setup(ready_model())
        with pytest.raises(ValueError, match="optimizer must not be a multi-node one, got .*; use AccumulatingUpdater"):
            chainer_accum.CachedGradientUpdater(serial(DATASET, 8), optimizer, loss_func=F.sum)

    run_ranks(1, program)


# Broken micro-batches, running averages and the noise scale.


NAN = [(x * numpy.float32("nan"), t) for x, t in DATASET]
invalid = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@invalid
def test_a_micro_batch_that_one_rank_skips_counts_on_none():
    windows = [[split(DATASET, 4, 5)], [split(DATASET[9:], 2) + [NAN[:7]]]]
    actual, _ = train_both(windows, nonfinite="skip")
    expected = train(momentum_sgd().setup(ready_model()), [split(DATASET, 4, 5, 2)])
    for optimizer in actual:
        assert_same_parameters(optimizer.target, expected.target)


@invalid
@pytest.mark.filterwarnings("ignore:no update:RuntimeWarning")
@pytest.mark.parametrize("skipped_on, updates", [((0, 1), 0), ((0,), 1)])
def test_there_is_no_update_if_all_is_skipped_on_all_ranks_and_one_if_not(skipped_on, updates):
    windows = [[[NAN[:3] if rank in skipped_on else DATASET[:3]]] for rank in range(2)]
    actual, _ = train_both(windows, nonfinite="skip")
    assert [optimizer.t for optimizer in actual] == [updates, updates]
    assert_same_parameters(actual[1].target, actual[0].target)
    assert all(numpy.isfinite(param.array).all() for param in actual[0].target.params())


def test_running_averages_of_the_window_are_collected_once_though_passes_are_repeated():
    def make_its_model(rank):
        model = lazy_model(rank)
        model.predictor.insert(0, L.BatchNormalization(5))
        return model

    windows = [[split(DATASET, 4, 5)], [split(DATASET[9:], 4, 5)]]
    actual, _ = train_both(windows, make_its_model, running_statistics="update")
    for rank, optimizer in enumerate(actual):
        link = L.BatchNormalization(5)
        link(numpy.stack([x for x, _ in DATASET[9 * rank : 9 * (rank + 1)]]))
        numpy.testing.assert_allclose(optimizer.target.predictor[0].avg_mean, link.avg_mean, rtol=1e-5)
        numpy.testing.assert_allclose(optimizer.target.predictor[0].avg_var, link.avg_var, rtol=1e-5)


@pytest.mark.parametrize("make_its_model", [ready_model, lazy_model])  # of which the second makes ranks repeat passes
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_each_rank_measures_the_norms_of_its_own_gradients(loss_reduction, make_its_model):
    def norms_of(optimizer, examples):
        window_norms = GradientNorms()
        window = window_class(optimizer)(optimizer, WindowOptions(loss_reduction), norms=window_norms)
        for part in split(examples, 4, 3):
            window.add(optimizer.target, *chainer.dataset.concat_examples(part), weight=len(part))
        window.update()
        return [float(norm) for norm in (*window_norms.micro_batches, window_norms.window)]

    def program(communicator):
        optimizer = make_multi_node(optimizers.SGD(0), communicator).setup(make_its_model(communicator.rank))
        return norms_of(optimizer, DATASET[7 * communicator.rank :])

    for rank, norms in enumerate(run_ranks(2, program)):
        expected = norms_of(optimizers.SGD(0).setup(make_its_model()), DATASET[7 * rank :])
        numpy.testing.assert_allclose(norms, expected, rtol=1e-5)


def raise_memory_error():
    raise MemoryError("stands in for a batch that is too large")


# What is a multi-node optimizer.


def test_other_optimizers_have_windows_of_their_own():
    optimizer = momentum_sgd().setup(make_model())
    window = window_class(optimizer)(optimizer)
    assert type(window) is Window
    assert not window.is_shared and MultiNodeWindow.is_shared


def test_double_buffering_is_refused(monkeypatch):
    from chainermn.optimizers import _DoubleBufferingOptimizer

    monkeypatch.setattr(chainer.cuda, "Stream", lambda non_blocking: None)
    optimizer = _DoubleBufferingOptimizer(momentum_sgd(), None, True).setup(make_model())
    message = "optimizer must not use double buffering, got double_buffering=True.*; call"
    with pytest.raises(ValueError, match=message):
        AccumulatingUpdater(serial(DATASET, 4), optimizer)
    with pytest.raises(ValueError, match=message), accumulate(optimizer):
        pass


def test_what_another_process_returns_as_its_loss_may_be_empty():
    delegate = (
        pytest.importorskip("chainermn.functions.pseudo_connect")
        .PseudoConnect()
        .apply((chainer.Variable(numpy.zeros(0, "f")), chainer.Variable(numpy.zeros(0, "f"))))[0]
    )
    optimizer = momentum_sgd().setup(ready_model())
    optimizer.t = 1  # in the first update, a gradient that reaches no parameter is an error
    with chainer_accum.accumulate(optimizer) as window:
        window.add(lambda: delegate)
    assert optimizer.t == 2
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        window = Window(optimizer)
        window.add(lambda: chainer.Variable(numpy.zeros(0, "f")) * 1)


def test_training_within_an_except_block_takes_part_to_the_end(tmp_path):
    """The exception that is being handled there has nothing to do with it."""

    def program(communicator):
        updater = make_updater(communicator, SIZES[communicator.rank], accumulation_steps=1)
        trainer = Trainer(updater, (1, "epoch"), out=str(tmp_path))
        try:
            raise ImportError("an optional package is missing")
        except ImportError:
            trainer.run()
        return updater.iteration, updater.get_optimizer("main").t

    assert run_ranks(3, program) == [(2, 5), (5, 5), (1, 5)]


def test_a_rank_that_fails_does_not_take_part_in_what_is_left(tmp_path):
    class Failing(chainer.training.Extension):
        def __call__(self, trainer):
            raise ValueError("a rank fails")

    def program(communicator):
        updater = make_updater(communicator, 20, accumulation_steps=1)
        trainer = Trainer(updater, (1, "epoch"), out=str(tmp_path))
        if communicator.rank == 0:
            trainer.extend(Failing(), trigger=(2, "iteration"))
        with pytest.raises((ValueError, threading.BrokenBarrierError)):
            trainer.run(show_loop_exception_msg=False)
            raise AssertionError("the ranks went on")
        if communicator.rank == 0:
            assert updater.get_optimizer("main").t == 2
            raise ValueError("a rank fails")

    with pytest.raises(ValueError, match="a rank fails"):
        run_ranks(2, program)


def test_finalizing_within_an_except_block_takes_part_to_the_end():
    def program(communicator):
        updater = make_updater(communicator, 20, accumulation_steps=1)
        for _ in range(1 + communicator.rank):
            updater.update()
        try:
            raise OSError("a file is missing")
        except OSError:
            updater.finalize()
        return updater.get_optimizer("main").t

    assert run_ranks(3, program) == [3] * 3


@pytest.mark.parametrize("name", ["loss_func", "converter", "weight_func"])
def test_a_stop_iteration_of_the_user_is_not_taken_for_the_end_of_a_ranks_data(name):
    def stop(*args):
        raise StopIteration

    def program(communicator):
        kwargs = {name: stop} if communicator.rank == 0 else {}
        make_updater(communicator, 20, accumulation_steps=2, **kwargs).update()

    with pytest.raises(RuntimeError, match="must not raise StopIteration, got it from"):
        run_ranks(2, program)
