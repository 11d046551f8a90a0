"""load_snapshot: loads a snapshot completely, or not at all.

:func:`chainer.serializers.load_npz` changes the model while it reads. If it then meets a value that is damaged or
missing, the model is a mixture of old and new values. Here, everything is read and checked before anything is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any, Dict, List, Union

import chainer
import numpy
from chainer.serializers import DictionarySerializer, NpzDeserializer

_UNKNOWN = object()  # placeholder for a value that does not exist before loading


def load_snapshot(filename: Union[str, os.PathLike[str]], target: Any) -> None:
    """Loads a snapshot completely, or leaves ``target`` unchanged.

    The snapshot is one written by :func:`chainer.serializers.save_npz` or by a snapshot extension of a Trainer. A valid
    snapshot is loaded as by :func:`chainer.serializers.load_npz`. If the file is truncated, damaged, or not a snapshot
    of ``target``, this function raises, and ``target`` stays as it was.

    Args:
        filename (str): Name of the file.
        target: Object to load into, such as a :class:`~chainer.training.Trainer`, an updater, an optimizer or a model.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``target`` cannot be serialized.
        ValueError: If the file cannot be read as a snapshot, or is not a snapshot of ``target``.

    """
    if not callable(getattr(target, "serialize", None)):
        raise TypeError(
            f"target must be an object that Chainer can serialize, got {target!r}; "
            "pass a Trainer, an updater, an optimizer or a model"
        )
    values = _read(filename)
    before = DictionarySerializer()
    with contextlib.suppress(RuntimeError):  # a Trainer that has not run has no elapsed time, which comes last
        target.serialize(before)
    optimizers = _optimizers_of(target)
    scalings = [_loss_scaling_of(optimizer) for optimizer in optimizers]  # not saved before the first update
    rules = _rules_without_state(optimizers)
    try:
        for rule in rules:
            rule._state = _state_to_come(rule)
        target.serialize(_DryRun(values))
    except Exception as error:
        raise ValueError(
            f"{filename} is not a snapshot of this {type(target).__name__}: {error.args[0] if error.args else error}; "
            "create model, optimizer and extensions as they were when it was taken"
        ) from error
    finally:
        for rule in rules:
            rule._state = None
        target.serialize(NpzDeserializer(before.target, strict=False))
        for optimizer, scaling in zip(optimizers, scalings):
            vars(optimizer).update(scaling)
    target.serialize(NpzDeserializer(values))


def _read(filename: Union[str, os.PathLike[str]]) -> Dict[str, numpy.ndarray]:
    try:
        # The file is opened here, because NumPy does not close a file that it cannot read.
        with open(filename, "rb") as file, numpy.load(file, allow_pickle=True) as npz:
            return {name: npz[name] for name in npz.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # its type depends on where the file is damaged
        raise ValueError(
            f"{filename} cannot be read as a snapshot, {type(error).__name__}: {error}; "
            "it may be truncated or damaged, so load an earlier one"
        ) from error


def _optimizers_of(target: Any) -> List[Any]:
    updater = getattr(target, "updater", target)
    return list(updater.get_all_optimizers().values()) if hasattr(updater, "get_all_optimizers") else [target]


def _loss_scaling_of(optimizer: object) -> Dict[str, Any]:
    return {name: value for name, value in vars(optimizer).items() if name.startswith("_loss_scal")}


def _rules_without_state(optimizers: List[Any]) -> List[chainer.UpdateRule]:
    """Returns the update rules that will load a state and have none yet."""
    links = [getattr(optimizer, "target", None) for optimizer in optimizers]
    rules = [param.update_rule for link in links if link is not None for param in link.params()]
    return [rule for rule in rules if rule is not None and rule.enabled and rule.state is None]


def _state_to_come(rule: chainer.UpdateRule) -> Dict[str, Any]:
    """Returns a state with unknown values. Chainer creates one in the same way to learn the names."""
    duplicate = copy.copy(rule)
    duplicate._state = {}
    array = numpy.empty(1, numpy.float32)
    duplicate.init_state(chainer.Variable(array, grad=array))
    return dict.fromkeys(duplicate.state, _UNKNOWN)


class _DryRun(chainer.Deserializer):
    """Deserializer that loads numbers and text, which are easy to restore, but only checks arrays."""

    def __init__(self, values: Dict[str, numpy.ndarray], path: str = "") -> None:
        self._values = values
        self._path = path

    def __getitem__(self, key: str) -> _DryRun:
        return _DryRun(self._values, f"{self._path}{key.strip('/')}/")

    def __call__(self, key: str, value: Any) -> Any:
        name = self._path + key.lstrip("/")
        if name not in self._values:
            raise KeyError(f"it has no {name}")
        if value is None or value is _UNKNOWN:
            return value
        if not isinstance(value, chainer.get_array_types()):
            return NpzDeserializer(self._values)(name, value)
        saved = self._values[name]
        if saved[()] is not None and not (
            saved.shape == value.shape and numpy.can_cast(saved.dtype, value.dtype, "same_kind")
        ):
            raise ValueError(f"{name} is {saved.dtype} of shape {saved.shape}, not {value.dtype} of {value.shape}")
        return value
