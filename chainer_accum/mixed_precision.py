"""What Chainer's snapshots leave out of training in mixed precision.

That is the loss scale that dynamic scaling has found, and the float32 parameters behind float16 ones, which have the
small steps that float16 would round away. A run resumed without them is another run.
"""

from __future__ import annotations

import contextlib
from typing import Any

import chainer
import numpy


def serialize_mixed_precision(optimizer: Any, serializer: Any, prefix: str) -> None:
    """Serializes the dynamic loss scale and the float32 parameters of an optimizer.

    A snapshot may be without them. The parameters are to be serialized before.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up.
        serializer (~chainer.AbstractSerializer): Serializer or deserializer.
        prefix (str): What the names of the values begin with.

    """
    # Chainer has no public way to these, as it has none to serialize them.
    is_new = optimizer.t == 0 and isinstance(serializer, chainer.Serializer)  # it is as the program has made it
    if optimizer._loss_scaling_is_dynamic and not is_new:
        with contextlib.suppress(KeyError):
            optimizer._loss_scale = serializer(f"{prefix}loss_scale", optimizer._loss_scale)
            was_nonfinite = serializer(f"{prefix}was_nonfinite", optimizer._loss_scaling_isnan_ever)
            optimizer._loss_scaling_isnan_ever = was_nonfinite
    for name, param in optimizer.target.namedparams(include_uninit=False):
        rule = param.update_rule
        if rule is not None and rule._use_fp32_update and param.dtype == numpy.float16:
            _serialize_float32(rule, param, serializer, f"{prefix}float32{name}")


def _serialize_float32(rule: Any, param: chainer.Parameter, serializer: Any, key: str) -> None:
    if isinstance(serializer, chainer.Serializer):
        if rule._fp32_param is not None:
            serializer(key, rule._fp32_param.array)
        return
    rule._fp32_param = None  # those of before belong to other parameters; the rule makes new ones from the parameters
    with contextlib.suppress(KeyError):
        array = serializer(key, None)
        if array is not None:
            rule._fp32_param = chainer.Parameter(array, name=param.name)
            rule._fp32_param.to_device(param.device)
