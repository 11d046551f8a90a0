from typing import Any

from chainer.training.extension import Extension
from chainer.training.trigger import _Trigger, _TriggerSpec

class Trainer:
    observation: dict[str, Any]
    out: str
    stop_trigger: _Trigger
    # An Updater. Which one, only the program knows.
    updater: Any
    def __init__(self, updater: Any, stop_trigger: _TriggerSpec = ..., out: str = ...) -> None: ...
    def extend(self, extension: Extension) -> None: ...
    def run(self, show_loop_exception_msg: bool = ...) -> None: ...
