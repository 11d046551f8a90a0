"""Runs a random program twice: with micro-batches, and with StandardUpdater and whole effective batches."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from typing import Any, Callable, Dict, Iterator, List

import chainer_accum  # noqa: F401
import chainer
import numpy
from chainer.serializers import DictionarySerializer
from model_pieces import FLOAT32
from program_runners import RUNNERS, Standard
from random_models import Model
from random_programs import Program, smaller

Snapshot = Dict[str, Any]
COPIES: Dict[str, Callable[[Any], Any]] = {
    "": lambda value: value,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


def run(program: Program, make_runner: Callable[[Program], Any]) -> List[Snapshot]:
    """Returns what there is after each update."""
    snapshots = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(numpy.errstate(all="ignore"))
        stack.enter_context(chainer.using_config("dtype", numpy.float64))
        stack.enter_context(chainer.using_config("scale_of_programs", 0.5))
        runner = make_runner(program)
        for number, window in enumerate(program.windows()):
            observation: Dict[str, Any] = {}
            for index, args in enumerate(runner.calls(window)):
                # The debug mode finds NaN by itself, and lazy parameters have a NaN for a gradient before the first.
                with _reporting(runner.optimizer.target, observation):
                    with chainer.using_config("debug", program.debug and not program.spoilt and number > 0):
                        runner.call(*args)
                if number == index == 0:
                    runner = COPIES[program.copy](runner)
            snapshots.append(snapshot(runner.optimizer, observation))
    return snapshots


@contextlib.contextmanager
def _reporting(model: Model, observation: Dict[str, Any]) -> Iterator[None]:
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    with reporter.scope(observation):
        yield


def snapshot(optimizer: Any, observation: Dict[str, Any]) -> Snapshot:
    """Returns copies of all that an update has to do with, by names that begin with what it is."""
    model = optimizer.target
    state, values = DictionarySerializer(), DictionarySerializer()
    optimizer.serialize(state)
    model.serialize(values)
    params = dict(model.namedparams())
    found = {f"state {name}": value for name, value in state.target.items()}
    found["state loss_scale"] = optimizer._loss_scale or 1.0
    for name, value in values.target.items():
        found[f"{'parameter' if f'/{name}' in params else 'persistent'} {name}"] = value
    for name, param in [*params.items(), *((f"outside{name}", param) for name, param in model.outside.namedparams())]:
        found[f"gradient {name}"] = param.grad
    for key, value in observation.items():
        for index, part in enumerate(value if isinstance(value, tuple) else [value]):
            found[f"observation {key} {index}"] = part
    return {key: numpy.array(chainer.as_array(value)) for key, value in found.items() if value is not None}


def differences(program: Program) -> List[str]:
    """Returns in what a program differs from its counterpart, sorted, or what it raises."""
    try:
        expected_snapshots = run(program, Standard)
    except Exception as error:
        raise ValueError(f"StandardUpdater cannot run {program}") from error
    try:
        snapshots = run(program, RUNNERS[program.way])
    except Exception as error:
        return [f"raises {type(error).__name__}: {str(error)[:200]}"]
    assert len(snapshots) == len(expected_snapshots) == program.updates
    found = []
    epochs = 0
    for window, actual, expected in zip(program.windows(), snapshots, expected_snapshots):
        epochs += window.epochs
        expected["state epoch"] = numpy.array(epochs if program.way in ("updater", "cached") else 0)
        for key in sorted({*actual, *expected}):
            if not _is_same(program, key, actual.get(key), expected.get(key)):
                found.append(key)
    return sorted(set(found))


def _is_same(program: Program, key: str, actual: Any, expected: Any) -> bool:
    if key == "observation skipped_micro_batches 0":
        return True
    if program.way.startswith("wrapped") and key.startswith("observation"):
        return True  # each call reports for itself, as it does without us
    if actual is None or expected is None or actual.shape != expected.shape:
        return False
    if actual.dtype == object or expected.dtype == object:  # that of a parameter without a shape is None
        return actual.item() is expected.item() is None
    is_float32 = any(modifier == "float32" or name in FLOAT32 for name, modifier in program.pieces)
    tolerance = 1e-4 if is_float32 else 1e-9
    return bool(numpy.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True))


def kind_of(found: List[str]) -> str:
    """Returns what kind of difference it is, to tell a fault from another."""
    kinds = ("gradient", "parameter", "state", "persistent", "observation")
    return next((kind for kind in kinds for key in found if key.startswith(kind)), found[0])


def minimize(program: Program, kind: str) -> Program:
    """Returns the smallest program with the same kind of difference that can be reached in steps."""
    for simpler in smaller(program):
        try:
            found = differences(simpler)
        except ValueError:  # StandardUpdater cannot run it
            continue
        if found and kind_of(found) == kind:
            return minimize(simpler, kind)
    return program
