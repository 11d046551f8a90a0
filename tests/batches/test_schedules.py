"""The number of accumulation steps changes when it should, between windows, and after a resume as well."""

from __future__ import annotations

import json

import chainer_accum
import chainer
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.serializers import load_npz, save_npz
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import Accumulate
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    assert_same_optimizer_state,
    assert_same_parameters,
    make_dataset,
    make_updater,
    run,
    serial,
    to_device,
)

SCHEDULE = {0: 1, 1: 3, 3: 2}


def steps_of(updater, updates):
    steps = []
    for _ in range(updates):
        run(updater, 1)
        steps.append((updater.accumulation_steps, updater.effective_batch_size))
    return steps


def make(schedule, size=48, batch_size=6, **kwargs):
    return make_updater(
        AccumulatingUpdater, serial(make_dataset(size), batch_size), optimizers.MomentumSGD(0.1),
        accumulation_steps=schedule, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "schedule",
    [SCHEDULE, {3: 2, 1: 3}, lambda updater: SCHEDULE[max(e for e in SCHEDULE if e <= updater.epoch)]],
    ids=["dictionary", "dictionary in another order, without its first", "function"],
)
def test_a_schedule_changes_k_with_the_first_window_of_an_epoch(schedule):
    # 8 batches per epoch: 8 windows of 1, then 6 of 3 (the last begins in epoch 2), then windows of 2.
    assert steps_of(make(schedule), 18) == [(1, 6)] * 8 + [(3, 18)] * 6 + [(2, 12)] * 4


def test_each_window_is_the_step_of_the_whole_batch_whatever_its_k():
    updater = make({0: 1, 1: 3})
    whole = optimizers.MomentumSGD(0.1).setup(updater.get_optimizer("main").target.copy(mode="copy"))
    x, t = to_device(make_dataset(48) * 3)
    start = 0
    for _, size in steps_of(updater, 13):
        whole.update(whole.target, x[start : start + size], t[start : start + size])
        start += size
    assert_same_parameters(updater.get_optimizer("main").target, whole.target)
    assert whole.t == updater.get_optimizer("main").t


def test_a_schedule_of_ones_is_standard_updater_in_every_bit():
    updaters = [
        make({0: 1}),
        make_updater(StandardUpdater, serial(make_dataset(48), 6), optimizers.MomentumSGD(0.1)),
    ]
    for updater in updaters:
        run(updater, 12)
    assert_same_parameters(*(updater.get_optimizer("main").target for updater in updaters), 0)


def test_k_can_be_set_between_updates():
    updater = make(2)
    assert steps_of(updater, 1) == [(2, 12)]
    updater.accumulation_steps = 4
    assert updater.accumulation_steps == 4
    assert steps_of(updater, 1) == [(4, 24)]
    updater.accumulation_steps = {0: 3}
    assert steps_of(updater, 1) == [(3, 18)]
    with pytest.raises(ValueError, match="accumulation_steps must be an int of 1 or more, got 0"):
        updater.accumulation_steps = 0
    assert steps_of(updater, 1) == [(3, 18)]


@pytest.mark.parametrize("updates", [3, 8, 10, 14])
def test_a_resumed_run_goes_on_with_the_k_it_would_have_had(updates, tmp_path):
    uninterrupted, saved, resumed = make(SCHEDULE), make(SCHEDULE), make(SCHEDULE)
    run(uninterrupted, 18)
    run(saved, updates)
    save_npz(str(tmp_path / "snapshot.npz"), saved)
    run(resumed, 1)
    load_npz(str(tmp_path / "snapshot.npz"), resumed)
    run(resumed, 18 - updates)
    optimizers_ = [updater.get_optimizer("main") for updater in (resumed, uninterrupted)]
    assert_same_parameters(optimizers_[0].target, optimizers_[1].target, 0)
    assert_same_optimizer_state(*optimizers_, 0)
    assert (resumed.epoch_detail, resumed.accumulation_steps) == (uninterrupted.epoch_detail, 2)


def test_the_effective_batch_size_counts_examples():
    updater = make(4, size=20, micro_batch_size=4, epoch_boundary="flush", weight_func=lambda batch: 1.5)
    assert updater.effective_batch_size is None
    # The second window begins with the fifth example and ends with the batch in which the epoch does.
    assert steps_of(updater, 2) == [(4, 24), (3, 18)]


@pytest.mark.parametrize("steps", [1, {0: 1}])
def test_the_effective_batch_size_counts_the_examples_of_single_batches(steps):
    assert steps_of(make(steps), 2) == [(1, 6), (1, 6)]


