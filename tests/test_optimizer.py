"""An accumulating optimizer makes the step of the whole batch in programs that call it themselves."""

from __future__ import annotations

import copy
import pickle

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import create_accumulating_optimizer
from chainer import optimizers
from chainer.serializers import load_npz, save_npz
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, make_model, serial
from thread_ranks import run_ranks

inputs, labels = chainer.dataset.concat_examples(make_dataset(48))


def set_up(steps=None, optimizer=None):
    optimizer = optimizers.MomentumSGD(0.1) if optimizer is None else optimizer
    if steps is not None:
        optimizer = create_accumulating_optimizer(optimizer, steps)
    return optimizer.setup(make_model())


def parts_of(sizes):
    ends = numpy.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def update_with_lossfun(optimizer, part, weight=None):
    arguments = (optimizer.target, inputs[part], labels[part])
    optimizer.update(*arguments) if weight is None else optimizer.update_weighted(weight, *arguments)


def update_with_gradients(optimizer, part, weight=None):
    loss = optimizer.target(inputs[part], labels[part])
    optimizer.target.cleargrads()
    loss.backward(loss_scale=optimizer._loss_scale)
    optimizer.update() if weight is None else optimizer.update_weighted(weight)


each_call = pytest.mark.parametrize("update", [update_with_lossfun, update_with_gradients])


@each_call
@settings(max_examples=15)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 4))
def test_each_kth_call_makes_the_step_of_the_whole_batch(update, sizes, steps):
    accumulated, whole = set_up(steps), set_up()
    parts = parts_of(sizes)
    for number, part in enumerate(parts, 1):
        update(accumulated, part, weight=part.stop - part.start)
        assert accumulated.t == number // steps
    accumulated.flush()
    for start in range(0, len(parts), steps):
        update_with_lossfun(whole, slice(parts[start].start, parts[start : start + steps][-1].stop))
    assert_same_parameters(accumulated.target, whole.target)
    assert_same_optimizer_state(accumulated, whole)


def test_what_the_caller_clears_in_between_makes_no_difference():
    clearing, not_clearing = set_up(3), set_up(3)
    not_clearing.target(inputs, labels)
    not_clearing.target.cleargrads()
    for part in parts_of([8] * 3):
        update_with_gradients(clearing, part)
        not_clearing.target(inputs[part], labels[part]).backward()
        not_clearing.update()
    assert clearing.t == not_clearing.t == 1
    assert_same_parameters(not_clearing.target, clearing.target, 0)


@each_call
def test_loss_scaling(update):
    scaled, plain = set_up(3), set_up(3)
    scaled.loss_scaling(scale=64.0)
    for part in parts_of([8] * 6):
        update(scaled, part)
        update(plain, part)
    assert {param._loss_scale for param in scaled.target.params()} == {64.0}
    assert_same_parameters(scaled.target, plain.target)


def test_everything_else_is_that_of_the_actual_optimizer():
    actual = optimizers.MomentumSGD(0.1)
    optimizer = create_accumulating_optimizer(actual, 2)
    model = make_model()
    assert optimizer.setup(model) is optimizer
    assert optimizer.target is model
    optimizer.lr = 0.5
    assert actual.lr == optimizer.hyperparam.lr == 0.5
    optimizer.use_auto_new_epoch = True
    optimizer.new_epoch(auto=True)
    assert actual.epoch == optimizer.epoch == 1
    calls = []
    optimizer.add_hook(lambda optimizer: calls.append(optimizer), "hook")
    for part in parts_of([8] * 5):
        update_with_lossfun(optimizer, part)
    assert calls == [actual, actual]
    assert (optimizer.t, optimizer.accumulation_steps) == (2, 2)
    assert not hasattr(optimizer, "no_such_thing")


def test_setup_begins_a_new_window():
    optimizer, reference = set_up(2), set_up(2)
    update_with_lossfun(optimizer, slice(0, 20))
    optimizer.setup(make_model())
    for each in (optimizer, reference):
        for part in parts_of([8, 8]):
            update_with_lossfun(each, part)
    assert_same_parameters(optimizer.target, reference.target, 0)


def test_flush_without_micro_batches_does_nothing():
    optimizer = set_up(2)
    optimizer.flush()
    for part in parts_of([8, 8]):
        update_with_lossfun(optimizer, part)
    optimizer.flush()
    assert optimizer.t == 1


