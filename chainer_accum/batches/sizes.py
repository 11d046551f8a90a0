"""What limits a pass: a number of examples, a number of tokens, or a function that cuts. It drops when memory runs out.

Splitting a batch does not change its gradient, so a window may be split in any way. A window that does not fit in
memory restarts with smaller micro-batches.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Callable, ContextManager, Dict, Iterator, NamedTuple, Optional, Protocol, Union

import chainer

from chainer_accum._devices import free_memory
from chainer_accum.batches.cutting import Arranged, Counted, CutFunc, Load, Part
from chainer_accum.batches.token_budget import TokenBudget

# What an updater takes as micro_batch_size.
Limit = Union[int, str, TokenBudget, CutFunc, None]


class OutOfMemory(Exception):
    """Raised when memory runs out in a pass that can be repeated with fewer examples."""

    def __init__(self, load: Load, error: MemoryError) -> None:
        super().__init__(str(error))
        self.load = load


class _Repeatable(Protocol):
    """What takes part in a pass, and knows whether the pass can be repeated."""

    is_repeatable: bool


class Unit(NamedTuple):
    """What the limit of a pass counts.

    Attributes:
        limit (str): The key under which the limit is reported while it is searched for.
        seconds (str): The key under which the time is reported.

    """

    limit: str
    seconds: str


EXAMPLES = Unit("micro_batch_size", "seconds_per_example")
TOKENS = Unit("max_tokens", "seconds_per_token")


class MicroBatchSize:
    """How batches are cut into micro-batches, and the limit of a micro-batch, which is lowered when memory runs out.

    Args:
        arrange (callable): Function that takes a batch and returns its examples in the order in which they are cut.
        limit (int): The largest cost of a micro-batch, or ``None`` for no limit.
        unit (Unit): What the limit counts.
        across_window (bool): Whether all batches of a window are cut together.
        splits (bool): Whether a window restarts when memory runs out, or ``None`` for the default.

    Attributes:
        arrange (callable): See the argument.
        across_window (bool): See the argument.
        is_tuned (bool): Whether the fastest limit is searched for.

    """

    is_tuned = False

    def __init__(
        self,
        arrange: Callable[[Any], Arranged] = Counted,
        limit: Optional[int] = None,
        unit: Unit = EXAMPLES,
        across_window: bool = False,
        splits: Optional[bool] = None,
    ) -> None:
        self.arrange = arrange
        self._limit = limit
        self._unit = unit
        self.across_window = across_window
        self._splits = splits
        self._num_tokens = self._num_positions = 0

    @property
    def limit(self) -> Optional[int]:
        """The limit of the next micro-batch."""
        return self._limit

    @property
    def leaves_whole(self) -> bool:
        """Whether batches are not cut."""
        return self.arrange is Counted and self.limit is None

    @property
    def cuts_evenly(self) -> bool:
        """Whether batches of the same size are cut into the same number of micro-batches, on any rank."""
        return self.arrange is Counted and not self.is_tuned

    def keeps_examples(self, is_one_batch: bool) -> bool:
        """Returns whether a window keeps its examples, to restart when memory runs out."""
        if self._splits is not None:
            return self._splits
        # A search tries sizes that may not fit. A single batch is in memory as a whole anyway.
        return self.is_tuned or self.across_window or (is_one_batch and not self.leaves_whole)

    @property
    def timings(self) -> Dict[int, float]:
        """Seconds per example or token by limit, as measured so far."""
        return {}

    def parts(self, arranged: Arranged) -> Iterator[Part]:
        """Returns an iterator over the parts of a batch. Each is as large as the limit allows when it is asked for."""
        start = 0
        while start < len(arranged):
            part = arranged.part(start, self.limit)
            self._num_tokens += part.load.num_tokens
            self._num_positions += part.load.num_positions
            start += part.load.num_examples or 1
            yield part

    def begin_window(self, device: chainer.backend.Device, parameter_bytes: Callable[[], int] = int) -> None:
        """Called when a window begins, with the device of the model and what returns the bytes of its parameters."""
        self.begin_again()

    def begin_again(self) -> None:
        """Called when a window begins, and when it restarts."""
        self._num_tokens = self._num_positions = 0

    @contextlib.contextmanager
    def retrying(self, load: Load, *repeatable: _Repeatable) -> Iterator[None]:
        """Context manager that raises OutOfMemory for a MemoryError, if the pass can be repeated with fewer examples.

        Args:
            load (Load): How much there is in the pass.
            *repeatable: The objects that take part in the pass.

        """
        try:
            yield
        except MemoryError as error:
            if all(each.is_repeatable for each in repeatable):
                raise OutOfMemory(load, error) from None
            raise

    def measuring(self, load: Load) -> ContextManager[None]:
        """Context manager that measures what a search needs to know about a pass."""
        return contextlib.nullcontext()

    def lower(self, failed: int) -> None:
        """Lowers the limit after memory ran out in a micro-batch of two or more examples that costs ``failed``."""
        self._limit = max((failed + 1) // 2, 1)

    def make_room(self, error: OutOfMemory, device: chainer.backend.Device) -> None:
        """Lowers the limit after memory ran out, and frees cached memory on the device of the model.

        Raises:
            MemoryError: If memory ran out for a single example.

        """
        if error.load.num_examples == 1:
            raise MemoryError(
                f"one example does not fit in memory: {error}; use a smaller model or smaller examples, "
                "or chainer.functions.forget, which recomputes parts of the graph instead of keeping them"
            )
        self.lower(error.load.cost)
        free_memory(device)
        failed, limit = f"{error.load.num_examples} examples", str(self.limit)
        if self._unit == TOKENS:
            failed, limit = f"{failed} and {error.load.cost} tokens", f"{limit} tokens"
        warnings.warn(
            f"memory ran out for a micro-batch of {failed} ({error}); the update restarts, and from now on a "
            f"micro-batch has at most {limit}",
            RuntimeWarning,
            stacklevel=2,
        )

    def end_window(self, kind: Any, largest: int) -> Dict[str, float]:
        """Called when a window has ended, and returns what to report.

        Args:
            kind: What windows must have in common to be compared: the shapes of the arrays in an example.
            largest (int): The cost of the costliest batch, as one micro-batch.

        """
        if self._unit == EXAMPLES or not self._num_positions:
            return {}
        return {"padding": 1 - self._num_tokens / self._num_positions}

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes what a search has found."""
