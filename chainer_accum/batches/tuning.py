"""TunedMicroBatchSize: the fastest limit of a pass that fits in memory.

The first pass has one example. As long as the next larger pass is predicted to fit, each pass is twice as large as the
one before it, so the first window shows how memory and time grow. The windows that follow have one limit each, and are
compared by their time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import zlib
from typing import Any, Callable, Dict, Hashable, Iterator, Optional, Tuple

import chainer

from chainer_accum._arguments import check_bool, check_int
from chainer_accum._devices import free_memory, synchronize
from chainer_accum.batches.cutting import Grouped, Load, Measured
from chainer_accum.batches.memory import Memory, MemoryLimit, make_share, memory_of
from chainer_accum.batches.search import Search
from chainer_accum.batches.sizes import EXAMPLES, TOKENS, Limit, MicroBatchSize
from chainer_accum.batches.token_budget import TokenBudget

# What the first update may take, in units of the parameters: two states, as of Adam, and as much for computing.
_OF_FIRST_UPDATE = 4
_USED = 0.97  # of the limit, because what the C library keeps of freed memory cannot be predicted
_AMPLE = 4  # if a pass takes a smaller part of the room, what the C library keeps of freed memory does not matter


class TunedMicroBatchSize(MicroBatchSize):
    """The limit with the shortest window among those that fit in memory.

    Windows of another kind have a search of their own, unless they occur singly, as at the end of the data.

    Args:
        memory_limit: How much memory may be in use: bytes, a share such as ``'80%'``, or ``None`` for the default.
        **kwargs: Arguments of :class:`MicroBatchSize`.

    """

    is_tuned = True

    def __init__(self, memory_limit: MemoryLimit = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._share = make_share(memory_limit)
        self._search = Search()
        self._searches: Dict[int, Search] = {}
        self._last_kind: Optional[int] = None
        self._device: Optional[chainer.backend.Device] = None
        self._memory: Optional[Memory] = None
        self._ceiling = math.inf
        self._base = 0.0  # what is in use without what the last pass has left
        self._last_cost = 0  # of the last pass
        self._for_update: Optional[float] = None  # what an update takes in addition, as far as known
        self._sees_update = False
        self._is_tight = False  # whether passes of the size that was found leave little room

    @property
    def limit(self) -> int:
        return self._search.limit

    @property
    def timings(self) -> Dict[int, float]:
        return self._search.timings()

    def begin_window(self, device: chainer.backend.Device, parameter_bytes: Callable[[], int] = int) -> None:
        self._parameter_bytes = parameter_bytes
        if self._device is None:
            self._device = device
            self._memory = memory_of(device)
            if self._memory is not None:
                self._ceiling = _USED * self._memory.ceiling(self._share)
                self._search.shrink_to_fit(self._ceiling - self._memory.in_use())  # what a snapshot says may not fit
        if self._memory is None and self._search.is_growing:
            self._search.skip_growing()
        super().begin_window(device, parameter_bytes)

    def begin_again(self) -> None:
        super().begin_again()
        self._seconds = 0.0
        self._num_timed = 0  # tokens
        self._costliest = 0
        self._peak = 0.0
        self._num_passes = 0
        self._in_use = 0.0
        self._cost_before = self._last_cost
        if self._memory is not None and not self._search.is_over:
            free_memory(self._device)
            self._in_use = self._memory.in_use()
            # What the last pass has left may be gone, for example after an evaluation.
            without = self._in_use - self._search.footprint.kept(self._last_cost)
            self._base = min(max(self._base, without), self._in_use)
            self._search.shrink_to_fit(self._room())
        elif self._memory is not None and self._is_tight:
            self._memory.in_use()  # frees what the C library keeps
        self._first_limit = self.limit

    @contextlib.contextmanager
    def measuring(self, load: Load) -> Iterator[None]:
        search, memory = self._search, self._memory
        if search.is_over:
            yield
            return
        if memory is not None and search.is_growing:
            self._learn_what_is_kept(memory.in_use())
        synchronize(self._device)
        began = time.perf_counter()
        yield
        synchronize(self._device)
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._num_timed += load.num_tokens
        self._num_passes += 1
        self._last_cost = load.cost
        self._costliest = max(self._costliest, load.cost)
        peak = 0.0 if memory is None else memory.peak()
        self._peak = max(self._peak, peak)
        if self._for_update is None:  # on a GPU, memory that runs out is an error and no more
            is_needed = memory is not None and memory.reset_peak()
            self._for_update = float(_OF_FIRST_UPDATE * self._parameter_bytes()) if is_needed else 0.0
        if search.is_growing:
            length = load.cost / max(load.num_examples, 1)
            seconds /= max(load.num_tokens, 1)
            search.end_pass(load.cost, length, seconds, peak - self._base, self._room())
        self._sees_update = memory is not None and memory.reset_peak()

    def lower(self, failed: int) -> None:
        self._search.lower(failed)

    def end_window(self, kind: Hashable, largest: int) -> Dict[str, float]:
        observation = {**super().end_window(kind, largest), self._unit.limit: float(self.limit)}
        is_homogeneous = self.limit == self._first_limit
        if not self._search.is_over and self._num_timed > 0:
            seconds = self._seconds / self._num_timed
            if is_homogeneous:
                observation[self._unit.seconds] = seconds
            if self._memory is not None:
                observation["peak_memory"] = self._peak
                predicted = self._search.footprint.predict(self._costliest)  # from the windows before
                if is_homogeneous and predicted is not None:
                    observation["predicted_peak_memory"] = max(self._base + predicted, self._in_use)
                if self._sees_update:
                    kept = self._search.footprint.kept(self._last_cost)
                    self._for_update = max(self._memory.peak() - self._base - kept, 0.0)
            # What a larger pass of the window before has left may be the peak, which then says nothing.
            taken = self._peak - self._base if self._costliest >= self._cost_before else None
            self._search.end_window(seconds if is_homogeneous else None, self._costliest, taken, largest, self._room())
            self._is_tight = _AMPLE * (self._search.footprint.predict(self.limit) or 0.0) > self._room()
        if self._unit == EXAMPLES:
            self._change_kind(zlib.crc32(repr((kind, largest)).encode()))
        return observation

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        self._search.serialize(serializer, self._unit.limit)
        if isinstance(serializer, chainer.Deserializer):
            self._searches = {}

    def _room(self) -> float:
        """Returns the bytes that passes may take."""
        # The update follows while the graph of the last pass may still be there.
        return math.inf if self._memory is None else self._ceiling - self._base - (self._for_update or 0.0)

    def _learn_what_is_kept(self, in_use: float) -> None:
        """Compares what is in use between two passes of a window."""
        footprint = self._search.footprint
        if self._num_passes == 1:  # the first pass of all makes what stays, such as gradients
            self._base = in_use - footprint.kept(self._last_cost)
        elif self._num_passes > 1:
            footprint.add_kept(self._last_cost, in_use - self._base)

    def _change_kind(self, kind: int) -> None:
        """Continues with the search for windows of this kind, if two in a row are of it."""
        if self._search.kind is None:
            self._search.kind = kind
        self._searches[self._search.kind] = self._search
        if kind == self._last_kind:
            self._search = self._searches.setdefault(kind, Search(kind))
        self._last_kind = kind


def make_micro_batch_size(
    micro_batch_size: Limit, memory_limit: MemoryLimit = None, split_when_out_of_memory: Optional[bool] = None
) -> MicroBatchSize:
    """Returns what limits a pass, for the arguments of an updater."""
    is_auto, kwargs = _arguments(micro_batch_size)
    if split_when_out_of_memory is not None:
        check_bool("split_when_out_of_memory", split_when_out_of_memory, "use None for the default")
    if is_auto:
        if split_when_out_of_memory is False:
            raise ValueError(
                "split_when_out_of_memory must not be False with micro_batch_size='auto', got False; a size that is "
                "tried may not fit in memory, so leave it out"
            )
        return TunedMicroBatchSize(memory_limit, **kwargs)
    if memory_limit is not None:
        make_share(memory_limit)  # raises if it is not one
        raise ValueError(
            f"memory_limit must be None unless the size of micro-batches is searched for, got {memory_limit!r}; set "
            "micro_batch_size='auto' or TokenBudget('auto', ...)"
        )
    return MicroBatchSize(**kwargs, splits=split_when_out_of_memory)


def _arguments(micro_batch_size: Limit) -> Tuple[bool, Dict[str, Any]]:
    """Returns whether the limit is searched for, and the arguments of :class:`MicroBatchSize`."""
    if isinstance(micro_batch_size, TokenBudget):
        budget = micro_batch_size
        is_auto, max_tokens = (False, budget.max_tokens) if isinstance(budget.max_tokens, int) else (True, None)
        arrange = functools.partial(Measured, length_func=budget.length_func, max_tokens=max_tokens)
        kwargs = {"arrange": arrange, "limit": max_tokens, "unit": TOKENS, "across_window": budget.across_window}
        return is_auto, kwargs
    if callable(micro_batch_size) and not isinstance(micro_batch_size, type):
        return False, {"arrange": functools.partial(Grouped, function=micro_batch_size)}
    if micro_batch_size is None:
        return False, {}
    if isinstance(micro_batch_size, str) and micro_batch_size == "auto":
        return True, {}
    remedy = "use None to leave batches whole, 'auto' to find the fastest, a TokenBudget, or a function"
    return False, {"limit": check_int("micro_batch_size", micro_batch_size, 1, remedy)}
