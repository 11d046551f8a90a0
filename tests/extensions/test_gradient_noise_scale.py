"""The noise scale that is estimated from micro-batches is the one that the model has."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.serializers import load_npz, save_npz
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import GradientNoiseScale
from chainer_accum.extensions.gradient_noise_scale import estimate
from chainer_accum.window.gradient_norms import GradientNorms

from helpers import assert_same_parameters, make_dataset, make_model, make_updater, run, serial

DIMENSIONS = 8
NOISE = 1.5
WINDOWS = 200


class Regression(chainer.Chain):
    """Linear regression whose true parameters are zero, at parameters of one."""

    def __init__(self, dtype=numpy.float32):
        super().__init__()
        with self.init_scope(), chainer.using_config("dtype", dtype):
            self.linear = L.Linear(DIMENSIONS, 1, nobias=True, initialW=1.0)

    def forward(self, x, t):
        losses = F.squared_error(F.cast(self.linear(x), numpy.float32)[:, 0], t) / 2
        return F.mean(losses) if self.is_mean else F.sum(losses)

    is_mean = True


def make_regression_data(size):
    """Returns examples of standard normal inputs, with targets that are noise alone."""
    random = numpy.random.RandomState(0)
    inputs = random.standard_normal((size, DIMENSIONS)).astype(numpy.float32)
    return list(zip(inputs, (NOISE * random.standard_normal(size)).astype(numpy.float32)))


# The gradient of an example is x (x·w - e) with w = 1: its mean is w, and E|x|²(x·w)² = (d + 2)|w|².
TRUE_SIGNAL = float(DIMENSIONS)
TRUE_NOISE = (DIMENSIONS + 1) * DIMENSIONS + NOISE**2 * DIMENSIONS


def estimates_of(updater, windows):
    updater.gradient_norm_interval = 1
    estimates = []
    for _ in range(windows):
        updater.update()
        estimates.append(estimate(updater.gradient_norms))
    return numpy.array(estimates)


WAYS = {
    "equal micro-batches": {"micro_batch_size": 8},
    "unequal ones": {"micro_batch_size": 9, "weight_func": len},
    "gathered": {"accumulation_steps": 3, "micro_batch_size": 16},
    "sums": {"micro_batch_size": 9, "loss_reduction": "sum"},
}


@pytest.mark.parametrize("way, scaling", [*((way, None) for way in WAYS), ("unequal ones", "dynamic"), ("sums", 64.0)])
def test_the_estimates_are_without_bias(way, scaling):
    model = Regression()
    model.is_mean = way != "sums"
    optimizer = chainer.optimizers.SGD(0.0)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(make_regression_data(WINDOWS * 40), 40), optimizer, model, **WAYS[way]
    )
    if scaling == "dynamic":
        optimizer.loss_scaling(interval=10)
    elif scaling:
        optimizer.loss_scaling(scale=scaling)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(10.0))  # which is no part of the gradient of the loss
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1e-3))
    estimates = estimates_of(updater, WINDOWS // updater.accumulation_steps)
    errors = estimates.std(axis=0, ddof=1) / len(estimates) ** 0.5
    noise, signal = estimates.mean(axis=0)
    assert errors[0] < 0.07 * TRUE_NOISE and errors[1] < 0.11 * TRUE_SIGNAL  # so that what follows says something
    assert abs(noise - TRUE_NOISE) < 4 * errors[0]
    assert abs(signal - TRUE_SIGNAL) < 4 * errors[1]


def test_unequal_micro_batches_are_what_the_formula_is_for():
    norms = GradientNorms()
    for size, value in ((4, 3.0), (2, 5.0)):
        norms.add([numpy.full(2, value, "f")], 1.0, size)
    norms.set_window([numpy.full(2, 11 / 3, "f")], 1.0)
    noise, signal = estimate(norms)
    window = 2 * (11 / 3) ** 2
    assert noise == pytest.approx(((18 + 50) / 2 - window) / ((1 / 4 + 1 / 2) / 2 - 1 / 6), rel=1e-6)
    assert signal == pytest.approx(window - noise / 6, rel=1e-6)


def train(updates, interval=1, steps=4, updater_class=chainer_accum.AccumulatingUpdater, out="result", **kwargs):
    extension = GradientNoiseScale(interval, **kwargs)
    numbers = {} if updater_class is StandardUpdater else {"accumulation_steps": steps}
    updater = make_updater(
        updater_class, serial(make_regression_data(2000), 2), chainer.optimizers.SGD(0.0), Regression(), **numbers
    )
    trainer = Trainer(updater, (updates, "iteration"), out=str(out))
    trainer.extend(extension)
    reports = []
    trainer.extend(lambda trainer: reports.append(dict(trainer.observation)), name="reports", trigger=(1, "iteration"))
    trainer.run()
    return trainer, extension, reports


def test_the_smoothed_ratio_is_reported_with_the_steps_that_it_suggests(tmp_path):
    _, extension, reports = train(150, smoothing=0.99, out=tmp_path)
    true = TRUE_NOISE / TRUE_SIGNAL
    assert extension.noise_scale == pytest.approx(true, rel=0.3)
    assert reports[-1]["noise_scale"] == extension.noise_scale
    assert reports[-1]["suggested_accumulation_steps"] == max(1, round(extension.noise_scale / 2))


def test_in_between_nothing_is_measured_and_nothing_reported(tmp_path):
    trainer, _, reports = train(12, interval=5, out=tmp_path)
    assert ["noise_scale" in report for report in reports] == [i in (5, 10) for i in range(1, 13)]
    assert trainer.updater.gradient_norms is None


def test_an_update_without_accumulation_leaves_no_norms_of_the_one_before():
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(make_dataset(), 6), chainer.optimizers.SGD(), accumulation_steps=2
    )
    updater.gradient_norm_interval = 1
    run(updater, 1)
    assert len(updater.gradient_norms.micro_batches) == 2
    updater.accumulation_steps = 1
    run(updater, 1)
    assert updater.gradient_norms is None


def test_a_single_micro_batch_tells_nothing(tmp_path):
    _, extension, reports = train(3, steps=1, out=tmp_path)
    assert extension.noise_scale is None
    assert ["noise_scale" in report for report in reports] == [False] * 3


def test_to_measure_changes_no_update():
    models = []
    for interval in (None, 1, 2):
        updater = make_updater(
            chainer_accum.AccumulatingUpdater, serial(make_dataset(), 20), chainer.optimizers.Adam(), micro_batch_size=6
        )
        updater.gradient_norm_interval = interval
        run(updater, 4)
        models.append(updater.get_optimizer("main").target)
    for model in models[1:]:
        assert_same_parameters(model, models[0])


def test_what_is_skipped_or_run_again_is_not_part_of_it():
    class Fragile(L.Classifier):
        def forward(self, x, t):
            if len(x) > 5:
                raise MemoryError("no room")
            return super().forward(x, t)

    data = make_dataset(20)
    data[0] = (data[0][0] * numpy.nan, data[0][1])
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(data, 20),
        chainer.optimizers.SGD(),
        Fragile(make_model().predictor),
        micro_batch_size=10,
        nonfinite="skip",
    )
    updater.gradient_norm_interval = 1
    with pytest.warns(RuntimeWarning, match="memory ran out"), numpy.errstate(invalid="ignore"):
        run(updater, 1)
    assert updater.gradient_norms.weights == [5.0, 5.0, 5.0]
    assert [bool(numpy.isfinite(norm)) for norm in updater.gradient_norms.micro_batches] == [True] * 3


def test_the_accumulation_steps_grow_up_to_a_limit_and_never_shrink(tmp_path):
    trainer, _, _ = train(60, steps=2, adapt_up_to=64, smoothing=0.9, out=tmp_path)
    assert 2 < trainer.updater.accumulation_steps < 64  # the true one is of six batches, and an estimate is noisy
    trainer, _, _ = train(60, steps=2, adapt_up_to=3, smoothing=0.9, out=tmp_path)
    assert trainer.updater.accumulation_steps == 3
    trainer, _, _ = train(60, steps=50, adapt_up_to=60, smoothing=0.9, out=tmp_path)
    assert trainer.updater.accumulation_steps == 50


def test_a_noise_that_is_estimated_below_zero_is_none(tmp_path):
    trainer, _, _ = train(1, out=tmp_path)
    trainer.updater.gradient_norms = norms = GradientNorms()
    norms.weights, norms.micro_batches, norms.window = [1.0, 1.0], [1.0, 1.0], 1.5
    assert estimate(norms) == (-1.0, 2.0)
    extension = GradientNoiseScale(1)
    observation = {}
    with chainer.Reporter().scope(observation):
        extension(trainer)
    assert extension.noise_scale == 0
    assert observation == {"noise_scale": 0, "suggested_accumulation_steps": 1}


def test_a_batch_that_is_split_can_grow(tmp_path):
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(make_dataset(), 6), chainer.optimizers.SGD(), micro_batch_size=3
    )
    GradientNoiseScale(adapt_up_to=4).initialize(Trainer(updater, (1, "iteration"), out=str(tmp_path)))
    assert updater.gradient_norm_interval == 10


def test_the_accumulation_steps_double_at_most_for_the_first_estimates_are_noisy(tmp_path):
    extension = GradientNoiseScale(1, 0.9, 64)
    trainer, _, _ = train(1, steps=2, out=tmp_path)
    trainer.updater.gradient_norms = norms = GradientNorms()
    norms.weights, norms.micro_batches, norms.window = [1.0, 1.0], [1000.0, 1000.0], 501.0  # a noise scale of 499
    steps = []
    for _ in range(6):
        with chainer.Reporter().scope({}):
            extension(trainer)
        steps.append(trainer.updater.accumulation_steps)
    assert steps == [4, 8, 16, 32, 64, 64]


def test_a_resumed_run_goes_on_with_the_estimate_and_the_steps(tmp_path):
    trainer, extension, _ = train(30, steps=2, adapt_up_to=64, smoothing=0.9, out=tmp_path)
    save_npz(str(tmp_path / "trainer.npz"), extension)
    resumed = GradientNoiseScale(1, 0.9, 64)
    load_npz(str(tmp_path / "trainer.npz"), resumed)
    assert resumed.noise_scale == extension.noise_scale
    fresh = make_updater(
        chainer_accum.AccumulatingUpdater, serial(make_dataset(), 10), chainer.optimizers.SGD(), accumulation_steps=2
    )
    resumed.initialize(Trainer(fresh, (1, "iteration")))
    assert fresh.accumulation_steps == trainer.updater.accumulation_steps > 2


def test_a_snapshot_without_it_can_be_loaded(tmp_path):
    numpy.savez(str(tmp_path / "empty.npz"), nothing=0)
    extension = GradientNoiseScale()
    load_npz(str(tmp_path / "empty.npz"), extension)
    assert extension.noise_scale is None


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"interval": 0}, ValueError, "interval must be an int of 1 or more, got 0; use 1 to measure every update"),
        ({"smoothing": 1.0}, ValueError, "smoothing must be a number from 0 to less than 1, got 1.0"),
        ({"smoothing": "a"}, TypeError, "smoothing must be a number from 0 to less than 1, got 'a'"),
        ({"adapt_up_to": 1}, ValueError, "adapt_up_to must be an int of 2 or more, got 1; use None"),
    ],
)
def test_bad_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        GradientNoiseScale(**kwargs)


def test_another_updater_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be able to accumulate gradients, got StandardUpdater; use chainer_accum"):
        train(1, updater_class=StandardUpdater, out=tmp_path)


@pytest.mark.filterwarnings("ignore:(Non finite|invalid value|overflow)")
def test_norms_that_are_not_finite_are_passed_over(tmp_path):
    data = [(x.astype("e"), t) for x, t in make_regression_data(200)]
    optimizer = chainer.optimizers.SGD(0.0)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater, serial(data, 2), optimizer, Regression(numpy.float16), accumulation_steps=4
    )
    optimizer.loss_scaling()
    optimizer._loss_scale = 2.0**18  # too large for float16
    extension = GradientNoiseScale(1)
    trainer = Trainer(updater, (20, "iteration"), out=str(tmp_path))
    trainer.extend(extension)
    trainer.run()
    assert optimizer._loss_scale < 2.0**18
    assert numpy.isfinite(extension._noise.value) and extension._noise.value > 0


def test_updaters_that_cannot_measure_or_cannot_adapt_are_refused(tmp_path):
    optimizer = chainer.optimizers.SGD().setup(make_model())
    cached = chainer_accum.CachedGradientUpdater(serial(make_dataset(), 6), optimizer, loss_func=F.sum)
    with pytest.raises(TypeError, match="must be able to accumulate gradients, got CachedGradientUpdater"):
        GradientNoiseScale().initialize(Trainer(cached, (1, "iteration"), out=str(tmp_path)))
    for steps in (1, lambda updater: 1):
        single = chainer_accum.AccumulatingUpdater(serial(make_dataset(), 6), optimizer, accumulation_steps=steps)
        trainer = Trainer(single, (2, "iteration"), out=str(tmp_path))
        trainer.extend(GradientNoiseScale(adapt_up_to=4))
        with pytest.raises(
            ValueError, match="accumulation_steps must be 2 or more for adapt_up_to, got 1; nothing can"
        ):
            trainer.run(show_loop_exception_msg=False)
        assert single.iteration == 1


@pytest.mark.parametrize("steps", [3, {0: 3}, lambda updater: 3])
def test_the_accumulation_steps_may_be_a_schedule_at_first(tmp_path, steps):
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_regression_data(20), 2),
        chainer.optimizers.SGD(0.0),
        Regression(),
        accumulation_steps=steps,
    )
    trainer = Trainer(updater, (40, "iteration"), out=str(tmp_path))
    trainer.extend(GradientNoiseScale(1, 0.9, adapt_up_to=4))
    trainer.run()
    assert updater.accumulation_steps == 4


class WindowOf:
    """What the extension sees of an updater whose window took so many iterator batches of 10 examples."""

    iteration = 1
    micro_batch_size = 5
    gradient_norm_interval = 1

    def __init__(self, steps, is_new_epoch=False, last_batch=10, noise_scale=1000.0):
        self.updater = self
        self.accumulation_steps = steps
        self.is_new_epoch = is_new_epoch
        self.gradient_norms = norms = GradientNorms()
        norms.weights = [10.0] * (steps - 1) + [last_batch / 2] * 2
        # With |G|² = 1 and S = noise_scale, micro-batches and the window have these norms on average.
        average = sum(1 / weight for weight in norms.weights) / len(norms.weights)
        norms.micro_batches = [1 + noise_scale * average] * len(norms.weights)
        norms.window = 1 + noise_scale / sum(norms.weights)


def steps_after(extension, *windows):
    """Returns what was suggested, and which accumulation steps there were, after each window."""
    seen = []
    for window in windows:
        observation = {}
        with chainer.Reporter().scope(observation):
            extension(window)
        seen.append((observation["suggested_accumulation_steps"], window.accumulation_steps))
    return seen


def test_a_window_that_is_cut_short_neither_shrinks_the_steps_nor_limits_them():
    extension = GradientNoiseScale(1, 0.9, adapt_up_to=64)
    windows = [WindowOf(4), WindowOf(1, True), WindowOf(16), WindowOf(3, True, 2), WindowOf(64)]
    assert steps_after(extension, *windows) == [(100, 8), (100, 16), (100, 32), (100, 64), (100, 64)]


def test_a_short_window_is_no_reason_for_fewer_steps_than_there_are():
    extension = GradientNoiseScale(1, 0.9, adapt_up_to=64)
    windows = [WindowOf(8, noise_scale=50.0), WindowOf(1, True, noise_scale=50.0), WindowOf(0, noise_scale=50.0)]
    windows[-1].gradient_norms = None  # no data here, in a window of several processes
    assert steps_after(extension, *windows[:2]) == [(5, 8), (5, 1)]
    extension(windows[-1])
    assert steps_after(extension, WindowOf(8, noise_scale=200.0)) == [(11, 11)]


def test_a_schedule_may_lower_the_steps():
    extension = GradientNoiseScale(1, 0.9, adapt_up_to=64)
    windows = [WindowOf(8, noise_scale=30.0), WindowOf(2, noise_scale=30.0), WindowOf(3, True, noise_scale=30.0)]
    assert steps_after(extension, *windows) == [(3, 8), (3, 3), (3, 3)]


def test_windows_longer_than_an_epoch_are_whole():
    extension = GradientNoiseScale(1, 0.9, adapt_up_to=64)
    assert steps_after(extension, WindowOf(2, True), WindowOf(4, True), WindowOf(8, True)) == [
        (100, 4),
        (100, 8),
        (100, 16),
    ]


def test_a_resumed_run_may_begin_with_a_short_window(tmp_path):
    extension = GradientNoiseScale(1, 0.9, 64)
    steps_after(extension, WindowOf(8, noise_scale=50.0))
    save_npz(str(tmp_path / "extension.npz"), extension)
    resumed = GradientNoiseScale(1, 0.9, 64)
    load_npz(str(tmp_path / "extension.npz"), resumed)
    assert steps_after(resumed, WindowOf(1, True, 2, noise_scale=50.0)) == [(5, 1)]
