"""With micro_batch_size='auto', the fastest size that fits is found, and every window on the way is an exact update."""

from __future__ import annotations

import itertools
import math
import warnings

import chainer_accum
import chainer
import numpy
import pytest
from chainer.training.updaters import StandardUpdater
from chainer_accum.batches import make_micro_batch_size, together, tuning
from chainer_accum.batches.search import Footprint
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_same_parameters, make_dataset, make_model, make_updater, run, serial

HOST = chainer.get_device("@numpy")
MIB = 2**20


class Machine:
    """A machine whose clock and memory show what passes are said to cost, so that no test depends on a real one."""

    def __init__(
        self,
        monkeypatch,
        seconds=lambda size: 1.0,
        memory=lambda size: 0.0,
        room=math.inf,
        base=100 * MIB,
        keeps=lambda size: 0.0,
        update=0,
    ):
        self.now = 0.0
        self.update = update  # what the parameter update takes, which comes after the passes
        self.peaks = []
        self.seconds = seconds  # per example
        self.memory = memory  # of a pass
        self.room = room
        self.base = base
        self.keeps = keeps  # what a pass leaves in use until the next one
        self.kept = 0.0
        self.highest = base
        self.sizes = []
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(tuning, "memory_of", lambda device: self)
        monkeypatch.setattr(tuning, "free_memory", lambda device: None)

    def in_use(self):
        self.highest = self.base + self.kept
        return self.highest

    def peak(self):
        return self.highest

    def reset_peak(self):
        self.highest = self.base + self.kept
        return True

    def ceiling(self, share):
        return self.base + self.room

    def run(self, size, windows, examples=256, kind=(5,), batches=1, is_measured=True, fits=math.inf):
        """Runs windows, and returns what they report."""
        reports = []
        for _ in range(windows):
            size.begin_window(HOST, lambda: self.update // 4)
            while not self.run_passes(size, examples, batches, is_measured, fits):
                size.begin_again()
            self.highest = max(self.highest, self.base + self.kept + self.update)
            self.peaks.append((self.highest, self.sizes[-1]))
            reports.append(size.end_window(kind, examples))
        return reports

    def run_passes(self, size, examples, batches, is_measured, fits):
        loads = []
        for _ in range(batches):
            for part in size.parts(size.arrange(range(examples))):
                loads.append(part.load)
                if part.load.cost > fits:
                    size.lower(part.load.cost)
                    return False
                if is_measured:
                    with size.measuring(part.load):
                        self.run_pass(part.load.cost)
        if not is_measured:
            with size.measuring(together(loads)):
                for load in loads:
                    self.run_pass(load.cost)
        return True

    def run_pass(self, cost):
        self.sizes.append(cost)
        self.now += cost * self.seconds(cost)
        self.highest = max(self.highest, self.base + self.memory(cost))
        self.kept = self.keeps(cost)


@pytest.fixture
def make_machine(monkeypatch):
    return lambda *args, **kwargs: Machine(monkeypatch, *args, **kwargs)


def valley(best, steepness=1.0):
    """Returns the seconds per example on a machine where ``best`` is the fastest size."""
    return lambda size: 1 + steepness * abs(math.log2(size / best))


def windows_until_chosen(reports):
    return sum("seconds_per_example" in report for report in reports) + 1  # the first one is not timed


@pytest.mark.parametrize("best", [1, 2, 8, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("steepness", [0.03, 1.0])
@pytest.mark.parametrize("is_measured", [True, False])
def test_the_fastest_size_is_found_in_eight_windows(best, steepness, is_measured, make_machine):
    machine = make_machine(valley(best, steepness))
    size = make_micro_batch_size("auto")
    reports = machine.run(size, 12, examples=1024, is_measured=is_measured)
    if is_measured or steepness == 1.0:
        assert size.limit == best
    assert all("seconds_per_example" not in report for report in reports[8:])
    assert valley(best, steepness)(size.limit) <= 1.1
    assert min(size.timings, key=size.timings.get) == size.limit


def test_each_pass_of_the_first_window_is_twice_as_large(make_machine):
    machine = make_machine(lambda size: 1 / size, memory=lambda size: size * MIB)
    machine.run(make_micro_batch_size("auto"), 1, examples=256)
    assert machine.sizes == [1, 1, 2, 4, 8, 16, 32, 64, 128]


@given(
    best=st.sampled_from([2**i for i in range(11)]),
    examples=st.integers(1, 1500),
    per_example=st.integers(1, 50 * MIB),
    base=st.integers(0, 500 * MIB),
    room=st.integers(1, 1000 * MIB),
    is_measured=st.booleans(),
)
def test_no_pass_is_tried_that_would_not_fit(best, examples, per_example, base, room, is_measured):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, valley(best), lambda size: base + per_example * size, room)
        size = make_micro_batch_size("auto")
        reports = machine.run(size, 9, examples=examples, is_measured=is_measured)
    assert all(cost == 1 or base + per_example * cost <= room for cost in machine.sizes)
    assert "seconds_per_example" not in reports[-1]


@given(st.integers(0, 10**9), st.floats(0, 1e8), st.floats(1, 1e6), st.booleans())
def test_the_predicted_peak_is_the_measured_one_where_memory_grows_in_proportion(base, fixed, slope, is_measured):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, valley(64), lambda size: fixed + slope * size, base=base)
        reports = machine.run(make_micro_batch_size("auto"), 8, is_measured=is_measured)
    predictions = [report for report in reports[2:] if "predicted_peak_memory" in report]
    assert predictions
    for report in predictions:
        # After a single size, the fixed part is taken to grow as well.
        assert report["predicted_peak_memory"] >= 0.99 * report["peak_memory"]
        if is_measured:
            assert report["predicted_peak_memory"] <= 1.1 * report["peak_memory"]


@given(st.floats(0, 1), st.floats(1e3, 1e6), st.sampled_from([1, 8, 64, 256]), st.integers(200, 300), st.booleans())
def test_what_a_pass_leaves_in_use_is_part_of_the_prediction(share, slope, best, examples, is_evaluated):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, valley(best), lambda size: slope * size, keeps=lambda size: share * slope * size)
        size = make_micro_batch_size("auto")
        reports = []
        for _ in range(8):
            reports += machine.run(size, 1, examples)
            if is_evaluated:
                machine.kept = 0.0  # an evaluation makes models forget the last pass
    predictions = [report for report in reports[1:] if "predicted_peak_memory" in report]
    assert predictions
    for report in predictions:
        assert report["predicted_peak_memory"] == pytest.approx(report["peak_memory"], rel=0.02)


