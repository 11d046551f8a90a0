"""Ctrl-C at any bytecode of an update: all is as before it or as after it, nothing is left, and the next is right."""

from __future__ import annotations

import functools
import random
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import chainer_accum  # noqa: F401
import chainer
import pytest
from interrupted_updates import STEPS, UPDATES, Call, State, Update
from interrupts import WAYS, Interrupt, Surroundings
from scale import SEED, TIMES

MakeUpdate = Callable[[], Update]
INTERRUPTS = 16 * TIMES  # of each kind of update, in each way
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def _what_a_finalizer_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python goes on after an interrupt that comes in a finalizer, as after any error there, and says so.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


class Expected(NamedTuple):
    """What there is without an interrupt."""

    before: State
    after: State
    aftermaths: List[Dict[str, State]]  # each is right

    @classmethod
    def of(cls, make_update: MakeUpdate, others: Sequence[MakeUpdate]) -> Expected:
        made, not_made = make_update(), make_update()
        before = made.state()
        made.run()
        after = made.state()
        assert not_made.state() == before
        return cls(before, after, [update.aftermath() for update in (made, not_made, *(other() for other in others))])


def interrupt(update: Update, way: str, number: int) -> Tuple[Interrupt, str]:
    """Runs an update with an interrupt, and returns it with what was raised."""
    raised = ""
    with Interrupt(WAYS[way], number) as interrupted:
        try:
            update.run()
        except KeyboardInterrupt:
            raised = "KeyboardInterrupt"
        except BaseException as error:
            raised = repr(error)
    return interrupted, raised


def numbers(make_update: MakeUpdate, way: str, name: str) -> List[int]:
    """Returns at which bytecodes of an update it is to be interrupted."""
    executed = interrupt(make_update(), way, 0)[0].executed
    generator = random.Random(f"{SEED} {way} {name}")
    return [generator.randint(1, executed) for _ in range(INTERRUPTS)]


def difference(state: State, expected: State) -> str:
    """Returns what differs, in short."""
    keys = sorted(key for key in {**state, **expected} if state.get(key) != expected.get(key))
    return f"{keys[0]} and {len(keys) - 1} others" if keys else "nothing"


def problems_at(make_update: MakeUpdate, way: str, number: int, expected: Expected) -> List[str]:
    """Returns what is wrong after an interrupt."""
    update = make_update()
    surroundings = Surroundings()
    interrupted, raised = interrupt(update, way, number)
    if interrupted.place is None:  # how much is executed with a thread beside it depends on the thread
        return problems_at(make_update, way, number // 2, expected)
    problems = surroundings.changes()
    if WAYS[way].is_in_package_only:  # what is raised directly may come where a handler is about to be put back
        problems = [problem for problem in problems if not problem.startswith("signal handler")]
    state = update.state()
    if raised != "KeyboardInterrupt" and (raised or state != expected.after):
        problems.append(f"raised {raised or 'nothing'}")
    if WAYS[way].is_in_package_only:  # what is raised directly is not put off, and epochs are counted after the step
        state["optimizer/epoch"] = expected.after["optimizer/epoch"]
        expected.before["optimizer/epoch"] = expected.after["optimizer/epoch"]
    if state not in (expected.before, expected.after):
        problems.append(
            f"differs from before in {difference(state, expected.before)}, "
            f"from after in {difference(state, expected.after)}"
        )
    try:
        for name, next_state in update.aftermath().items():
            if next_state not in [aftermath[name] for aftermath in expected.aftermaths]:
                problems.append(f"{name} differs in {difference(next_state, expected.aftermaths[0][name])}")
    except Exception as error:
        problems.append(f"what comes next raises {error!r}")
    surroundings.put_back()
    return [f"bytecode {number}, {interrupted.place}: {problem}" for problem in problems]


def check(
    make_update: MakeUpdate, way: str, name: str, record_property: Any, others: Sequence[MakeUpdate] = ()
) -> None:
    with chainer.Reporter().scope({}):
        expected = Expected.of(make_update, others)
        problems = [
            problem
            for number in numbers(make_update, way, name)
            for problem in problems_at(make_update, way, number, expected)
        ]
    assert not problems, "\n".join(problems)
    record_property("interrupts", INTERRUPTS)


@every_way
@pytest.mark.parametrize("kind", UPDATES)
def test_an_interrupted_update_is_made_as_a_whole_or_not_at_all(kind: str, way: str, record_property: Any) -> None:
    check(UPDATES[kind], way, kind, record_property)


@every_way
@pytest.mark.parametrize("is_own_pass", [False, True])
@pytest.mark.parametrize("calls", range(STEPS))
def test_an_interrupted_call_is_made_drops_the_window_or_is_not_made(
    calls: int, is_own_pass: bool, way: str, record_property: Any
) -> None:
    make_call, make_dropped = functools.partial(Call, calls, is_own_pass), functools.partial(Call, 0, is_own_pass)
    check(make_call, way, f"{calls} {is_own_pass}", record_property, [make_dropped])
