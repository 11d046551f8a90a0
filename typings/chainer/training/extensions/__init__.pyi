from chainer.training.extension import Extension
from chainer.training.extensions import snapshot_writers as snapshot_writers
from chainer.training.trigger import _TriggerSpec

class LogReport(Extension):
    def __init__(self, keys: list[str] | None = ..., trigger: _TriggerSpec = ...) -> None: ...

class ProgressBar(Extension):
    def __init__(self, training_length: tuple[float, str] | None = ..., update_interval: int = ...) -> None: ...
