"""chainer-addons: its MiniBatchUpdater accumulates already, by sums."""

from __future__ import annotations

import chainer_accum
import chainercv_without_gpu  # noqa: F401  (before ChainerCV, which it makes importable)
from chainer.optimizers import MomentumSGD
from chainer_addons.training import MiniBatchUpdater

from helpers import assert_same_parameters, make_dataset, make_model, run, serial


def train_by_hand():
    """Returns chainer-addons' updater after three updates, each with the gradients of four batches."""
    optimizer = MomentumSGD(0.1).setup(make_model())
    updater = MiniBatchUpdater(16, serial(make_dataset(48), 4), optimizer)
    run(updater, 12)
    return updater


def train(lr, **kwargs):
    optimizer = MomentumSGD(lr).setup(make_model())
    updater = chainer_accum.AccumulatingUpdater(serial(make_dataset(48), 4), optimizer, accumulation_steps=4, **kwargs)
    run(updater, 3)
    return updater


def test_mini_batch_updater_is_a_window_of_sums_and_counts_batches():
    by_hand, actual = train_by_hand(), train(0.1, loss_reduction="sum")
    assert (by_hand.iteration, actual.iteration) == (12, 3)
    assert by_hand.get_optimizer("main").t == actual.get_optimizer("main").t == 3
    assert_same_parameters(actual.get_optimizer("main").target, by_hand.get_optimizer("main").target)


def test_with_means_the_learning_rate_is_four_times_as_large():
    by_hand, actual = train_by_hand(), train(0.4)
    assert_same_parameters(actual.get_optimizer("main").target, by_hand.get_optimizer("main").target)
