"""ValueChecks: whether the losses and gradients of a window are finite, and what happens if they are not."""

from __future__ import annotations

from typing import Optional

import chainer

from chainer_accum._devices import are_finite
from chainer_accum.window.losses import describe, not_finite
from chainer_accum.window.options import WindowOptions
from chainer_accum.window.terms import Losses


class ValueChecks:
    """The checks of one window, as its options say, and how many passes they have skipped.

    Args:
        options (WindowOptions): Options of the window.
        optimizer (~chainer.Optimizer): Optimizer, which may look for gradients that are not finite itself.

    Attributes:
        look_at_gradients (bool): Whether gradients are checked.
        num_skipped (int): Number of skipped passes.
        has_skipped_weight (bool): Whether a loss with a weight was in one of them.

    """

    def __init__(self, options: WindowOptions, optimizer: chainer.Optimizer) -> None:
        self._options = options
        self._look_at_losses = options.checks_values
        # With dynamic scaling, a gradient that is not finite means that the scale is too large. The optimizer finds it
        # in the gradient of the window, skips the update and lowers the scale.
        self.look_at_gradients = options.checks_values and not optimizer._loss_scaling_is_dynamic
        self.num_skipped = 0
        self.has_skipped_weight = False

    def find(self, losses: Losses) -> Optional[str]:
        """Returns what is not finite among the losses of a pass, or ``None``."""
        for loss in losses.to_check() if self._look_at_losses else ():
            if not are_finite([loss.array]):
                return f"its loss is {describe(loss)}"
        return None

    def skip(self, has_weight: bool) -> None:
        """Counts a skipped pass, which has a loss with a weight or none."""
        self.num_skipped += 1
        self.has_skipped_weight = self.has_skipped_weight or has_weight

    def raise_if_asked(self, number: int, finding: str, has_weight: bool) -> None:
        """Raises FloatingPointError for a skipped pass with a weight, counted from 1, if the options say so."""
        if self._options.nonfinite == "raise" and has_weight:
            raise not_finite(number, finding)

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the number of skipped passes."""
        self.num_skipped = serializer("num_skipped", self.num_skipped)
