"""Windows over the ranks of ChainerMN: one all-reduce of gradients per window, and weights that are global.

ChainerMN's optimizer averages the gradients of the ranks. That is the gradient over all examples only where each rank
has as many. So here each rank scales its sums by the weight of all ranks, and the mean that ChainerMN takes is the
gradient that one process would have with the examples of all. For that, the ranks add up one number per window.

When parameters are new to it, ChainerMN's optimizer gives all ranks those of the first one, and drops the gradients. So
a window does that itself, before its first pass; if parameters are born in a pass, it shares them once all passes are
done, and runs these again. No window is lost.

What one rank does in a collective, all must do. So each decision here is made from a number that all ranks have added
up, or from parameters that they have shared.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

import chainer
import numpy

from chainer_accum._devices import device_of
from chainer_accum.observations import reporting_to
from chainer_accum.window import Window


def communicator_of(optimizer: Any) -> Optional[Any]:
    """Returns the communicator of a multi-node optimizer, or ``None`` for any other.

    Raises:
        ValueError: If the optimizer uses double buffering.

    """
    chainermn = sys.modules.get("chainermn.optimizers")  # where nobody has imported it, there is no such optimizer
    if chainermn is None:
        return None
    if isinstance(optimizer, chainermn._DoubleBufferingOptimizer):
        raise ValueError(
            "optimizer must not use double buffering, got double_buffering=True: it would update with the gradients of "
            "the window before, and drop the first two; call create_multi_node_optimizer without it"
        )
    return optimizer.communicator if isinstance(optimizer, chainermn._MultiNodeOptimizer) else None


def begin_window(optimizer: Any, *args: Any, **kwargs: Any) -> Window:
    """Returns a new window, one over all ranks if the optimizer is a multi-node one. See :class:`Window`."""
    window_class = Window if communicator_of(optimizer) is None else MultiNodeWindow
    return window_class(optimizer, *args, **kwargs)


def links_communicate(optimizer: Any) -> bool:
    """Returns whether forward passes of the model wait for those of other ranks."""
    return communicator_of(optimizer) is not None and any(map(_communicates, optimizer.target.links()))


def update_without_data(optimizer: Any, loss_reduction: str = "mean") -> bool:
    """Takes part in the update of the other ranks with a window that has no micro-batch.

    Returns:
        bool: Whether there was an update. There is none on a single process, or if no rank has a micro-batch.

    """
    window = begin_window(optimizer, loss_reduction)
    if not isinstance(window, MultiNodeWindow):
        return False
    window.update()
    return window.has_data


def finish(optimizer: Any, loss_reduction: str = "mean") -> None:
    """Takes part in the updates of the other ranks until all of them call this."""
    while update_without_data(optimizer, loss_reduction):
        pass


class MultiNodeWindow(Window):
    r"""A window of which each rank has its own micro-batches, and some maybe none.

    With losses that are means, the gradient that reaches the optimizer of each rank is
    :math:`\sum_i w_i g_i / \sum_i w_i` over the micro-batches :math:`i` of all ranks; with losses that are sums, it is
    :math:`\sum_i g_i`. Each rank is to call :meth:`update` once, even if it has nothing to add.

    While the model has uninitialized parameters, the window holds the arguments of its calls, to repeat them if the
    ranks find that they have begun with different values. Repeated calls report nothing, and draw new random numbers.

    The numbers of micro-batches may differ, unless the model has links that communicate, such as
    :class:`chainermn.links.MultiNodeBatchNormalization`: then the ranks make sure before each pass that all run one.

    Args:
        optimizer: Multi-node optimizer that has been set up with the model.
        *args: As for :class:`Window`. The expected weight is that of this rank.
        **kwargs: As for :class:`Window`.

    Attributes:
        has_data (bool): After :meth:`update`, whether any rank had a micro-batch. If none had, nothing was updated.

    """

    is_shared = True

    def __init__(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self._communicator = optimizer.communicator
        self._is_in_lockstep = links_communicate(optimizer)
        self._has_begun = False
        self._unborn: List[chainer.Parameter] = []
        self._passes: List[Callable[[], Any]] = []
        self._global_weight = 0.0
        self.has_data = False

    @property
    def is_repeatable(self) -> bool:  # type: ignore[override]
        # Other ranks may be in the same pass, or wait to hear of the parameters that were born in it.
        return not self._is_in_lockstep and not self._unborn

    def add(self, lossfun: Callable[..., chainer.Variable], *args: Any, weight: float = 1, **kwargs: Any) -> bool:
        """Runs one forward and one backward pass. See :meth:`Window.add`.

        Raises:
            RuntimeError: If the model has links that communicate, and another rank runs no pass now; or if the window
                is over: it was updated, or a pass of it failed where the ranks cannot repeat it.

        """
        self.check_open()
        self._share_parameters_at_first()
        run = functools.partial(super().add, lossfun, *args, weight=weight, **kwargs)
        if self._is_in_lockstep:
            self._agree_on_pass(True)
        try:
            is_counted = run()
        except BaseException:
            self.is_open = self.is_open and not self._is_in_lockstep  # the other ranks are in that pass, too
            raise
        if self._unborn:
            self._passes.append(run)
        return is_counted

    def add_gradients(self, weight: float = 1) -> bool:
        """Adds the gradients that the parameters have. See :meth:`Window.add_gradients`.

        Raises:
            RuntimeError: If they were computed before the ranks had the same parameters, which they have from then on.

        """
        self.check_open()
        self._has_taken_gradients = True
        self._share_parameters_at_first()
        return super().add_gradients(weight)

    def update(self) -> bool:
        """Updates the parameters of all ranks once, if any of them had a micro-batch. See :meth:`Window.update`."""
        self.check_open()
        self._share_parameters_at_first()
        if self._is_in_lockstep:
            self._agree_on_pass(False)
        if self._unborn:
            self._share_new_parameters()
        self._global_weight = self._sum_over_ranks(self.weights.total)
        if not math.isfinite(self._global_weight):
            self.is_open = False
            raise ValueError(
                f"the weights of all ranks must have a finite sum, got {self._global_weight}; scale them down"
            )
        self.has_data = self._global_weight > 0 or self._sum_over_ranks(self.micro_batches) > 0
        if self.has_data:
            return super().update()
        self.is_open = False
        return False

    def _give_gradients(self) -> None:
        ranks = float(self._communicator.size)  # by which ChainerMN will divide the sum
        weights = self.weights
        if self._is_mean and weights:
            part = ranks / self._global_weight
            self._gradients.give(weights.divisor * part, weights.total * part)
        else:
            self._gradients.give(1.0 if self._is_mean else ranks, ranks)
        for param in self._optimizer.target.params(include_uninit=False):
            with device_of(param.array):
                if param.grad is None:  # not so on the other ranks, maybe, and what one sends, all must
                    param.grad = param.xp.zeros(param.shape, param.dtype)
                elif not param.grad.flags.c_contiguous:  # of which ChainerMN would average a copy
                    param.grad = param.xp.ascontiguousarray(param.grad)
            if not self._has_taken_gradients:
                param._loss_scale = self._gradients.loss_scale  # even if the backward passes were those of other ranks
        self._optimizer.is_changed(self._optimizer.target)  # from here on, no parameter is new to it

    def _is_all_skipped(self) -> bool:
        return self._global_weight == 0 and self._sum_over_ranks(self._has_skipped_weight) > 0

    def _share_parameters_at_first(self) -> None:
        """Gives the ranks the same parameters if these are new to the optimizer."""
        if self._has_begun:
            return
        self._has_begun = True
        target = self._optimizer.target
        have_differed = self._optimizer.is_changed(target) and share_parameters(target, self._communicator)
        # There are micro-batches already if the window is one of a run that was resumed.
        if have_differed and (self._has_taken_gradients or self.micro_batches > 0):
            self._refuse_gradients()
        self._unborn = [param for param in target.params() if param.array is None]

    def _share_new_parameters(self) -> None:
        """Gives the ranks the same new parameters, and runs all passes again if these have had other ones."""
        is_born = any(param.array is not None for param in self._unborn)
        if not self._sum_over_ranks(is_born) or not share_parameters(self._optimizer.target, self._communicator):
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
            "gradients of different ones; they have been given the same now: run the pass again, or begin each rank "
            "with the same random seed"
        )

    def _agree_on_pass(self, has_pass: bool) -> None:
        """Raises on each rank unless all ranks have another pass or none has."""
        ranks = self._sum_over_ranks(has_pass)
        if ranks not in (0, self._communicator.size):
            self.is_open = False
            raise RuntimeError(
                "each rank must have the same number of micro-batches where links of the model communicate, got "
                f"micro-batch {self.micro_batches + 1} on {ranks:.0f} of {self._communicator.size} ranks only; "
                "give the ranks as many examples each, with the same accumulation_steps and micro_batch_size, or use "
                "links that do not communicate"
            )

    def _sum_over_ranks(self, value: float) -> float:
        return float(self._communicator.allreduce(numpy.array([value], numpy.float64))[0])


def share_parameters(target: chainer.Link, communicator: Any) -> bool:
    """Gives all ranks the same parameters: of each, the values of the first rank that has initialized it.

    Returns:
        bool: Whether a rank had others.

    """
    params: List[Tuple[str, chainer.Parameter]] = sorted(target.namedparams())
    shapes = {name: param.shape for name, param in params if param.array is not None}
    roots: Dict[str, Tuple[int, Any]] = {}
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
