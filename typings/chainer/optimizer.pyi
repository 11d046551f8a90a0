from typing import Any, Callable

from chainer.link import Link
from chainer.serializer import AbstractSerializer
from chainer.variable import Parameter, Variable
from typing_extensions import Self

class Hyperparameter:
    def get_dict(self) -> dict[str, Any]: ...

class UpdateRule:
    enabled: bool
    hyperparam: Hyperparameter
    _fp32_param: Parameter | None
    _state: dict[str, Any] | None
    _use_fp32_update: bool
    # None until there is one.
    @property
    def state(self) -> dict[str, Any] | Any: ...
    def init_state(self, param: Variable) -> None: ...

class Optimizer:
    # None before setup, which comes before all else.
    target: Link
    t: int
    epoch: int
    _loss_scale: float | None
    _loss_scaling_is_dynamic: bool
    _loss_scaling_isnan_ever: bool
    def new_epoch(self, auto: bool = ...) -> None: ...
    def serialize(self, serializer: AbstractSerializer) -> None: ...
    def setup(self, link: Link) -> Self: ...
    def update(self, lossfun: Callable[..., Variable] | None = ..., *args: Any, **kwds: Any) -> None: ...

class GradientMethod(Optimizer):
    hyperparam: Hyperparameter
    def create_update_rule(self) -> UpdateRule | None: ...
