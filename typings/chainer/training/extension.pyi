from chainer.serializer import AbstractSerializer
from chainer.training.trainer import Trainer
from chainer.training.trigger import _TriggerSpec

PRIORITY_WRITER: int
PRIORITY_EDITOR: int
PRIORITY_READER: int

class Extension:
    # A property, which subclasses replace by a value.
    default_name: str
    name: str | None
    priority: int
    trigger: _TriggerSpec
    def __call__(self, trainer: Trainer) -> object: ...
    def finalize(self) -> None: ...
    def initialize(self, trainer: Trainer) -> None: ...
    def serialize(self, serializer: AbstractSerializer) -> None: ...
