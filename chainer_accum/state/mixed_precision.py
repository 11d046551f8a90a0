"""Serialization of mixed-precision state that Chainer's snapshots leave out.

This is the loss scale found by dynamic scaling, and the float32 copies of float16 parameters, which keep the small
steps that float16 would round away. Without them, a resumed run differs from an uninterrupted one.
"""

from __future__ import annotations

import contextlib

import chainer
import numpy


def serialize_mixed_precision(
    optimizer: chainer.Optimizer, serializer: chainer.AbstractSerializer, prefix: str
) -> None:
    """Serializes the dynamic loss scale and the float32 copies of the parameters of an optimizer.

    Snapshots without these values can be loaded. Serialize the parameters first.

    Args:
        optimizer (~chainer.Optimizer): Optimizer that has been set up.
        serializer (~chainer.AbstractSerializer): Serializer or deserializer.
        prefix (str): Prefix of the names of the values.

    """
    # Chainer has no public access to these values.
    is_new = optimizer.t == 0 and isinstance(serializer, chainer.Serializer)  # it has the initial scale
    if optimizer._loss_scaling_is_dynamic and not is_new:
        with contextlib.suppress(KeyError):
            optimizer._loss_scale = serializer(f"{prefix}loss_scale", optimizer._loss_scale)
            was_nonfinite = serializer(f"{prefix}was_nonfinite", optimizer._loss_scaling_isnan_ever)
            optimizer._loss_scaling_isnan_ever = was_nonfinite
    for name, param in optimizer.target.namedparams(include_uninit=False):
        rule = param.update_rule
        if rule is not None and rule._use_fp32_update and param.dtype == numpy.float16:
            _serialize_float32(rule, param, serializer, f"{prefix}float32{name}")


def _serialize_float32(
    rule: chainer.UpdateRule, param: chainer.Parameter, serializer: chainer.AbstractSerializer, key: str
) -> None:
    if isinstance(serializer, chainer.Serializer):
        if rule._fp32_param is not None:
            serializer(key, rule._fp32_param.array)
        return
    rule._fp32_param = None  # the old copy is outdated; the rule makes a new one from the parameter
    with contextlib.suppress(KeyError):
        array = serializer(key, None)
        if array is not None:
            rule._fp32_param = chainer.Parameter(array, name=param.name)
            rule._fp32_param.to_device(param.device)
