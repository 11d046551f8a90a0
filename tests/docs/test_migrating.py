"""What docs/migrating.md says of other people's accumulation holds."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import optimizers
from chainer.training.updaters import ParallelUpdater, StandardUpdater

from helpers import assert_same_parameters, make_dataset, make_model, run, serial


def make_optimizer():
    """Returns an optimizer whose model has all its parameters already."""
    optimizer = optimizers.MomentumSGD(0.1).setup(make_model())
    with chainer.no_backprop_mode():
        optimizer.target(*chainer.dataset.concat_examples(make_dataset(2)))
    return optimizer


def batches(sizes, dataset=None):
    examples = iter(make_dataset() if dataset is None else dataset)
    return [chainer.dataset.concat_examples([next(examples) for _ in range(size)]) for size in sizes]


def update_with_window(optimizer, parts, weigh=len, **kwargs):
    with chainer_accum.accumulate(optimizer, **kwargs) as window:
        for x, t in parts:
            window.add(optimizer.target, x, t, weight=weigh(x))


def add_losses(optimizer, parts):
    loss = sum(optimizer.target(x, t) for x, t in parts) / len(parts)
    optimizer.target.cleargrads()
    loss.backward()
    optimizer.update()


def add_gradients(optimizer, parts):
    optimizer.target.cleargrads()
    for x, t in parts:
        (optimizer.target(x, t) / len(parts)).backward()
    optimizer.update()


@pytest.mark.parametrize("update_by_hand", [add_losses, add_gradients])
def test_accumulation_by_hand_is_a_window_if_all_batches_are_alike(update_by_hand):
    by_hand, actual = make_optimizer(), make_optimizer()
    for _ in range(3):
        update_by_hand(by_hand, batches([4, 4, 4]))
        update_with_window(actual, batches([4, 4, 4]))
    assert_same_parameters(actual.target, by_hand.target)


@pytest.mark.parametrize("update_by_hand", [add_losses, add_gradients])
def test_accumulation_by_hand_gives_a_short_batch_the_weight_of_a_long_one(update_by_hand):
    by_hand, alike, weighted = make_optimizer(), make_optimizer(), make_optimizer()
    update_by_hand(by_hand, batches([6, 6, 1]))
    update_with_window(alike, batches([6, 6, 1]), weigh=lambda x: 1)
    update_with_window(weighted, batches([6, 6, 1]))
    assert_same_parameters(alike.target, by_hand.target)
    with pytest.raises(AssertionError):
        assert_same_parameters(weighted.target, by_hand.target, tolerance=1e-4)


class EveryFourth(StandardUpdater):
    """As in the page."""

    def update_core(self):
        optimizer = self.get_optimizer("main")
        batch = self.converter(self.get_iterator("main").next(), self.device)
        if self.iteration == 0:
            optimizer.target.cleargrads()
        optimizer.target(*batch).backward()
        if (self.iteration + 1) % 4 == 0:
            optimizer.update()
            optimizer.target.cleargrads()


def test_an_update_at_each_fourth_call_is_a_window_of_sums_and_counts_four_iterations():
    by_hand = EveryFourth(serial(make_dataset(), 5), make_optimizer())
    actual = chainer_accum.AccumulatingUpdater(
        serial(make_dataset(), 5), make_optimizer(), accumulation_steps=4, loss_reduction="sum"
    )
    run(by_hand, 12)
    run(actual, 3)
    assert (by_hand.iteration, actual.iteration) == (12, 3)
    assert_same_parameters(actual.get_optimizer("main").target, by_hand.get_optimizer("main").target)


class BatchesOfBatches(StandardUpdater):
    """Accumulates as ESPnet's updater does: batches are lists of one minibatch, and ``iteration`` counts updates."""

    def __init__(self, *args, steps, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = steps
        self.calls = 0

    def update(self):
        self.update_core()
        if self.calls % self.steps == 0:
            self.iteration += 1

    def update_core(self):
        optimizer = self.get_optimizer("main")
        arrays = self.converter(self.get_iterator("main").next(), self.device)
        if self.calls == 0:
            optimizer.target.cleargrads()
        (optimizer.target(*arrays) / self.steps).backward()
        self.calls += 1
        if self.calls % self.steps == 0:
            optimizer.update()
            optimizer.target.cleargrads()


def test_batches_of_batches_count_alike_and_are_clipped_together():
    def set_up(updater_class, **kwargs):
        data = make_dataset()
        minibatches = [data[:9], data[9:12], data[12:20], data[20:22], data[22:30]]
        optimizer = make_optimizer()
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.1))
        return updater_class(
            serial(minibatches, 1),
            optimizer,
            converter=lambda batch, device: chainer.dataset.concat_examples(batch[0], device),
            **kwargs,
        )

    by_hand = set_up(BatchesOfBatches, steps=2)
    actual = set_up(chainer_accum.AccumulatingUpdater, accumulation_steps=2)
    run(by_hand, 12)
    run(actual, 6)
    assert by_hand.iteration == actual.iteration == 6
    assert (by_hand.get_optimizer("main").epoch, actual.get_optimizer("main").epoch) == (0, 2)
    assert_same_parameters(actual.get_optimizer("main").target, by_hand.get_optimizer("main").target)


