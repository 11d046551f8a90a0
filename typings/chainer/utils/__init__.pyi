from chainer.types import NdArray, Shape

class CooMatrix:
    def __init__(self, data: NdArray, row: NdArray, col: NdArray, shape: Shape) -> None: ...