@given(st.floats(0.1, 100), st.floats(0, 1), st.integers(20, 200))
def test_the_memory_of_short_examples_predicts_that_of_the_longest(per_token, per_pair, longest):
    def memory(cost, length):
        return cost * (per_token + per_pair * length)

    footprint = Footprint()
    for doublings in range(6):  # the longest come first
        length = longest * 0.8**doublings
        cost = 1000 * 2**doublings
        footprint.add_pass(cost, memory(cost, length), length)
    for cost in (1000, 5000, 32000, 64000):
        assert footprint.predict(cost) == pytest.approx(memory(cost, longest), rel=0.01)


@pytest.mark.parametrize("begins", range(8))
def test_a_machine_that_is_slower_for_one_window_does_not_mislead_the_search(begins, make_machine):
    machine = make_machine()
    window = [0]
    machine.seconds = lambda size: valley(64)(size) * (5 if window[0] == begins else 1)
    size = make_micro_batch_size("auto")
    for window[0] in range(10):
        machine.run(size, 1, examples=1024)
    assert size.limit in (32, 64, 128)


@given(st.integers(1, 500 * MIB), st.integers(1, 5 * MIB), st.floats(0, 1), st.integers(1, 1000 * MIB))
def test_the_parameter_update_fits_beside_what_the_last_pass_has_left(update, per_example, share, room):
    with pytest.MonkeyPatch.context() as monkeypatch:
        keeps = lambda size: share * per_example * size  # noqa: E731
        machine = Machine(monkeypatch, valley(64), lambda size: per_example * size, room, keeps=keeps, update=update)
        machine.run(make_micro_batch_size("auto"), 9)
    assert all(peak <= machine.base + room or last == 1 for peak, last in machine.peaks)


@given(slow=st.sets(st.sampled_from([2**i for i in range(11)])), best=st.sampled_from([1, 8, 64, 512]))
def test_single_passes_that_are_slow_by_chance_do_not_end_the_search(slow, best):
    with pytest.MonkeyPatch.context() as monkeypatch:
        is_first = [True]
        machine = Machine(
            monkeypatch, lambda size: 2 ** valley(best)(size) * (9 if is_first[0] and size in slow else 1)
        )
        size = make_micro_batch_size("auto")
        machine.run(size, 1, examples=1024)
        first = size.limit
        is_first[0] = False
        machine.run(size, 8, examples=1024)
    # What is found is the fastest, or as near to it as six more windows may come, twice or four times as large each.
    assert abs(math.log2(size.limit / best)) <= max(abs(math.log2(first / best)) - 4, 1)


def test_neither_the_first_window_nor_one_that_restarted_is_timed(make_machine):
    machine = make_machine(valley(64))
    size = make_micro_batch_size("auto")
    machine.run(size, 1)
    assert size.timings == {}
    limit = size.limit
    machine.run(size, 1, fits=limit - 1)
    assert size.limit < limit and max(size.timings, default=0) < limit


