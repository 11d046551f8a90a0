"""create_accumulating_optimizer: accumulation for updaters and training loops that are not ours.

Some programs cannot swap their updater, because its ``update_core`` is their own: of a GAN, or of truncated
backpropagation through time. All of them call ``optimizer.update``, so there it can be told what is a micro-batch.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Optional

import chainer

from chainer_accum._arguments import check_callable, check_choice, check_instance, check_int, check_set_up, check_weight
from chainer_accum.distributed import begin_window
from chainer_accum.mixed_precision import serialize_mixed_precision
from chainer_accum.taken_gradients import is_taken, keep_for_others, mark_as_taken
from chainer_accum.window import LOSS_REDUCTIONS, NONFINITE, Window


def create_accumulating_optimizer(
    optimizer: Any, accumulation_steps: int, *, loss_reduction: str = "mean", nonfinite: str = "keep"
) -> _AccumulatingOptimizer:
    """Returns an optimizer that updates the parameters at each ``accumulation_steps``-th call of ``update`` only.

    Both ways of calling it count as one micro-batch: ``optimizer.update(lossfun, *args)``, and ``optimizer.update()``
    after a backward pass of the caller's own. Micro-batches that do not all count alike have a weight:
    ``optimizer.update_weighted(len(x), lossfun, x, t)``, or ``optimizer.update_weighted(len(x))``.
    ``optimizer.flush()`` updates with the micro-batches that there are, as at the end of the data.

    Gradients of a backward pass of the caller's own stay in the parameters, so that several optimizers can take them.
    Whether the caller clears them before the next pass makes no difference.

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


def check_not_accumulating(name: str, optimizer: Any, where: str) -> None:
    """Raises TypeError for an optimizer that accumulates by itself, where something else accumulates already."""
    if isinstance(optimizer, _AccumulatingOptimizer):
        raise TypeError(
            f"{name} must not accumulate by itself in {where}, got one from create_accumulating_optimizer with "
            f"accumulation_steps={optimizer.accumulation_steps}; pass the optimizer that it wraps, {name}."
            "actual_optimizer, or use StandardUpdater or a loop of your own"
        )


class _AccumulatingOptimizer(chainer.Optimizer):
    """Passes everything on to the actual optimizer, but for what is about windows."""

    # Attributes that are set on this object. All others, and those that the base class has, are the actual optimizer's.
    _OWN = ("actual_optimizer", "accumulation_steps", "_steps", "_loss_reduction", "_nonfinite", "_window", "_heaviest")

    def __init__(self, actual_optimizer: Any, accumulation_steps: int, loss_reduction: str, nonfinite: str) -> None:
        self.actual_optimizer = actual_optimizer
        self.accumulation_steps = accumulation_steps
        self._loss_reduction = loss_reduction
        self._nonfinite = nonfinite
        self._window: Optional[Window] = None
        self._heaviest = 0.0  # of the weights so far

    @property
    def accumulation_steps(self) -> int:
        """Number of micro-batches per update. It can be set at any time."""
        return self._steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: int) -> None:
        self._steps = check_int("accumulation_steps", value, 1, "use 1 to disable accumulation")

    def update(self, lossfun: Optional[Callable[..., chainer.Variable]] = None, *args: Any, **kwds: Any) -> None:
        """Adds a micro-batch to the window, and updates the parameters if the window is complete.

        If a backward pass fails, the window is dropped.

        Args:
            lossfun (callable): Loss function. If it is omitted, the gradients of the parameters are taken as they are.
            *args: Arguments for the loss function.
            **kwds: Keyword arguments for the loss function.

        """
        self.update_weighted(1, lossfun, *args, **kwds)

    def update_weighted(
        self, weight: float, lossfun: Optional[Callable[..., chainer.Variable]] = None, /, *args: Any, **kwds: Any
    ) -> None:
        """Does the same as :meth:`update`, with a micro-batch that counts for ``weight`` rather than for 1.

        Args:
            weight (float): What the micro-batch counts for, zero or more.
            lossfun (callable): Loss function. If it is omitted, the gradients of the parameters are taken as they are.
            *args: Arguments for the loss function.
            **kwds: Keyword arguments for the loss function, which may be called ``weight``.

        """
        check_set_up(self.actual_optimizer, "optimizer")
        weight = check_weight(weight, "weight")
        if lossfun is None and (args or kwds):
            raise TypeError(
                f"update takes no arguments without a loss function, got {', '.join([*map(repr, args), *kwds])}; "
                "to give gradients a weight, call optimizer.update_weighted(weight)"
            )
        if lossfun is not None:
            check_callable("lossfun", lossfun, "pass a function that returns the loss, and not the loss")
        window = self._window
        if window is None:
            window = self._window = self._make_window(None if lossfun is None else self._steps * weight)
        num_before = window.micro_batches
        try:
            if lossfun is None:
                window.add_gradients(weight)
            else:
                to_come = self._steps - window.micro_batches
                window.weights.expect(
                    window.weights.total + to_come * max(self._heaviest, window.weights.largest, weight)
                )
                window.add(functools.partial(lossfun, *args, **kwds), weight=weight)
            if window.micro_batches >= self._steps:
                self.flush()
        except BaseException:
            if not window.is_open or window.micro_batches > num_before:
                window.abandon(undoes_all=False)  # the calls before have been made
                self._window = None
            raise

    def flush(self) -> None:
        """Updates the parameters with the micro-batches since the last update, if there are any."""
        window, self._window = self._window, None
        if window is None or window.micro_batches == 0:
            return
        params = self.target.params(include_uninit=False) if window.micro_batches > 1 else ()
        put_back = keep_for_others(params, self.actual_optimizer)
        try:
            window.update()
        finally:
            put_back()
        self._heaviest = max(self._heaviest, window.weights.largest)

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
            self._window = self._make_window() if is_under_way else None
        if self._window is not None:
            self._window.serialize(serializer["window"])

    def _make_window(self, expected_weight: Optional[float] = None) -> Window:
        return begin_window(self.actual_optimizer, self._loss_reduction, expected_weight, self._nonfinite)

    def __getattribute__(self, name: str) -> Any:
        if name in _AccumulatingOptimizer.__dict__ or name in _AccumulatingOptimizer._OWN or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("actual_optimizer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.actual_optimizer, name, value)

    def __getstate__(self) -> Dict[str, Any]:
        params = self.target.params(include_uninit=False) if self.target is not None else ()
        return {**vars(self), "taken": [param for param in params if is_taken(param, self.actual_optimizer)]}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        taken = state.pop("taken")
        self.__dict__.update(state)
        for param in taken:
            mark_as_taken(param, self.actual_optimizer)


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
