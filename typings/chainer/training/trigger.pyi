from typing import Callable

from chainer.training.trainer import Trainer

_Trigger = Callable[[Trainer], bool]
_TriggerSpec = _Trigger | tuple[float, str] | None

def get_trigger(trigger: _TriggerSpec) -> _Trigger: ...
