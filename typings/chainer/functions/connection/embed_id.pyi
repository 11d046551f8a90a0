from chainer.function_node import FunctionNode

class EmbedIDFunction(FunctionNode):
    ignore_label: int | None
