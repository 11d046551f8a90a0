"""A loss whose divisor is known only in the forward pass counts by it, as in the whole batch."""

from __future__ import annotations

import functools
import weakref

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import (
    AccumulatingUpdater,
    CachedGradientUpdater,
    accumulate,
    check_equivalence,
    create_accumulating_optimizer,
    train_model,
)
from chainer import optimizers
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater
from chainer_accum._late_weights import is_late
from chainer_accum.lockstep import make_lockstep_policy
from chainer_accum.window.gradient_norms import GradientNorms
from chainer_accum.window.options import WindowOptions
from chainer_accum.window.window import Window
from chainer_accum.window.windows import window_class
from detectors import Detector, make_boxes, set_up, split, summed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import make_multi_node

from helpers import assert_same_optimizer_state, assert_same_parameters, make_updater, run, serial
from thread_ranks import run_ranks

EXACT = 1e-12
BOXES = make_boxes(24)


def whole_batch(name, num_examples=24, updates=1, model=None):
    optimizer = set_up(model)
    for _ in range(updates):
        lossfun = summed(getattr(optimizer.target, name))
        optimizer.update(lossfun, *chainer.dataset.concat_examples(BOXES[:num_examples]))
    return optimizer


def assert_same(actual, expected):
    assert_same_parameters(actual.target, expected.target, EXACT)
    assert_same_optimizer_state(actual, expected, EXACT)


# Exact everywhere.


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    expected_weight=st.one_of(st.none(), st.floats(0.5, 1000)),
    given_weights=st.sampled_from(["none", "examples"]),
)
def test_a_returned_weight_makes_the_step_of_the_whole_batch(sizes, expected_weight, given_weights):
    accumulated = set_up()
    for _ in range(2):
        with accumulate(accumulated, expected_weight=expected_weight) as window:
            for arrays in split(BOXES, sizes):
                weight = len(arrays[0]) if given_weights == "examples" else 1
                window.add(accumulated.target.of_labels, *arrays, weight=weight)
    assert_same(accumulated, whole_batch("of_labels", sum(sizes), 2))


@pytest.mark.parametrize("lockstep", [None, "memory"])
def test_a_weight_that_is_a_function_is_called_after_the_pass(lockstep):
    accumulated = set_up()
    model = accumulated.target
    for _ in range(2):
        with accumulate(accumulated, lockstep=lockstep) as window:
            for arrays in split(BOXES, [5, 1, 9, 9]):
                window.add(lambda *args: model.of_labels(*args)[0], *arrays, weight=lambda: model.num_labels)
    assert_same(accumulated, whole_batch("of_labels", updates=2))


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("name", ["of_labels", "of_all"])
@pytest.mark.parametrize("lockstep", ["memory", "file"])
def test_lockstep_is_exact_for_returned_weights(normalizes, name, lockstep):
    runs = {}
    for updater_class, kwargs in (
        (StandardUpdater, {}),
        (AccumulatingUpdater, {"micro_batch_size": 5, "lockstep": lockstep}),
    ):
        model = Detector(normalizes)
        lossfun = getattr(model, name)
        lossfun = summed(lossfun) if updater_class is StandardUpdater else lossfun
        updater = make_updater(updater_class, serial(BOXES, 12), set_up(model), model, loss_func=lossfun, **kwargs)
        runs[updater_class] = updater, run(updater, 4)
    (expected, expected_steps), (actual, steps) = runs.values()
    assert_same(actual.get_optimizer("main"), expected.get_optimizer("main"))
    for key in ("main/label", "main/box") if name == "of_all" else ():
        for step, expected_step in zip(steps, expected_steps):
            value, expected_value = (each.observation[key] for each in (step, expected_step))
            numpy.testing.assert_allclose(chainer.as_array(value), chainer.as_array(expected_value), rtol=1e-10)