@each_call
@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
def test_a_run_resumed_within_a_window_is_the_same_bit_for_bit(update, calls, tmp_path):
    uninterrupted, saved, resumed = set_up(3), set_up(3), set_up(3)
    parts = parts_of([8, 5, 7, 6, 9, 4])
    for number, part in enumerate(parts):
        update(uninterrupted, part, weight=part.stop - part.start)
        if number < calls:
            update(saved, part, weight=part.stop - part.start)
    save_npz(str(tmp_path / "optimizer.npz"), saved)
    save_npz(str(tmp_path / "model.npz"), saved.target)
    update(resumed, slice(0, 3))  # of which nothing may be left
    load_npz(str(tmp_path / "model.npz"), resumed.target)
    load_npz(str(tmp_path / "optimizer.npz"), resumed)
    for part in parts[calls:]:
        update(resumed, part, weight=part.stop - part.start)
    assert_same_parameters(resumed.target, uninterrupted.target, 0)
    assert_same_optimizer_state(resumed, uninterrupted, 0)


@pytest.mark.parametrize("scale", [64.0, 8.0])
def test_a_window_that_is_flushed_right_after_a_resume_is_divided_by_the_scale_it_had(scale, tmp_path):
    uninterrupted, resumed = set_up(3), set_up(3)
    uninterrupted.loss_scaling(scale=64.0)
    resumed.loss_scaling(scale=scale)
    update_with_lossfun(uninterrupted, slice(0, 8))
    save_npz(str(tmp_path / "optimizer.npz"), uninterrupted)
    save_npz(str(tmp_path / "model.npz"), uninterrupted.target)
    load_npz(str(tmp_path / "model.npz"), resumed.target)
    load_npz(str(tmp_path / "optimizer.npz"), resumed)
    for optimizer in (uninterrupted, resumed):
        optimizer.flush()
    assert uninterrupted.t == resumed.t == 1
    assert_same_parameters(resumed.target, uninterrupted.target, 0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_micro_batch_that_was_skipped_before_a_resume_is_counted_after_it(tmp_path):
    saved, resumed = (create_accumulating_optimizer(optimizers.SGD(), 2, nonfinite="skip") for _ in range(2))
    for optimizer in (saved, resumed):
        optimizer.setup(make_model())
    saved.update(saved.target, inputs[:8] * numpy.float32("nan"), labels[:8])
    save_npz(str(tmp_path / "optimizer.npz"), saved)
    save_npz(str(tmp_path / "model.npz"), saved.target)
    load_npz(str(tmp_path / "model.npz"), resumed.target)
    load_npz(str(tmp_path / "optimizer.npz"), resumed)
    observation = {}
    with chainer.Reporter().scope(observation):
        chainer.get_current_reporter().add_observer("main", resumed.target)
        update_with_lossfun(resumed, slice(8, 16))
    assert resumed.t == 1
    assert observation["skipped_micro_batches"] == 1


@pytest.mark.parametrize("strict", [True, False])
def test_snapshots_load_both_ways_with_the_actual_optimizer(strict, tmp_path):
    for source, target in ((set_up(2), set_up()), (set_up(), set_up(2))):
        for part in parts_of([8] * 4):
            update_with_lossfun(source, part)
        update_with_lossfun(target, slice(0, 8))
        save_npz(str(tmp_path / "optimizer.npz"), source)
        load_npz(str(tmp_path / "optimizer.npz"), target, strict=strict)
        assert_same_optimizer_state(target, source, 0)
        t = target.t
        update_with_lossfun(target, slice(0, 8))
        assert target.t == t + (target.__class__ is optimizers.MomentumSGD)


def test_a_failed_backward_pass_drops_the_window():
    class Failure(chainer.FunctionHook):
        def backward_postprocess(self, function, in_data, out_grad):
            raise MemoryError

    optimizer, reference = set_up(2), set_up(2)
    update_with_lossfun(optimizer, slice(20, 28))
    with pytest.raises(MemoryError), Failure():
        update_with_lossfun(optimizer, slice(0, 8))
    for each in (optimizer, reference):
        for part in parts_of([8, 8]):
            update_with_lossfun(each, part)
    assert optimizer.t == 1
    assert_same_parameters(optimizer.target, reference.target, 0)


def test_a_failed_forward_pass_leaves_the_window_as_it_was():
    optimizer, reference = set_up(2), set_up(2)
    update_with_lossfun(optimizer, slice(0, 8))
    with pytest.raises(chainer.utils.type_check.InvalidType):
        optimizer.update(optimizer.target, inputs[:, :2], labels)
    update_with_lossfun(optimizer, slice(8, 16))
    for part in parts_of([8, 8]):
        update_with_lossfun(reference, part)
    assert_same_parameters(optimizer.target, reference.target, 0)


def test_there_is_nothing_to_flush_after_a_failed_forward_pass_alone():
    optimizer, reference = set_up(2), set_up(2)
    with pytest.raises(chainer.utils.type_check.InvalidType):
        optimizer.update(optimizer.target.predictor[2], inputs)
    optimizer.flush()
    assert optimizer.t == 0
    assert_same_parameters(optimizer.target, reference.target, 0)


class GANUpdater(StandardUpdater):
    """An updater of the user's own, with two optimizers, in the shape of Chainer's example."""

    def update_core(self):
        x = numpy.stack([x for x, _ in self.get_iterator("main").next()])
        generator, discriminator = self.get_optimizer("generator"), self.get_optimizer("discriminator")
        y_fake = discriminator.target(generator.target(x[:, ::-1]))
        y_real = discriminator.target(x)
        generator_loss = F.sum(F.softplus(-y_fake)) / len(x)
        discriminator_loss = F.sum(F.softplus(y_fake)) / len(x) + F.sum(F.softplus(-y_real)) / len(x)
        chainer.report({"generator": generator_loss, "discriminator": discriminator_loss})
        # Both gradients are those of the parameters as they were.
        generator.target.cleargrads()
        generator_loss.backward()
        generator_grads = [param.grad for param in generator.target.params()]
        discriminator.target.cleargrads()
        discriminator_loss.backward()
        for param, grad in zip(generator.target.params(), generator_grads):
            param.grad = grad
        discriminator.update()
        generator.update()


def test_a_gan_with_an_updater_of_its_own_and_two_optimizers():
    results = []
    for batch_size, steps in ((24, None), (6, 4)):
        numpy.random.seed(0)
        models = {name: L.Linear(5, size) for name, size in (("generator", 5), ("discriminator", 1))}
        wrapped = {}
        for name, model in models.items():
            optimizer = optimizers.Adam(eps=1e-3)
            if steps:
                optimizer = create_accumulating_optimizer(optimizer, steps)
            wrapped[name] = optimizer.setup(model)
        updater = GANUpdater(serial(make_dataset(48), batch_size), wrapped)
        for _ in range(6 * (steps or 1)):
            updater.update()
        results.append(updater)
    for name in ("generator", "discriminator"):
        expected, actual = (updater.get_optimizer(name) for updater in results)
        assert_same_parameters(actual.target, expected.target)
        assert_same_optimizer_state(actual, expected)


def test_truncated_backpropagation_through_time_by_hand():
    """As in Chainer's language model: several losses, one backward pass, and the history is cut."""

    def train(optimizer, streams, weights):
        model = optimizer.target
        for step in range(0, 12, 4):
            for stream, weight in zip(streams, weights):
                loss = 0
                model.h.h, model.h.c = states.get(id(stream), (None, None))
                for time in range(step, step + 4):
                    loss += F.mean(model.out(model.h(stream[:, time : time + 1])) ** 2)
                states[id(stream)] = model.h.h, model.h.c
                model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                optimizer.update() if len(streams) == 1 else optimizer.update_weighted(weight)

    class Recurrent(chainer.Chain):
        def __init__(self):
            numpy.random.seed(0)
            super().__init__(h=L.LSTM(1, 6), out=L.Linear(6, 2))

    data = numpy.random.RandomState(0).standard_normal((8, 12)).astype("f")
    whole = optimizers.SGD(0.1).setup(Recurrent())
    accumulated = create_accumulating_optimizer(optimizers.SGD(0.1), 2).setup(Recurrent())
    states = {}
    train(whole, [data], [8])
    train(accumulated, [data[:3], data[3:]], [3, 5])
    assert whole.t == accumulated.t == 3
    assert_same_parameters(accumulated.target, whole.target)


def test_a_trainer_takes_it_for_an_optimizer():
    optimizer = set_up(2)
    updater = StandardUpdater(serial(make_dataset(48), 12), optimizer)
    trainer = Trainer(updater, (2, "epoch"), out="unused")
    trainer.extend(chainer.training.extensions.ExponentialShift("lr", 0.5), trigger=(1, "epoch"))
    while not trainer.stop_trigger(trainer):
        updater.update()
    assert (optimizer.t, optimizer.epoch) == (4, 2)


def test_an_accumulating_optimizer_can_be_copied():
    optimizer = set_up(2)
    duplicate = copy.copy(optimizer)
    assert duplicate.actual_optimizer is optimizer.actual_optimizer
    assert copy.deepcopy(optimizer).accumulation_steps == 2


def test_there_is_one_all_reduce_per_window():
    from chainermn.optimizers import _MultiNodeOptimizer

    def program(communicator):
        multi_node = _MultiNodeOptimizer(optimizers.SGD(0.1), communicator, False)
        optimizer = create_accumulating_optimizer(multi_node, 4).setup(make_model())
        for part in parts_of([3] * 16):
            update_with_lossfun(optimizer, part)
        return optimizer.t, communicator.collectives.count("mean_grad")

    assert run_ranks(2, program) == [(4, 4)] * 2


@pytest.mark.parametrize(
    "steps, error",
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)],
)
def test_steps_that_are_no_positive_int_are_refused(steps, error):
    with pytest.raises(error, match="accumulation_steps must be an int of 1 or more, got .*; use 1 to disable"):
        create_accumulating_optimizer(optimizers.SGD(), steps)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="loss_reduction must be one of 'mean', 'sum', got 'avg'"):
        create_accumulating_optimizer(optimizers.SGD(), 2, loss_reduction="avg")
    optimizer = create_accumulating_optimizer(optimizers.SGD(), 2)
    with pytest.raises(ValueError, match=r"optimizer must be set up with a model, got SGD without one"):
        optimizer.update()
    optimizer.setup(make_model())
    with pytest.raises(ValueError, match="weight must be finite and not negative, got -1.0"):
        update_with_lossfun(optimizer, slice(0, 8), weight=-1)
    with pytest.raises(TypeError, match="weight must be a number, got 'all'"):
        update_with_lossfun(optimizer, slice(0, 8), weight="all")
    assert chainer_accum.create_accumulating_optimizer is create_accumulating_optimizer


