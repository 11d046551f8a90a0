"""AccumulatingUpdater: a StandardUpdater that computes the gradient of a large batch from several small ones."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional, Union

import chainer
from chainer.dataset import ConcatWithAsyncTransfer, concat_examples

from chainer_accum._arguments import (
    check_bool,
    check_callable,
    check_choice,
    check_loss_scale,
    check_main,
    check_set_up,
)
from chainer_accum._devices import DeviceSpec
from chainer_accum._late_weights import check_weight_func
from chainer_accum._window_updater import WindowUpdater
from chainer_accum.batches import (
    EPOCH_BOUNDARIES,
    Limit,
    MemoryLimit,
    Schedule,
    Steps,
    TokenBudget,
    WeightFunc,
    make_micro_batch_size,
    make_schedule,
)
from chainer_accum.lockstep import StoreSpec, make_lockstep_policy
from chainer_accum.observations import ObservationRules, Rule
from chainer_accum.optimizer import check_not_accumulating
from chainer_accum.window import SkipUpdate, WindowOptions, communicator_of, links_communicate, window_class


class AccumulatingUpdater(WindowUpdater):
    """:class:`~chainer.training.updaters.StandardUpdater` with gradient accumulation.

    One :meth:`update` takes the step that ``StandardUpdater`` would take with the whole effective batch, but keeps the
    graph of only one micro-batch at a time. It is one ``optimizer.update()`` and one ``iteration``: hooks, triggers,
    extensions and snapshots see effective batches only.

    An effective batch consists of ``accumulation_steps`` batches from the iterator, or of as many as contain
    ``effective_batch_size`` examples or tokens. Each is split into micro-batches, as ``micro_batch_size`` says. Without
    these arguments, this works like ``StandardUpdater``. Each micro-batch has its own forward pass, so batch
    normalization uses the statistics of the micro-batch, unless the micro-batches run in ``lockstep``.

    With several iterators or optimizers by name, the main ones are used. With a multi-node optimizer of ChainerMN, an
    effective batch spans all ranks, each with its own updater and iterator.

    If the iterator, the converter, a forward pass or a backward pass raises, the examples of that update are dropped;
    parameters, optimizer, reporter and the persistent values of the models are as they were before it. The same holds
    for Ctrl-C, which waits if the parameters are already being updated.

    If memory runs out, the update can restart with micro-batches of half the size, which later updates keep. A
    :class:`RuntimeWarning` is then issued. No example is lost or read twice; persistent values and the random
    generators of the host are restored. See ``split_when_out_of_memory``.

    Args:
        iterator: Dataset iterator for the training dataset, or a dictionary that maps strings to iterators.
        optimizer: Optimizer that has been set up with the model, or a dictionary that maps strings to optimizers.
        converter: Converter function, called with the examples of each micro-batch.
        device (device specifier): Device to which the model is sent. If ``None``, the model stays where it is.
        loss_func: Loss function. The target link of the main optimizer is used by default. It returns the loss; or a
            pair ``(loss, weight)``, if only the forward pass finds what the loss is divided by; or a list of such
            pairs, if the loss is a sum of means with different divisors.
        loss_scale (float): Loss scaling factor.
        auto_new_epoch (bool): As in ``StandardUpdater``, but for each epoch that ended within the effective batch.
        input_device (device specifier): Device to which the training data is sent. By default, ``device``.
        accumulation_steps: Number of iterator batches per update: an int; a dictionary from epochs, counted from 0, to
            the number that applies from then on, such as ``{0: 1, 10: 4}``; or a function that takes the updater and
            returns the number for its next update.
        effective_batch_size: Number of examples per update on all ranks together, instead of ``accumulation_steps``: an
            int, a dictionary from epochs, or a function of the updater, as there. The number must be a multiple of
            ``iterator.batch_size`` times the number of ranks. Or a :class:`~chainer_accum.TokenBudget`, which gathers
            iterator batches until they have its number of tokens.
        micro_batch_size: The limit of one forward/backward pass. With a number of examples, larger iterator batches are
            split as evenly as possible. A :class:`~chainer_accum.TokenBudget` sorts examples by length and limits the
            tokens. ``'auto'`` finds the fastest number that fits in memory during the first updates, and reports what
            it tries. A function takes the list of examples of an iterator batch and returns a list of micro-batches,
            each a list of examples. If ``None``, iterator batches stay whole.
        weight_func (callable): Function that takes the examples of a micro-batch, as the iterator returned them, and
            returns the weight of the micro-batch, a number of 0 or more. The right weight is what the loss is divided
            by: for a mean over tokens or valid labels, their number. By default, the number of examples. A weight of 0
            skips the backward pass; if all weights are 0, the gradient is zero. The function is called before the
            forward pass or, if it takes no argument or refers to a model, after it.
        loss_reduction (str): Whether the loss is a ``'mean'`` or a ``'sum'`` over its examples. With ``'sum'``, weights
            affect observations only, which are still means: give a reported loss the rule ``'sum'`` in
            ``observation_rules``.
        epoch_boundary (str): ``'carry'`` lets an effective batch cross the end of an epoch, as a large batch does;
            ``'flush'`` ends it there, with fewer examples.
        observation_rules (dict): Maps keys of the observation, such as ``'main/n_correct'``, to how the values of the
            micro-batches are merged. ``'mean'`` (weighted), ``'sum'``, ``'max'`` and ``'min'`` merge numbers and,
            elementwise, arrays. ``'last'`` takes the last value. ``'concat'`` concatenates arrays along axis 0; numbers
            become the elements of an array. A function of two lists, the values and their weights, returns what is
            reported. It gets arrays in place of Variables, and is called before the parameters are updated, also if
            there is only one micro-batch. ``'concat'`` and functions keep all values until then. By default, scalars
            are averaged; for anything else, the last value is reported. Counts need ``'sum'``, and so do the numerator
            and denominator of :class:`~chainer.training.extensions.MicroAverage`. If the first update does not report a
            key that has a rule, a :class:`RuntimeWarning` is issued.
        prefetch (bool): Whether a thread reads and converts the next micro-batch of an update while the current one
            computes, which holds one more converted micro-batch. If the iterator, dataset or converter shares a random
            generator with the model, as a shuffling iterator does by default, the order of their draws is left to
            chance.
        split_when_out_of_memory (bool): Whether an update restarts with smaller micro-batches when memory runs out. The
            examples of an update are then kept until it ends. By default, ``True`` if this costs no extra memory
            because each update splits one iterator batch or keeps its examples anyway, and with ``'auto'``.
        nonfinite (str): What to do with a micro-batch whose loss or gradient is not finite: ``'keep'``, ``'skip'`` or
            ``'raise'``, as for :func:`~chainer_accum.accumulate`. ``'skip'`` also drops what the micro-batch reported,
            and reports the number of such micro-batches as ``skipped_micro_batches``.
        running_statistics (str): When the running averages of batch normalization move: with each ``'micro_batch'`` or
            once per ``'update'``, as for :func:`~chainer_accum.accumulate`.
        lockstep: Whether micro-batches wait for one another wherever a layer looks at the whole batch, so that batch
            normalization, dropout and the state of layers are exactly those of the whole batch: ``'memory'``,
            ``'host'``, ``'file'`` or the path of a folder, where to keep what is needed in between. If ``None``, each
            micro-batch passes through the model by itself.
        memory_limit: How much memory may be in use during the search of ``'auto'``: bytes, or a share of what the
            cgroup, machine or device has, such as ``'80%'``. By default, 90 % of what is available.
        skip_update (callable): Function of the window that is called before the optimizer updates. If it returns
            ``True``, there is no update, as for :func:`~chainer_accum.accumulate`. The examples are used up, and the
            update counts as an iteration. ``skipped_updates`` is reported, which is 0 or 1.

    Attributes:
        accumulation_steps (int): Number of iterator batches in the last update. Before the first update, the number for
            it, or 1 if a function decides. Assign anything that the argument accepts to change it for later updates;
            this replaces the argument ``effective_batch_size`` as well.
        effective_batch_size (int): Number of examples in the last update, without skipped ones and without those of
            other ranks, or ``None`` if unknown: before the first update, or if iterator batches are not lists. It
            cannot be set.
        micro_batch_size (int): The largest number of examples, or of tokens, in one forward/backward pass of the next
            update, or ``None``. It is lowered when memory runs out.
        gradient_norm_interval (int): If set to n, the gradient norms of all micro-batches are measured every n updates.
        gradient_norms (~chainer_accum.window.GradientNorms): The norms from the last update, if measured, or ``None``.
        lockstep: See the argument.
        micro_batch_timings (dict): Seconds per example or token by limit, as measured by ``'auto'`` so far.
        weight_func (callable): See the argument.
        loss_reduction (str): See the argument. The other attributes are those of ``StandardUpdater``.

    Raises:
        FloatingPointError: If a micro-batch is not finite and ``nonfinite`` is ``'raise'``.
        MemoryError: If memory runs out for a single example.
        RuntimeError: If no loss of the first update depends on a parameter of the model.
        TypeError: If an argument is unknown or has the wrong type.
        ValueError: If an argument has an invalid value, or an optimizer has not been set up.

    """

    def __init__(
        self,
        iterator: Union[chainer.dataset.Iterator, Dict[str, Any]],
        optimizer: Union[chainer.Optimizer, Dict[str, Any]],
        converter: Callable[..., Any] = concat_examples,
        device: Optional[DeviceSpec] = None,
        loss_func: Optional[Callable[..., chainer.Variable]] = None,
        loss_scale: Optional[float] = None,
        auto_new_epoch: bool = True,
        *,
        input_device: Optional[DeviceSpec] = None,
        accumulation_steps: Steps = 1,
        effective_batch_size: Union[Steps, TokenBudget, None] = None,
        micro_batch_size: Limit = None,
        weight_func: Optional[WeightFunc] = None,
        loss_reduction: str = "mean",
        epoch_boundary: str = "carry",
        observation_rules: Optional[Mapping[str, Rule]] = None,
        prefetch: bool = False,
        split_when_out_of_memory: Optional[bool] = None,
        nonfinite: str = "keep",
        running_statistics: str = "micro_batch",
        lockstep: StoreSpec = None,
        skip_update: Optional[SkipUpdate] = None,
        memory_limit: MemoryLimit = None,
    ) -> None:
        iterators = iterator if isinstance(iterator, dict) else {"main": iterator}
        check_main("iterator", iterators, "an iterator", "next", "create a SerialIterator for the dataset")
        optimizers = optimizer if isinstance(optimizer, dict) else {"main": optimizer}
        check_main("optimizer", optimizers, "an optimizer", "update", "pass the optimizer as the second argument")
        for name, each in optimizers.items():
            check_set_up(each, f"optimizer {name!r}")
        check_not_accumulating("optimizer", optimizers["main"], "an updater that accumulates")
        check_callable("converter", converter, "to accumulate, pass accumulation_steps or micro_batch_size by keyword")
        if isinstance(converter, chainer.Link):
            raise TypeError(
                f"converter must not be a model, got {type(converter).__name__}; the optimizer has the model already; "
                "to use it as the loss function, write loss_func=model"
            )
        if loss_func is not None:
            check_callable("loss_func", loss_func)
        check_weight_func(weight_func)
        communicator = communicator_of(optimizers["main"])
        num_ranks = 1 if communicator is None else communicator.size
        schedule = make_schedule(accumulation_steps, effective_batch_size, iterators["main"], num_ranks)
        size = make_micro_batch_size(micro_batch_size, memory_limit, split_when_out_of_memory)
        check_bool("auto_new_epoch", auto_new_epoch, "use False to call optimizer.new_epoch() yourself")
        check_bool("prefetch", prefetch, "use True to convert the next micro-batch in a thread")
        if prefetch and isinstance(converter, ConcatWithAsyncTransfer):
            raise ValueError(
                "converter must not be ConcatWithAsyncTransfer with prefetch=True, got both; it would overwrite "
                "a buffer that is still being read; use concat_examples, whose copies are prefetched as well"
            )
        policy = make_lockstep_policy(lockstep)
        if policy is not None and isinstance(converter, ConcatWithAsyncTransfer):
            raise ValueError(
                "converter must not be ConcatWithAsyncTransfer with lockstep, got both; it would overwrite a buffer of "
                "a micro-batch that waits; use concat_examples"
            )
        options = WindowOptions(loss_reduction, nonfinite, running_statistics, policy, skip_update).checked()
        check_choice("epoch_boundary", epoch_boundary, EPOCH_BOUNDARIES)
        rules = ObservationRules(observation_rules)
        check_loss_scale(loss_scale)
        window_class(optimizers["main"], options)  # raises if the optimizer does not fit
        if (schedule.depends_on_data or not size.cuts_evenly) and links_communicate(optimizers["main"]):
            raise ValueError(
                "micro_batch_size and effective_batch_size must be numbers or None if links of the model communicate, "
                f"got {micro_batch_size!r} and {effective_batch_size!r}; the ranks would have different numbers of "
                "micro-batches"
            )
        super().__init__(
            iterators,
            optimizers,
            converter,
            device,
            loss_func,
            loss_scale,
            auto_new_epoch,
            input_device=input_device,
            schedule=schedule,
            size=size,
            options=options,
            rules=rules,
            weight_func=weight_func,
            epoch_boundary=epoch_boundary,
            prefetch=prefetch,
        )

    def __setattr__(self, name: str, value: object) -> None:
        if name in _SET_ONCE:
            raise AttributeError(
                f"{name} cannot be set, got {value!r}; pass it when the updater is created: "
                f"{type(self).__name__}(..., {name}={value!r})"
            )
        super().__setattr__(name, value)

    @property
    def accumulation_steps(self) -> int:
        return self._steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: Union[Steps, Schedule]) -> None:
        self._schedule = value if isinstance(value, Schedule) else Schedule(value)
        self._steps = self._schedule.known(self) or self._steps

    @property
    def effective_batch_size(self) -> Optional[int]:
        return self._effective_batch_size

    @property
    def loss_reduction(self) -> str:
        """Whether the loss is a ``'mean'`` or a ``'sum'`` over its examples."""
        return self._options.loss_reduction

    @property
    def lockstep(self) -> StoreSpec:
        """Where micro-batches in lockstep keep what they need, or ``None`` if they do not run in lockstep."""
        return None if self._options.lockstep is None else self._options.lockstep.store

    @property
    def micro_batch_size(self) -> Optional[int]:
        """The largest number of examples, or of tokens, in one forward/backward pass of the next update."""
        return self._size.limit

    @property
    def micro_batch_timings(self) -> Dict[int, float]:
        """Seconds per example, or per token, by limit of a pass, as measured by ``'auto'`` so far."""
        return self._size.timings

    @property
    def previous_epoch_detail(self) -> Optional[float]:
        """``epoch_detail`` before the last update, or ``None`` before the first."""
        return self._epochs.previous_epoch_detail(self.get_iterator("main"))

    @property
    def is_new_epoch(self) -> bool:
        """Whether an epoch ended within the last effective batch."""
        return self._epochs.is_new_epoch(self.get_iterator("main"))


# Arguments that are not attributes, or are read-only.
_SET_ONCE = frozenset(
    [
        *("micro_batch_size", "epoch_boundary", "observation_rules", "prefetch", "split_when_out_of_memory"),
        *("nonfinite", "running_statistics", "loss_reduction", "lockstep", "effective_batch_size", "memory_limit"),
        "skip_update",
    ]
)
