"""UsedLinks: the links whose persistent values a pass may change."""

from __future__ import annotations

import functools
from typing import Iterable, List, Optional

import chainer


class UsedLinks:
    """The links that the passes of an updater use, besides those of the optimizer's target.

    A loss function may use links that no object names. They are found when the first window calls them, which takes
    time, and are known from then on.

    """

    def __init__(self) -> None:
        self._others: Optional[List[chainer.Link]] = None

    @property
    def are_known(self) -> bool:
        """Whether the links that the first window used have been recorded."""
        return self._others is not None

    def named_by(self, optimizers: Iterable[chainer.Optimizer], function: object) -> List[Optional[chainer.Link]]:
        """Returns the targets of optimizers, the links to which a function is bound, and the recorded links."""
        targets = [optimizer.target for optimizer in optimizers]
        return [*targets, *_links_of(function), *(self._others or [])]

    def record(self, named: Iterable[Optional[chainer.Link]], used: Iterable[chainer.Link]) -> None:
        """Records the links that a window used, except those below a named one."""
        known = {id(link) for root in named if root is not None for link in root.links()}
        self._others = [link for link in used if id(link) not in known]


def _links_of(function: object) -> List[chainer.Link]:
    """Returns the links that a function is or is bound to."""
    if isinstance(function, functools.partial):
        return [link for part in (function.func, *function.args) for link in _links_of(part)]
    return [each for each in (function, getattr(function, "__self__", None)) if isinstance(each, chainer.Link)]
