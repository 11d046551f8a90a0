"""Checks of arguments, whose errors name the argument, the value and the remedy."""

from __future__ import annotations

import math
import numbers
from typing import Any, Callable, Tuple

import chainer


def check_instance(optimizer: Any, name: str) -> None:
    """Raises TypeError for the class of an optimizer."""
    if isinstance(optimizer, type):
        raise TypeError(f"{name} must be an instance, got the class {optimizer.__name__}; write {optimizer.__name__}()")


def check_set_up(optimizer: Any, name: str) -> None:
    """Raises TypeError for what is no optimizer, and ValueError unless it has been set up with a model."""
    check_instance(optimizer, name)
    if not callable(getattr(optimizer, "setup", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"{name} must be an optimizer, got {optimizer!r}; pass one such as chainer.optimizers.Adam()")
    if getattr(optimizer, "target", None) is None:
        raise ValueError(
            f"{name} must be set up with a model, got {type(optimizer).__name__} without one; "
            "call optimizer.setup(model) first"
        )


def check_callable(name: str, value: Any, remedy: str = "pass a function") -> None:
    """Raises TypeError unless the value can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}; {remedy}")


def check_choice(name: str, value: Any, choices: Tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(name: str, value: Any, remedy: str) -> None:
    """Raises TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}; {remedy}")


def check_int(name: str, value: Any, least: int, remedy: str) -> int:
    """Returns the value as an int, or raises TypeError or ValueError unless it is one and ``least`` or more."""
    message = f"{name} must be an int of {least} or more, got {value!r}; {remedy}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    return int(value)


def check_real(name: str, value: Any, is_possible: Callable[[float], bool], expected: str, remedy: str) -> float:
    """Returns the value as a float, or raises TypeError or ValueError unless it is a number that is possible."""
    message = f"{name} must be {expected}, got {value!r}; {remedy}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(message)
    if not is_possible(float(value)):
        raise ValueError(message)
    return float(value)


def call(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Returns what a function of the user returns, whose StopIteration must not be taken for the end of the data.

    Raises:
        RuntimeError: If it raises StopIteration.

    """
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError(
            f"{name} must not raise StopIteration, got it from {function!r}; only the iterator says that data has "
            "ended, so catch it, as of next(), where it is raised"
        ) from error


def check_weight(weight: Any, name: str) -> float:
    """Returns the weight as a float, or raises TypeError or ValueError unless it is a finite number of 0 or more."""
    is_array = not isinstance(weight, chainer.Variable) and getattr(weight, "ndim", -1) == 0
    if not isinstance(weight, numbers.Real) and not is_array:
        raise TypeError(f"{name} must be a number, got {weight!r}; give the number of examples, tokens or valid labels")
    value = float(weight)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}; use 0 to leave a micro-batch out")
    return value
