"""PassState: what a forward pass changes as side effects, so that it can run again from the same state."""

from __future__ import annotations

from typing import ContextManager, Optional, Sequence

import chainer

from chainer_accum.state.persistent_values import PersistentValues
from chainer_accum.state.random_state import RandomState, devices_of


class PassState:
    """The state that a forward pass changes as side effects: random generators and persistent values.

    Args:
        links: Known links, whose persistent values and devices belong to the state. Items may be ``None``.
        values (PersistentValues): Their persistent values, if already stored.

    """

    def __init__(self, links: Sequence[Optional[chainer.Link]], values: Optional[PersistentValues] = None) -> None:
        self._links = links
        self._random = RandomState(devices_of(links))
        # Other state is not replayed: if it matters, the encoder does not process each micro-batch independently.
        self._values = PersistentValues(links, has_state=False) if values is None else values

    def following(self) -> ContextManager[None]:
        """Context manager for passes that may call other links, whose values are stored as well."""
        return self._values.following()

    def checkpoint(self) -> PassState:
        """Returns the current state of the same generators and links."""
        return PassState(self._links, self._values.checkpoint())

    def restore(self) -> None:
        """Restores the state."""
        self._random.restore()
        self._values.restore()
