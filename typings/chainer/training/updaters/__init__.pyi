from typing import Any, Callable

from chainer.backend import Device
from chainer.dataset import Iterator
from chainer.optimizer import Optimizer
from chainer.training.updater import Updater
from chainer.types import DeviceSpec
from chainer.variable import Variable

class StandardUpdater(Updater):
    auto_new_epoch: bool
    converter: Callable[..., Any]
    iteration: int
    loss_func: Callable[..., Variable] | None
    _iterators: dict[str, Iterator]
    def __init__(
        self,
        iterator: Iterator | dict[str, Iterator],
        optimizer: Optimizer | dict[str, Optimizer],
        converter: Callable[..., Any] = ...,
        device: DeviceSpec | None = ...,
        loss_func: Callable[..., Variable] | None = ...,
        loss_scale: float | None = ...,
        auto_new_epoch: bool = ...,
        *,
        input_device: DeviceSpec | None = ...,
    ) -> None: ...
    @property
    def device(self) -> Device | None: ...
    @property
    def input_device(self) -> Device | None: ...
    @property
    def epoch(self) -> int: ...
    @property
    def epoch_detail(self) -> float: ...
    # None if the iterator does not know it, or does not know it yet.
    @property
    def previous_epoch_detail(self) -> float | None: ...
    @property
    def is_new_epoch(self) -> bool: ...
    def get_iterator(self, name: str) -> Iterator: ...
    def update_core(self) -> None: ...
