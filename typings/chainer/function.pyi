from typing import Any, ContextManager

from chainer.function_node import FunctionNode

class Function: ...

class FunctionAdapter(FunctionNode):
    # A Function, which is a class of its own, but has the names that hooks look up.
    @property
    def function(self) -> Any: ...

def no_backprop_mode() -> ContextManager[None]: ...
