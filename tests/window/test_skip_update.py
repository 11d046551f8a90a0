"""An update that skip_update refuses has not been, but for the examples that it used up."""

from __future__ import annotations

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, accumulate, create_accumulating_optimizer
from chainer import optimizers
from chainer_accum.window.window import Window
from detectors import Detector, make_boxes, set_up, split, summed

from helpers import (
    assert_same_optimizer_state,
    assert_same_parameters,
    make_dataset,
    make_model,
    make_updater,
    run,
    serial,
)

BOXES = make_boxes(24)


def always(window):
    return True


def never(window):
    return False


class Hook:
    """A hook that notes that it was called."""

    name, timing, call_for_each_param = "Hook", "pre", False

    def __init__(self):
        self.calls = 0

    def __call__(self, optimizer):
        self.calls += 1


def norm_of_whole_batch(model, name, examples):
    model.cleargrads()
    summed(getattr(model, name))(*chainer.dataset.concat_examples(examples)).backward()
    return sum(float((param.grad**2).sum()) for param in model.params() if param.grad is not None) ** 0.5


@pytest.mark.parametrize("name", ["of_labels", "of_all"])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("lockstep", [None, "memory"])
def test_the_function_is_given_the_window_before_the_update(name, scale, lockstep):
    def skip_update(window):
        seen.append((float(window.gradient_norm), float(window.loss), window.num_micro_batches, window.weights.total))
        return False

    seen, optimizer, hook = [], set_up(), Hook()
    optimizer.add_hook(hook)
    if scale is not None:
        optimizer.loss_scaling(scale=scale)
    expected = norm_of_whole_batch(Detector(), name, BOXES)
    with accumulate(optimizer, skip_update=skip_update, lockstep=lockstep) as window:
        for arrays in split(BOXES, [5, 19]):
            window.add(getattr(optimizer.target, name), *arrays, weight=len(arrays[0]))
    ((norm, loss, num_micro_batches, weight),) = seen
    assert norm == pytest.approx(expected, rel=1e-10)
    assert loss == pytest.approx(float(window.loss)) and (num_micro_batches, weight) == (2, 24)
    assert (hook.calls, optimizer.t) == (1, 1)


