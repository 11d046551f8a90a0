"""Step: the end of a window, at which the optimizer updates, unless it is to be skipped or left to the caller."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Dict, List, Optional

import chainer

from chainer_accum._arguments import call
from chainer_accum._devices import Array, are_finite
from chainer_accum.state import DeferredSignals
from chainer_accum.window.gradient_norms import norm_of
from chainer_accum.window.losses import ALL_SKIPPED, has_updated
from chainer_accum.window.options import WindowOptions
from chainer_accum.window.pass_effects import PassEffects
from chainer_accum.window.taken_gradients import mark_as_taken
from chainer_accum.window.weighted_gradients import WeightedGradients


class Step:
    """The step that the optimizer takes at the end of a window, from the gradient that the parameters have by then.

    Args:
        optimizer (~chainer.Optimizer): Optimizer.
        options (WindowOptions): Options of the window.
        gradients (WeightedGradients): The gradients of the window.
        effects (PassEffects): What else the passes change.

    Attributes:
        update (callable): What updates the parameters, or ``None`` for the optimizer's own method.
        agree (callable): Turns the answer of ``skip_update`` into that of all who take part in the step.
        is_done (bool): Whether the window has come to its end.
        is_skipped (bool): Whether ``skip_update`` has said no to the update.

    """

    def __init__(
        self, optimizer: chainer.Optimizer, options: WindowOptions, gradients: WeightedGradients, effects: PassEffects
    ) -> None:
        self._optimizer = optimizer
        self._options = options
        self._gradients = gradients
        self._effects = effects
        self.update: Optional[Callable[[], None]] = None
        self.agree: Callable[[bool], bool] = bool
        self._t = optimizer.t
        self._is_prepared = False
        self._norm: Optional[Array] = None
        self.is_done = False
        self.is_skipped = False

    @property
    def is_first(self) -> bool:
        """Whether the optimizer has never updated before."""
        return self._t == 0

    @property
    def is_ahead(self) -> bool:
        """Whether the optimizer has not updated since the window began."""
        return self._optimizer.t == self._t

    @property
    def gradient_norm(self) -> Optional[Array]:
        """The norm of the gradient of the window, or ``None`` if it has not been read while the parameters have it."""
        if self._norm is None and self._is_prepared:
            grads = [param.grad for param in self.params() if param.grad is not None]
            self._norm = norm_of(grads, self._gradients.loss_scale or 1.0)
        return self._norm

    def params(self) -> List[chainer.Parameter]:
        """Returns the initialized parameters, each once."""
        return list({id(param): param for param in self._optimizer.target.params(include_uninit=False)}.values())

    def observation(self, num_skipped: int) -> Dict[str, int]:
        """Returns what to report at the end: how many micro-batches and updates were skipped, if any may be."""
        reported = {}
        if self.is_done and self._options.nonfinite == "skip":
            reported["skipped_micro_batches"] = num_skipped
        if self.is_done and self._options.skip_update is not None:
            reported["skipped_updates"] = int(self.is_skipped)
        return reported

    def too_late(self) -> RuntimeError:
        """Returns the error for an optimizer that has updated since the window began."""
        return has_updated(self._optimizer.t - self._t)

    def prepare(self, give_gradients: Callable[[], None]) -> None:
        """Gives the parameters their gradients."""
        if self.is_first and self._gradients:
            self._gradients.check_target_is_reached()
        give_gradients()
        self._is_prepared = True

    def take(self, window: object, undo: Callable[[], None]) -> bool:
        """Updates, unless the window says no.

        Args:
            window (Window): What ``skip_update`` gets.
            undo (callable): Undoes what the passes have changed.

        Returns:
            bool: Whether the optimizer was asked to update.

        """
        self.is_skipped = self._ask(window)
        with DeferredSignals():
            self._is_prepared = False
            if self.is_skipped:
                self._gradients.take_back()
                undo()
            else:
                self._gradients.forget_replaced()
                self._effects.end()
                (self.update or self._optimizer.update)()
            self.is_done = True
        self._end()
        return not self.is_skipped

    def leave(self) -> None:
        """Leaves the update to the caller."""
        self._gradients.forget_replaced()
        with DeferredSignals():
            self._effects.end()
            self.is_done = True
        self._end()

    def drop(self) -> None:
        """Clears all gradients, since there is nothing to update with."""
        self.is_done = True
        self._optimizer.target.cleargrads()
        warnings.warn(ALL_SKIPPED, RuntimeWarning, stacklevel=4)

    def _ask(self, window: object) -> bool:
        """Returns whether ``skip_update`` says no.

        With dynamic loss scaling, it is not asked about a gradient that is not finite: that means that the scale is too
        large, and the optimizer must see it, to lower the scale.

        """
        skip_update = self._options.skip_update
        if skip_update is None:
            return False
        if self._optimizer._loss_scaling_is_dynamic:
            if not are_finite(param.grad for param in self.params() if param.grad is not None):
                return False
        answer: Any = call("skip_update", skip_update, window)
        is_answer = isinstance(answer, bool) or getattr(getattr(answer, "dtype", None), "kind", "") == "b"
        if not is_answer or getattr(answer, "ndim", 0) != 0:
            raise TypeError(f"skip_update must return True or False, got {answer!r}; return True to skip the update")
        return self.agree(bool(answer))

    def _end(self) -> None:
        self._effects.let_go()
        if self._gradients.are_taken:
            for param in self.params():
                mark_as_taken(param, self._optimizer)
