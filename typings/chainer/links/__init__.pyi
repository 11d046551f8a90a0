from chainer.link import Link
from chainer.types import NdArray

class BatchNormalization(Link):
    N: int
    avg_mean: NdArray
    avg_var: NdArray
