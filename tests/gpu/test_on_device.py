"""What the other tests assert on NumPy arrays holds on CuPy arrays, too.

Without a device these tests are skipped.
"""

from __future__ import annotations

import chainer_accum  # noqa: F401
import chainer
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.training.updaters import StandardUpdater

from conftest import assert_same_parameters, assert_same_steps, make_dataset, make_model, make_updater, run, serial

pytestmark = pytest.mark.skipif(not chainer.backends.cuda.available, reason="needs CuPy and a GPU")

WAYS = {
    "gathered": (6, {"accumulation_steps": 4}),
    "split": (24, {"micro_batch_size": 7}),
    "gathered and split": (8, {"accumulation_steps": 3, "micro_batch_size": 3}),
}
each_way = pytest.mark.parametrize("way", sorted(WAYS))


def to_host(updater, steps):
    """Sends what is to be compared to the host."""
    updater.get_optimizer("main").target.to_cpu()
    for step in steps:
        for key, value in step.observation.items():
            assert isinstance(chainer.as_array(value), chainer.backends.cuda.ndarray), key
            step.observation[key] = chainer.backends.cuda.to_cpu(chainer.as_array(value))
    return updater.get_optimizer("main").target, steps


@each_way
@pytest.mark.parametrize("make_optimizer", [lambda: optimizers.MomentumSGD(0.1), lambda: optimizers.Adam(eps=1e-4)])
def test_one_update_makes_the_step_of_the_whole_batch(way, make_optimizer):
    batch_size, kwargs = WAYS[way]
    expected = make_updater(StandardUpdater, serial(make_dataset(), 24), make_optimizer(), device="@cupy:0")
    actual = make_updater(
        AccumulatingUpdater, serial(make_dataset(), batch_size), make_optimizer(), device="@cupy:0", **kwargs
    )
    expected_model, expected_steps = to_host(expected, run(expected, 6))
    model, steps = to_host(actual, run(actual, 6))
    assert_same_parameters(model, expected_model, 1e-5)
    assert_same_steps(steps, expected_steps)


@each_way
def test_device_and_host_agree(way):
    batch_size, kwargs = WAYS[way]
    updaters = [
        make_updater(
            AccumulatingUpdater, serial(make_dataset(), batch_size), optimizers.SGD(0.1), device=device, **kwargs
        )
        for device in ("@numpy", "@cupy:0")
    ]
    for updater in updaters:
        run(updater, 6)
    models = [updater.get_optimizer("main").target for updater in updaters]
    models[1].to_cpu()
    assert_same_parameters(models[1], models[0], 1e-5)


def test_an_overflow_in_float16_skips_the_update_and_lowers_the_scale():
    with chainer.using_config("dtype", numpy.float16):
        model = make_model()
        model(numpy.zeros((1, 5), "e"), numpy.zeros(1, "i"))
    dataset = [(x.astype("e"), t) for x, t in make_dataset()]
    updater = make_updater(
        AccumulatingUpdater, serial(dataset, 6), optimizers.SGD(0.1), model, device="@cupy:0", accumulation_steps=4
    )
    optimizer = updater.get_optimizer("main")
    optimizer.loss_scaling()
    optimizer._loss_scale = 2.0**40  # more than float16 holds
    before = optimizer.target.copy(mode="copy")
    with pytest.warns(UserWarning, match="Non finite number found"):
        run(updater, 1)
    assert optimizer._loss_scale < 2.0**40
    for param, old in zip(optimizer.target.params(), before.params()):
        assert (param.array == old.array).all()


def test_the_memory_pool_does_not_grow_with_k():
    pool = chainer.backends.cuda.memory_pool
    totals = []
    for k in (1, 16):
        pool.free_all_blocks()
        before = pool.total_bytes()
        model = L.Classifier(chainer.Sequential(L.Linear(100, 1000), chainer.functions.relu, L.Linear(1000, 10)))
        iterator = serial(make_dataset(512 * 16, 100, 10), 512)
        updater = make_updater(
            AccumulatingUpdater, iterator, optimizers.SGD(), model, device="@cupy:0", accumulation_steps=k
        )
        run(updater, 2)
        totals.append(pool.total_bytes() - before)
        del model, updater
    assert totals[1] <= 1.1 * totals[0]