@pytest.mark.parametrize("lockstep", ["memory", "file"])
def test_lockstep_is_exact_for_several_losses_that_are_sums(lockstep):
    def sums(model):
        return lambda *args: [(loss * weight, weight) for loss, weight in model.of_all(*args)]

    accumulated, expected = (set_up(Detector(normalizes=True), optimizers.MomentumSGD(0.01)) for _ in range(2))
    for _ in range(2):
        with accumulate(accumulated, loss_reduction="sum", lockstep=lockstep) as window:
            for arrays in split(BOXES, [5, 1, 9, 9]):
                window.add(sums(accumulated.target), *arrays)
        expected.update(summed(sums(expected.target)), *chainer.dataset.concat_examples(BOXES))
    assert_same(accumulated, expected)


def takes_nothing(model):
    return lambda: model.num_labels


def is_bound(model):
    model.count = lambda examples: model.num_labels
    return functools.partial(model.count)


def takes_examples(model):
    return lambda examples: sum(t >= 0 for _, t, _, _ in examples)


@pytest.mark.parametrize("make_weight_func", [takes_nothing, is_bound, takes_examples])
@pytest.mark.parametrize("kwargs", [{"micro_batch_size": 5}, {"accumulation_steps": 2}, {"lockstep": "memory"}])
def test_a_weight_func_may_ask_the_model_after_the_pass(make_weight_func, kwargs):
    kwargs = {"micro_batch_size": 5, **kwargs} if "lockstep" in kwargs else kwargs
    model = Detector()
    updater = AccumulatingUpdater(
        serial(BOXES, 12),
        set_up(model),
        loss_func=lambda *args: model.of_labels(*args)[0],
        weight_func=make_weight_func(model),
        **kwargs,
    )
    updater.update()
    num_examples = 12 * kwargs.get("accumulation_steps", 1)
    assert_same_parameters(model, whole_batch("of_labels", num_examples).target, EXACT)


def test_a_weight_func_that_needs_only_examples_is_called_before_the_pass():
    calls = []

    def lossfun(*args):
        calls.append("pass")
        return model.of_labels(*args)[0]

    def weight_func(examples):
        calls.append("weight")
        return len(examples)

    model = Detector()
    AccumulatingUpdater(
        serial(BOXES, 12), set_up(model), loss_func=lossfun, weight_func=weight_func, micro_batch_size=6
    ).update()
    assert calls == ["weight", "weight", "pass", "weight", "pass"]  # the first is for the whole iterator batch
    assert not is_late(weight_func) and is_late(lambda examples: model.num_labels) and not is_late(len)


def test_returned_weights_count_instead_of_those_of_weight_func():
    model = Detector()
    updater = AccumulatingUpdater(
        serial(BOXES, 12), set_up(model), loss_func=model.of_labels, weight_func=lambda: 1, micro_batch_size=5
    )
    updater.update()
    assert_same(updater.get_optimizer("main"), whole_batch("of_labels", 12))


def test_stacked_batches_need_no_count_if_the_weight_is_known_later():
    class Stacked:
        is_new_epoch, epoch, epoch_detail = False, 0, 0.0

        def next(self):
            return chainer.dataset.concat_examples(BOXES[:12])

    model = Detector()
    updater = AccumulatingUpdater(
        Stacked(),
        set_up(model),
        converter=lambda batch, device: batch,
        loss_func=lambda *args: model.of_labels(*args)[0],
        weight_func=lambda: model.num_labels,
        accumulation_steps=2,
    )
    updater.update()
    assert_same(updater.get_optimizer("main"), whole_batch("of_labels", 12))


@pytest.mark.parametrize("name", ["of_labels", "of_all"])
def test_the_wrapped_optimizer_takes_returned_weights_also_when_it_is_resumed(name, tmp_path):
    def wrap():
        return create_accumulating_optimizer(set_up(), 4)

    first, second = wrap(), wrap()
    parts = split(BOXES, [5, 1, 9, 9])
    for arrays in parts[:2]:
        first.update_weighted(len(arrays[0]), getattr(first.target, name), *arrays)
    save_npz(tmp_path / "optimizer.npz", first)
    load_npz(tmp_path / "optimizer.npz", second)
    second.target.copyparams(first.target)
    for arrays in parts[2:]:
        second.update_weighted(len(arrays[0]), getattr(second.target, name), *arrays)
    assert_same(second.actual_optimizer, whole_batch(name))


