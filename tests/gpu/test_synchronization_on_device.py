"""No pass of a window waits for the device.

CuPy can be told to raise where the host waits for a value: as an array is copied to the host, which includes ``float``,
``bool`` and the like, and as a device is synchronized. What it does not see is waiting that goes past it; nothing here
does. Without a device these tests are skipped.
"""

from __future__ import annotations

import contextlib
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

from helpers import has_gpu, make_dataset, make_model, make_updater, run, serial

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs CuPy and a GPU")

DEVICE = "@cupy:0"


@contextlib.contextmanager
def no_waiting():
    """Returns a context that raises where the host waits for the device."""
    import cupyx

    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that it cannot see all
            stack.enter_context(cupyx.allow_synchronize(False))
        yield


def waits():
    import cupyx

    return pytest.raises(cupyx.DeviceSynchronized)


@pytest.mark.parametrize(
    "read",
    [
        float,
        int,
        bool,
        cuda.to_cpu,
        lambda array: array.item(),
        lambda array: array.tolist(),
        lambda array: array.get(),
        lambda array: array.device.synchronize(),
    ],
)
def test_what_waits_is_found_out(read):
    array = cuda.cupy.ones((), "f")
    with no_waiting(), waits():
        read(array)
    read(array)


WAYS = {
    "gathered": {"accumulation_steps": 4},
    "split": {"micro_batch_size": 5},
    "gathered and split": {"accumulation_steps": 3, "micro_batch_size": 3},
    "weighted": {"accumulation_steps": 4, "weight_func": lambda batch: float(len(batch))},
    "summed": {"accumulation_steps": 4, "loss_reduction": "sum", "observation_rules": {"main/loss": "sum"}},
    "repeatable": {"accumulation_steps": 4, "split_when_out_of_memory": True},
    "prefetched": {"accumulation_steps": 4, "prefetch": True},
    "with running statistics": {"accumulation_steps": 4, "running_statistics": "update"},
    "with a loss scale": {"accumulation_steps": 4, "loss_scale": 128.0},
}


class Normalized(chainer.Chain):
    """A convolutional network with batch normalization, which reports."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(1, 4, 3, pad=1)
            self.norm = L.BatchNormalization(4)
            self.last = L.Linear(20, 3)

    def forward(self, x, t):
        h = F.relu(self.norm(self.conv(x[:, None, None])))
        loss = F.softmax_cross_entropy(self.last(h), t)
        chainer.report({"loss": loss, "accuracy": F.accuracy(self.last(h), t)}, self)
        return loss


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("make", [make_model, Normalized])
def test_an_update_waits_for_nothing(way, make):
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(40), 10), optimizers.Adam(), make(), device=DEVICE, **WAYS[way]
    )
    run(updater, 1)  # which compiles kernels, and shapes what takes its shape from its first input
    with no_waiting():
        run(updater, 2)


def test_measuring_the_norms_of_gradients_waits_for_nothing():
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(), 5), optimizers.SGD(), device=DEVICE, accumulation_steps=3
    )
    updater.gradient_norm_interval = 1
    run(updater, 1)
    with no_waiting():
        run(updater, 1)
    assert len(updater.gradient_norms.micro_batches) == 3


@pytest.mark.parametrize("by_gradients", [False, True])
def test_an_accumulating_optimizer_waits_for_nothing(by_gradients):
    optimizer = chainer_accum.create_accumulating_optimizer(optimizers.Adam(), 3).setup(make_model())
    model = optimizer.target
    model.to_device(DEVICE)
    x, t = chainer.dataset.concat_examples(make_dataset(6), DEVICE)

    def update():
        if by_gradients:
            loss = model(x, t)
            model.cleargrads()
            loss.backward()
            optimizer.update(weight=6)
        else:
            optimizer.update(model, x, t, weight=6)

    for _ in range(3):
        update()
    with no_waiting():
        for _ in range(6):
            update()
    assert optimizer.t == 3


def test_looking_for_values_that_are_not_finite_waits():
    updater = make_updater(
        AccumulatingUpdater, serial(make_dataset(), 12), optimizers.SGD(), device=DEVICE, micro_batch_size=4,
        nonfinite="skip",
    )  # fmt: skip
    with no_waiting(), waits():
        run(updater, 1)


def test_a_weight_on_the_device_is_waited_for_and_one_on_the_host_is_not():
    model = make_model()
    model.to_device(DEVICE)
    optimizer = optimizers.SGD().setup(model)
    x, t = chainer.dataset.concat_examples(make_dataset(6), DEVICE)
    with chainer_accum.accumulate(optimizer) as window:
        window.add(model, x, t, weight=6)
        with no_waiting():
            window.add(model, x, t, weight=numpy.float32(6))
            with waits():
                window.add(model, x, t, weight=(t >= 0).sum())
