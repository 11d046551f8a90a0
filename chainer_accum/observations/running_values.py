"""RunningValue: the values reported under one key, merged as they arrive."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import chainer
import numpy

from chainer_accum.observations.mergers import MERGERS, Mean
from chainer_accum.observations.reports import (
    Number,
    Reported,
    as_reported,
    device_of_either,
    dtype_of,
    is_numeric,
    is_scalar,
    promoted,
    value_and_weight,
    widened,
    without_graph,
)

_FLOATS = (float, numpy.float32, numpy.float16)


class RunningValue:
    """The values reported under one key, and what they have become so far.

    Args:
        key (str): The key.
        rule (str): Name of the rule, or ``None`` to average scalars and keep the last of anything else.

    """

    def __init__(self, key: str, rule: Optional[str]) -> None:
        self._key = key
        self._rule = rule
        self._merger = MERGERS.get(rule or "", Mean)()
        self._reports = 0
        self._last: Reported = None
        self._own_weight: Number = None
        # Shape and dtype of the merged values.
        self._shape: Optional[Tuple[int, ...]] = None
        self._dtype: Any = None

    def add(self, reported: Reported, weight: Number) -> None:
        self._reports += 1
        self._last = reported
        if isinstance(reported, tuple) and not chainer.config.keep_graph_on_report:
            self.drop_graph()  # chainer.report drops the graph of a Variable, but not inside a tuple
        value, own_weight = value_and_weight(reported)
        if not self._is_merged(value):
            return
        if self._rule is not None:
            self._check_shape(value)
        dtype = dtype_of(value)
        if dtype is not self._dtype:
            self._dtype = dtype if self._dtype is None else numpy.promote_types(self._dtype, dtype)
        weight = weight if own_weight is None else own_weight
        if own_weight is None and type(weight) is float and type(value) in _FLOATS:  # the common case
            self._merger.add(float(value), weight)
            return
        # NaN and infinity are not errors here; extensions look for them.
        with numpy.errstate(all="ignore"), device_of_either(value, weight):
            self._merger.add(value, weight)
            if own_weight is not None:
                own_weight = widened(own_weight, numpy.int64)
                self._own_weight = own_weight if self._own_weight is None else self._own_weight + own_weight

    def drop_graph(self) -> None:
        self._last = without_graph(self._last)

    def merged(self) -> Reported:
        value, _ = value_and_weight(self._last)
        if self._reports == 1 or not self._is_merged(value):
            return self._last
        with numpy.errstate(all="ignore"), device_of_either(value, self._own_weight):
            dtype = promoted(self._dtype, self._merger.least_dtype(self._dtype))
            reported = self._last[0] if isinstance(self._last, tuple) else self._last
            merged = as_reported(reported, self._merger.result(value), dtype)
        return merged if self._own_weight is None else (merged, self._own_weight)

    def _is_merged(self, value: Number) -> bool:
        if self._rule is None:
            return is_scalar(value)
        if self._rule == "last":
            return False
        if not is_numeric(value):
            raise TypeError(
                f"{self._key!r} must be a number or an array of numbers for the rule {self._rule!r}, got {value!r}; "
                "report numbers, or give this key the rule 'last'"
            )
        return True

    def _check_shape(self, value: Number) -> None:
        shape = getattr(value, "shape", ())
        self._shape = shape if self._shape is None else self._shape
        if shape != self._shape:
            raise ValueError(
                f"{self._key!r} must have the same shape in all micro-batches for the rule {self._rule!r}, got "
                f"{self._shape} and {shape}; report a value whose shape does not depend on the micro-batch, such as "
                "a sum over its examples, or give this key the rule 'last'"
            )
