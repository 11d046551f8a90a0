"""Training on a device: each way to accumulate, half precision, memory, and matrix products that are added to a sum.

With --device=@cupy:0, most of the tests of the host run on a device as well. These are the others: they compare with
the host, or look at what only a device has. Without a device they are skipped.
"""

from __future__ import annotations

import importlib

import chainer_accum
import chainer
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.training.updaters import StandardUpdater
from chainer_accum.window.blas import add_matrix_product

from helpers import (
    assert_same_parameters,
    assert_same_steps,
    has_gpu,
    make_dataset,
    make_model,
    make_updater,
    run,
    serial,
)

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs CuPy and a GPU")

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


def make_on_device(size=24):
    """Returns a model, and the arrays of examples."""
    model = make_model()
    model.to_device("@cupy:0")
    return model, chainer.dataset.concat_examples(make_dataset(size), "@cupy:0")


def train_by_block(optimizer, parts):
    with chainer_accum.accumulate(optimizer) as window:
        for x, t in parts:
            window.add(optimizer.target, x, t, weight=len(x))


def train_by_calls(optimizer, parts):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizer, len(parts))
    for x, t in parts:
        optimizer.update(optimizer.target, x, t, weight=len(x))


def train_with_gradients(optimizer, parts):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizer, len(parts))
    for x, t in parts:
        loss = optimizer.target(x, t)
        optimizer.target.cleargrads()
        loss.backward()
        optimizer.update(weight=len(x))


@pytest.mark.parametrize("train", [train_by_block, train_by_calls, train_with_gradients])
def test_loops_of_ones_own_make_the_step_of_the_whole_batch(train):
    models = []
    for sizes in ([24], [7, 7, 7, 3]):
        model, (x, t) = make_on_device()
        optimizer = optimizers.Adam(eps=1e-4).setup(model)
        ends = numpy.cumsum(sizes).tolist()
        for _ in range(3):
            parts = [(x[end - size : end], t[end - size : end]) for size, end in zip(sizes, ends)]
            if len(sizes) == 1:
                optimizer.update(model, x, t)
            else:
                train(optimizer, parts)
        assert optimizer.t == 3
        model.to_cpu()
        models.append(model)
    assert_same_parameters(models[1], models[0], 1e-5)


LAYOUTS = {
    "rows": lambda array: array,
    "columns": lambda array: chainer.backends.cuda.cupy.asfortranarray(array),
    "every second row": lambda array: chainer.backends.cuda.cupy.repeat(array, 2, axis=0)[::2],
    "one row": lambda array: chainer.backends.cuda.cupy.broadcast_to(array[:1], array.shape),
}


@pytest.mark.parametrize("a_layout", sorted(LAYOUTS))
@pytest.mark.parametrize("b_layout", sorted(LAYOUTS))
@pytest.mark.parametrize("dtype, calls", [("f", 1), ("d", 1), ("e", 0)])
def test_a_matrix_product_is_added_in_place(monkeypatch, dtype, calls, a_layout, b_layout):
    cublas = importlib.import_module("cupy.cublas")
    made = []
    gemm = cublas.gemm
    monkeypatch.setattr(cublas, "gemm", lambda *args, **kwargs: made.append(args) or gemm(*args, **kwargs))
    random = numpy.random.RandomState(0)
    xp = chainer.backends.cuda.cupy
    a, b = (xp.asarray(random.standard_normal(shape).astype(dtype)) for shape in ((7, 30), (7, 20)))
    a, b = LAYOUTS[a_layout](a), LAYOUTS[b_layout](b)
    total = xp.asarray(random.standard_normal((30, 20)).astype("d" if dtype == "d" else "f"))
    expected = total.get().astype("d") + a.get().astype("d").T.dot(b.get().astype("d"))
    array = total
    add_matrix_product(total, a, b)
    assert total is array
    numpy.testing.assert_allclose(total.get(), expected, **({"atol": 2e-2} if dtype == "e" else {"atol": 1e-5}))
    assert len(made) == calls


def test_the_product_of_no_rows_adds_nothing():
    xp = chainer.backends.cuda.cupy
    total = xp.ones((30, 20), "f")
    add_matrix_product(total, xp.ones((0, 30), "f"), xp.ones((0, 20), "f"))
    assert (total.get() == 1).all()


def test_the_matrix_product_adds_to_the_sums_of_linear_layers(monkeypatch):
    cublas = importlib.import_module("cupy.cublas")
    shapes = []
    gemm = cublas.gemm
    monkeypatch.setattr(
        cublas, "gemm", lambda *args, **kwargs: shapes.append(kwargs["out"].shape) or gemm(*args, **kwargs)
    )
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(), 6), optimizers.SGD(), device="@cupy:0", accumulation_steps=4
    )
    run(updater, 1)
    assert sorted(shapes) == [(3, 8)] * 3 + [(8, 5)] * 3  # the first of each is what the others are added to
