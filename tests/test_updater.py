"""AccumulatingUpdater takes StandardUpdater's place, keeps one graph at a time, and fails without a trace."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import weakref

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.training.updaters import StandardUpdater

import helpers
from helpers import (
    BOOKKEEPING,
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_model,
    make_updater,
    on_device,
    run,
    serial,
    to_host,
)


def make_arguments():
    return serial(make_dataset(), 6), optimizers.MomentumSGD(0.1).setup(make_model())


def test_arguments_of_standard_updater_keep_their_places():
    standard = inspect.signature(StandardUpdater.__init__).parameters
    accumulating = inspect.signature(AccumulatingUpdater.__init__).parameters
    positional = [name for name, parameter in standard.items() if parameter.kind is not parameter.VAR_KEYWORD]
    assert list(accumulating)[: len(positional)] == positional
    for name in positional:
        assert accumulating[name].default == standard[name].default
    for name in set(accumulating) - set(positional) - {"unknown"}:
        assert accumulating[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_without_accumulation_it_is_standard_updater():
    results = []
    for updater_class in (StandardUpdater, AccumulatingUpdater):
        updater = make_updater(updater_class, serial(make_dataset(), 6), optimizers.Adam())
        results.append((updater.get_optimizer("main"), run(updater, 12)))
    (expected, expected_steps), (actual, steps) = results
    assert_same_parameters(actual.target, expected.target, 0)
    assert_same_optimizer_state(actual, expected, 0)
    assert_same_steps(steps, expected_steps, 0)


def test_a_batch_that_fits_into_one_micro_batch_is_not_changed_in_any_bit():
    results = []
    for updater_class, kwargs in ((StandardUpdater, {}), (AccumulatingUpdater, {"micro_batch_size": 6})):
        updater = make_updater(updater_class, serial(make_dataset(), 6), optimizers.Adam(), **kwargs)
        results.append((updater.get_optimizer("main"), run(updater, 12)))
    (expected, expected_steps), (actual, steps) = results
    assert_same_parameters(actual.target, expected.target, 0)
    assert_same_steps(steps, expected_steps, 0)


def test_new_epoch_is_left_to_the_user_if_asked():
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(8), 4), optimizers.SGD(), accumulation_steps=2, auto_new_epoch=False
    )
    run(updater, 3)
    assert updater.epoch == 3
    assert updater.get_optimizer("main").epoch == 0
    assert not updater.get_optimizer("main").use_auto_new_epoch


def test_input_goes_to_the_input_device():
    devices = []

    @chainer.dataset.converter()
    def convert(batch, device):
        devices.append(device)
        return chainer.dataset.concat_examples(batch, device)

    iterator, optimizer = make_arguments()
    updater = AccumulatingUpdater(iterator, optimizer, convert, input_device="@numpy", accumulation_steps=2)
    run(updater, 1)
    assert updater.device is None
    assert devices == [chainer.get_device("@numpy")] * 2


class Watched(chainer.Chain):
    """A model that counts the graphs and the inputs that are alive as a forward pass begins."""

    def __init__(self):
        super().__init__(classifier=make_model())
        self.inputs, self.creators = [], []
        self.alive = []

    def forward(self, x, t):
        self.alive.append(
            (sum(ref() is not None for ref in self.inputs), sum(ref() is not None for ref in self.creators))
        )
        loss = F.softmax_cross_entropy(self.classifier.predictor(x), t)
        chainer.report({"loss": loss}, self)
        self.creators.append(weakref.ref(loss.creator_node))
        return loss


@pytest.mark.parametrize("keep_graph_on_report", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{"accumulation_steps": 4}, {"micro_batch_size": 2}, {"accumulation_steps": 2, "micro_batch_size": 3}]
)
def test_one_graph_and_one_converted_micro_batch_are_alive_at_a_time(kwargs, keep_graph_on_report):
    model = Watched()
    converted = []

    def convert(batch, device):
        assert sum(ref() is not None for ref in model.inputs) == 0
        converted.append(len(batch))
        x, t = chainer.dataset.concat_examples(batch, device)
        model.inputs.append(weakref.ref(x))
        return x, t

    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(), 6), optimizers.SGD(), model, converter=convert, **kwargs
    )
    with chainer.using_config("keep_graph_on_report", keep_graph_on_report):
        for _ in range(3):
            run(updater, 1)  # which drops the observation, as the Trainer does
    assert len(model.alive) == len(converted) >= 9
    assert set(model.alive) == {(1, 0)}


class Batch(list):
    """A list of examples to which there can be a weak reference."""


@pytest.mark.parametrize("kwargs", [{"accumulation_steps": 4}, {"accumulation_steps": 4, "micro_batch_size": 6}])
def test_no_batch_is_held_while_the_next_one_is_read(kwargs):
    batches, alive = [], []

    class Iterator(chainer.iterators.SerialIterator):
        def next(self):
            alive.append(sum(batch() is not None for batch in batches))
            batch = Batch(super().next())
            batches.append(weakref.ref(batch))
            return batch

    updater = make_updater(AccumulatingUpdater, Iterator(make_dataset(), 6), optimizers.SGD(), **kwargs)
    run(updater, 3)
    assert alive == [0] * 12


def test_the_effective_batch_size_is_unknown_after_batches_that_are_no_lists():
    class Iterator(chainer.iterators.SerialIterator):
        def next(self):
            batch = super().next()
            return batch if self.epoch_detail < 0.5 else tuple(batch)

    def convert(batch, device):
        return chainer.dataset.concat_examples(list(batch), device)

    updater = make_updater(
        AccumulatingUpdater,
        Iterator(make_dataset(24), 6, shuffle=False),
        optimizers.SGD(),
        converter=convert,
        accumulation_steps={0: 1},
        weight_func=lambda batch: 1,
    )
    sizes = []
    for _ in range(3):
        updater.update()
        sizes.append(updater.effective_batch_size)
    assert sizes == [6, None, None]


STAGES = ("iterator", "converter", "forward", "loss", "backward", "weight")


class Fragile:
    """Raises once, at a given stage of the third micro-batch it sees."""

    def __init__(self, stage):
        self.stage = stage
        self.calls = 0
        self.armed = False

    def __call__(self, stage):
        if self.armed and stage == self.stage:
            self.calls += 1
            if self.calls == 3:
                raise ConnectionError(stage)


class FragileBackward(chainer.FunctionNode):
    def __init__(self, fragile):
        self.fragile = fragile

    def forward(self, inputs):
        return inputs

    def backward(self, indexes, grad_outputs):
        self.fragile("backward")
        return grad_outputs


def make_fragile_updater(fragile, updater_class=AccumulatingUpdater, batch_size=6, **kwargs):
    model = make_model()

    class Dataset(chainer.dataset.DatasetMixin):
        examples = make_dataset(60)

        def __len__(self):
            return len(self.examples)

        def get_example(self, i):
            if i % 6 == 0:
                fragile("iterator")
            return self.examples[i]

    def convert(batch, device):
        fragile("converter")
        return chainer.dataset.concat_examples(batch, device)

    def loss_func(x, t):
        h = model.predictor[0](x)
        (h,) = FragileBackward(fragile).apply((h,))
        chainer.report({"seen": len(x)}, model)
        fragile("forward")
        loss = F.softmax_cross_entropy(model.predictor[2](F.relu(h)), t)
        chainer.report({"loss": loss}, model)
        try:
            fragile("loss")
        except ConnectionError:
            return loss.array
        return loss

    def weight_func(batch):
        try:
            fragile("weight")
        except ConnectionError:
            return float("nan")
        return len(batch)

    if updater_class is AccumulatingUpdater:
        kwargs["weight_func"] = weight_func
    optimizer = optimizers.MomentumSGD(0.1)
    return make_updater(
        updater_class, serial(Dataset(), batch_size), optimizer, model, converter=convert, loss_func=loss_func, **kwargs
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("batch_size, kwargs", [(6, {"accumulation_steps": 4}), (24, {"micro_batch_size": 6})])
def test_an_exception_leaves_everything_as_it_was_and_the_next_update_is_right(stage, batch_size, kwargs):
    fragile = Fragile(stage)
    updater = make_fragile_updater(fragile, batch_size=batch_size, **kwargs)
    optimizer = updater.get_optimizer("main")
    reference = make_fragile_updater(Fragile(None), StandardUpdater, batch_size=24)
    run(updater, 1)
    run(reference, 1)
    before = {name: getattr(updater, name) for name in ("iteration", "previous_epoch_detail", "is_new_epoch")}
    fragile.armed = True
    observation = {"outer": 1}
    reporter = chainer.Reporter()
    reporter.add_observer("main", optimizer.target)
    with pytest.raises((ConnectionError, TypeError, ValueError)), reporter.scope(observation):
        updater.update()
    assert fragile.calls == 3
    assert observation == {"outer": 1}
    assert {name: getattr(updater, name) for name in before} == before
    assert_same_parameters(optimizer.target, reference.get_optimizer("main").target)
    assert_same_optimizer_state(optimizer, reference.get_optimizer("main"))
    # The next window holds the examples that follow those that were read.
    reference.get_iterator("main")._state = updater.get_iterator("main")._state
    run(updater, 2)
    run(reference, 2)
    assert_same_parameters(optimizer.target, reference.get_optimizer("main").target)
    assert_same_optimizer_state(optimizer, reference.get_optimizer("main"))


def test_a_hook_that_raises_leaves_parameters_and_reporter_as_they_were():
    def fail(optimizer):
        chainer.report({"hook": 1})
        raise ConnectionError

    updater = make_updater(AccumulatingUpdater, serial(make_dataset(), 6), optimizers.SGD(), accumulation_steps=2)
    run(updater, 1)
    optimizer = updater.get_optimizer("main")
    before = optimizer.target.copy(mode="copy")
    optimizer.add_hook(fail, "fail")
    observation = {}
    reporter = chainer.Reporter()
    reporter.add_observer("main", optimizer.target)
    reporter.add_observers("main", optimizer.target.namedlinks(skipself=True))
    with pytest.raises(ConnectionError), reporter.scope(observation):
        updater.update()
    assert observation == {}
    assert (updater.iteration, optimizer.t) == (1, 1)
    assert_same_parameters(optimizer.target, before, 0)


class Normalizing(chainer.Chain):
    """A loss function whose running averages move before its second pass fails."""

    def __init__(self, model):
        super().__init__(normalization=L.BatchNormalization(5))
        self.model = [model]  # not a link of this one
        self.passes = 0

    def forward(self, x, t):
        self.passes += 1
        self.normalization(x)
        if self.passes == 2:
            raise ConnectionError
        return self.model[0](x, t)


@pytest.mark.parametrize("is_link_of_another_optimizer", [False, True])
def test_a_pass_that_fails_moves_no_averages_outside_the_target(is_link_of_another_optimizer):
    optimizer = optimizers.SGD().setup(make_model())
    loss = on_device(Normalizing(optimizer.target))
    by_name = {"main": optimizer}
    loss_func = loss
    if is_link_of_another_optimizer:
        by_name["other"] = optimizers.SGD().setup(loss)
        loss_func = functools.partial(loss)
    updater = AccumulatingUpdater(
        serial(make_dataset(), 6), by_name, device=helpers.DEVICE, loss_func=loss_func, accumulation_steps=2
    )
    with pytest.raises(ConnectionError):
        updater.update()
    assert loss.passes == 2
    assert to_host(loss.normalization.avg_mean).tolist() == [0] * 5
    assert to_host(loss.normalization.avg_var).tolist() == [1] * 5


def test_what_a_hook_reports_is_observed():
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(), 6), optimizers.SGD(), accumulation_steps=2)
    updater.get_optimizer("main").add_hook(lambda optimizer: chainer.report({"t": optimizer.t}), "report")
    assert [step.observation["t"] for step in run(updater, 3)] == [0, 1, 2]


def test_it_runs_without_a_reporter():
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(), 6), optimizers.SGD(), accumulation_steps=2)
    updater.update()
    assert updater.iteration == 1


def test_bookkeeping_before_the_first_update_is_that_of_the_iterator():
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(), 6), optimizers.SGD(), accumulation_steps=2)
    standard = make_updater(StandardUpdater, serial(make_dataset(), 12), optimizers.SGD())
    for name in BOOKKEEPING:
        assert getattr(updater, name) == getattr(standard, name)


@pytest.mark.parametrize("name", ["accumulation_steps", "micro_batch_size"])
@pytest.mark.parametrize(
    "value, error",
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("4", TypeError), ((2,), TypeError)],
)
def test_a_size_that_is_no_positive_int_is_refused(name, value, error):
    with pytest.raises(error, match=rf"{name} must be an int of 1 or more, got .*; use (1|None) to"):
        AccumulatingUpdater(*make_arguments(), **{name: value})


def test_accumulation_steps_must_be_given_as_a_number():
    with pytest.raises(TypeError, match="accumulation_steps must be an int of 1 or more, got None; use 1 to disable"):
        AccumulatingUpdater(*make_arguments(), accumulation_steps=None)


def test_a_numpy_integer_is_a_size():
    updater = AccumulatingUpdater(*make_arguments(), accumulation_steps=numpy.int64(3), micro_batch_size=numpy.int32(2))
    assert (updater.accumulation_steps, updater.micro_batch_size) == (3, 2)


BAD_ARGUMENTS = {
    "an int in the place of the converter": (
        lambda it, opt: AccumulatingUpdater(it, opt, 4),
        TypeError,
        "converter must be callable, got 4; to accumulate, pass accumulation_steps or micro_batch_size by keyword",
    ),
    "an unknown keyword": (
        lambda it, opt: AccumulatingUpdater(it, opt, accum_steps=4),
        TypeError,
        "got an unexpected keyword argument 'accum_steps'",
    ),
    "an optimizer without setup": (
        lambda it, opt: AccumulatingUpdater(it, optimizers.SGD(), device="@numpy"),
        ValueError,
        r"optimizer 'main' must be set up with a model, got SGD .*; call optimizer.setup\(model\) first",
    ),
    "a second optimizer without setup": (
        lambda it, opt: AccumulatingUpdater(it, {"main": opt, "other": optimizers.Adam()}),
        ValueError,
        "optimizer 'other' must be set up with a model, got Adam without one",
    ),
    "optimizers without a main one": (
        lambda it, opt: AccumulatingUpdater(it, {"generator": opt}),
        ValueError,
        r"optimizer must have the key 'main', got the keys \['generator'\]",
    ),
    "iterators without a main one": (
        lambda it, opt: AccumulatingUpdater({"train": it}, opt),
        ValueError,
        r"iterator must have the key 'main', got the keys \['train'\]",
    ),
    "a dataset in the place of the iterator": (
        lambda it, opt: AccumulatingUpdater([1, 2], opt),
        TypeError,
        r"iterator must be an iterator or a dict of them, got \[1, 2\]; create a SerialIterator",
    ),
    "a model in the place of the optimizer": (
        lambda it, opt: AccumulatingUpdater(it, make_model()),
        TypeError,
        "optimizer must be an optimizer or a dict of them, got ",
    ),
    "a loss function that is none": (
        lambda it, opt: AccumulatingUpdater(it, opt, loss_func="mse"),
        TypeError,
        "loss_func must be callable, got 'mse'; pass a function",
    ),
    "a weight for weight_func": (
        lambda it, opt: AccumulatingUpdater(it, opt, weight_func=0.5),
        TypeError,
        "weight_func must be callable, got 0.5",
    ),
    "the class of an optimizer": (
        lambda it, opt: AccumulatingUpdater(it, optimizers.Adam),
        TypeError,
        r"optimizer 'main' must be an instance, got the class Adam; write Adam\(\)",
    ),
    "a loss scale that is no number": (
        lambda it, opt: AccumulatingUpdater(it, opt, loss_scale="dynamic"),
        ValueError,
        r"loss_scale must be a positive number, got 'dynamic'; for dynamic scaling, call optimizer.loss_scaling\(\)",
    ),
    "an unknown reduction": (
        lambda it, opt: AccumulatingUpdater(it, opt, loss_reduction="max"),
        ValueError,
        "loss_reduction must be one of 'mean', 'sum', got 'max'",
    ),
    "an unknown boundary": (
        lambda it, opt: AccumulatingUpdater(it, opt, epoch_boundary=None),
        ValueError,
        "epoch_boundary must be one of 'carry', 'flush', got None",
    ),
    "an unknown rule": (
        lambda it, opt: AccumulatingUpdater(it, opt, observation_rules={"main/loss": "median"}),
        ValueError,
        r"observation_rules\['main/loss'\] must be one of 'mean', 'sum', 'last', 'max', 'min', 'concat', got 'median'",
    ),
    "rules that are no dict": (
        lambda it, opt: AccumulatingUpdater(it, opt, observation_rules="sum"),
        TypeError,
        "observation_rules must be a dict, got 'sum'",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_ARGUMENTS))
def test_a_bad_argument_is_refused(name):
    make, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        make(*make_arguments())


@pytest.mark.parametrize("kwargs", [{"accumulation_steps": 2}, {"micro_batch_size": 2}])
def test_an_empty_batch_is_refused(kwargs):
    class Empty(chainer.dataset.Iterator):
        epoch = 0
        epoch_detail = 0.0
        is_new_epoch = False

        def __next__(self):
            return []

    updater = make_updater(AccumulatingUpdater, Empty(), optimizers.SGD(), **kwargs)
    with pytest.raises(
        ValueError, match=r"the iterator returned an empty batch, got \[\]; check that the dataset is not empty"
    ):
        updater.update()
    assert updater.iteration == 0


def stop(*args):
    raise StopIteration


class StoppingSchedule:
    def __call__(self, updater):
        return stop()


STOPPING = {
    "loss function": {"loss_func": stop},
    "converter": {"converter": stop},
    "weight_func": {"weight_func": stop},
    "schedule": {"accumulation_steps": StoppingSchedule()},
    "converter, prefetched": {"converter": stop, "prefetch": True},
    "weight_func, prefetched": {"weight_func": stop, "prefetch": True, "accumulation_steps": 2},
}


@pytest.mark.parametrize("name", sorted(STOPPING))
def test_only_the_iterator_says_that_data_has_ended(name):
    kwargs = {"accumulation_steps": 2, **STOPPING[name]}
    optimizer = chainer.optimizers.SGD()
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(12), 3), optimizer, **kwargs)
    with pytest.raises(RuntimeError, match="must not raise StopIteration, got it from .*; only the iterator says"):
        updater.update()
    assert (updater.iteration, optimizer.t) == (0, 0)


def test_the_model_is_not_taken_for_a_converter():
    optimizer = chainer.optimizers.SGD().setup(make_model())
    with pytest.raises(TypeError, match="converter must not be a model, got Classifier; .*loss_func=model"):
        AccumulatingUpdater(serial(make_dataset(12), 3), optimizer, optimizer.target)


@pytest.mark.parametrize(
    "name", ["micro_batch_size", "nonfinite", "prefetch", "epoch_boundary", "running_statistics", "observation_rules"]
)
def test_what_cannot_be_set_later_says_so(name):
    updater = make_updater(AccumulatingUpdater, serial(make_dataset(12), 6), chainer.optimizers.SGD())
    with pytest.raises(
        AttributeError, match=f"{name} cannot be set, got 4; pass it when the updater is created: .*{name}=4"
    ):
        setattr(updater, name, 4)


@pytest.mark.parametrize("kwargs", [{"micro_batch_size": 5}, {"accumulation_steps": {0: 2, 1: 3}}, {"prefetch": True}])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda updater: pickle.loads(pickle.dumps(updater))])
@pytest.mark.parametrize("updates", [0, 3])
def test_a_copy_of_an_updater_goes_on_as_the_updater_does(kwargs, duplicate, updates):
    updater = make_updater(
        AccumulatingUpdater,
        serial(make_dataset(20), 8),
        chainer.optimizers.Adam(),
        L.Classifier(L.Linear(5, 3)),
        accumulation_steps=kwargs.pop("accumulation_steps", 2),
        **kwargs,
    )
    run(updater, updates)
    copied = duplicate(updater)
    assert_same_steps(run(copied, 3), run(updater, 3), 0)
    assert_same_parameters(copied.get_optimizer("main").target, updater.get_optimizer("main").target, 0)


@pytest.mark.parametrize("batch_size, accumulation_steps", [(3, 5), (4, 9), (2, 1), (6, 2)])
def test_an_optimizer_counts_all_epochs_that_end_within_a_window(batch_size, accumulation_steps):
    optimizer = chainer.optimizers.SGD()
    iterator = serial(make_dataset(6), batch_size)
    updater = make_updater(AccumulatingUpdater, iterator, optimizer, accumulation_steps=accumulation_steps)
    run(updater, 4)
    assert optimizer.epoch == iterator.epoch == batch_size * accumulation_steps * 4 // 6


def test_the_steps_of_a_short_window_are_those_taken():
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(20), 4, repeat=False), chainer.optimizers.SGD(), accumulation_steps=3
    )
    taken = []
    for _ in range(2):
        updater.update()
        taken.append((updater.accumulation_steps, updater.effective_batch_size))
    assert taken == [(3, 12), (2, 8)]
