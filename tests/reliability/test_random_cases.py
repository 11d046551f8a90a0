"""The promise of the package for whatever can be chosen, all of it at once and at random."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
from chainer_accum import AccumulatingUpdater
from chainer import optimizers
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import (
    CountingUpdater,
    Step,
    assert_same_optimizer_state,
    assert_same_parameters,
    assert_same_steps,
    make_dataset,
    make_model,
    make_updater,
    run,
)

CASES = 300
UPDATES = 4
# A small eps: where a gradient is nearly zero, these would else make large steps of its rounding.
OPTIMIZERS: Dict[str, Callable[[], Any]] = {
    "SGD": lambda: optimizers.SGD(0.1),
    "MomentumSGD": lambda: optimizers.MomentumSGD(0.1),
    "NesterovAG": lambda: optimizers.NesterovAG(0.1),
    "Adam": lambda: optimizers.Adam(eps=1e-3),
    "AdaGrad": lambda: optimizers.AdaGrad(0.1, eps=1e-3),
    "AdaDelta": lambda: optimizers.AdaDelta(eps=1e-3),
    "RMSprop": lambda: optimizers.RMSprop(eps=1e-3),
    "AdaBound": lambda: optimizers.AdaBound(eps=1e-3),
}


class Case(NamedTuple):
    """What can be chosen of a training run."""

    size: int
    batch_size: int
    accumulation_steps: int
    micro_batch_size: Optional[int]
    is_weighted: bool
    epoch_boundary: str
    repeat: bool
    seed: Optional[int]  # with which the examples are shuffled, if they are
    optimizer: str
    is_decayed: bool
    is_sum: bool


cases = st.builds(
    Case,
    size=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    accumulation_steps=st.integers(1, 6),
    micro_batch_size=st.one_of(st.none(), st.integers(1, 20)),
    is_weighted=st.booleans(),
    epoch_boundary=st.sampled_from(["carry", "flush"]),
    repeat=st.booleans(),
    seed=st.one_of(st.none(), st.integers(0, 9)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    is_decayed=st.booleans(),
    is_sum=st.booleans(),
)


class FlushingIterator(SerialIterator):
    """Gives whole effective batches, the last of an epoch a shorter one, for StandardUpdater to flush."""

    def __init__(self, dataset: Any, batch_size: int, steps: int, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size, **kwargs)
        self._steps = steps

    def __next__(self) -> List[Any]:
        epoch_detail = self.epoch_detail
        batch = super().__next__()
        for _ in range(self._steps - 1):
            if self.is_new_epoch:
                break
            batch = batch + super().__next__()
        self._previous_epoch_detail = epoch_detail
        return batch

    next = __next__


def make_examples(case: Case) -> List[Any]:
    """Returns examples, of which some have no label if they are weighted; in some batches, none has."""
    examples = make_dataset(case.size)
    if case.is_weighted:
        examples = [(x, numpy.int32(-1) if i % 7 < 4 else t) for i, (x, t) in enumerate(examples)]
    return examples


def count_labels(batch: List[Any]) -> int:
    return sum(int(t != -1) for _, t in batch)


def make(case: Case, updater_class: Any, iterator: Any, **kwargs: Any) -> Any:
    optimizer = OPTIMIZERS[case.optimizer]()
    model = make_model()

    def loss_func(x: Any, t: Any) -> chainer.Variable:
        y = model.predictor(x)
        loss = F.sum(F.softmax_cross_entropy(y, t, reduce="no")) if case.is_sum else F.softmax_cross_entropy(y, t)
        chainer.report({"loss": loss, "examples": len(x)}, model)
        return loss

    updater = make_updater(updater_class, iterator, optimizer, model, loss_func=loss_func, **kwargs)
    if case.is_decayed:
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
    return updater


def make_standard(case: Case) -> Any:
    shuffling = {"shuffle": case.seed is not None, "repeat": case.repeat}
    if case.epoch_boundary == "flush":
        flushing = FlushingIterator(make_examples(case), case.batch_size, case.accumulation_steps, **shuffling)
        return make(case, StandardUpdater, flushing)
    iterator = SerialIterator(make_examples(case), case.batch_size * case.accumulation_steps, **shuffling)
    batches = SerialIterator(make_examples(case), case.batch_size, shuffle=False, repeat=case.repeat)
    return make(case, CountingUpdater, iterator, batches=batches, accumulation_steps=case.accumulation_steps)


def make_accumulating(case: Case) -> Any:
    iterator = SerialIterator(make_examples(case), case.batch_size, shuffle=case.seed is not None, repeat=case.repeat)
    return make(
        case,
        AccumulatingUpdater,
        iterator,
        accumulation_steps=case.accumulation_steps,
        micro_batch_size=case.micro_batch_size,
        weight_func=count_labels if case.is_weighted else None,
        epoch_boundary=case.epoch_boundary,
        loss_reduction="sum" if case.is_sum else "mean",
        observation_rules={"main/examples": "sum", **({"main/loss": "sum"} if case.is_sum else {})},
    )


def run_to_the_end(case: Case, make: Callable[[Case], Any]) -> Any:
    """Returns the updater after some updates, or as many as the data suffices for, and its steps."""
    numpy.random.seed(case.seed or 0)
    updater = make(case)
    steps: List[Step] = []
    try:
        for _ in range(UPDATES):
            steps.extend(run(updater, 1))
    except StopIteration:
        assert not case.repeat
    return updater, steps


def test_every_case_is_that_of_standard_updater_with_whole_batches(record_property: Any) -> None:
    seen = []

    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case: Case) -> None:
        (expected, expected_steps), (actual, steps) = (
            run_to_the_end(case, make) for make in (make_standard, make_accumulating)
        )
        pair = actual.get_optimizer("main"), expected.get_optimizer("main")
        assert actual.iteration == expected.iteration == len(steps) > 0
        assert_same_steps(steps, expected_steps)
        assert_same_parameters(*[optimizer.target for optimizer in pair], tolerance=1e-5)
        assert_same_optimizer_state(*pair, tolerance=1e-5)
        seen.append(case)

    check()
    assert len(seen) >= CASES
    record_property("random cases", CASES)
