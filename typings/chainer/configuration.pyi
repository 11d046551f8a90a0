import threading
from typing import Any, ContextManager

class LocalConfig:
    dtype: Any
    enable_backprop: bool
    in_recomputing: bool
    keep_graph_on_report: bool
    train: bool
    _local: threading.local

config: LocalConfig

def using_config(name: str, value: Any, config: LocalConfig = ...) -> ContextManager[None]: ...
