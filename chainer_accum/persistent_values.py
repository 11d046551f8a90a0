"""The persistent values of links, such as running averages, to go back to.

A forward pass moves them, and a pass that comes to nothing should not have.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Tuple

import chainer

from chainer_accum._devices import device_of


class PersistentValues:
    """The persistent values of links and of all links below them, as they are now.

    Args:
        links: Links, or ``None`` in the place of one.

    """

    def __init__(self, links: Iterable[Optional[chainer.Link]]) -> None:
        # Chainer can list parameters, but persistent values have no public way to be found.
        self._arrays: List[Tuple[chainer.Link, str, Any, Any]] = []
        self._others: List[Tuple[chainer.Link, Dict[str, Any]]] = []
        for link in _with_all_below(links):
            others = {}
            for name in link._persistent:
                value = getattr(link, name)
                if isinstance(value, chainer.get_array_types()):
                    with device_of(value):
                        self._arrays.append((link, name, value, value.copy()))
                else:
                    others[name] = value
            if None in others.values():  # a link that gives itself its shape later, from what else it has
                others.update(_plain_attributes(link))
            if others:
                self._others.append((link, others))

    def restore(self) -> None:
        """Gives the links these values again, in the arrays in which they were."""
        for link, name, array, value in self._arrays:
            with device_of(array):
                array[...] = value
            setattr(link, name, array)
        for link, others in self._others:
            for name, value in others.items():
                setattr(link, name, value)


def _with_all_below(links: Iterable[Optional[chainer.Link]]) -> Iterable[chainer.Link]:
    return {id(link): link for root in links if root is not None for link in root.links()}.values()


def _plain_attributes(link: chainer.Link) -> Dict[str, Any]:
    return {
        name: value for name, value in vars(link).items() if not isinstance(value, (chainer.Parameter, chainer.Link))
    }
