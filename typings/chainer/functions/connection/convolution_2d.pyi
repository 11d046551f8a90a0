from chainer.function_node import FunctionNode

class Convolution2DFunction(FunctionNode):
    dx: int
    dy: int
    groups: int
    ph: int
    pw: int
    sx: int
    sy: int
