"""Micro-batches that are padded like the whole batch: the rows of what the converter returned for it.

A converter pads the examples of a micro-batch to the longest of them, which may be shorter than the longest of the
batch. If a model reads padding, its gradient depends on that. To tell this from a loss that compares examples, the
batch is converted once, and the micro-batches are cut from the result.
"""

from __future__ import annotations

from typing import Any, Callable, Hashable, List, Optional, Sequence, Tuple

import chainer

from chainer_accum._devices import DeviceSpec
from chainer_accum.batches import Arguments

Converted = Any  # an array or a Variable, or a tuple, list or dict of them


class PaddedAlike(chainer.dataset.Converter):
    """Converter for the very micro-batches that it was made for.

    Args:
        converted (list): Pairs of the examples of a micro-batch and what they are converted to.

    """

    def __init__(self, converted: Sequence[Tuple[Sequence[Any], Converted]]) -> None:
        self._converted = converted

    def __call__(self, batch: Any, device: Optional[DeviceSpec] = None) -> Converted:
        return next(converted for examples, converted in self._converted if examples is batch)


def pad_alike(
    converter: Callable[..., Any],
    batch: Sequence[Any],
    parts: Sequence[Sequence[Any]],
    device: Optional[chainer.backend.Device],
) -> Optional[PaddedAlike]:
    """Returns a converter that pads the parts of a batch like the whole batch.

    Returns:
        PaddedAlike: The converter, or ``None`` if the arrays of a batch cannot be cut by example, or if the parts have
        the same shapes anyway.

    """
    shapes = [_shapes(_convert(converter, part, device)) for part in parts]
    whole = _convert(converter, batch, device)  # last, because a converter may use its buffers again
    rows: List[Converted] = []
    start = 0
    for part in parts:
        try:
            rows.append(_cut(whole, len(batch), slice(start, start + len(part))))
        except _CannotBeCut:
            return None
        start += len(part)
    if [_shapes(each) for each in rows] == shapes:
        return None
    return PaddedAlike([(batch, whole), *zip(parts, rows)])


class _CannotBeCut(Exception):
    """Raised for an array whose first axis is not that of the examples, or for an object of another kind."""


def _convert(converter: Callable[..., Any], examples: Sequence[Any], device: Optional[DeviceSpec]) -> Converted:
    arguments = Arguments(converter, examples, device)
    return arguments.kwargs or arguments.args


def _cut(value: Converted, size: int, rows: slice) -> Converted:
    """Returns the rows of arrays whose first axis is that of the examples, and of lists with an item for each."""
    if getattr(value, "shape", ()):
        if len(value) != size:
            raise _CannotBeCut
        return value[rows]
    if isinstance(value, dict):
        return {key: _cut(each, size, rows) for key, each in value.items()}
    if isinstance(value, list) and len(value) == size:
        return value[rows]
    if isinstance(value, (tuple, list)):
        make: Callable[..., Converted] = getattr(type(value), "_make", type(value))  # that of a named tuple
        return make(_cut(each, size, rows) for each in value)
    if value is None or isinstance(value, (int, float, str)) or getattr(value, "shape", None) == ():
        return value  # such as the length to which the examples are padded
    raise _CannotBeCut


def _shapes(value: Converted) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _shapes(each)) for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return getattr(value, "shape", None)
