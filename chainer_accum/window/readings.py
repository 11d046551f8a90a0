"""Readings: what can be read of a window, by ``skip_update``, by a training loop, or by the updater."""

from __future__ import annotations

from typing import Dict, List, Optional

import chainer

from chainer_accum._devices import Array
from chainer_accum.window.pass_effects import PassEffects
from chainer_accum.window.step import Step
from chainer_accum.window.value_checks import ValueChecks
from chainer_accum.window.weighted_gradients import WeightedGradients
from chainer_accum.window.weighting import Weights


class Readings:
    """What can be read of a window at any time. Nothing waits for a device."""

    _checks: ValueChecks
    _effects: PassEffects
    _gradients: WeightedGradients
    _step: Step

    @property
    def num_skipped(self) -> int:
        """Number of micro-batches skipped because they are not finite."""
        return self._checks.num_skipped

    @property
    def links(self) -> List[chainer.Link]:
        """The links that passes have used, and those that were named."""
        return self._effects.links

    @property
    def weights(self) -> Weights:
        """The weights of the micro-batches so far, as they were given, without skipped ones."""
        return self._gradients.weights

    @property
    def loss(self) -> Optional[Array]:
        """The loss of the micro-batches so far, without skipped ones, as a zero-dimensional array on its device.

        It is the weighted mean of the losses, or their sum if they are sums. With several pairs of a loss and a weight,
        it is the sum of their means. It is ``None`` before the first loss, and if a pass did not say its loss.

        """
        return self._gradients.loss

    @property
    def observation(self) -> Dict[str, int]:
        """What to report after :meth:`update`: how many micro-batches and updates were skipped, if any may be."""
        return self._step.observation(self.num_skipped)

    @property
    def is_done(self) -> bool:
        """Whether the window has updated, skipped the update, or left it to the caller."""
        return self._step.is_done

    @property
    def is_skipped(self) -> bool:
        """Whether ``skip_update`` has said no to the update."""
        return self._step.is_skipped

    @property
    def gradient_norm(self) -> Optional[Array]:
        """The norm of the gradient of the window, without loss scale and before hooks, as an array on its device.

        It can be read in ``skip_update``, and after a block of ``accumulate(optimizer, update=False)`` before the
        gradients change. Otherwise it is ``None``.

        """
        return self._step.gradient_norm
