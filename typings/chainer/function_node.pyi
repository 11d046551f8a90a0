import weakref
from typing import Any, Sequence

from chainer.types import NdArray
from chainer.variable import Variable, VariableNode

class FunctionNode:
    inputs: tuple[VariableNode, ...]
    outputs: tuple[weakref.ReferenceType[VariableNode], ...]
    rank: int
    _input_indexes_to_retain: tuple[int, ...] | None
    _output_indexes_to_retain: tuple[int, ...] | None
    _output_layouts: tuple[object | None, ...] | None
    @property
    def input_layouts(self) -> tuple[object | None, ...]: ...
    @property
    def label(self) -> str: ...
    def apply(self, inputs: Sequence[Any]) -> tuple[Variable, ...]: ...
    def forward(self, inputs: tuple[NdArray, ...]) -> tuple[NdArray, ...]: ...
    def backward(
        self, target_input_indexes: tuple[int, ...], grad_outputs: tuple[Variable | None, ...]
    ) -> Sequence[Variable | None]: ...
    def retain_inputs(self, indexes: Sequence[int]) -> None: ...