@pytest.mark.parametrize(
    "schedule, error, message",
    [
        ({}, ValueError, "accumulation_steps must map epochs to numbers, got {}; give at least one epoch"),
        ({0: 0}, ValueError, r"accumulation_steps\[0\] must be an int of 1 or more, got 0"),
        ({0: 1.5}, TypeError, r"accumulation_steps\[0\] must be an int of 1 or more, got 1.5"),
        (
            {-1: 2},
            ValueError,
            "an epoch in accumulation_steps must be an int of 0 or more, got -1; count",
        ),
        ({"1": 2}, TypeError, "an epoch in accumulation_steps must be an int of 0 or more, got '1'"),
        (lambda updater: 0, ValueError, "the value of accumulation_steps must be an int of 1 or more, got 0"),
        (lambda updater: None, TypeError, "the value of accumulation_steps must be an int of 1 or more, got None"),
        ([1, 2], TypeError, r"accumulation_steps must be an int of 1 or more, got \[1, 2\]"),
    ],
)
def test_a_bad_schedule_is_refused(schedule, error, message):
    with pytest.raises(error, match=message):
        make(schedule).update()


def test_a_schedule_is_asked_once_as_each_window_begins():
    asked = []

    def double(updater):
        asked.append(updater.iteration)
        return 2 * updater.accumulation_steps

    updater = make(double, size=60)
    assert steps_of(updater, 3) == [(2, 12), (4, 24), (8, 48)]
    assert asked == [0, 1, 2]


def make_trainer(updater, tmp_path, epochs=4):
    trainer = Trainer(updater, (epochs, "epoch"), out=str(tmp_path))
    trainer.extend(chainer.training.extensions.LogReport(trigger=(1, "epoch")))
    return trainer


def test_the_extension_sets_a_schedule_and_logs_it(tmp_path):
    trainer = make_trainer(make(1), tmp_path)
    trainer.extend(Accumulate({0: 1, 1: 2, 2: 4}))
    trainer.run()
    log = json.loads((tmp_path / "log").read_text())
    assert [entry["accumulation_steps"] for entry in log] == [1, 2, 4, 4]
    assert [entry["effective_batch_size"] for entry in log] == [6, 12, 24, 24]
    assert trainer.updater.iteration == 8 + 4 + 2 + 2


def test_the_extension_without_a_schedule_only_logs(tmp_path):
    trainer = make_trainer(make(4), tmp_path, epochs=1)
    trainer.extend(Accumulate())
    trainer.run()
    (entry,) = json.loads((tmp_path / "log").read_text())
    assert (entry["accumulation_steps"], entry["effective_batch_size"]) == (4, 24)


def test_the_extension_leaves_out_a_size_that_is_not_known(tmp_path):
    def convert(batch, device):
        return chainer.dataset.concat_examples(list(batch), device)

    updater = make(1, converter=convert)
    iterator = updater.get_iterator("main")
    iterator.next = lambda: tuple(type(iterator).next(iterator))  # no list, so its length may be that of anything
    trainer = make_trainer(updater, tmp_path, epochs=1)
    trainer.extend(Accumulate())
    trainer.run()
    (entry,) = json.loads((tmp_path / "log").read_text())
    assert entry["accumulation_steps"] == 1
    assert "effective_batch_size" not in entry


def test_the_extension_explains_itself_where_the_updater_cannot_accumulate(tmp_path):
    updater = make_updater(StandardUpdater, serial(make_dataset(48), 6), optimizers.SGD())
    trainer = make_trainer(updater, tmp_path)
    trainer.extend(Accumulate(4))
    with pytest.raises(
        TypeError, match="must be able to accumulate gradients, got StandardUpdater; use chainer_accum.Accum"
    ):
        trainer.run()


def test_the_extension_refuses_a_bad_schedule_at_once():
    with pytest.raises(ValueError, match="accumulation_steps must be an int of 1 or more, got 0"):
        chainer_accum.extensions.Accumulate(0)


def test_a_learning_rate_schedule_steps_once_per_update(tmp_path):
    updater = make(2)
    trainer = make_trainer(updater, tmp_path, epochs=2)
    trainer.extend(Accumulate({1: 4}))
    trainer.extend(chainer.training.extensions.ExponentialShift("lr", 0.5), trigger=(1, "iteration"))
    trainer.run()
    assert updater.iteration == 8 + 2
    numpy.testing.assert_allclose(updater.get_optimizer("main").lr, 0.1 * 0.5**10)


# The number of examples instead of the number of iterator batches.


