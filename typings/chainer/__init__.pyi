# What chainer_accum uses of Chainer 7.8.1, for its own run of mypy. Chainer says that it is typed, but mostly is not.

from typing import Any, Sequence

from chainer import backend as backend
from chainer import backends as backends
from chainer import dataset as dataset
from chainer import functions as functions
from chainer import iterators as iterators
from chainer import links as links
from chainer import optimizer as optimizer
from chainer import reporter as reporter
from chainer import serializers as serializers
from chainer import training as training
from chainer import types as types
from chainer import variable as variable
from chainer.backend import get_device as get_device
from chainer.backend import using_device as using_device
from chainer.configuration import config as config
from chainer.configuration import using_config as using_config
from chainer.function import Function as Function
from chainer.function import FunctionAdapter as FunctionAdapter
from chainer.function import no_backprop_mode as no_backprop_mode
from chainer.function_hook import FunctionHook as FunctionHook
from chainer.function_node import FunctionNode as FunctionNode
from chainer.initializer import Initializer as Initializer
from chainer.link import Link as Link
from chainer.link_hook import LinkHook as LinkHook
from chainer.optimizer import GradientMethod as GradientMethod
from chainer.optimizer import Optimizer as Optimizer
from chainer.optimizer import UpdateRule as UpdateRule
from chainer.reporter import DictSummary as DictSummary
from chainer.reporter import Reporter as Reporter
from chainer.reporter import get_current_reporter as get_current_reporter
from chainer.reporter import report as report
from chainer.serializer import AbstractSerializer as AbstractSerializer
from chainer.serializer import Deserializer as Deserializer
from chainer.serializer import Serializer as Serializer
from chainer.variable import Parameter as Parameter
from chainer.variable import Variable as Variable
from chainer.variable import as_array as as_array
from chainer.variable import as_variable as as_variable

__version__: str

def backward(outputs: Sequence[Variable], grad_outputs: Sequence[Variable | None] | None = ...) -> None: ...
def get_array_types() -> tuple[type[Any], ...]: ...
def get_function_hooks() -> dict[str, FunctionHook]: ...
def _get_link_hooks() -> dict[str, LinkHook]: ...
def is_debug() -> bool: ...
