"""PassEffects: what the passes of a window change besides gradients, and how to undo it.

A forward pass moves persistent values, such as the running averages of batch normalization. If the pass is abandoned,
its changes must be undone; if the window is abandoned, so must the changes of all its passes.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, TypeVar

import chainer

from chainer_accum.state import PersistentValues
from chainer_accum.window.running_statistics import Moves, RunningStatistics

Result = TypeVar("Result")

_NOTHING = PersistentValues(())


class PassEffects:
    """The changes that the passes of a window make to persistent values and running averages.

    Args:
        target (~chainer.Link): Model.
        links: Other links whose persistent values passes may change. Items may be ``None``.
        is_collecting (bool): Whether running averages move only at the end of the window.
        undoes_passes (bool): Whether a single pass can be undone, or only all passes.
        looks_for_links (bool): Whether passes may call links that are not named.
        looks_at_functions (bool): Whether passes may move running averages that belong to no link.

    Attributes:
        is_collecting (bool): See the argument.

    """

    def __init__(
        self,
        target: chainer.Link,
        links: Iterable[Optional[chainer.Link]],
        is_collecting: bool,
        undoes_passes: bool,
        looks_for_links: bool,
        looks_at_functions: bool,
    ) -> None:
        self._target = target
        self._links = [target, *links]
        self.is_collecting = is_collecting
        self._undoes_passes = undoes_passes
        self._looks = {"links": looks_for_links, "functions": looks_at_functions}
        self._values = PersistentValues(self._links)
        self._links_so_far: List[chainer.Link] = []
        is_followed = undoes_passes or looks_for_links or self._values.has_large_arrays
        self._is_plain = not is_followed and not self.is_collecting
        self.begin()

    @property
    def links(self) -> List[chainer.Link]:
        """The links known so far."""
        return self._links_so_far or self._values.links

    def begin(self) -> None:
        """Forgets all passes."""
        self._statistics = RunningStatistics(self._target, self.is_collecting)
        self._moves: Moves = {}
        self._before: Optional[PersistentValues] = None
        self._config: Optional[Dict[str, Any]] = None

    def run(self, function: Callable[[], Result]) -> Result:
        """Runs a forward pass and returns its result. The pass must be kept or undone before the next one."""
        self._config = dict(vars(chainer.config._local))
        self._before = None
        if self._is_plain and not chainer.get_function_hooks():  # hooks may belong to an outer window
            return function()
        with self._following(), self._statistics.collecting() as self._moves:
            return function()

    def keep_pass(self) -> None:
        """Keeps the changes of the last pass."""
        self._statistics.add(self._moves)
        self._config = None

    def forget_pass(self) -> None:
        """Marks the last pass as the caller's own, which is not undone."""
        self._before = None

    def undo_pass(self) -> None:
        """Undoes the last pass and what followed it, if possible."""
        if self._config is not None:  # Chainer does not restore it if its own code is interrupted
            vars(chainer.config._local).clear()
            vars(chainer.config._local).update(self._config)
        if self._before is not None:
            self._before.restore()

    def undo_all(self) -> None:
        """Undoes all passes and the end of the window."""
        self.undo_pass()
        self._values.restore()

    def end(self) -> None:
        """Moves the running averages that have waited for the end of the window."""
        if self.is_collecting:
            stored = [each for each in (self._values, self._before) if each is not None]
            with contextlib.ExitStack() as stack:
                for each in stored:  # averages may be large
                    stack.enter_context(each.following(links=False))
                self._statistics.update(stored)

    def let_go(self) -> None:
        """Forgets how to undo the passes.

        Large arrays can be recorded only while nothing else refers to them.

        """
        self._links_so_far = self.links
        self._values, self._before = _NOTHING, None

    def clean_up(self) -> None:
        """Cleans up after an interrupted pass."""
        self._statistics.end()

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        with self._values.following(**self._looks):
            if not self._undoes_passes:
                yield
                return
            self._before = self._values.checkpoint()  # inside the block, where large arrays need no copy
            with self._before.following(**self._looks):
                yield

    def __getstate__(self) -> Dict[str, Any]:
        return {**vars(self), "_values": None, "_before": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state)
        self._values = PersistentValues(self._links)  # of the copied links
