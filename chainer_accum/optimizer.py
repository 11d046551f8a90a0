"""create_accumulating_optimizer: accumulation for updaters and training loops that are not ours.

Some programs cannot swap their updater, because its ``update_core`` is their own: of a GAN, or of truncated
backpropagation through time. All of them call ``optimizer.update``, so there it can be told what is a micro-batch.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import chainer

from chainer_accum._arguments import check_choice, check_instance, check_int, check_set_up, check_weight
from chainer_accum.distributed import begin_window
from chainer_accum.mixed_precision import serialize_mixed_precision
from chainer_accum.window import LOSS_REDUCTIONS, NONFINITE, Window


def create_accumulating_optimizer(
    optimizer: Any, accumulation_steps: int, *, loss_reduction: str = "mean", nonfinite: str = "keep"
) -> _AccumulatingOptimizer:
    """Returns an optimizer that updates the parameters at each ``accumulation_steps``-th call of ``update`` only.

    Both ways of calling it count as one micro-batch: ``optimizer.update(lossfun, *args)``, and ``optimizer.update()``
    after a backward pass of the caller's own. Whether the caller clears gradients in between makes no difference. Each
    call can have a weight: ``optimizer.update(lossfun, x, t, weight=len(x))``, or ``optimizer.update(weight=len(x))``.
    ``optimizer.flush()`` updates with the micro-batches that there are, as at the end of the data.

    In all else the optimizer is the one that was passed: hooks, hyperparameters, ``target`` and ``t``, which counts
    updates, not calls. It is serialized with the sums of an unfinished window, so that a run resumed within a window
    goes on as if it had never stopped; a snapshot of the optimizer that was passed can be loaded, too.

    Between the calls of a window, a second set of gradients is alive besides those of a backward pass of the caller's
    own. With a loss function, gradients are added as they are made, and there is one set only.

    To train with ChainerMN, wrap its optimizer, and there is one all-reduce per window:
    ``create_accumulating_optimizer(chainermn.create_multi_node_optimizer(optimizer, comm), 4)``.

    Args:
        optimizer (~chainer.Optimizer): Optimizer. It may be set up before or after.
        accumulation_steps (int): Number of micro-batches per update.
        loss_reduction (str): ``'mean'`` or ``'sum'``: what the losses are of their examples.
        nonfinite (str): What is done with a micro-batch whose loss or gradient is not finite: ``'keep'``, ``'skip'`` or
            ``'raise'``, as for :func:`~chainer_accum.accumulate`. A micro-batch that is skipped counts as a call.

    Returns:
        The accumulating optimizer.

    Raises:
        TypeError: If ``accumulation_steps`` is not an int, or the optimizer is none or accumulates already.
        ValueError: If ``accumulation_steps`` is not positive or an option is unknown.

    """
    check_instance(optimizer, "optimizer")
    if isinstance(optimizer, _AccumulatingOptimizer) or not callable(getattr(optimizer, "setup", None)):
        raise TypeError(
            f"optimizer must be one that does not accumulate yet, got {optimizer!r}; "
            "pass the optimizer to be wrapped, such as chainer.optimizers.Adam()"
        )
    steps = check_int("accumulation_steps", accumulation_steps, 1, "use 1 to disable accumulation")
    check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
    check_choice("nonfinite", nonfinite, NONFINITE)
    return _AccumulatingOptimizer(optimizer, steps, loss_reduction, nonfinite)


class _AccumulatingOptimizer:
    """Passes everything on to the actual optimizer, but for what is about windows."""

    # Attributes that are set on this object; all others are the actual optimizer's.
    _OWN = frozenset(["actual_optimizer", "accumulation_steps", "_loss_reduction", "_nonfinite", "_window"])

    def __init__(self, actual_optimizer: Any, accumulation_steps: int, loss_reduction: str, nonfinite: str) -> None:
        self.actual_optimizer = actual_optimizer
        self.accumulation_steps = accumulation_steps
        self._loss_reduction = loss_reduction
        self._nonfinite = nonfinite
        self._window: Optional[Window] = None

    def update(
        self, lossfun: Optional[Callable[..., chainer.Variable]] = None, *args: Any, weight: float = 1, **kwds: Any
    ) -> None:
        """Adds a micro-batch to the window, and updates the parameters if the window is complete.

        If a backward pass fails, the window is dropped.

        Args:
            lossfun (callable): Loss function. If it is omitted, the gradients of the parameters are taken as they are.
            *args: Arguments for the loss function.
            weight (float): What the micro-batch counts for, zero or more.
            **kwds: Keyword arguments for the loss function.

        """
        check_set_up(self.actual_optimizer, "optimizer")
        weight = check_weight(weight, "weight")
        window = self._window
        if window is None:
            # Gradients that come as they are have the magnitude that they have.
            expected_weight = None if lossfun is None else self.accumulation_steps * weight or None
            window = self._window = self._make_window(expected_weight)
        try:
            if lossfun is None:
                window.add_gradients(weight)
            else:
                window.add(lossfun, *args, weight=weight, **kwds)
        finally:
            if not window.is_open:
                self._window = None
        if window.micro_batches >= self.accumulation_steps:
            self.flush()

    def flush(self) -> None:
        """Updates the parameters with the micro-batches since the last update, if there are any."""
        window, self._window = self._window, None
        if window is not None and window.micro_batches > 0:
            window.update()

    def setup(self, link: chainer.Link) -> _AccumulatingOptimizer:
        """Sets up the actual optimizer and begins a new window."""
        self.actual_optimizer.setup(link)
        self._window = None
        return self

    def serialize(self, serializer: Any) -> None:
        """Serializes the actual optimizer and the window that is under way."""
        is_saving = isinstance(serializer, chainer.Serializer)
        if not is_saving and serializer("t", self.actual_optimizer.t) == 0:
            self.actual_optimizer.serialize(_BeforeFirstUpdate(serializer))
        else:
            self.actual_optimizer.serialize(serializer)
        serialize_mixed_precision(self.actual_optimizer, serializer, "mixed_precision:")
        serializer = serializer["accumulation"]
        try:
            is_under_way = serializer("is_under_way", is_saving and self._window is not None)
        except (KeyError, ValueError):  # a snapshot of another optimizer, in npz or HDF5
            is_under_way = False
        if not is_saving:
            self._window = self._make_window(None) if is_under_way else None
        if self._window is not None:
            self._window.serialize(serializer["window"])

    def _make_window(self, expected_weight: Optional[float]) -> Window:
        return begin_window(self.actual_optimizer, self._loss_reduction, expected_weight, self._nonfinite)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # while a copy is being made, and there is no actual optimizer yet
            raise AttributeError(name)
        return getattr(self.actual_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.actual_optimizer, name, value)


class _BeforeFirstUpdate(chainer.Deserializer):
    """Reads a snapshot from before the first update, when update rules have no state yet.

    Chainer cannot, nor has it to: there is no snapshot before an update. But there is one within the first window.

    """

    def __init__(self, deserializer: Any) -> None:
        self._deserializer = deserializer

    def __getitem__(self, key: str) -> _BeforeFirstUpdate:
        return _BeforeFirstUpdate(self._deserializer[key])

    def __call__(self, key: str, value: Any) -> Any:
        try:
            return self._deserializer(key, value)
        except KeyError:
            return value
