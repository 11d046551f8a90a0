from chainer.dataset import convert as convert
from chainer.dataset.convert import ConcatWithAsyncTransfer as ConcatWithAsyncTransfer
from chainer.dataset.convert import Converter as Converter
from chainer.dataset.convert import concat_examples as concat_examples
from chainer.dataset.iterator import Iterator as Iterator

class DatasetMixin: ...
