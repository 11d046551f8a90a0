"""WindowOptions: how a window treats losses, values that are not finite, and running averages."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

from chainer_accum._arguments import check_callable, check_choice
from chainer_accum.lockstep import LockstepPolicy

# A function of the window.
SkipUpdate = Callable[[Any], Any]


class WindowOptions(NamedTuple):
    """Options of a window, as described in :func:`~chainer_accum.accumulate`.

    Attributes:
        loss_reduction (str): Whether each loss is a ``'mean'`` or a ``'sum'`` over its examples.
        nonfinite (str): What to do with a micro-batch whose loss or gradient is not finite: ``'keep'``, ``'skip'`` or
            ``'raise'``.
        running_statistics (str): When running averages move: with each ``'micro_batch'`` or once per ``'update'``.
        lockstep (LockstepPolicy): How micro-batches wait for one another, or ``None`` if they do not.
        skip_update (callable): Function of the window that says whether there is no update, or ``None``.

    """

    loss_reduction: str = "mean"
    nonfinite: str = "keep"
    running_statistics: str = "micro_batch"
    lockstep: Optional[LockstepPolicy] = None
    skip_update: Optional[SkipUpdate] = None

    def checked(self) -> WindowOptions:
        """Returns these options, or raises ValueError or TypeError if a value is not one that the option takes."""
        check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))
        check_choice("nonfinite", self.nonfinite, ("keep", "skip", "raise"))
        check_choice("running_statistics", self.running_statistics, ("micro_batch", "update"))
        if self.skip_update is not None:
            check_callable("skip_update", self.skip_update, "pass a function of the window, or None")
        if self.lockstep is not None and self.nonfinite == "skip":
            raise ValueError(
                "nonfinite must not be 'skip' with lockstep, got 'skip': a micro-batch cannot be taken out of the "
                "statistics of the whole batch; use 'keep' or 'raise', or lockstep=None"
            )
        return self

    @property
    def is_mean(self) -> bool:
        """Whether the losses are means over their examples."""
        return self.loss_reduction == "mean"

    @property
    def checks_values(self) -> bool:
        """Whether losses and gradients are checked, for which each pass waits for the device."""
        return self.nonfinite != "keep"

    @property
    def moves_averages_once(self) -> bool:
        """Whether running averages must be kept from moving until the update. In lockstep, they move once anyway."""
        return self.running_statistics == "update" and self.lockstep is None


DEFAULTS = WindowOptions()
