from chainer.function_node import FunctionNode
from chainer.types import NdArray

class BatchNormalization(FunctionNode):
    decay: float
    running_mean: NdArray | None
    running_var: NdArray | None
