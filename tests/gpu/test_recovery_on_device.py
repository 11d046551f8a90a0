"""What is broken, does not fit or is interrupted on a device is recovered from as on the host.

Without a device these tests are skipped.
"""

from __future__ import annotations

import warnings

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.backends import cuda
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions.gradient_noise_scale import estimate
from chainer_accum.state.random_state import RandomState

from helpers import assert_same_parameters, has_gpu, make_dataset, make_model, make_updater, run, serial

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs CuPy and a GPU")

DEVICE = "@cupy:0"


def to_host(updater):
    model = updater.get_optimizer("main").target
    model.to_cpu()
    return model


def make_wide_model():
    rngs = [numpy.random.RandomState(seed) for seed in range(2)]
    first, last = (chainer.initializers.LeCunNormal(rng=rng) for rng in rngs)
    return L.Classifier(
        chainer.Sequential(L.Linear(64, 8192, initialW=first), F.tanh, L.Linear(8192, 10, initialW=last))
    )


def test_a_window_that_exceeds_the_limit_of_the_memory_pool_begins_again():
    data = make_dataset(4096, 64, 10)
    expected = make_updater(
        AccumulatingUpdater,
        serial(data, 4096),
        optimizers.SGD(0.1),
        make_wide_model(),
        device=DEVICE,
        micro_batch_size=128,
    )
    run(expected, 2)
    expected_model = to_host(expected)
    pool = cuda.memory_pool
    pool.free_all_blocks()
    updater = make_updater(
        AccumulatingUpdater,
        serial(data, 4096),
        optimizers.SGD(0.1),
        make_wide_model(),
        device=DEVICE,
        micro_batch_size=4096,
    )
    limit = pool.get_limit()
    pool.set_limit(size=pool.total_bytes() + 64 * 2**20)  # the graph of all examples takes 256 MiB and more
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(updater, 2)
    finally:
        pool.set_limit(size=limit)
    assert "memory ran out for a micro-batch of 4096 examples" in str(caught[0].message)
    assert updater.micro_batch_size < 4096
    assert_same_parameters(to_host(updater), expected_model, 1e-4)


def test_the_fastest_size_is_found_within_the_memory_pool():
    updater = make_updater(
        AccumulatingUpdater,
        serial(make_dataset(1024, 64, 10), 1024),
        optimizers.SGD(),
        make_wide_model(),
        device=DEVICE,
        micro_batch_size="auto",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        steps = run(updater, 30)
    assert updater.micro_batch_size == min(updater.micro_batch_timings, key=updater.micro_batch_timings.get)
    assert "seconds_per_example" not in steps[-1].observation


def test_a_micro_batch_that_is_not_finite_is_skipped():
    data = make_dataset(12)
    broken = [(x * numpy.float32("nan") if i in (4, 7) else x, t) for i, (x, t) in enumerate(data)]
    updater = make_updater(
        AccumulatingUpdater, serial(broken, 12), optimizers.SGD(), device=DEVICE, micro_batch_size=4, nonfinite="skip"
    )
    (step,) = run(updater, 1)
    assert step.observation["skipped_micro_batches"] == 1
    expected = optimizers.SGD().setup(make_model())
    expected.update(expected.target, *chainer.dataset.concat_examples(data[:4] + data[8:]))
    assert_same_parameters(to_host(updater), expected.target, 1e-5)


@pytest.mark.parametrize("make_link", [lambda: L.BatchNormalization(5), lambda: L.BatchRenormalization(5, 2.0, 1.0)])
def test_running_averages_move_once_per_window(make_link):
    models = []
    for updater_class, kwargs in (
        (StandardUpdater, {}),
        (AccumulatingUpdater, {"micro_batch_size": 5, "running_statistics": "update"}),
    ):
        model = make_model()
        model.predictor.insert(0, make_link())
        updater = make_updater(
            updater_class, serial(make_dataset(), 24), optimizers.SGD(0.0), model, device=DEVICE, **kwargs
        )
        run(updater, 3)
        models.append(to_host(updater))
    for name in ("avg_mean", "avg_var"):
        actual, expected = (getattr(model.predictor[0], name) for model in reversed(models))
        numpy.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_norms_of_gradients_are_those_of_the_host():
    estimates = []
    for device in ("@numpy", DEVICE):
        updater = make_updater(
            AccumulatingUpdater, serial(make_dataset(), 24), optimizers.SGD(), device=device, micro_batch_size=5
        )
        updater.gradient_norm_interval = 1
        run(updater, 1)
        estimates.append(estimate(updater.gradient_norms))
    numpy.testing.assert_allclose(*estimates, rtol=1e-3)


def test_cupys_generator_goes_back_to_where_it_was_sent_from():
    state = RandomState([chainer.get_device(DEVICE)])
    expected = cuda.cupy.random.rand(5).get()
    for _ in range(2):
        state.restore()
        numpy.testing.assert_array_equal(cuda.cupy.random.rand(5).get(), expected)


def test_float32_parameters_survive_a_snapshot(tmp_path):
    def make():
        with chainer.using_config("dtype", numpy.float16):
            model = L.Classifier(L.Linear(5, 3, initialW=0))
        optimizer = optimizers.MomentumSGD()
        optimizer.use_fp32_update()
        data = [(x.astype("e"), t) for x, t in make_dataset()]
        updater = make_updater(
            AccumulatingUpdater, serial(data, 24), optimizer, model, device=DEVICE, micro_batch_size=7
        )
        optimizer.loss_scaling(interval=2)
        return updater

    expected, updater = make(), make()
    run(expected, 3)
    save_npz(str(tmp_path / "updater.npz"), expected)
    load_npz(str(tmp_path / "updater.npz"), updater)
    for each in (expected, updater):
        run(each, 3)
    assert updater.get_optimizer("main")._loss_scale == expected.get_optimizer("main")._loss_scale
    assert_same_parameters(to_host(updater), to_host(expected), 0)


def test_cached_gradients_make_the_step_of_the_whole_batch_with_dropout_replayed():
    def compare(z, t):
        return F.softmax_cross_entropy(F.matmul(z, z, transb=True), chainer.get_device(DEVICE).xp.arange(len(z)))

    def train(updater_class, make_kwargs):
        model = make_model()
        updater = make_updater(
            updater_class, serial(make_dataset(), 24), optimizers.SGD(0.1), model, device=DEVICE, **make_kwargs(model)
        )
        cuda.cupy.random.seed(0)
        with chainer.using_config("use_cudnn", "never"):
            run(updater, 2)
        return to_host(updater)

    def encode(model, x):
        return F.dropout(model.predictor(x))

    def loss_of_all_parts(model):  # drawing for parts of six, as the micro-batches do
        return lambda x, t: compare(F.concat([encode(model, x[i : i + 6]) for i in range(0, 24, 6)], axis=0), t)

    actual = train(
        chainer_accum.CachedGradientUpdater,
        lambda model: {"encoder": lambda x, t: (encode(model, x), t), "loss_func": compare, "micro_batch_size": 7},
    )
    expected = train(StandardUpdater, lambda model: {"loss_func": loss_of_all_parts(model)})
    assert_same_parameters(actual, expected, 1e-5)
