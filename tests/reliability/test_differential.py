"""The step of random programs is that of StandardUpdater with whole batches, in float64, to nine digits."""

from __future__ import annotations

from typing import Any, Dict

import chainer_accum  # noqa: F401
import pytest
from differential import differences, kind_of, minimize
from random_programs import WAYS, Program, draw
from scale import SEED, TIMES

PROGRAMS = 80 * TIMES  # of each way


@pytest.mark.parametrize("way", WAYS)
def test_every_program_makes_the_steps_of_standard_updater(way: str, record_property: Any) -> None:
    failures: Dict[Program, str] = {}
    for seed in range(SEED, SEED + PROGRAMS):
        program = draw(seed, way)
        found = differences(program)
        if found:
            smallest = minimize(program, kind_of(found))
            failures.setdefault(smallest._replace(seed=0), f"seed {seed}, {smallest}: {differences(smallest)}")
    assert not failures, "\n".join(failures.values())
    record_property("random programs", PROGRAMS)
