from typing import Any, Callable

import numpy
from chainer.function_node import FunctionNode
from chainer.types import NdArray, Xp

class BatchNormalization(FunctionNode):
    axis: tuple[int, ...] | None
    decay: float
    running_mean: NdArray | None
    running_var: NdArray | None
    _impl_selector: Callable[..., Any]

class GeneralBatchNormalizationImpl:
    def forward(
        self,
        axis: tuple[int, ...],
        gamma: NdArray,
        x: NdArray,
        x_layout: Any,
        xp: Xp,
        expander: Any,
        beta: NdArray,
        eps: float,
        decay: float,
        running_mean: NdArray | None,
        running_var: NdArray | None,
    ) -> tuple[Any, ...]: ...
    def get_mean_and_var(
        self, axis: tuple[int, ...], gamma: NdArray, x: NdArray, xp: Xp, interm_dtype: numpy.dtype[Any]
    ) -> tuple[NdArray, NdArray]: ...
    def backward(
        self,
        axis: tuple[int, ...],
        gamma: NdArray,
        gy: NdArray,
        x: NdArray,
        x_layout: Any,
        xp: Xp,
        expander: Any,
        mean: NdArray,
        inv_std: NdArray,
        eps: float,
        var: NdArray | None,
        forward_data: Any,
    ) -> tuple[NdArray | None, ...]: ...

def _impl_selector(batch_norm_func: BatchNormalization, inputs: tuple[NdArray, ...]) -> Any: ...
