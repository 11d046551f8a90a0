"""A block reports once, as the updater does, and says what is wrong with its use."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, accumulate, create_accumulating_optimizer
from chainer.optimizers import SGD
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

from helpers import assert_same_optimizer_state, assert_same_parameters, make_dataset, make_model, make_updater, serial

x, t = chainer.dataset.concat_examples(make_dataset(24))


def set_up(model=None):
    return SGD(0.1).setup(model or make_model())


def add_by_loss(window, model, part):
    window.add(model, x[part], t[part], weight=part.stop - part.start)


def add_own_gradients(window, model, part):
    loss = model(x[part], t[part])
    model.cleargrads()
    loss.backward()
    window.add_gradients(weight=part.stop - part.start)


PARTS = [slice(0, 4), slice(4, 7), slice(7, 24)]


@pytest.mark.parametrize("add", [add_by_loss, add_own_gradients])
def test_what_the_passes_report_is_reported_once_and_merged(add):
    def observe(run):
        optimizer = set_up()
        reporter, observation = chainer.Reporter(), {}
        reporter.add_observer("main", optimizer.target)
        with reporter.scope(observation):
            run(optimizer)
        return observation

    def in_parts(optimizer):
        with accumulate(optimizer) as window:
            for part in PARTS:
                add(window, optimizer.target, part)
            chainer.report({"rate": optimizer.lr})

    actual = observe(in_parts)
    expected = observe(lambda optimizer: optimizer.update(optimizer.target, x, t))
    assert actual.pop("rate") == 0.1
    assert actual.keys() == expected.keys() >= {"main/loss", "main/accuracy"}
    for key, value in expected.items():
        numpy.testing.assert_allclose(chainer.as_array(actual[key]), chainer.as_array(value), rtol=1e-6)


def test_a_trainer_logs_whole_windows(tmp_path):
    class Blocks(StandardUpdater):
        def update_core(self):
            optimizer, batch = self.get_optimizer("main"), self.get_iterator("main").next()
            with accumulate(optimizer) as window:
                for start in range(0, len(batch), 5):
                    part = batch[start : start + 5]
                    window.add(optimizer.target, *self.converter(part, self.device), weight=len(part))

    logs = []
    for updater_class in (StandardUpdater, Blocks):
        updater = make_updater(updater_class, serial(make_dataset(48), 12), SGD(0.1))
        trainer = Trainer(updater, (8, "iteration"), out=str(tmp_path))
        trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
        trainer.run()
        logs.append([entry["main/loss"] for entry in trainer.get_extension("LogReport").log])
    numpy.testing.assert_allclose(logs[1], logs[0], rtol=1e-5)


def test_rules_say_how_values_become_one():
    observation = {}
    optimizer = set_up()
    with chainer.Reporter().scope(observation), accumulate(optimizer, observation_rules={"n": "sum"}) as window:
        for part in PARTS:
            chainer.report({"n": part.stop - part.start})
            window.add(lambda part: F.sum(optimizer.target.predictor(x[part])), part)
    assert observation["n"] == 24


def test_a_micro_batch_that_is_skipped_reports_nothing():
    observation = {}
    optimizer = set_up()

    def loss_func(part, factor):
        chainer.report({"factor": factor})
        return optimizer.target(x[part], t[part]) * factor

    with chainer.Reporter().scope(observation):
        chainer.get_current_reporter().add_observer("main", optimizer.target)
        with accumulate(optimizer, nonfinite="skip") as window:
            for part, factor in zip(PARTS, (1.0, float("nan"), 3.0)):
                window.add(loss_func, part, factor)
    assert observation["factor"] == 2.0
    assert observation["skipped_micro_batches"] == 1


class Counting(chainer.Chain):
    def __init__(self):
        super().__init__()
        self.add_persistent("passes", 0)
        self.add_persistent("sum", numpy.zeros(5, "f"))
        with self.init_scope():
            self.linear = L.Linear(5, 3)

    def forward(self, x, t):
        self.passes += 1
        self.sum += x.sum(axis=0)
        chainer.report({"passes": self.passes})
        return F.softmax_cross_entropy(self.linear(x), t)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_raises_leaves_no_trace(error):
    optimizer, observation = set_up(Counting()), {}
    before = optimizer.target.copy(mode="copy")
    with chainer.Reporter().scope(observation), pytest.raises(error), accumulate(optimizer) as window:
        add_by_loss(window, optimizer.target, PARTS[0])
        raise error
    assert_same_parameters(optimizer.target, before, 0)
    assert (optimizer.target.passes, optimizer.target.sum.any(), observation, optimizer.t) == (0, False, {}, 0)
    assert not chainer.get_function_hooks() and not chainer._get_link_hooks()


def test_a_pass_that_raises_is_undone_and_the_block_may_go_on():
    optimizer = set_up(Counting())
    with accumulate(optimizer) as window:
        add_by_loss(window, optimizer.target, PARTS[0])
        with pytest.raises(TypeError, match="incompatible array types"):
            window.add(optimizer.target, x[:3], 0)
        add_by_loss(window, optimizer.target, PARTS[1])
    assert optimizer.t == 1
    assert optimizer.target.passes == 2
    numpy.testing.assert_allclose(optimizer.target.sum, x[:7].sum(axis=0), rtol=1e-6)


def test_a_block_may_be_entered_again():
    optimizer = set_up()
    block = accumulate(optimizer)
    for updates in (1, 2):
        with block as window:
            add_by_loss(window, optimizer.target, PARTS[0])
        assert optimizer.t == updates


def test_a_block_is_not_entered_within_itself():
    block = accumulate(set_up())
    with pytest.raises(RuntimeError, match="must not be entered inside itself; call accumulate again"), block, block:
        pass


@pytest.mark.parametrize("name", ["add", "add_gradients", "update"])
def test_without_a_with_statement_it_says_how_to_write_it(name):
    message = (
        f"accumulate returns a context manager, which has no '{name}'; .*: with accumulate.optimizer. as window: window"
    )
    with pytest.raises(AttributeError, match=message):
        getattr(accumulate(set_up()), name)


def test_a_block_of_updates_that_adds_nothing_is_refused():
    optimizer = set_up()
    with pytest.raises(RuntimeError, match="the optimizer must not update within a window, got 3 updates"):
        with accumulate(optimizer):
            for part in PARTS:
                optimizer.update(optimizer.target, x[part], t[part])


def test_passes_of_your_own_have_moved_running_averages_already():
    optimizer = set_up()
    with pytest.raises(ValueError, match="running_statistics must be 'micro_batch' for your own passes, got 'update'"):
        with accumulate(optimizer, running_statistics="update") as window:
            add_own_gradients(window, optimizer.target, PARTS[0])


def test_what_is_reported_after_the_last_pass_is_merged_as_well():
    observation, optimizer = {}, set_up()
    with chainer.Reporter().scope(observation), accumulate(optimizer, observation_rules={"n": "sum"}) as window:
        for part in PARTS:
            window.add(lambda part: F.sum(optimizer.target.predictor(x[part])), part)
            chainer.report({"n": part.stop - part.start})
    assert observation == {"n": 24}


def test_a_pass_that_raised_reports_nothing():
    observation, optimizer = {}, set_up()

    def fail():
        chainer.report({"loss": 100.0})
        raise ValueError

    with chainer.Reporter().scope(observation), accumulate(optimizer) as window:
        window.add(lambda: (chainer.report({"loss": 1.0}), F.sum(optimizer.target.predictor(x)))[1])
        with pytest.raises(ValueError):
            window.add(fail)
    assert observation == {"loss": 1.0}


@pytest.mark.parametrize("add_again", [True, False])
def test_an_update_left_inside_a_block_is_refused(add_again):
    optimizer = set_up()
    message = (
        "the optimizer must not update within a window, got 1 updates since it began; remove calls of optimizer.update"
    )
    with pytest.raises(RuntimeError, match=message), accumulate(optimizer) as window:
        add_by_loss(window, optimizer.target, PARTS[0])
        optimizer.update()
        for part in PARTS[1:] if add_again else ():
            add_by_loss(window, optimizer.target, part)


def test_what_accumulates_already_is_refused():
    optimizer = create_accumulating_optimizer(SGD(), 2).setup(make_model())
    message = (
        "optimizer must not accumulate gradients itself in {}, got one from create_accumulating_optimizer with "
        "accumulation_steps=2; pass the optimizer that it wraps, optimizer.actual_optimizer"
    )
    with pytest.raises(TypeError, match=message.format("an accumulate block")):
        accumulate(optimizer)
    for updater_class in (AccumulatingUpdater, chainer_accum.CachedGradientUpdater):
        with pytest.raises(TypeError, match=message.format("an updater that accumulates")):
            updater_class(serial(make_dataset(), 4), optimizer, loss_func=F.sum)


NO_GRADIENT = {
    "a function of the data": lambda model: F.sum(chainer.Variable(x, requires_grad=False)),
    "another model": lambda model: F.sum(L.Linear(5, 3)(x)),
    "an unchained output": lambda model: F.sum(L.Linear(3, 3)(model.predictor(x).array)),
}


@pytest.mark.parametrize("name", sorted(NO_GRADIENT))
def test_a_first_update_that_would_train_nothing_is_an_error(name):
    optimizer = set_up()
    message = "a loss must depend on the parameters of the optimizer's target, got none that depends on Classifier;"
    with pytest.raises(RuntimeError, match=message), accumulate(optimizer) as window:
        window.add(NO_GRADIENT[name], optimizer.target)
    assert optimizer.t == 0
    with accumulate(optimizer) as window:
        window.add(optimizer.target, x, t)
        window.add(NO_GRADIENT[name], optimizer.target)  # one that has none is nothing to worry about
    with accumulate(optimizer) as window:
        window.add(NO_GRADIENT[name], optimizer.target)
    assert optimizer.t == 2


def test_gradients_without_a_backward_pass_are_an_error_in_the_first_update():
    optimizer = set_up()
    optimizer.target.cleargrads()
    with pytest.raises(RuntimeError, match="and run the backward pass if your own code must do so"):
        with accumulate(optimizer) as window:
            window.add_gradients()


def test_a_first_update_of_constants_is_made_with_a_warning():
    optimizer = set_up()
    with pytest.warns(RuntimeWarning, match="all losses of the first update are constants: no parameter of Classifier"):
        with accumulate(optimizer) as window:
            window.add(lambda: chainer.Variable(numpy.zeros((), "f")))
    assert optimizer.t == 1


def test_a_constant_loss_is_a_zero_gradient_that_counts():
    actual, expected = set_up(), set_up()
    for optimizer in (actual, expected):
        optimizer.update(optimizer.target, x, t)
    with accumulate(actual) as window:
        window.add(actual.target, x[:6], t[:6], weight=6)
        window.add(lambda: chainer.Variable(numpy.zeros((), "f")), weight=18)
    expected.update(lambda: expected.target(x[:6], t[:6]) * 0.25)
    assert_same_parameters(actual.target, expected.target, 1e-6)


def test_a_preset_gradient_is_where_the_backward_pass_begins():
    def preset(model, x, t):
        loss = model(x, t)
        loss.grad = numpy.array(3, "f")
        return loss

    actual, expected = set_up(), set_up()
    with accumulate(actual) as window:
        for part in PARTS:
            window.add(preset, actual.target, x[part], t[part], weight=part.stop - part.start)
    expected.update(preset, expected.target, x, t)
    assert_same_parameters(actual.target, expected.target, 1e-5)


def test_gradients_of_another_model_are_those_of_the_whole_batch():
    """Its own optimizer may use them, after the block."""
    grads = []
    for in_parts in (False, True):
        body, optimizer = L.Linear(5, 5, initialW=numpy.eye(5)), set_up()
        body.cleargrads()
        body.b.grad = numpy.ones(5, "f")

        def loss_func(part, body=body, optimizer=optimizer):
            return optimizer.target(body(x[part]), t[part])

        optimizer.update(loss_func, slice(0, 24)) if not in_parts else None
        if in_parts:
            with accumulate(optimizer) as window:
                for part in PARTS:
                    window.add(loss_func, part, weight=part.stop - part.start)
        grads.append((body.W.grad, body.b.grad))
    for actual, expected in zip(*reversed(grads)):
        numpy.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# Blocks that leave the update to the caller.


@pytest.mark.parametrize("lockstep", [None, "memory"])
@pytest.mark.parametrize("scale", [None, 256.0])
def test_a_block_without_update_leaves_the_gradient_of_the_whole_batch(lockstep, scale):
    actual, expected = set_up(), set_up()
    for optimizer in (actual, expected):
        optimizer.update(optimizer.target, x, t)
        if scale is not None:
            optimizer.loss_scaling(scale=scale)
    before = actual.target.copy(mode="copy")
    with accumulate(actual, update=False, lockstep=lockstep) as window:
        for part in PARTS:
            window.add(actual.target, x[part], t[part], weight=part.stop - part.start)
    assert actual.t == 1 and window.is_done
    assert_same_parameters(actual.target, before, 0)
    expected.target.cleargrads()
    expected.target(x, t).backward(loss_scale=scale)
    for param, other in zip(actual.target.params(), expected.target.params()):
        numpy.testing.assert_allclose(param.grad, other.grad, rtol=1e-4, atol=1e-6)
    norm = sum(float((param.grad**2).sum()) for param in actual.target.params()) ** 0.5 / (scale or 1)
    assert float(window.gradient_norm) == pytest.approx(norm, rel=1e-5)
    for optimizer in (actual, expected):
        optimizer.update()
    assert_same_parameters(actual.target, expected.target)
    assert_same_optimizer_state(actual, expected)


def test_a_block_without_update_reports_and_moves_running_averages():
    observations, models = [], []
    for update in (True, False):
        model = L.Classifier(chainer.Sequential(L.BatchNormalization(5), L.Linear(5, 3, initialW=numpy.ones((3, 5)))))
        optimizer, observation = SGD(0.1).setup(model), {}
        with chainer.Reporter().scope(observation):
            chainer.get_current_reporter().add_observer("main", model)
            with accumulate(optimizer, update=update, running_statistics="update") as window:
                for part in PARTS:
                    window.add(model, x[part], t[part], weight=part.stop - part.start)
        if not update:
            optimizer.update()
        observations.append({key: float(value.array) for key, value in observation.items()})
        models.append(model)
    assert observations[0] == observations[1] and "main/loss" in observations[0]
    assert_same_parameters(*models)
    numpy.testing.assert_array_equal(models[0].predictor[0].avg_mean, models[1].predictor[0].avg_mean)


def test_the_gradients_of_two_tasks_can_be_combined_before_the_update():
    """As for PCGrad, which projects each on the normal plane of the other."""
    actual, expected = set_up(), set_up()
    tasks = (lambda model: model, lambda model: lambda x, t: F.mean(model.predictor(x) ** 2))
    for optimizer in (actual, expected):
        grads = []
        for make_loss in tasks:
            loss_func = make_loss(optimizer.target)
            if optimizer is actual:
                with accumulate(actual, update=False) as window:
                    for part in PARTS:
                        window.add(loss_func, x[part], t[part], weight=part.stop - part.start)
            else:
                loss = loss_func(x, t)
                expected.target.cleargrads()
                loss.backward()
            grads.append([param.grad.copy() for param in optimizer.target.params()])
        product = sum(float((a * b).sum()) for a, b in zip(*grads))
        square = sum(float((b * b).sum()) for b in grads[1])
        for param, a, b in zip(optimizer.target.params(), *grads):
            param.grad = a + b - min(product, 0.1) / square * b
        optimizer.update()
    assert actual.t == 1
    assert_same_parameters(actual.target, expected.target, 1e-5)
    assert_same_optimizer_state(actual, expected, 1e-5)


def test_a_block_without_update_and_without_loss_clears_the_gradients():
    optimizer = set_up()
    optimizer.update(optimizer.target, x, t)
    with accumulate(optimizer, update=False) as window:
        pass
    assert window.loss is None
    assert all(param.grad is None for param in optimizer.target.params())


def test_a_block_without_update_that_raises_undoes_its_passes():
    model = L.Classifier(chainer.Sequential(L.BatchNormalization(5), L.Linear(5, 3)))
    optimizer = SGD(0.1).setup(model)
    before = model.copy(mode="copy")
    with pytest.raises(ZeroDivisionError), accumulate(optimizer, update=False) as window:
        window.add(model, x, t)
        raise ZeroDivisionError
    assert_same_parameters(model, before, 0)
    numpy.testing.assert_array_equal(model.predictor[0].avg_mean, before.predictor[0].avg_mean)