# Over ranks.


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=2, max_size=3),
    name=st.sampled_from(["of_labels", "of_all"]),
)
def test_ranks_normalize_each_loss_by_the_weights_of_all(sizes, name):
    def program(communicator):
        optimizer = make_multi_node(optimizers.MomentumSGD(0.1), communicator).setup(Detector())
        start = sum(map(sum, sizes[: communicator.rank]))
        with accumulate(optimizer) as window:
            for arrays in split(examples[start:], sizes[communicator.rank]):
                window.add(getattr(optimizer.target, name), *arrays)
        return optimizer

    examples = make_boxes(60)
    num_examples = sum(map(sum, sizes))
    ranks = run_ranks(len(sizes), program)
    expected = set_up()
    if num_examples > 0:
        lossfun = summed(getattr(expected.target, name))
        expected.update(lossfun, *chainer.dataset.concat_examples(examples[:num_examples]))
    for optimizer in ranks:
        assert_same_parameters(optimizer.target, expected.target, EXACT)


def test_ranks_that_return_different_numbers_of_pairs_all_raise():
    def program(communicator):
        optimizer = make_multi_node(optimizers.SGD(0.1), communicator).setup(Detector())
        name = "of_all" if communicator.rank == 0 else "of_labels"
        with pytest.raises(TypeError, match="on all ranks, got a pair and 3 pairs; return a weight of 0"):
            with accumulate(optimizer) as window:
                window.add(getattr(optimizer.target, name), *split(BOXES, [4])[0])

    run_ranks(2, program)


# Weights of zero, and values that are not finite.


def test_a_loss_of_weight_zero_may_be_nan():
    accumulated = set_up()
    arrays = chainer.dataset.concat_examples(BOXES)
    nothing = [arrays[0][:4], numpy.full(4, -1, "i"), *(array[:4] for array in arrays[2:])]
    with accumulate(accumulated) as window:
        window.add(accumulated.target.of_labels, *arrays)
        window.add(lambda *args: (accumulated.target.of_labels(*args)[0] * numpy.nan, 0), *nothing)
    assert_same(accumulated, whole_batch("of_labels"))


@pytest.mark.parametrize("nonfinite", ["keep", "skip", "raise"])
def test_a_term_without_weight_is_not_what_makes_a_micro_batch_bad(nonfinite):
    accumulated = set_up()
    sizes = [2] * 12  # so that some have no match, and a loss of NaN
    assert any(arrays[3].sum() == 0 for arrays in split(BOXES, sizes))
    with accumulate(accumulated, nonfinite=nonfinite) as window:
        for arrays in split(BOXES, sizes):
            assert window.add(accumulated.target.of_all, *arrays, weight=len(arrays[0]))
    assert window.num_skipped == 0
    assert_same(accumulated, whole_batch("of_all"))


@pytest.mark.parametrize("spoils", ["a loss", "a gradient"])
def test_nothing_of_a_skipped_micro_batch_counts_in_any_term(spoils):
    def bad(*args):
        (label, w), (box, v), (size, u) = accumulated.target.of_all(*args)
        if spoils == "a loss":
            return [(label, w), (box, v), (size * numpy.inf, u)]
        return [(label, w), (box, v), (F.sqrt(size * 0), u)]  # its gradient is 1 / 0

    accumulated = set_up()
    parts = split(BOXES, [12, 12])
    with accumulate(accumulated, nonfinite="skip") as window, numpy.errstate(all="ignore"):
        assert window.add(accumulated.target.of_all, *parts[0])
        assert not window.add(bad, *parts[1])
    assert window.num_skipped == 1
    assert_same(accumulated, whole_batch("of_all", 12))


@pytest.mark.parametrize("run_passes", ["accumulate", "updater"])
def test_if_no_loss_has_weight_the_gradient_is_zero(run_passes):
    model = Detector()
    optimizer = set_up(model)

    def lossfun(*args):
        return [(loss * numpy.nan, 0) for loss, _ in model.of_all(*args)]

    before = model.copy(mode="copy")
    if run_passes == "accumulate":
        with accumulate(optimizer) as window:
            window.add(lossfun, *split(BOXES, [4])[0])
    else:
        AccumulatingUpdater(serial(BOXES, 4), optimizer, loss_func=lossfun).update()
    assert optimizer.t == 1
    assert_same_parameters(model, before, 0)