def test_a_size_that_did_fit_and_fits_no_longer_is_forgotten(make_machine):
    machine = make_machine(valley(64))
    size = make_micro_batch_size("auto")
    machine.run(size, 8)
    assert max(size.timings) > 64
    machine.run(size, 8, fits=16)
    assert size.limit <= 16 and max(size.timings, default=0) <= 16


@given(best=st.sampled_from([2**i for i in range(11)]), fits=st.integers(1, 1024), examples=st.integers(1, 1024))
def test_memory_that_runs_out_bounds_the_search(best, fits, examples):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, valley(best))
        size = make_micro_batch_size("auto")
        reports = machine.run(size, 20, examples=examples, fits=fits)
    assert max(machine.sizes) <= fits
    assert "seconds_per_example" not in reports[-1]


def test_other_shapes_and_larger_batches_have_a_search_of_their_own(make_machine):
    machine = make_machine(valley(256))
    size = make_micro_batch_size("auto")
    machine.run(size, 10)
    assert size.limit == 256
    machine.seconds = valley(16)
    machine.run(size, 12, kind=(10,))
    assert size.limit == 16
    machine.run(size, 12, kind=(10,), examples=512)
    assert size.limit == 16 and set(size.timings) == {8, 16, 32}  # single passes have ruled out those further away
    machine.run(size, 2)  # what was found before is known
    assert size.limit == 256


def test_a_single_window_of_another_kind_changes_nothing(make_machine):
    machine = make_machine(valley(256))
    size = make_micro_batch_size("auto")
    machine.run(size, 10)
    timings = size.timings
    for _ in range(3):
        machine.run(size, 1, examples=100)  # the tail of an epoch
        assert size.limit == 256
        machine.run(size, 3)
    assert size.timings == timings


@pytest.mark.parametrize("windows", [1, 3, 5, 9])
def test_a_resumed_search_goes_on_where_it_was(windows, make_machine):
    machine = make_machine(valley(64), memory=lambda size: size * MIB)
    size, resumed = make_micro_batch_size("auto"), make_micro_batch_size("auto")
    machine.run(size, windows)
    saved = chainer.serializers.DictionarySerializer()
    size.serialize(saved)
    resumed.serialize(chainer.serializers.NpzDeserializer(saved.target))
    assert (resumed.limit, resumed.timings) == (size.limit, size.timings)
    assert machine.run(resumed, 12)[-1] == machine.run(size, 12)[-1]
    assert resumed.limit == size.limit


def test_a_resumed_run_on_a_machine_with_less_memory_begins_with_what_fits(make_machine):
    machine = make_machine(valley(64), memory=lambda size: size * MIB)
    size, resumed = make_micro_batch_size("auto"), make_micro_batch_size("auto")
    machine.run(size, 10)
    assert size.limit == 64
    saved = chainer.serializers.DictionarySerializer()
    size.serialize(saved)
    resumed.serialize(chainer.serializers.NpzDeserializer(saved.target))
    machine.room = 25 * MIB
    machine.sizes = []
    machine.run(resumed, 2)
    assert max(machine.sizes) == 16


def test_a_resumed_run_that_begins_with_a_single_odd_window_does_not_search_again(make_machine):
    machine = make_machine(valley(64))
    size, resumed = make_micro_batch_size("auto"), make_micro_batch_size("auto")
    machine.run(size, 10)
    saved = chainer.serializers.DictionarySerializer()
    size.serialize(saved)
    resumed.serialize(chainer.serializers.NpzDeserializer(saved.target))
    machine.run(resumed, 1, examples=100)  # the tail of an epoch
    assert all("seconds_per_example" not in report for report in machine.run(resumed, 5))
    assert resumed.limit == 64


def test_a_size_that_was_found_is_not_taken_for_a_budget(make_machine):
    machine = make_machine(valley(64))
    size = make_micro_batch_size("auto")
    machine.run(size, 10)
    saved = chainer.serializers.DictionarySerializer()
    size.serialize(saved)
    budget = make_micro_batch_size(chainer_accum.TokenBudget("auto", int))
    budget.serialize(chainer.serializers.NpzDeserializer(saved.target))
    assert (budget.limit, budget.timings) == (1, {})


def test_a_snapshot_without_a_search_leaves_the_search_as_it_is(make_machine):
    size = make_micro_batch_size("auto")
    make_machine(valley(64)).run(size, 10)
    for strict in (True, False):
        size.serialize(chainer.serializers.NpzDeserializer({}, strict=strict))
        assert size.limit == 64


def test_where_memory_cannot_be_measured_the_search_begins_with_a_usual_size(make_machine, monkeypatch):
    machine = make_machine(valley(32))
    monkeypatch.setattr(tuning, "memory_of", lambda device: None)
    size = make_micro_batch_size("auto")
    reports = machine.run(size, 10)
    assert machine.sizes[0] == 64 and size.limit == 32
    assert all("peak_memory" not in report for report in reports)


