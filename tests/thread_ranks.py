"""Ranks that are threads: ChainerMN's protocol without MPI, for tests of what the ranks tell one another.

Each collective is a meeting of all threads. Ranks that meet in different collectives fail, where MPI would mix up their
messages; ranks that wait for one that does not come fail after ``PATIENCE`` seconds, where MPI would wait for ever.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List

import numpy

PATIENCE = 20.0


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=PATIENCE)
        self._brought: List[Any] = [None] * size

    def exchange(self, rank: int, collective: str, value: Any) -> List[Any]:
        self._brought[rank] = collective, value
        self._barrier.wait()
        brought = list(self._brought)
        self._barrier.wait()
        collectives = [collective for collective, _ in brought]
        assert len(set(collectives)) == 1, f"the ranks are in different collectives: {collectives}"
        return [value for _, value in brought]

    def end(self) -> None:
        self._barrier.abort()  # nobody is to wait for a rank that has failed


class ThreadCommunicator:
    """The part of ChainerMN's naive communicator that is used, and a list of the collectives that were run."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self.size = meeting.size
        self.rank = rank
        self.collectives: List[str] = []

    def allreduce(self, array: Any) -> Any:
        return sum(self._exchange(f"allreduce of {array.nbytes} bytes", array.copy()))

    def allreduce_obj(self, value: Any) -> Any:
        return sum(self._exchange("allreduce_obj", value))

    def gather_obj(self, value: Any, root: int = 0) -> Any:
        values = self._exchange("gather_obj", value)
        return values if self.rank == root else None

    def bcast_obj(self, value: Any, root: int = 0) -> Any:
        assert (value is not None) == (self.rank == root)
        return self._exchange(f"bcast_obj from {root}", value)[root]

    def bcast_data(self, model: Any) -> None:
        raise AssertionError("ChainerMN broadcasts parameters, and drops the gradients")

    def multi_node_mean_grad(self, model: Any, zero_fill: bool) -> None:
        params = [param for _, param in sorted(model.namedparams()) if param.array is not None]
        if not zero_fill:
            params = [param for param in params if param.grad is not None]
        grads = [param.xp.zeros_like(param.array) if param.grad is None else param.grad for param in params]
        means = [sum(each) / self.size for each in zip(*self._exchange("mean_grad", [grad.copy() for grad in grads]))]
        for param, grad, mean in zip(params, grads, means):
            numpy.ascontiguousarray(grad)[...] = mean  # as in ChainerMN, this misses an array of another order
            param.grad = grad.astype(param.dtype)

    def _exchange(self, collective: str, value: Any) -> List[Any]:
        self.collectives.append(collective)
        return self._meeting.exchange(self.rank, collective, value)


def make_multi_node(optimizer: Any, communicator: ThreadCommunicator, zero_fill: bool = True) -> Any:
    """Returns the multi-node optimizer of a rank, without create_multi_node_optimizer, which asks for MPI."""
    from chainermn.optimizers import _MultiNodeOptimizer

    return _MultiNodeOptimizer(optimizer, communicator, zero_fill)


def run_ranks(size: int, program: Callable[[ThreadCommunicator], Any]) -> List[Any]:
    """Runs the program on so many ranks at once and returns what each returned. Raises if one raised."""
    meeting = _Meeting(size)

    def run(rank: int) -> Any:
        try:
            return program(ThreadCommunicator(meeting, rank))
        except BaseException:
            meeting.end()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [future.exception() for future in futures if future.exception() is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):  # which is only the consequence of another one
            raise error
    return [future.result() for future in futures]