# How large gradients are on the way.


def record_factors(sizes, weights, expected_weight, weight):
    """Returns the initial gradients of losses with these weights."""
    link, seen = L.Linear(1, 1), []

    def lossfun(w):
        loss = F.sum(link(numpy.ones((1, 1), "f")))
        backward = loss.backward
        loss.backward = lambda **kwargs: (seen.append(float(loss.grad)), backward(**kwargs))
        return loss, w

    optimizer = optimizers.SGD(0.1).setup(link)
    with accumulate(optimizer, expected_weight=expected_weight) as window:
        for size, w in zip(sizes, weights):
            window.add(lossfun, w, weight=size if weight == "examples" else 1)
    return seen


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10))
def test_no_factor_is_larger_than_in_the_weights_so_far(weights):
    factors = record_factors([1] * len(weights), weights, None, "none")
    for number, factor in enumerate(factors, 1):
        assert factor <= weights[number - 1] / sum(weights[:number]) * (1 + 1e-6)


def test_the_expected_number_of_examples_tells_what_returned_weights_to_expect():
    # 4 examples of 1000 tokens each: each counts a quarter from the first one on.
    assert record_factors([4] * 4, [4000] * 4, 16, "examples") == pytest.approx([0.25] * 4)


def test_float16_gradients_of_returned_weights_do_not_vanish():
    link = L.Linear(1, 1, initialW=1, nobias=True)
    link.W.array = link.W.array.astype("e")
    optimizer = optimizers.SGD(1.0).setup(link)
    tiny = numpy.full((1, 1), 2.0**-10, "e")  # with an expected weight in other units, it would be rounded to zero
    with accumulate(optimizer, expected_weight=64) as window:
        for _ in range(64):
            window.add(lambda: (F.sum(link(tiny)), 50000.0))
    assert link.W.grad.item() == pytest.approx(2.0**-10, rel=1e-3)


def test_an_updater_expects_returned_weights_in_their_own_units():
    seen, model = [], Detector()

    def lossfun(*args):
        loss, weight = model.of_labels(*args)
        backward = loss.backward
        loss.backward = lambda **kwargs: (seen.append(float(loss.grad)), backward(**kwargs))
        return loss, 1000.0

    AccumulatingUpdater(serial(BOXES, 12), set_up(model), loss_func=lossfun, micro_batch_size=3).update()
    numpy.testing.assert_allclose(seen, [0.25] * 4)


# Reports.


def test_reports_are_averaged_with_the_returned_weight():
    model = Detector()
    parts = split(BOXES, [5, 19])

    def lossfun(*args):
        loss, weight = model.of_labels(*args)
        chainer.report({"loss": loss, "weight": float(weight)})
        return loss, weight

    observation = {}
    with chainer.reporter.Reporter().scope(observation), accumulate(set_up(model)) as window:
        for arrays in parts:
            window.add(lossfun, *arrays)
    weights = [float((arrays[1] >= 0).sum()) for arrays in parts]
    assert observation["weight"] == pytest.approx(sum(w * w for w in weights) / sum(weights))
    expected, _ = Detector().of_labels(*chainer.dataset.concat_examples(BOXES))
    numpy.testing.assert_allclose(observation["loss"].array, expected.array, rtol=EXACT)


@pytest.mark.parametrize("kwargs", [{"micro_batch_size": 5}, {"micro_batch_size": 5, "prefetch": True}])
def test_each_of_several_losses_is_averaged_with_its_own_weight_and_the_rest_by_examples(kwargs):
    model = Detector()
    updater = make_updater(
        AccumulatingUpdater, serial(BOXES, 24), set_up(model), model, loss_func=model.of_all, **kwargs
    )
    (step,) = run(updater, 1)
    pairs = Detector().of_all.__func__
    reference = Detector()
    with chainer.reporter.Reporter().scope({}):
        chainer.get_current_reporter().add_observer("main", reference)
        (label, _), (box, _), _ = pairs(reference, *chainer.dataset.concat_examples(BOXES))
    numpy.testing.assert_allclose(step.observation["main/label"].array, label.array, rtol=EXACT)
    numpy.testing.assert_allclose(step.observation["main/box"], box.array, rtol=EXACT)
    assert step.observation["main/size"] == pytest.approx((4 * 4 + 5 * 5 * 4) / 24)