def make_networks():
    names = ("enc", "dec", "dis")
    links = [L.Linear(5, 4), L.Linear(4, 5), L.Linear(10, 1)]
    return {name: optimizers.SGD(0.1).setup(link) for name, link in zip(names, links)}


def update_encoder_decoder_discriminator(optimizer, x):
    """Updates three networks in the order of Chainer's pix2pix: the graph is cut behind each before the next goes."""
    enc, dec, dis = (optimizer[name].target for name in ("enc", "dec", "dis"))
    z = F.tanh(enc(x))
    out = F.tanh(dec(z))
    fake, real = dis(F.concat([x, out])), dis(F.concat([x, x]))
    optimizer["enc"].update(lambda: F.mean(F.softplus(-fake)) + F.mean_squared_error(out, x))
    z.unchain_backward()
    optimizer["dec"].update(lambda: F.mean(F.softplus(-fake)) + F.mean_squared_error(out, x))
    out.unchain_backward()
    optimizer["dis"].update(lambda: F.mean(F.softplus(fake)) + F.mean(F.softplus(-real)))


def update_discriminator_first(optimizer, x):
    """Updates two networks in the order of Chainer's DCGAN: the generator's loss goes back through what was updated."""
    dec, dis = (optimizer[name].target for name in ("dec", "dis"))
    out = F.tanh(dec(x[:, :4]))
    fake, real = dis(F.concat([x, out])), dis(F.concat([x, x]))
    optimizer["dis"].update(lambda: F.mean(F.softplus(fake)) + F.mean(F.softplus(-real)))
    optimizer["dec"].update(lambda: F.mean(F.softplus(-fake)))


def train_both_ways(update):
    """Returns the networks after large batches, and after windows of micro-batches."""
    x, _ = chainer.dataset.concat_examples(make_dataset(32))
    numpy.random.seed(0)
    whole = make_networks()
    numpy.random.seed(0)
    wrapped = {
        name: chainer_accum.create_accumulating_optimizer(optimizer, 4) for name, optimizer in make_networks().items()
    }
    for start in range(0, 32, 8):
        update(whole, x[start : start + 8])
    for start in range(0, 32, 2):
        update(wrapped, x[start : start + 2])
    return [optimizer.target for optimizer in whole.values()], [optimizer.target for optimizer in wrapped.values()]


def test_networks_that_are_updated_behind_one_another_are_those_of_the_large_batch():
    for expected, actual in zip(*train_both_ways(update_encoder_decoder_discriminator)):
        assert_same_parameters(actual, expected)


def test_a_backward_pass_through_what_was_updated_is_not_that_of_the_large_batch():
    whole, wrapped = train_both_ways(update_discriminator_first)
    assert_same_parameters(wrapped[2], whole[2], tolerance=1e-2)
    with pytest.raises(AssertionError):
        assert_same_parameters(wrapped[1], whole[1], tolerance=1e-5)


def test_parallel_updater_adds_gradients_so_it_is_a_window_of_sums():
    def set_up(updater_class, **kwargs):
        numpy.random.seed(0)
        optimizer = optimizers.MomentumSGD(0.1).setup(L.Classifier(L.Linear(5, 3)))
        return updater_class(serial(make_dataset(48), 12), optimizer, **kwargs)

    cpu = chainer.get_device("@numpy")
    parallel = set_up(ParallelUpdater, devices={"main": cpu, "second": cpu})
    actual = set_up(chainer_accum.AccumulatingUpdater, micro_batch_size=6, loss_reduction="sum")
    for _ in range(6):
        parallel.update()
        actual.update()
    assert (parallel.iteration, parallel.epoch) == (actual.iteration, actual.epoch)
    assert_same_parameters(actual.get_optimizer("main").target, parallel.get_optimizer("main").target)
