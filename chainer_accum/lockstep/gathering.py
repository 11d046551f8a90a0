"""GatherVisit: a meeting where each micro-batch learns what the others have handed in."""

from __future__ import annotations

from typing import Any, Sequence

from chainer_accum.lockstep.visits import Visit


class GatherVisit(Visit):
    """The part of one micro-batch in such a meeting.

    Args:
        name (str): What is handed in, for error messages.
        value: What this micro-batch hands in. It is not differentiated.

    Attributes:
        gathered (list): After the meeting, the values of all micro-batches in their order, the same list for all.

    """

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.description = "its loss"
        self.key = ("gather", name)
        self.value = value
        self.gathered: Sequence[Any] = ()

    def merge(self, visits: Sequence[Visit]) -> None:
        parts = [visit for visit in visits if isinstance(visit, GatherVisit)]
        gathered = [part.value for part in parts]
        for part in parts:
            part.gathered = gathered