def test_the_graph_of_several_losses_is_not_kept_for_their_reports():
    graphs = []

    def lossfun(*args):
        pairs = optimizer.target.of_all(*args)
        graphs.extend(weakref.ref(loss.creator_node) for loss, _ in pairs)
        return pairs

    optimizer = set_up()
    with accumulate(optimizer) as window:
        window.add(lossfun, *split(BOXES, [6])[0])
        assert [graph() for graph in graphs] == [None] * 3


# What is refused.


def test_passes_of_a_window_return_the_same_number_of_pairs():
    optimizer = set_up()
    (arrays,) = split(BOXES, [4])
    model = optimizer.target
    for first, second, message in (
        (model.of_all, model.of_labels, "got a pair after 3 pairs; return a weight of 0 for a loss that"),
        (model.of_labels, lambda *args: model.of_labels(*args)[0], "got a loss without a weight after a pair"),
        (lambda *args: model.of_labels(*args)[0], model.of_labels, "got a pair after a loss without a weight"),
    ):
        before = model.copy(mode="copy")
        with pytest.raises(TypeError, match=message), accumulate(optimizer) as window:
            window.add(first, *arrays)
            window.add(second, *arrays)
        assert_same_parameters(model, before, 0)
        assert optimizer.t == 0


@pytest.mark.parametrize("is_second_other", [True, False])
def test_in_lockstep_passes_return_the_same_number_of_pairs(is_second_other):
    optimizer = set_up()
    model = optimizer.target
    other = model.of_all if is_second_other else lambda *args: model.of_labels(*args)[0]
    message = "the same number of pairs" if is_second_other else "call the same layers in the same order"
    (arrays,) = split(BOXES, [4])
    with pytest.raises((TypeError, RuntimeError), match=message):
        with accumulate(optimizer, lockstep="memory") as window:
            window.add(model.of_labels, *arrays)
            window.add(other, *arrays)
    assert optimizer.t == 0


def test_own_backward_passes_do_not_mix_with_returned_weights():
    optimizer = set_up()
    (arrays,) = split(BOXES, [4])
    with pytest.raises(TypeError, match="got a loss without a weight after a pair"), accumulate(optimizer) as window:
        window.add(optimizer.target.of_labels, *arrays)
        optimizer.target.of_labels(*arrays)[0].backward()
        window.add_gradients(4)


