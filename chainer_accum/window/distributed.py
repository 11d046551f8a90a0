"""Windows over all ranks of ChainerMN: one all-reduce of gradients per window, with global weights.

ChainerMN's optimizer averages the gradients of the ranks. The average equals the gradient over all examples only if
every rank has the same number of them. So each rank scales its sums by the weight of all ranks, and ChainerMN's mean
then equals the gradient that one process would compute from all examples. For this, the ranks add up two numbers per
window: their weights, and how many more pairs of a loss and a weight their loss functions return than one. Only if
there are more, the weights of each of these terms follow.

When ChainerMN's optimizer meets new parameters, it broadcasts those of the first rank and drops the gradients. So a
window does this itself, before its first pass. If parameters are initialized in a pass, the window broadcasts them
after all passes and repeats these. No window is lost.

If one rank takes part in a collective operation, all must. So each decision here depends on a number that all ranks
have added up, or on parameters that they have shared.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence

import chainer
import numpy

from chainer_accum._devices import Array, device_of
from chainer_accum.observations import reporting_to
from chainer_accum.window.ranks import links_communicate
from chainer_accum.window.shared_parameters import share_parameters
from chainer_accum.window.terms import Weight, kind_of
from chainer_accum.window.window import Window

if TYPE_CHECKING:
    from chainermn.communicators.communicator_base import CommunicatorBase
    from chainermn.optimizers import _MultiNodeOptimizer


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

    If the gradient is looked at before the update, by ``skip_update`` or by the caller, it is averaged over the ranks
    before that, and so is the loss.

    Attributes:
        has_data (bool): After :meth:`update`, whether any rank had a micro-batch. If none had, nothing was updated.

    """

    is_shared = True
    has_data = False
    _shows_gradient = False  # before the update
    _global_loss: Optional[Array] = None
    _optimizer: _MultiNodeOptimizer
    _has_begun = False
    _uninitialized: Sequence[chainer.Parameter] = ()
    _passes: Sequence[Callable[[], bool]] = ()  # that may have to be repeated
    _global_weights: Sequence[float] = (0.0,)  # of each term of the losses

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

    def add(self, lossfun: Callable[..., Any], *args: Any, weight: Weight = 1, **kwargs: Any) -> bool:
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
        self._gradients.are_taken = True
        self._share_parameters_at_first()
        return super().add_gradients(weight)

    @property
    def loss(self) -> Optional[Array]:
        """The loss of this rank so far; and that of all ranks while the parameters have the gradient of all."""
        return super().loss if self._global_loss is None else self._global_loss

    def update(self) -> bool:
        """Updates the parameters of all ranks once, if any rank had a micro-batch. See :meth:`Window.update`."""
        self._shows_gradient = self._options.skip_update is not None
        return self._join() and super().update()

    def give_gradients(self) -> None:
        self._shows_gradient = True
        if self._join():
            super().give_gradients()

    def _begin(self) -> None:
        super()._begin()
        if self._options.skip_update is not None:  # then the gradients are averaged already
            self._step.update = self._optimizer.actual_optimizer.update
            self._step.agree = self._agree_on_skipping

    def _join(self) -> bool:
        """Completes the passes of all ranks, and returns whether any rank had one."""
        self.check_open()
        self._share_parameters_at_first()
        if self._is_in_lockstep:
            self._agree_on_pass(False)
        if self._uninitialized:
            self._share_new_parameters()
        self._global_weights = self._sum_weights()
        if not all(map(math.isfinite, self._global_weights)):
            self.is_open = False
            raise ValueError(
                "the weights of all ranks must have a finite sum, got "
                f"{', '.join(map(str, self._global_weights))}; return smaller weights"
            )
        self.has_data = any(self._global_weights) or self._sum_over_ranks(self.num_micro_batches)[0] > 0
        self.is_open = self.has_data
        return self.has_data

    def _sum_weights(self) -> Sequence[float]:
        """Returns the sum of the weights of each term over all ranks."""
        own = [weights.total for weights in self._gradients.term_weights]
        first, num_others = self._sum_over_ranks(own[0], len(own) - 1)
        if num_others == 0:
            return [first]
        num_pairs = self._communicator.bcast_obj(self._communicator.gather_obj(self._gradients.num_pairs))
        different = sorted({number for number in num_pairs if number is not None})
        if len(different) > 1:
            self.is_open = False
            raise TypeError(
                "the loss function must return the same number of pairs (loss, weight) on all ranks, got "
                f"{' and '.join(map(kind_of, different))}; return a weight of 0 for a loss that a micro-batch does not "
                "have"
            )
        return self._sum_over_ranks(*own, *[0.0] * (different[0] - len(own)))

    def _give_gradients(self) -> None:
        ranks = float(self._communicator.size)  # ChainerMN divides the sum by this
        if self._shows_gradient:
            self._sum_losses()
        if self._options.is_mean:
            pairs = list(zip(self._gradients.term_weights, self._global_weights))
            corrections = [weights.divisor * (ranks / total) if weights else 1.0 for weights, total in pairs]
            shares = [weights.total * (ranks / total) if weights else ranks for weights, total in pairs]
            self._gradients.give(corrections, shares[0])
        else:
            self._gradients.give([ranks] * len(self._gradients.term_weights), ranks)
        for param in self._optimizer.target.params(include_uninit=False):
            with device_of(param.array):
                if param.grad is None:  # other ranks may have one, and all must send the same arrays
                    param.grad = param.xp.zeros(param.shape, param.dtype)
                elif not param.grad.flags.c_contiguous:  # ChainerMN would average a copy
                    param.grad = param.xp.ascontiguousarray(param.grad)
            if not self._gradients.are_taken:
                param._loss_scale = self._gradients.loss_scale  # even if only other ranks ran backward passes
        self._optimizer.is_changed(self._optimizer.target)  # registers all parameters as known
        if self._shows_gradient:
            self._communicator.multi_node_mean_grad(self._optimizer.target, self._optimizer.zero_fill)

    def _sum_losses(self) -> None:
        """Adds up the loss over all ranks."""
        pairs = zip(self._gradients.term_weights, self._global_weights)
        shares = [weights.divisor / total if weights else 0.0 for weights, total in pairs]
        share = self._gradients.loss_scaled(shares) if self._options.is_mean else super().loss
        is_unknown = share is None and self.num_micro_batches > 0
        total, num_unknown = self._sum_over_ranks(0.0 if share is None else float(share), is_unknown)
        if num_unknown == 0:
            device = self._optimizer.target.device
            self._global_loss = device.send(numpy.array(total, numpy.float64))

    def _agree_on_skipping(self, answer: bool) -> bool:
        """Returns the answer, or raises RuntimeError on every rank unless all ranks give the same one."""
        (ranks,) = self._sum_over_ranks(answer)
        if ranks not in (0, self._communicator.size):
            raise RuntimeError(
                f"skip_update must return the same on all ranks, got True on only {ranks:.0f} of "
                f"{self._communicator.size}; decide by window.gradient_norm and window.loss, which are those of all "
                "ranks"
            )
        return answer

    def _is_all_skipped(self) -> bool:
        return not any(self._global_weights) and self._sum_over_ranks(self._checks.has_skipped_weight)[0] > 0

    def _share_parameters_at_first(self) -> None:
        """Gives all ranks the same parameters, if these are new to the optimizer."""
        if self._has_begun:
            return
        self._has_begun = True
        target = self._optimizer.target
        have_differed = self._optimizer.is_changed(target) and share_parameters(target, self._communicator)
        # In a resumed run, the window may have micro-batches already.
        if have_differed and (self._gradients.are_taken or self.num_micro_batches > 0):
            self._refuse_gradients()
        self._uninitialized = [param for param in target.params() if param.array is None]

    def _share_new_parameters(self) -> None:
        """Gives all ranks the same new parameters, and repeats all passes if the ranks had different ones."""
        is_initialized = any(param.array is not None for param in self._uninitialized)
        if not self._sum_over_ranks(is_initialized)[0] or not share_parameters(
            self._optimizer.target, self._communicator
        ):
            return
        if self._gradients.are_taken:
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
        (ranks,) = self._sum_over_ranks(has_pass)
        if ranks not in (0, self._communicator.size):
            self.is_open = False
            raise RuntimeError(
                "each rank must have the same number of micro-batches if links of the model communicate, got "
                f"micro-batch {self.num_micro_batches + 1} on only {ranks:.0f} of {self._communicator.size} ranks; "
                "give all ranks the same number of examples, accumulation_steps and micro_batch_size, or use links "
                "that do not communicate"
            )

    def _sum_over_ranks(self, *values: float) -> List[float]:
        sums: List[float] = self._communicator.allreduce(numpy.array(values, numpy.float64)).tolist()
        return sums
