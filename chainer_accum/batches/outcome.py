"""Outcome: the outcome of a call in one thread, for another thread to take over."""

from __future__ import annotations

import contextlib
from typing import Callable, Dict, Generic, List, TypeVar

import chainer

from chainer_accum.observations import Reported, reporting_to

Result = TypeVar("Result")


class Outcome(Generic[Result]):
    """The outcome of a call in one thread, for another thread to take over: result or exception, and reports.

    Args:
        function (callable): Function without arguments. It is called immediately.

    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._observation: Dict[str, Reported] = {}
        self._results: List[Result] = []
        self._errors: List[BaseException] = []
        with reporting_to(self._observation):
            try:
                self._results.append(function())
            except BaseException as error:
                self._errors.append(error)

    def take_over(self) -> Result:
        """Forwards the reports, and returns the result or raises the exception. It can be called once."""
        with contextlib.suppress(IndexError):  # there is no reporter
            # Not chainer.report(), which would add prefixes that the keys already have.
            chainer.get_current_reporter().observation.update(self._observation)
        if self._errors:
            raise self._errors.pop()  # popped, since its traceback refers to this object
        return self._results.pop()
