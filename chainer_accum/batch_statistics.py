"""The running averages of batch normalization, moved once per window instead of once per micro-batch.

A link for batch normalization moves its running averages during the forward pass, by the mean and the variance of what
it is given. With micro-batches that is too often, by statistics of too little, and a pass that comes to nothing has
moved them as well. So while a micro-batch passes through, each such link is lent other arrays and a decay of zero, so
that it leaves the very statistics there; those of all micro-batches make the statistics of the window, and these move
the running averages.
"""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple, Tuple

import chainer
import chainer.links as L
import numpy

from chainer_accum._devices import device_of

BATCH_STATISTICS = ("micro_batch", "window")


class _Loan(NamedTuple):
    """What belongs to a link that is passing its input on."""

    link: Any
    avg_mean: Any
    avg_var: Any
    decay: float
    N: int

    def end(self) -> None:
        for name, value in zip(self._fields[1:], self[1:]):
            setattr(self.link, name, value)


class _Moments:
    """Mean and variance of what went through a link, a float64 array each, and of how many values each is."""

    def __init__(self, count: int, mean: Any, variance: Any, is_finetuning: bool) -> None:
        self.count = count
        self.mean = mean
        self.variance = variance
        self.is_finetuning = is_finetuning

    def merge(self, other: _Moments) -> None:
        """Takes in the moments of other values: by the law of total variance."""
        count = self.count + other.count
        share = other.count / count
        difference = other.mean - self.mean
        self.variance += share * (other.variance - self.variance) + share * (1 - share) * difference * difference
        self.mean += share * difference
        self.count = count


class _Collector(chainer.LinkHook):
    name = "chainer_accum.BatchStatistics"

    def __init__(self) -> None:
        self.calls: List[Tuple[Any, _Moments]] = []
        self._loans: List[_Loan] = []

    def forward_preprocess(self, args: Any) -> None:
        link = args.link
        if not _moves_averages(link):
            return
        if link.avg_mean is None:  # it takes its shape from its first input
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                link.forward(*args.args, **args.kwargs)
        self._loans.append(_Loan(link, link.avg_mean, link.avg_var, link.decay, link.N))
        with device_of(link.avg_mean):
            link.avg_mean, link.avg_var = link.avg_mean.copy(), link.avg_var.copy()
        link.decay = 0.0
        link.N = 0  # with which the first step of finetuning has no decay, either

    def forward_postprocess(self, args: Any) -> None:
        link = args.link
        if not (self._loans and self._loans[-1].link is link):
            return
        x = args.args[0] if args.args else args.kwargs["x"]
        with device_of(link.avg_mean):
            count = x.size // link.avg_mean.size
            mean = link.avg_mean.astype(numpy.float64)
            variance = link.avg_var.astype(numpy.float64)
            variance *= (count - 1) / count  # which is what it is of these values; the link estimates that of all
        self.calls.append((link, _Moments(count, mean, variance, is_finetuning=link.N > 0)))
        self._loans.pop().end()

    def end_loans(self) -> None:
        """Ends what a pass that raised has left."""
        while self._loans:
            self._loans.pop().end()


@contextlib.contextmanager
def _collecting() -> Iterator[List[Tuple[Any, _Moments]]]:
    collector = _Collector()
    try:
        with collector:
            yield collector.calls
    finally:
        collector.end_loans()


class BatchStatistics:
    """The statistics of a window, for all links of batch normalization that its micro-batches pass through.

    They are :class:`~chainer.links.BatchNormalization` and its subclasses.

    Args:
        is_collecting (bool): Whether there is anything to do. If not, running averages move as they always do.

    """

    def __init__(self, is_collecting: bool) -> None:
        self._is_collecting = is_collecting
        # By link and by how many times a micro-batch has gone through it before, in the order of the calls.
        self._moments: Dict[Tuple[int, int], Tuple[Any, _Moments]] = {}

    def collecting(self) -> ContextManager[List[Tuple[Any, _Moments]]]:
        """Returns a context in which no running average moves, and that returns the list of what would move them."""
        return _collecting() if self._is_collecting else contextlib.nullcontext([])

    def add(self, calls: List[Tuple[Any, _Moments]]) -> None:
        """Adds what was collected of one micro-batch."""
        times: Dict[int, int] = {}
        for link, moments in calls:
            time = times[id(link)] = times.get(id(link), -1) + 1
            if (id(link), time) in self._moments:
                with device_of(moments.mean):
                    self._moments[id(link), time][1].merge(moments)
            else:
                self._moments[id(link), time] = link, moments

    def update(self) -> None:
        """Moves the running averages of each link, once per time that a micro-batch went through it."""
        for link, moments in self._moments.values():
            decay = link.decay
            if moments.is_finetuning:
                link.N += 1
                decay = 1.0 - 1.0 / link.N
            unbiased = moments.count / max(moments.count - 1.0, 1.0)
            with device_of(link.avg_mean):
                for average, value in (link.avg_mean, moments.mean), (link.avg_var, unbiased * moments.variance):
                    average *= decay
                    average += (1 - decay) * value.astype(average.dtype)
        self._moments.clear()


def _moves_averages(link: Any) -> bool:
    config = chainer.config
    return isinstance(link, L.BatchNormalization) and config.train and not config.in_recomputing
