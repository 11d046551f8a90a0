"""Peak memory: the most that NumPy and Python have allocated at a time (``tracemalloc``), or that was resident."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Type

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
from workloads import Workload

# Has the C library give back each array of 64 KiB or more as it is freed, so that what is resident is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(
    workload: Workload, optimizer_class: Any, updater_class: Type[Any], batch_size: int, examples: int, **kwargs: Any
) -> int:
    """Returns the peak, in bytes, of training with so many examples, without what the examples themselves take."""
    dataset = workload.make_dataset(examples)
    gc.collect()
    tracemalloc.start()
    try:
        optimizer = optimizer_class().setup(workload.make_model())
        iterator = chainer.iterators.SerialIterator(dataset, batch_size, shuffle=False)
        updater = updater_class(iterator, optimizer, **kwargs)
        while iterator.epoch == 0:
            updater.update()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def traced_peak(function: Callable[[], None]) -> int:
    """Returns the most bytes that are allocated at a time while a function runs, beside what there was before."""
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_mib(key: str = "VmRSS", process: object = "self") -> float:
    """Returns the MiB of a process that are resident, or that have been at the peak, ``"VmHWM"``."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def resident_peak(function: Callable[[], None]) -> float:
    """Returns the MiB that are resident at the peak of a function."""
    gc.collect()  # what was measured before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    function()
    return resident_mib("VmHWM")
