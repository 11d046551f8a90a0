"""Visits: what micro-batches do where they wait for one another, and how gradients come back from there.

A meeting consists of the visits of all micro-batches, one each. A kind of meeting is a class of visits.
"""

from __future__ import annotations

from typing import Hashable, Sequence


class Visit:
    """The part of one micro-batch in a meeting.

    Attributes:
        name (str): What the meeting is for, in error messages.
        description (str): What is handed in, in error messages.
        of: The link or running average that the meeting belongs to, if any.
        key: What must be the same for all micro-batches.

    """

    name: str
    description: str
    of: object = None
    key: Hashable

    def merge(self, visits: Sequence[Visit]) -> None:
        """Called for the first visit of a meeting, with all of them, before the first pass goes on."""

    def merge_gradients(self, visits: Sequence[Visit]) -> None:
        """Called for the first visit of a meeting, with all of them, after the backward passes of all later stages."""

    def add_gradients(self) -> None:
        """Adds the gradients of what was handed in, before the backward pass of the stage that computed it."""


def other_layers(first: str, other: str, number: int) -> RuntimeError:
    """Returns the error for a micro-batch, counted from 1, that is somewhere else than the first one."""
    return RuntimeError(
        "all micro-batches of a lockstep window must call the same layers in the same order, got "
        f"{first} in the first micro-batch and {other} in micro-batch {number}; let no layer depend on the examples, "
        "or set lockstep=None"
    )