@pytest.mark.parametrize("steps, batch", [(1, 40), (2, 20)])
def test_every_window_is_exact_and_says_what_was_tried(steps, batch, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(ticks))  # each pass takes as long
    data = make_dataset(120)
    expected = make_updater(StandardUpdater, serial(data, 40), chainer.optimizers.Adam())
    expected_steps = run(expected, 12)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(data, batch),
        chainer.optimizers.Adam(),
        accumulation_steps=steps,
        micro_batch_size="auto",
    )
    assert (updater.micro_batch_size, updater.micro_batch_timings) == (1, {})
    actual_steps = run(updater, 12)
    assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, 1e-5)
    assert [step.bookkeeping for step in actual_steps] == [step.bookkeeping for step in expected_steps]
    timed = [step.observation for step in actual_steps[1:] if "seconds_per_example" in step.observation]
    assert set(updater.micro_batch_timings) == {observation["micro_batch_size"] for observation in timed}
    assert len(updater.micro_batch_timings) > 1
    assert actual_steps[-1].observation["micro_batch_size"] == updater.micro_batch_size
    assert updater.micro_batch_size == min(updater.micro_batch_timings, key=updater.micro_batch_timings.get)
    assert "seconds_per_example" not in actual_steps[-1].observation


def test_a_size_that_does_not_fit_is_not_tried_again():
    class Limited(chainer.links.Classifier):
        sizes: list = []

        def forward(self, x, t):
            self.sizes.append(len(x))
            if len(x) > 10:
                raise MemoryError("no room")
            return super().forward(x, t)

    model = Limited(make_model().predictor)
    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_dataset(80), 40),
        chainer.optimizers.SGD(),
        model,
        micro_batch_size="auto",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(updater, 30)
    too_large = [size for size in model.sizes if size > 10]
    assert len(too_large) == len([w for w in caught if "memory ran out" in str(w.message)]) <= 2
    assert updater.micro_batch_size <= 10


def test_other_words_and_batches_that_cannot_be_split_are_refused():
    with pytest.raises(TypeError, match="micro_batch_size must be an int of 1 or more, got 'automatic'; .*'auto'"):
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(make_dataset(), 4),
            chainer.optimizers.SGD(),
            micro_batch_size="automatic",
        )


@pytest.mark.parametrize("steps", [1, 2])
def test_a_search_meets_sizes_that_do_not_fit_and_goes_on(steps):
    class Limited(chainer.links.Classifier):
        def forward(self, x, t):
            if len(x) > 70:
                raise MemoryError("no room")
            return super().forward(x, t)

    updater = make_updater(
        chainer_accum.AccumulatingUpdater,
        serial(make_dataset(400), 200),
        chainer.optimizers.SGD(),
        Limited(make_model().predictor),
        accumulation_steps=steps,
        micro_batch_size="auto",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run(updater, 12)
    assert max(updater.micro_batch_timings) <= 70


def test_a_search_that_may_not_split_is_refused():
    with pytest.raises(ValueError, match="split_when_out_of_memory must not be False with micro_batch_size='auto'"):
        make_updater(
            chainer_accum.AccumulatingUpdater,
            serial(make_dataset(), 4),
            chainer.optimizers.SGD(),
            micro_batch_size="auto",
            split_when_out_of_memory=False,
        )


def test_a_snapshot_has_the_choice_and_one_of_standard_updater_loads(tmp_path):
    def make(**kwargs):
        return make_updater(
            chainer_accum.AccumulatingUpdater, serial(make_dataset(80), 40), chainer.optimizers.Adam(), **kwargs
        )

    updater = make(micro_batch_size="auto")
    run(updater, 10)
    chainer.serializers.save_npz(tmp_path / "auto.npz", updater)
    resumed = make(micro_batch_size="auto")
    chainer.serializers.load_npz(tmp_path / "auto.npz", resumed)
    assert resumed.micro_batch_size == updater.micro_batch_size
    assert resumed.micro_batch_timings == updater.micro_batch_timings
    assert "seconds_per_example" not in run(resumed, 1)[0].observation

    standard = make_updater(StandardUpdater, serial(make_dataset(80), 40), chainer.optimizers.Adam())
    run(standard, 1)
    chainer.serializers.save_npz(tmp_path / "standard.npz", standard)
    chainer.serializers.load_npz(tmp_path / "standard.npz", make(micro_batch_size="auto"))
    chainer_accum.load_snapshot(tmp_path / "auto.npz", make(micro_batch_size="auto"))
    chainer_accum.load_snapshot(tmp_path / "auto.npz", make(micro_batch_size=8))
    with numpy.load(tmp_path / "standard.npz") as saved, numpy.load(tmp_path / "auto.npz") as auto:
        assert set(saved.files) < set(auto.files)