@pytest.mark.parametrize("lockstep", [None, "memory"])
@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize("running_statistics", ["micro_batch", "update"])
def test_a_skipped_update_leaves_all_as_before(lockstep, num_passes, running_statistics):
    model, hook = Detector(normalizes=True), Hook()
    optimizer = set_up(model)
    options = {"lockstep": lockstep, "running_statistics": running_statistics}

    def update(skip_update):
        with accumulate(optimizer, skip_update=skip_update, **options) as window:
            for arrays in split(BOXES, [24 // num_passes] * num_passes):
                window.add(model.of_labels, *arrays)
        return window

    update(never)
    optimizer.add_hook(hook)
    before = model.copy(mode="copy")
    state = {name: value.copy() for param in model.params() for name, value in param.update_rule.state.items()}
    window = update(always)
    assert window.is_skipped and window.is_done and hook.calls == 0
    assert_same_parameters(model, before, 0)
    for name, value in (("avg_mean", before.norm.avg_mean), ("avg_var", before.norm.avg_var), ("N", before.norm.N)):
        numpy.testing.assert_array_equal(getattr(model.norm, name), value)
    assert all(param.grad is None for param in model.params())
    assert optimizer.t == 1
    for param in model.params():
        assert param.update_rule.t == 1
    assert state.keys() == {"v"}


def test_training_goes_on_as_if_a_skipped_update_had_not_been():
    actual, expected = set_up(optimizer=optimizers.Adam()), set_up(optimizer=optimizers.Adam())
    answers = iter([False, True, False])
    for number, part in enumerate([BOXES[:8], BOXES[8:16], BOXES[16:]]):
        with accumulate(actual, skip_update=lambda window: next(answers)) as window:
            for arrays in split(part, [3, 5]):
                window.add(actual.target.of_all, *arrays)
        if number != 1:
            expected.update(summed(expected.target.of_all), *chainer.dataset.concat_examples(part))
    assert_same_parameters(actual.target, expected.target, 1e-12)
    assert_same_optimizer_state(actual, expected, 1e-12)


def test_a_spike_is_skipped_by_an_updater_and_reported():
    dataset = make_dataset(24)
    dataset[8:16] = [(1000 * x, t) for x, t in dataset[8:16]]
    optimizers_ = {}
    for is_skipping in (True, False):
        optimizer = optimizers.MomentumSGD(0.1)
        kwargs = {"skip_update": lambda window: window.gradient_norm > 50} if is_skipping else {}
        examples = dataset if is_skipping else dataset[:8] + dataset[16:]
        updater = make_updater(
            AccumulatingUpdater, serial(examples, 8, repeat=False), optimizer, micro_batch_size=3, **kwargs
        )
        steps = run(updater, 3 if is_skipping else 2)
        optimizers_[is_skipping] = optimizer
        if is_skipping:
            assert [step.observation["skipped_updates"] for step in steps] == [0, 1, 0]
            assert ["main/loss" in step.observation for step in steps] == [True, False, True]
            assert updater.iteration == 3 and updater.effective_batch_size == 8
    assert_same_parameters(optimizers_[True].target, optimizers_[False].target, 1e-6)
    assert optimizers_[True].t == 2


@pytest.mark.parametrize("kwargs", [{}, {"accumulation_steps": 2}, {"micro_batch_size": 5}])
def test_an_updater_asks_however_few_passes_there_are(kwargs):
    optimizer = optimizers.SGD(0.1)
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(), 10), optimizer, skip_update=always, **kwargs)
    (step,) = run(updater, 1)
    assert optimizer.t == 0 and step.observation == {"skipped_updates": 1}


def test_a_block_reports_only_that_its_update_was_skipped():
    observation, optimizer = {}, optimizers.SGD(0.1).setup(make_model())
    with chainer.reporter.Reporter().scope(observation):
        chainer.get_current_reporter().add_observer("main", optimizer.target)
        with accumulate(optimizer, skip_update=always) as window:
            window.add(optimizer.target, *chainer.dataset.concat_examples(make_dataset(4)))
    assert observation == {"skipped_updates": 1}


def test_the_wrapped_optimizer_asks_at_the_end_of_each_window():
    answers = iter([True, False])
    actual = create_accumulating_optimizer(set_up(), 2, skip_update=lambda window: next(answers))
    expected = set_up()
    for arrays in split(BOXES, [6] * 4):
        actual.update(actual.target.of_labels, *arrays)
    expected.update(summed(expected.target.of_labels), *chainer.dataset.concat_examples(BOXES[12:]))
    assert actual.t == 1
    assert_same_parameters(actual.target, expected.target, 1e-12)


def test_a_skipped_update_leaves_shared_gradients_to_other_optimizers():
    model = make_model()
    arrays = chainer.dataset.concat_examples(make_dataset(4))
    first = create_accumulating_optimizer(optimizers.SGD(0.1).setup(model), 1, skip_update=always)
    second = create_accumulating_optimizer(optimizers.SGD(0.1).setup(model), 1)
    reference = make_model()
    sgd = optimizers.SGD(0.1).setup(reference)
    for _ in range(2):
        loss = model(*arrays)
        model.cleargrads()
        loss.backward()
        for optimizer in (first, second):
            optimizer.update()
        sgd.update(reference, *arrays)
    assert_same_parameters(model, reference)


