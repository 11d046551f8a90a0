from chainer.link import Link
from chainer.optimizer import Optimizer
from chainermn.communicators.communicator_base import CommunicatorBase

# Not a subclass of Optimizer, but it has all attributes of the one that it wraps.
class _MultiNodeOptimizer(Optimizer):
    communicator: CommunicatorBase
    actual_optimizer: Optimizer
    zero_fill: bool
    def is_changed(self, target: Link) -> bool: ...