def test_gradient_norms_need_one_weight_for_each_micro_batch():
    optimizer, norms = set_up(), GradientNorms()
    parts = split(BOXES, [5, 19])
    window = Window(optimizer, norms=norms)
    for arrays in parts:
        window.add(optimizer.target.of_labels, *arrays, weight=len(arrays[0]))
    window.update()
    assert norms.weights == [float((arrays[1] >= 0).sum()) for arrays in parts]
    with pytest.raises(ValueError, match="several pairs .*GradientNoiseScale: the losses of a micro-batch have no"):
        Window(optimizer, norms=norms).add(optimizer.target.of_all, *parts[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_weight_that_raises_leaves_the_window_as_it_was(error):
    def raises():
        raise error

    optimizer, expected = set_up(), set_up()
    parts = split(BOXES, [12, 12])
    window = Window(optimizer)
    window.add(optimizer.target.of_labels, *parts[0])
    with pytest.raises(error):
        window.add(lambda *args: optimizer.target.of_labels(*args)[0], *parts[1], weight=raises)
    window.update()
    expected.update(summed(expected.target.of_labels), *parts[0])
    assert_same(optimizer, expected)


# Where else loss functions return weights.


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("name", ["of_labels", "of_all"])
def test_train_model_takes_such_loss_functions(name, accumulation_steps):
    model = Detector()
    batch_size = 12 // accumulation_steps
    history = train_model(
        model, optimizers.SGD(0.1), serial(BOXES, batch_size), getattr(model, name), accumulation_steps, num_epochs=1
    )
    expected, losses = set_up(optimizer=optimizers.SGD(0.1)), []
    lossfun = summed(getattr(expected.target, name))
    for start in (0, 12):
        arrays = chainer.dataset.concat_examples(BOXES[start : start + 12])
        losses.append(float(lossfun(*arrays).array))
        expected.update(lossfun, *arrays)
    assert_same_parameters(model, expected.target, EXACT)
    if name == "of_labels" or accumulation_steps == 1:
        assert history[0]["loss"] == pytest.approx(numpy.mean(losses))


@pytest.mark.parametrize("name", ["of_labels", "of_all"])
def test_check_equivalence_knows_that_such_a_step_is_exact(name):
    model = Detector()
    result = check_equivalence(model, BOXES[:10], loss_func=getattr(model, name))
    assert result, result.message


def test_check_equivalence_takes_a_weight_func_that_asks_the_model():
    model = Detector()
    kwargs = {"loss_func": lambda *args: model.of_labels(*args)[0]}
    assert check_equivalence(model, BOXES[:10], weight_func=lambda: model.num_labels, **kwargs)
    result = check_equivalence(model, BOXES[:10], weight_func=lambda: 1, **kwargs)
    assert not result and [cause.name for cause in result.causes] == ["normalizer"]
    assert "not like" not in result.message  # it cannot say what the weights were


def test_a_loss_of_all_representations_may_be_the_sum_of_several():
    def losses(h, t):
        return [(F.mean(h), 3), (F.softmax_cross_entropy(h[:, :3], t), 0), (F.sum(h**2), 1)]

    def step(updater_class, **kwargs):
        model = Detector()

        def encode(x, t, y, m):
            return model.features(x), t

        if updater_class is StandardUpdater:
            kwargs = {"loss_func": lambda *args: sum(loss for loss, weight in losses(*encode(*args)) if weight > 0)}
        else:
            kwargs = {"loss_func": losses, "encoder": encode, "micro_batch_size": 5}
        updater_class(serial(BOXES, 12), set_up(model), **kwargs).update()
        return model

    assert_same_parameters(step(CachedGradientUpdater), step(StandardUpdater), EXACT)


def test_representations_are_not_weighted_by_a_model():
    model = Detector()
    with pytest.raises(ValueError, match="weight_func must be a function of the examples alone, got one that takes no"):
        CachedGradientUpdater(
            serial(BOXES, 12), set_up(model), loss_func=F.sum, weight_func=lambda: 1, micro_batch_size=5
        )


def test_passes_that_need_not_wait_do_so_only_for_late_weights():
    optimizer, policy, waits = set_up(), make_lockstep_policy("memory"), []
    model, options = optimizer.target, WindowOptions(lockstep=policy)
    for name in ("of_all", "bare", "bare", "of_all", "of_all"):
        window = window_class(optimizer, options)(optimizer, options)
        for arrays in split(BOXES, [5, 19]):
            lossfun = model.of_all if name == "of_all" else lambda *args: model.of_labels(*args)[0]
            window.add(lossfun, *arrays, weight=len(arrays[0]))
        window.update()
        window.abandon()
        waits.append(policy.meets)
    assert waits == [True, False, False, True, True]
    expected = set_up()
    for name in ("of_all", "bare", "bare", "of_all", "of_all"):
        if name == "of_all":
            expected.update(summed(expected.target.of_all), *chainer.dataset.concat_examples(BOXES))
        else:
            by_examples(expected)
    assert_same_parameters(optimizer.target, expected.target, 1e-11)


def by_examples(optimizer):
    """Takes the step of micro-batches that count by their examples."""
    with accumulate(optimizer) as window:
        for arrays in split(BOXES, [5, 19]):
            window.add(lambda *args: optimizer.target.of_labels(*args)[0], *arrays, weight=len(arrays[0]))
