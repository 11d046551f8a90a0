from chainer.function_node import FunctionNode

class SimplifiedDropconnect(FunctionNode):
    use_batchwise_mask: bool
