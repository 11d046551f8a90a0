"""Windows over all ranks of ChainerMN: one all-reduce of gradients per window, with global weights.

ChainerMN's optimizer averages the gradients of the ranks. The average equals the gradient over all examples only if
every rank has the same number of them. So each rank scales its sums by the weight of all ranks, and ChainerMN's mean
then equals the gradient that one process would compute from all examples. For this, the ranks add up one number per
window.

When ChainerMN's optimizer meets new parameters, it broadcasts those of the first rank and drops the gradients. So a
window does this itself, before its first pass. If parameters are initialized in a pass, the window broadcasts them
after all passes and repeats these. No window is lost.

If one rank takes part in a collective operation, all must. So each decision here depends on a number that all ranks
have added up, or on parameters that they have shared.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import chainer
import numpy

from chainer_accum._devices import device_of
from chainer_accum.observations import reporting_to
from chainer_accum.window.lockstep_window import LockstepWindow
from chainer_accum.window.options import DEFAULTS, WindowOptions
from chainer_accum.window.window import Window

if TYPE_CHECKING:
    from chainermn.communicators.communicator_base import CommunicatorBase
    from chainermn.optimizers import _MultiNodeOptimizer


def communicator_of(optimizer: chainer.Optimizer) -> Optional[CommunicatorBase]:
    """Returns the communicator of a multi-node optimizer, or ``None`` for any other optimizer.

    Raises:
        ValueError: If the optimizer uses double buffering.

    """
    chainermn = sys.modules.get("chainermn.optimizers")  # if it is not imported, there is no such optimizer
    if chainermn is None:
        return None
    if isinstance(optimizer, chainermn._DoubleBufferingOptimizer):
        raise ValueError(
            "optimizer must not use double buffering, got double_buffering=True: it would update with the gradients of "
            "the previous window, and drop the first two; call create_multi_node_optimizer without it"
        )
    return optimizer.communicator if isinstance(optimizer, chainermn._MultiNodeOptimizer) else None


def window_class(optimizer: chainer.Optimizer, options: WindowOptions = DEFAULTS) -> Type[Window]:
    """Returns the class of the windows that an optimizer and its options need.

    Raises:
        ValueError: If passes are to run in lockstep and the optimizer is a multi-node one.

    """
    if communicator_of(optimizer) is None:
        return Window if options.lockstep is None else LockstepWindow
    if options.lockstep is not None:
        raise ValueError(
            "lockstep must be None with a multi-node optimizer, got one with a communicator: each rank would see the "
            "statistics of its own examples only; use MultiNodeBatchNormalization, or a single process"
        )
    return MultiNodeWindow


def links_communicate(optimizer: chainer.Optimizer) -> bool:
    """Returns whether forward passes of the model wait for those of other ranks."""
    return communicator_of(optimizer) is not None and any(map(_communicates, optimizer.target.links()))


def join_update(optimizer: chainer.Optimizer, options: WindowOptions) -> bool:
    """Takes part in an update of the other ranks with a window that has no micro-batches.

    Returns:
        bool: Whether there was an update. There is none on a single process, or if no rank has a micro-batch.

    """
    if communicator_of(optimizer) is None:
        return False
    window = MultiNodeWindow(optimizer, options)
    window.update()
    chainer.report(window.observation)
    return window.has_data


def join_remaining_updates(optimizer: chainer.Optimizer, options: WindowOptions) -> None:
    """Takes part in the updates of the other ranks until all ranks call this."""
    while join_update(optimizer, options):
        pass


class MultiNodeWindow(Window):
    r"""Window that spans all ranks, each of which has its own micro-batches, or none.

    With losses that are means, the gradient that reaches the optimizer of each rank is
    :math:`\sum_i w_i g_i / \sum_i w_i` over the micro-batches :math:`i` of all ranks; with losses that are sums, it is
    :math:`\sum_i g_i`. Each rank must call :meth:`update` once, even if it has added nothing.

    While the model has uninitialized parameters, the window keeps the arguments of its calls, to repeat the calls if
    the ranks have started with different values. Repeated calls report nothing, and draw new random numbers.

    The ranks may have different numbers of micro-batches, unless the model has links that communicate, such as
    :class:`chainermn.links.MultiNodeBatchNormalization`. In that case, the ranks check before each pass that all of
    them run one.

    The arguments are those of :class:`Window`. The optimizer is a multi-node one, and the expected weight is that of
    this rank.

    Attributes:
        has_data (bool): After :meth:`update`, whether any rank had a micro-batch. If none had, nothing was updated.

    """

    is_shared = True
    has_data = False
    _optimizer: _MultiNodeOptimizer
    _has_begun = False
    _uninitialized: Sequence[chainer.Parameter] = ()
    _passes: Sequence[Callable[[], bool]] = ()  # that may have to be repeated
    _global_weight = 0.0

    @property
    def _communicator(self) -> CommunicatorBase:
        return self._optimizer.communicator

    @functools.cached_property
    def _is_in_lockstep(self) -> bool:
        return links_communicate(self._optimizer)

    @property
    def is_repeatable(self) -> bool:  # type: ignore[override]
        # Other ranks may be in the same pass, or wait for the parameters that were initialized in it.
        return not self._is_in_lockstep and not self._uninitialized

    def add(self, lossfun: Callable[..., chainer.Variable], *args: Any, weight: float = 1, **kwargs: Any) -> bool:
        """Runs one forward and one backward pass. See :meth:`Window.add`.

        Raises:
            RuntimeError: If the model has links that communicate, and another rank runs no pass now; or if the window
                has ended, because it was updated or because a pass failed that the ranks cannot repeat.

        """
        self.check_open()
        self._share_parameters_at_first()
        run = functools.partial(super().add, lossfun, *args, weight=weight, **kwargs)
        if self._is_in_lockstep:
            self._agree_on_pass(True)
        try:
            is_counted = run()
        except BaseException:
            self.is_open = self.is_open and not self._is_in_lockstep  # the other ranks are in that pass
            raise
        if self._uninitialized:
            self._passes = [*self._passes, run]
        return is_counted

    def add_gradients(self, weight: float = 1) -> bool:
        """Adds the current gradients of the parameters. See :meth:`Window.add_gradients`.

        Raises:
            RuntimeError: If they were computed while the ranks had different parameters. From then on, the parameters
                are the same.

        """
        self.check_open()
        self._has_taken_gradients = True
        self._share_parameters_at_first()
        return super().add_gradients(weight)

    def update(self) -> bool:
        """Updates the parameters of all ranks once, if any rank had a micro-batch. See :meth:`Window.update`."""
        self.check_open()
        self._share_parameters_at_first()
        if self._is_in_lockstep:
            self._agree_on_pass(False)
        if self._uninitialized:
            self._share_new_parameters()
        self._global_weight = self._sum_over_ranks(self.weights.total)
        if not math.isfinite(self._global_weight):
            self.is_open = False
            raise ValueError(
                f"the weights of all ranks must have a finite sum, got {self._global_weight}; return smaller weights"
            )
        self.has_data = self._global_weight > 0 or self._sum_over_ranks(self.num_micro_batches) > 0
        if self.has_data:
            return super().update()
        self.is_open = False
        return False

    def _give_gradients(self) -> None:
        ranks = float(self._communicator.size)  # ChainerMN divides the sum by this
        weights = self.weights
        if self._options.is_mean and weights:
            part = ranks / self._global_weight
            self._gradients.give(weights.divisor * part, weights.total * part)
        else:
            self._gradients.give(1.0 if self._options.is_mean else ranks, ranks)
        for param in self._optimizer.target.params(include_uninit=False):
            with device_of(param.array):
                if param.grad is None:  # other ranks may have one, and all must send the same arrays
                    param.grad = param.xp.zeros(param.shape, param.dtype)
                elif not param.grad.flags.c_contiguous:  # ChainerMN would average a copy
                    param.grad = param.xp.ascontiguousarray(param.grad)
            if not self._has_taken_gradients:
                param._loss_scale = self._gradients.loss_scale  # even if only other ranks ran backward passes
        self._optimizer.is_changed(self._optimizer.target)  # registers all parameters as known

    def _is_all_skipped(self) -> bool:
        return self._global_weight == 0 and self._sum_over_ranks(self._has_skipped_weight) > 0

    def _share_parameters_at_first(self) -> None:
        """Gives all ranks the same parameters, if these are new to the optimizer."""
        if self._has_begun:
            return
        self._has_begun = True
        target = self._optimizer.target
        have_differed = self._optimizer.is_changed(target) and share_parameters(target, self._communicator)
        # In a resumed run, the window may have micro-batches already.
        if have_differed and (self._has_taken_gradients or self.num_micro_batches > 0):
            self._refuse_gradients()
        self._uninitialized = [param for param in target.params() if param.array is None]

    def _share_new_parameters(self) -> None:
        """Gives all ranks the same new parameters, and repeats all passes if the ranks had different ones."""
        is_initialized = any(param.array is not None for param in self._uninitialized)
        if not self._sum_over_ranks(is_initialized) or not share_parameters(self._optimizer.target, self._communicator):
            return
        if self._has_taken_gradients:
            self._refuse_gradients()
        self._effects.undo_all()
        self._begin()
        with reporting_to({}):
            for run in self._passes:
                run()

    def _refuse_gradients(self) -> None:
        self.is_open = False
        raise RuntimeError(
            "the ranks must have the same parameters before a backward pass that cannot be repeated here, got "
            "gradients of different ones; they have the same parameters now, so run the pass again, or start all ranks "
            "with the same random seed"
        )

    def _agree_on_pass(self, has_pass: bool) -> None:
        """Raises RuntimeError on every rank unless either all ranks or none have another pass."""
        ranks = self._sum_over_ranks(has_pass)
        if ranks not in (0, self._communicator.size):
            self.is_open = False
            raise RuntimeError(
                "each rank must have the same number of micro-batches if links of the model communicate, got "
                f"micro-batch {self.num_micro_batches + 1} on only {ranks:.0f} of {self._communicator.size} ranks; "
                "give all ranks the same number of examples, accumulation_steps and micro_batch_size, or use links "
                "that do not communicate"
            )

    def _sum_over_ranks(self, value: float) -> float:
        return float(self._communicator.allreduce(numpy.array([value], numpy.float64))[0])


def share_parameters(target: chainer.Link, communicator: CommunicatorBase) -> bool:
    """Gives all ranks the same parameters. Each comes from the first rank that has initialized it.

    Returns:
        bool: Whether any rank had different values.

    """
    params: List[Tuple[str, chainer.Parameter]] = sorted(target.namedparams())
    shapes = {name: param.shape for name, param in params if param.array is not None}
    roots: Dict[str, Tuple[int, Tuple[int, ...]]] = {}
    for rank, shapes_there in enumerate(communicator.bcast_obj(communicator.gather_obj(shapes))):
        for name, shape in shapes_there.items():
            roots.setdefault(name, (rank, shape))
    host = chainer.get_device("@numpy")
    differs = False
    for name, param in params:
        if name not in roots:
            continue
        root, shape = roots[name]
        own = None if param.array is None else host.send(param.array)
        values = communicator.bcast_obj(own if communicator.rank == root else None, root=root)
        if own is None:
            param.initialize(shape)
        elif not numpy.array_equal(own, values):
            differs = True
        with device_of(param.array):
            param.array[...] = param.device.send(values)
    return bool(communicator.allreduce_obj(int(differs)))


def _communicates(link: chainer.Link) -> bool:
    return any(base.__module__.startswith("chainermn.") for base in type(link).__mro__)
