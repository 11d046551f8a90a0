"""create_accumulating_optimizer: gradient accumulation for your own updater or training loop.

Some programs cannot replace their updater, because they define ``update_core`` themselves, as for a GAN or for
truncated backpropagation through time. They all call ``optimizer.update``, so the optimizer accumulates for them.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Optional

import chainer

from chainer_accum._arguments import check_callable, check_instance, check_int, check_set_up, check_weight
from chainer_accum.state import serialize_mixed_precision
from chainer_accum.window import (
    SkipUpdate,
    Window,
    WindowOptions,
    is_taken,
    keep_for_others,
    mark_as_taken,
    window_class,
)


def create_accumulating_optimizer(
    optimizer: chainer.Optimizer,
    accumulation_steps: int,
    *,
    loss_reduction: str = "mean",
    nonfinite: str = "keep",
    skip_update: Optional[SkipUpdate] = None,
) -> _AccumulatingOptimizer:
    """Returns an optimizer that updates the parameters once every ``accumulation_steps`` calls of ``update``.

    Each call adds one micro-batch: either ``optimizer.update(lossfun, *args)``, or ``optimizer.update()`` after your
    own backward pass. To weight micro-batches, call ``optimizer.update_weighted(len(x), lossfun, x, t)`` or
    ``optimizer.update_weighted(len(x))``. A loss function may also return its weight, or several losses with weights of
    their own, as for :func:`~chainer_accum.accumulate`. ``optimizer.flush()`` updates with the micro-batches added so
    far, for example at the end of the data.

    The gradients of your own backward pass stay in the parameters, so that several optimizers can take them. You may
    clear them before the next pass or not; the result is the same.

    Otherwise, the result behaves like the wrapped optimizer, with its hooks, hyperparameters, ``target`` and ``t``,
    which counts updates, not calls. Serialization includes the sums of an unfinished window, so a resumed run continues
    as if it had never stopped. A snapshot of the wrapped optimizer can be loaded as well.

    Between calls, the window holds one set of gradients, in addition to that of your own backward pass. With a loss
    function, each gradient is added to the sums as backpropagation produces it, so that there is only one set.

    To train with ChainerMN, wrap its multi-node optimizer:
    ``create_accumulating_optimizer(chainermn.create_multi_node_optimizer(optimizer, comm), 4)``. There is one
    all-reduce per window.

    Args:
        optimizer (~chainer.Optimizer): Optimizer to wrap. It may be set up before or after.
        accumulation_steps (int): Number of micro-batches per update.
        loss_reduction (str): ``'mean'`` or ``'sum'``: whether each loss is a mean or a sum over its examples.
        nonfinite (str): What to do with a micro-batch whose loss or gradient is not finite: ``'keep'``, ``'skip'`` or
            ``'raise'``, as for :func:`~chainer_accum.accumulate`. A skipped micro-batch still counts as a call.
        skip_update (callable): Function of the window that says whether there is no update, as for
            :func:`~chainer_accum.accumulate`. What the calls have reported stays reported.

    Returns:
        The accumulating optimizer.

    Raises:
        TypeError: If ``accumulation_steps`` is not an int, or ``optimizer`` is not an optimizer or accumulates already.
        ValueError: If ``accumulation_steps`` is not positive or an option has an unknown value.

    """
    check_instance(optimizer, "optimizer")
    if isinstance(optimizer, _AccumulatingOptimizer) or not callable(getattr(optimizer, "setup", None)):
        raise TypeError(
            f"optimizer must be an optimizer that does not accumulate yet, got {optimizer!r}; "
            "pass the optimizer to be wrapped, such as chainer.optimizers.Adam()"
        )
    steps = check_int("accumulation_steps", accumulation_steps, 1, "use 1 to disable accumulation")
    options = WindowOptions(loss_reduction, nonfinite, skip_update=skip_update).checked()
    window_class(optimizer, options)  # raises if the optimizer does not fit
    return _AccumulatingOptimizer(optimizer, steps, options)


def check_not_accumulating(name: str, optimizer: object, where: str) -> None:
    """Raises TypeError if the optimizer accumulates gradients itself, where the caller accumulates them already."""
    if isinstance(optimizer, _AccumulatingOptimizer):
        raise TypeError(
            f"{name} must not accumulate gradients itself in {where}, got one from create_accumulating_optimizer with "
            f"accumulation_steps={optimizer.accumulation_steps}; pass the optimizer that it wraps, {name}."
            "actual_optimizer, or keep it and use StandardUpdater or your own loop"
        )


class _AccumulatingOptimizer(chainer.Optimizer):
    """Optimizer that accumulates gradients and delegates everything else to the actual optimizer."""

    # The attributes of this object itself. All others, including those of the base class, are the actual optimizer's.
    _OWN = ("actual_optimizer", "accumulation_steps", "_steps", "_options", "_window", "_heaviest")

    def __init__(self, actual_optimizer: chainer.Optimizer, accumulation_steps: int, options: WindowOptions) -> None:
        self.actual_optimizer = actual_optimizer
        self.accumulation_steps = accumulation_steps
        self._options = options
        self._window: Optional[Window] = None
        self._heaviest = 0.0  # the largest weight so far

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
            lossfun (callable): Loss function. If omitted, the present gradients of the parameters are taken.
            *args: Arguments for the loss function.
            **kwds: Keyword arguments for the loss function.

        """
        self.update_weighted(1, lossfun, *args, **kwds)

    def update_weighted(
        self, weight: float, lossfun: Optional[Callable[..., chainer.Variable]] = None, /, *args: Any, **kwds: Any
    ) -> None:
        """Does the same as :meth:`update` with a micro-batch of weight ``weight`` instead of 1.

        Args:
            weight (float): Weight of the micro-batch, a number of 0 or more.
            lossfun (callable): Loss function. If omitted, the present gradients of the parameters are taken.
            *args: Arguments for the loss function.
            **kwds: Keyword arguments for the loss function, one of which may be called ``weight``.

        """
        check_set_up(self.actual_optimizer, "optimizer")
        weight = check_weight(weight, "weight")
        if lossfun is None and (args or kwds):
            raise TypeError(
                f"update takes no arguments without a loss function, got {', '.join([*map(repr, args), *kwds])}; "
                "to give gradients a weight, call optimizer.update_weighted(weight)"
            )
        if lossfun is not None:
            check_callable("lossfun", lossfun, "pass a function that returns the loss, not the loss itself")
        window = self._window
        if window is None:
            window = self._window = self._make_window(None if lossfun is None else self._steps * weight)
        num_before = window.num_micro_batches
        try:
            if lossfun is None:
                window.add_gradients(weight)
            else:
                to_come = self._steps - window.num_micro_batches
                window.weights.expect(
                    window.weights.total + to_come * max(self._heaviest, window.weights.largest, weight)
                )
                window.add(functools.partial(lossfun, *args, **kwds), weight=weight)
            if window.num_micro_batches >= self._steps:
                self.flush()
        except BaseException:
            if not window.is_open or window.num_micro_batches > num_before:
                window.abandon(undoes_all=False)  # the earlier calls have succeeded
                self._window = None
            raise

    def flush(self) -> None:
        """Updates the parameters with the micro-batches since the last update, if there are any."""
        window, self._window = self._window, None
        if window is None or window.num_micro_batches == 0:
            return
        params = self.target.params(include_uninit=False) if window.num_micro_batches > 1 else ()
        put_back = keep_for_others(params, self.actual_optimizer)
        try:
            window.update()
        finally:
            put_back()
        chainer.report(window.observation)
        self._heaviest = max(self._heaviest, window.weights.largest)

    def setup(self, link: chainer.Link) -> _AccumulatingOptimizer:
        """Sets up the actual optimizer and starts a new window."""
        self.actual_optimizer.setup(link)
        self._window = None
        return self

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the actual optimizer and the unfinished window."""
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
        optimizer = self.actual_optimizer
        return window_class(optimizer)(optimizer, self._options, expected_weight=expected_weight)

    def __getattribute__(self, name: str) -> Any:
        if name in _AccumulatingOptimizer.__dict__ or name in _AccumulatingOptimizer._OWN or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("actual_optimizer"), name)

    def __setattr__(self, name: str, value: object) -> None:
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
    """Deserializer for a snapshot from before the first update, when update rules have no state yet.

    Chainer cannot load such a snapshot, and has no need to: its snapshots are taken after updates. With accumulation, a
    snapshot may be taken within the first window.

    """

    def __init__(self, deserializer: chainer.AbstractSerializer) -> None:
        self._deserializer = deserializer

    def __getitem__(self, key: str) -> _BeforeFirstUpdate:
        return _BeforeFirstUpdate(self._deserializer[key])

    def __call__(self, key: str, value: Any) -> Any:
        try:
            return self._deserializer(key, value)
        except KeyError:
            return value
