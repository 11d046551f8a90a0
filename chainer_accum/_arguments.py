"""Argument checks, whose errors name the argument, the value and the remedy."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any, Callable, Mapping, Tuple, TypeVar

import chainer

Result = TypeVar("Result")


def check_instance(optimizer: object, name: str) -> None:
    """Raises TypeError if the optimizer is a class and not an instance."""
    if isinstance(optimizer, type):
        raise TypeError(f"{name} must be an instance, got the class {optimizer.__name__}; write {optimizer.__name__}()")


def check_set_up(optimizer: object, name: str) -> None:
    """Raises TypeError for anything but an optimizer, and ValueError if it has not been set up with a model."""
    check_instance(optimizer, name)
    if not callable(getattr(optimizer, "setup", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"{name} must be an optimizer, got {optimizer!r}; pass one such as chainer.optimizers.Adam()")
    if getattr(optimizer, "target", None) is None:
        raise ValueError(
            f"{name} must be set up with a model, got {type(optimizer).__name__} without one; "
            "call optimizer.setup(model) first"
        )


def check_main(name: str, by_name: Mapping[str, object], what: str, method: str, remedy: str) -> None:
    """Raises ValueError if ``by_name`` has no key ``'main'``, and TypeError if its value does not have the method."""
    if "main" not in by_name:
        raise ValueError(f"{name} must have the key 'main', got the keys {sorted(by_name)}; name one of them 'main'")
    if not callable(getattr(by_name["main"], method, None)):
        raise TypeError(f"{name} must be {what} or a dict of them, got {by_name['main']!r}; {remedy}")


def check_loss_scale(loss_scale: Any) -> None:
    """Raises ValueError unless the loss scale is ``None`` or a positive number."""
    is_number = isinstance(loss_scale, numbers.Real) and not isinstance(loss_scale, bool)
    if loss_scale is not None and not (is_number and 0 < float(loss_scale) < math.inf):
        raise ValueError(
            f"loss_scale must be a positive number, got {loss_scale!r}; "
            "for dynamic scaling, call optimizer.loss_scaling()"
        )


def check_callable(name: str, value: object, remedy: str = "pass a function") -> None:
    """Raises TypeError unless the value can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}; {remedy}")


def takes(function: Callable[..., Any], *args: object) -> bool:
    """Returns whether a function can be called with these arguments, as far as its signature is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function that is not written in Python may have none
        return True
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


def check_choice(name: str, value: object, choices: Tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(name: str, value: object, remedy: str) -> None:
    """Raises TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}; {remedy}")


def check_int(name: str, value: object, least: int, remedy: str) -> int:
    """Returns the value as an int, or raises TypeError if it is not one and ValueError if it is less than ``least``."""
    message = f"{name} must be an int of {least} or more, got {value!r}; {remedy}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    return int(value)


def check_real(name: str, value: object, is_possible: Callable[[float], bool], expected: str, remedy: str) -> float:
    """Returns the value as a float, or raises TypeError if it is not a number and ValueError if it is out of range."""
    message = f"{name} must be {expected}, got {value!r}; {remedy}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(message)
    if not is_possible(float(value)):
        raise ValueError(message)
    return float(value)


def call(name: str, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Returns what the user's function returns, and turns a StopIteration from it into an error.

    Otherwise, the StopIteration would be taken for the end of the data.

    Raises:
        RuntimeError: If the function raises StopIteration.

    """
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError(
            f"{name} must not raise StopIteration, got it from {function!r}; only the iterator says when the "
            "data has ended; catch the exception, for example from next(), where it is raised"
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