def make_by_size(schedule, size=48, batch_size=6, **kwargs):
    return make(1, size, batch_size, effective_batch_size=schedule, **kwargs)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 8),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["carry", "flush"]),
)
def test_a_number_of_examples_is_as_many_iterator_batches(batch_size, steps, micro_batch_size, epoch_boundary):
    by_steps, by_size = [
        make_of(
            {epoch: factor * each for epoch, each in enumerate(steps)},
            20,
            batch_size,
            micro_batch_size=micro_batch_size,
            epoch_boundary=epoch_boundary,
        )
        for make_of, factor in ((make, 1), (make_by_size, batch_size))
    ]
    assert steps_of(by_size, 8) == steps_of(by_steps, 8)
    assert_same_parameters(*(updater.get_optimizer("main").target for updater in (by_size, by_steps)), 0)


@pytest.mark.parametrize(
    "schedule",
    [{1: 18, 3: 12}, lambda updater: {1: 18, 2: 18}.get(updater.epoch, 12 if updater.epoch else 6)],
    ids=["dictionary without its first", "function"],
)
def test_the_number_of_examples_follows_a_schedule_by_epoch(schedule):
    assert steps_of(make_by_size(schedule), 18) == [(1, 6)] * 8 + [(3, 18)] * 6 + [(2, 12)] * 4


def test_the_steps_are_known_before_the_first_update_unless_a_function_decides():
    assert make_by_size(24).accumulation_steps == 4
    assert make_by_size({0: 12, 5: 24}).accumulation_steps == 2
    assert make_by_size(lambda updater: 24).accumulation_steps == 1


def test_assigned_steps_replace_the_number_of_examples():
    updater = make_by_size(24)
    assert steps_of(updater, 1) == [(4, 24)]
    updater.accumulation_steps = 2
    assert steps_of(updater, 1) == [(2, 12)]


def test_the_number_of_examples_in_the_last_update_cannot_be_set():
    updater = make_by_size(24)
    for size in (24, 12, None):
        with pytest.raises(AttributeError, match=f"effective_batch_size cannot be set, got {size}; pass it when"):
            updater.effective_batch_size = size
    assert steps_of(updater, 1) == [(4, 24)]


def test_the_steps_follow_when_the_iterator_changes_its_batch_size():
    updater = make_by_size(24)
    taken = steps_of(updater, 1)
    updater.get_iterator("main").batch_size = 12
    assert taken + steps_of(updater, 1) == [(4, 24), (2, 24)]
    updater.get_iterator("main").batch_size = 10
    with pytest.raises(ValueError, match=r"multiple of 10 \(iterator batches of 10 on 1 rank\), got 24; use 20 or 30"):
        updater.update()


def test_one_batch_per_update_is_standard_updater_in_every_bit():
    updaters = [
        make_by_size(6),
        make_updater(StandardUpdater, serial(make_dataset(48), 6), optimizers.MomentumSGD(0.1)),
    ]
    for updater in updaters:
        run(updater, 12)
    assert_same_parameters(*(updater.get_optimizer("main").target for updater in updaters), 0)


@pytest.mark.parametrize("size, batch_size, steps", [(24, 12, 2), (24, 6, 4), (24, 4, 6)])
def test_a_resumed_run_may_have_another_iterator_batch(size, batch_size, steps, tmp_path):
    uninterrupted, saved, resumed = make_by_size(size), make_by_size(size), make_by_size(size, batch_size=batch_size)
    run(uninterrupted, 5)
    run(saved, 3)
    save_npz(str(tmp_path / "snapshot.npz"), saved)
    load_npz(str(tmp_path / "snapshot.npz"), resumed)
    assert resumed.accumulation_steps == steps
    run(resumed, 2)
    optimizers_ = [updater.get_optimizer("main") for updater in (resumed, uninterrupted)]
    assert_same_parameters(*(each.target for each in optimizers_))
    assert_same_optimizer_state(*optimizers_)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12))
def test_the_error_names_the_nearest_numbers_that_divide(size, batch_size):
    def try_it(size):
        return make_by_size(size, batch_size=batch_size)

    if size % batch_size == 0:
        assert try_it(size).accumulation_steps == size // batch_size
        return
    with pytest.raises(ValueError) as caught:
        try_it(size)
    given_, nearest = str(caught.value).split("; use ")
    assert given_.endswith(f"iterator batches of {batch_size} on 1 rank), got {size}")
    numbers = [int(word) for word in nearest.split(", or another batch size")[0].split(" or ")]
    assert all(abs(number - size) < batch_size and try_it(number) for number in numbers)
    assert numbers == [n for n in range(1, 60) if n % batch_size == 0 and abs(n - size) < batch_size]