def test_gradients_of_other_parameters_are_as_before():
    teacher = L.Linear(5, 6, initialW=numpy.random.RandomState(2).standard_normal((6, 5)))
    teacher.W.array = teacher.W.array.astype("d")
    teacher.W.grad = kept = numpy.ones((6, 5))
    optimizer = set_up()
    (arrays,) = split(BOXES, [6])

    def lossfun():
        return F.mean(optimizer.target.features(arrays[0]) * F.linear(arrays[0], teacher.W))

    with accumulate(optimizer, skip_update=always) as window:
        window.add(lossfun)
    assert teacher.W.grad is kept and (kept == 1).all()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("way", ["block", "updater"])
def test_a_function_that_raises_abandons_the_window(error, way):
    def skip_update(window):
        raise error

    model = Detector(normalizes=True)
    optimizer = set_up(model)
    before = model.copy(mode="copy")
    with pytest.raises(error):
        if way == "block":
            with accumulate(optimizer, skip_update=skip_update) as window:
                window.add(model.of_labels, *split(BOXES, [6])[0])
        else:
            AccumulatingUpdater(
                serial(BOXES, 6), optimizer, loss_func=model.of_labels, micro_batch_size=3, skip_update=skip_update
            ).update()
    assert optimizer.t == 0
    assert_same_parameters(model, before, 0)
    numpy.testing.assert_array_equal(model.norm.avg_mean, before.norm.avg_mean)


def test_dynamic_loss_scaling_sees_an_overflow_before_the_function_is_asked():
    asked = []
    optimizer = optimizers.SGD(0.1).setup(make_model())
    optimizer.loss_scaling()
    optimizer._loss_scale = scale = 1024.0
    (arrays,) = [chainer.dataset.concat_examples(make_dataset(4))]

    def update(factor):
        with accumulate(optimizer, skip_update=lambda window: asked.append(1) or True) as window:
            window.add(lambda: optimizer.target(*arrays) * factor)

    with numpy.errstate(all="ignore"), pytest.warns(UserWarning, match="Non finite number"):
        update(numpy.inf)
    assert asked == [] and optimizer.t == 1 and optimizer._loss_scale < scale
    scale = optimizer._loss_scale
    update(1)
    assert asked == [1] and optimizer.t == 1 and optimizer._loss_scale == scale


@pytest.mark.parametrize("answer", [True, False, numpy.bool_(True), numpy.array(False)])
def test_answers_may_be_numpys(answer):
    optimizer = set_up()
    with accumulate(optimizer, skip_update=lambda window: answer) as window:
        window.add(optimizer.target.of_labels, *split(BOXES, [6])[0])
    assert window.is_skipped is bool(answer) and optimizer.t == 1 - bool(answer)


def test_the_gradient_norm_is_known_only_while_the_parameters_have_the_gradient():
    optimizer = set_up()
    window = Window(optimizer)
    window.add(optimizer.target.of_labels, *split(BOXES, [6])[0])
    assert window.gradient_norm is None
    window.update()
    assert window.gradient_norm is None


def test_stateful_links_go_on_from_before_a_skipped_update_in_lockstep():
    class Recurrent(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.lstm, self.out = L.LSTM(5, 4), L.Linear(4, 3)

        def forward(self, x, t):
            for state in (self.lstm.c, self.lstm.h):
                if state is not None:
                    state.unchain()
            return F.softmax_cross_entropy(self.out(self.lstm(x)), t)

    dataset = make_dataset(36)
    states = []
    for batches, answers in (([0, 1, 2], [False, True, False]), ([0, 2], [False, False])):
        numpy.random.seed(0)
        optimizer = optimizers.SGD(0.1).setup(Recurrent())
        examples = [example for batch in batches for example in dataset[12 * batch : 12 * batch + 12]]
        remaining = iter(answers)
        updater = AccumulatingUpdater(
            serial(examples, 12),
            optimizer,
            micro_batch_size=5,
            lockstep="memory",
            skip_update=lambda window, remaining=remaining: next(remaining),
        )
        for _ in answers:
            updater.update()
        states.append(optimizer.target)
    assert_same_parameters(*states)
    numpy.testing.assert_allclose(states[0].lstm.h.array, states[1].lstm.h.array, rtol=1e-6)
