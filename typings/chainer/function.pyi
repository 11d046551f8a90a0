import weakref
from typing import Any, ContextManager

from chainer.function_node import FunctionNode

class Function:
    _node: weakref.ReferenceType[FunctionAdapter] | None

class FunctionAdapter(FunctionNode):
    _function: Any
    # A Function, which is a class of its own, but has the names that hooks look up.
    @property
    def function(self) -> Any: ...

def no_backprop_mode() -> ContextManager[None]: ...
