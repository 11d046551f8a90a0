from chainer.function_node import FunctionNode
from chainer.types import NdArray

class Dropout(FunctionNode):
    dropout_ratio: float
    mask: NdArray | None