def test_it_is_an_optimizer_for_those_who_ask():
    optimizer = set_up(2)
    assert isinstance(optimizer, chainer.Optimizer)
    assert optimizer.lr == optimizer.actual_optimizer.lr
    optimizer.lr = 0.25
    assert optimizer.actual_optimizer.hyperparam.lr == 0.25
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
    assert "WeightDecay" in optimizer.actual_optimizer._hookable._pre_update_hooks
    optimizer.remove_hook("WeightDecay")
    optimizer.loss_scaling(scale=8.0)
    assert optimizer.actual_optimizer._loss_scale == optimizer._loss_scale == 8.0
    optimizer.new_epoch()
    assert optimizer.epoch == optimizer.actual_optimizer.epoch == 1


@each_call
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_copy_within_a_window_goes_on_by_itself(update, duplicate, calls):
    uninterrupted, copied = set_up(3), set_up(3)
    parts = parts_of([8, 5, 7, 6, 9, 4])
    for number, part in enumerate(parts):
        update(uninterrupted, part, part.stop - part.start)
        if number < calls:
            update(copied, part, part.stop - part.start)
    copy_of_it = duplicate(copied)
    for part in parts[calls:]:
        update(copy_of_it, part, part.stop - part.start)
    assert (uninterrupted.t, copy_of_it.t, copied.t) == (2, 2, calls // 3)
    assert_same_parameters(copy_of_it.target, uninterrupted.target, 0)
    assert_same_optimizer_state(copy_of_it, uninterrupted, 0)


def test_a_loss_function_may_have_an_argument_called_weight():
    plain, wrapped = set_up(), set_up(1)

    def loss_func(model, part, weight):
        return model(inputs[part], labels[part]) * weight

    plain.update(loss_func, plain.target, slice(0, 8), weight=0.1)
    wrapped.update(loss_func, wrapped.target, slice(0, 8), weight=0.1)
    assert_same_parameters(wrapped.target, plain.target, 0)
    plain.update(loss_func, plain.target, slice(0, 8), weight=0.1)
    wrapped.update_weighted(5, loss_func, wrapped.target, slice(0, 8), weight=0.1)
    assert_same_parameters(wrapped.target, plain.target, 0)


def test_a_weight_without_a_loss_function_is_not_taken_for_an_argument():
    with pytest.raises(TypeError, match="no arguments without a loss function, got weight; to give"):
        set_up(2).update(weight=3)


@pytest.mark.parametrize("value, error", [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_steps_that_are_set_are_checked(value, error):
    optimizer = set_up(2)
    with pytest.raises(error, match="accumulation_steps must be an int of 1 or more, got"):
        optimizer.accumulation_steps = value
    assert optimizer.accumulation_steps == 2


def test_steps_may_be_set_within_a_window():
    optimizer = set_up(4)
    for part in parts_of([4, 4]):
        update_with_lossfun(optimizer, part)
    optimizer.accumulation_steps = 3
    update_with_lossfun(optimizer, slice(8, 12))
    assert optimizer.t == 1


@pytest.mark.parametrize("calls", [0, 1])
def test_a_pass_that_raises_is_undone_and_the_window_goes_on(calls):
    class Counting(chainer.Chain):
        def __init__(self):
            super().__init__(linear=L.Linear(5, 3, initialW=numpy.ones((3, 5))))
            self.add_persistent("passes", 0)

        def forward(self, x, t):
            self.passes += 1
            return F.softmax_cross_entropy(self.linear(x), t)

    optimizer = create_accumulating_optimizer(optimizers.SGD(0.1), 2).setup(Counting())
    for part in parts_of([4] * calls):
        update_with_lossfun(optimizer, part)
    with pytest.raises(TypeError, match="incompatible array types"):
        optimizer.update(optimizer.target, inputs[:3], 0)
    assert optimizer.target.passes == calls
    for part in parts_of([4, 4])[calls:]:
        update_with_lossfun(optimizer, part)
    assert (optimizer.t, optimizer.target.passes) == (1, 2)
