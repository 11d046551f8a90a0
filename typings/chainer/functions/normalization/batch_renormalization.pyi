from chainer.function import Function

class BatchRenormalizationFunction(Function):
    decay: float
    update_statistics: bool
