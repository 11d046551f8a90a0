"""What the passes of a window change besides gradients, and how that is undone.

A forward pass moves persistent values, such as the running averages of batch normalization. If it is abandoned, that
must be undone; if its window is, so must be what all its passes have moved.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

import chainer

from chainer_accum.batch_statistics import BatchStatistics
from chainer_accum.persistent_values import PersistentValues


class PassEffects:
    """Persistent values and running averages, as the passes of a window change them.

    Args:
        target (~chainer.Link): Model.
        links: Other links whose persistent values passes may change, or ``None`` in the place of one.
        batch_statistics (str): When the running averages of batch normalization move: with each ``'micro_batch'`` or
            once per ``'window'``.
        undoes_passes (bool): Whether a single pass can be undone, or only all of them.
        looks_for_links (bool): Whether links may turn up that are not named.
        looks_at_functions (bool): Whether running averages may turn up that belong to no link.

    Attributes:
        is_collecting (bool): Whether running averages wait for the end of the window.

    """

    def __init__(
        self,
        target: chainer.Link,
        links: Iterable[Optional[chainer.Link]],
        batch_statistics: str,
        undoes_passes: bool,
        looks_for_links: bool,
        looks_at_functions: bool,
    ) -> None:
        self._target = target
        self._links = [target, *links]
        self.is_collecting = batch_statistics == "window"
        self._undoes_passes = undoes_passes
        self._looks = {"links": looks_for_links, "functions": looks_at_functions}
        self._values = PersistentValues(self._links)
        self._links_so_far: List[chainer.Link] = []
        is_followed = undoes_passes or looks_for_links or self._values.has_large_arrays
        self._is_plain = not is_followed and not self.is_collecting
        self.begin()

    @property
    def links(self) -> List[chainer.Link]:
        """The links that are known so far."""
        return self._links_so_far or self._values.links

    def begin(self) -> None:
        """Forgets all passes."""
        self._statistics = BatchStatistics(self._target, self.is_collecting)
        self._moves: Any = {}
        self._before: Optional[PersistentValues] = None
        self._config: Optional[Dict[str, Any]] = None

    def run(self, function: Callable[[], Any]) -> Any:
        """Returns what a forward pass returns. It is to be undone or to be kept before the next one."""
        self._config = dict(vars(chainer.config._local))
        self._before = None
        if self._is_plain and not chainer.get_function_hooks():  # which may be those of a window around this one
            return function()
        with self._following(), self._statistics.collecting() as self._moves:
            return function()

    def keep_pass(self) -> None:
        """Takes note that the last pass counts."""
        self._statistics.add(self._moves)
        self._config = None

    def forget_pass(self) -> None:
        """Takes note that the last pass is not to be undone, as that was the caller's own."""
        self._before = None

    def undo_pass(self) -> None:
        """Undoes the last pass, if that can be done."""
        if self._config is not None:  # which Chainer does not put back if its own code is interrupted
            vars(chainer.config._local).clear()
            vars(chainer.config._local).update(self._config)
        if self._before is not None:
            self._before.restore()

    def undo_last(self) -> None:
        """Undoes the end of the window and its last pass."""
        self._statistics.restore()
        self.undo_pass()

    def undo_all(self) -> None:
        """Undoes the end of the window and all its passes."""
        self._statistics.restore()
        self.undo_pass()
        self._values.restore()

    def end(self) -> None:
        """Moves the running averages that wait for the end of the window."""
        self._statistics.update()

    def let_go(self) -> None:
        """Forgets how to undo what has been done. Large arrays are recorded only while nothing else holds them."""
        self._links_so_far = self.links
        self._values, self._before = PersistentValues(()), None

    def clean_up(self) -> None:
        """Takes away what an interrupted pass has left."""
        self._statistics.end()

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        with self._values.following(**self._looks):
            if not self._undoes_passes:
                yield
                return
            self._before = self._values.checkpoint()  # here, where large arrays need no copy
            with self._before.following(**self._looks):
                yield

    def __getstate__(self) -> Dict[str, Any]:
        return {**vars(self), "_values": None, "_before": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state)
        self._values = PersistentValues(self._links)  # of what is a copy as well
