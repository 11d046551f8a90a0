"""AccumulatingUpdater: a window of micro-batches where StandardUpdater has one batch."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import numbers
import sys
import warnings
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Mapping, NoReturn, Optional, Tuple, Union

import chainer
from chainer.dataset import ConcatWithAsyncTransfer, concat_examples
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater

from chainer_accum._arguments import call, check_bool, check_callable, check_choice, check_int, check_set_up
from chainer_accum._devices import free_memory
from chainer_accum._signals import DeferredSignals
from chainer_accum.batch_statistics import BATCH_STATISTICS
from chainer_accum.distributed import begin_window, communicator_of, finish, links_communicate, update_without_data
from chainer_accum.gradient_norms import GradientNorms
from chainer_accum.micro_batches import EPOCH_BOUNDARIES, MicroBatch, MicroBatches, WeightFunc
from chainer_accum.mixed_precision import serialize_mixed_precision
from chainer_accum.observations import ObservationRules, Observations, reporting_to
from chainer_accum.optimizer import check_not_accumulating
from chainer_accum.prefetching import prepare_ahead, prepare_lazily
from chainer_accum.random_state import RandomState
from chainer_accum.schedules import Schedule, Steps
from chainer_accum.tuning import MicroBatchSize, TunedMicroBatchSize
from chainer_accum.window import LOSS_REDUCTIONS, NONFINITE, Window


class AccumulatingUpdater(StandardUpdater):
    """:class:`~chainer.training.updaters.StandardUpdater` with gradient accumulation.

    One :meth:`update` makes the step that ``StandardUpdater`` would make with the whole effective batch, but keeps the
    graph of one micro-batch at a time. One update is one ``optimizer.update()`` and one ``iteration``; hooks, triggers,
    extensions and snapshots see effective batches only.

    There are two ways to form an effective batch, and they compose: ``accumulation_steps`` batches are gathered from
    the iterator, and each is split into micro-batches of at most ``micro_batch_size`` examples. With neither, this is
    ``StandardUpdater``. Each micro-batch has its own forward pass, so what a model computes over the batch it sees,
    such as the statistics of batch normalization, it computes over the micro-batch.

    If there are several iterators or optimizers by name, the main ones are used, as in ``StandardUpdater``.

    With a multi-node optimizer of ChainerMN, an effective batch is that of all ranks together, each with an updater and
    an iterator of its own.

    If the iterator, the converter, a forward or a backward pass raises, the examples of that update are dropped, and
    parameters, optimizer, reporter and the persistent values of the models are as before it. The same holds for Ctrl-C,
    which waits if the parameters are already being updated.

    If memory does not suffice for a micro-batch, the update begins again with micro-batches of half the size, as later
    ones do. No example is read again or lost, persistent values and the random generators of the host are put back, and
    a :class:`RuntimeWarning` says so. See ``split_when_out_of_memory``.

    Args:
        iterator: Dataset iterator for the training dataset, or a dictionary that maps strings to iterators.
        optimizer: Optimizer that has been set up with the model, or a dictionary that maps strings to optimizers.
        converter: Converter function, called with the examples of each micro-batch.
        device(device specifier): Device to which the model is sent. If ``None``, the device of the model will stay
            unchanged.
        loss_func: Loss function. The target link of the main optimizer is used by default.
        loss_scale (float): Loss scaling factor.
        auto_new_epoch (bool): If ``True``, :meth:`~chainer.Optimizer.new_epoch` of the main optimizer is called when an
            epoch ended within the effective batch.
        input_device (device specifier): Device to which the training data is sent. By default, ``device``.
        accumulation_steps: Number of iterator batches per update. It is an int; or a dictionary that maps epochs,
            counted from 0, to the number that holds from then on, such as ``{0: 1, 10: 4}``; or a function of the
            updater that returns the number for its next update.
        micro_batch_size: The largest number of examples in one forward/backward pass. An iterator batch with more is
            split as evenly as can be. If ``None``, iterator batches stay whole. With ``'auto'``, the fastest size that
            fits in memory is found during the first updates: they are made with different sizes and timed. The size is
            reported as ``micro_batch_size``, and the time, as long as it is taken, as ``seconds_per_example``.
        weight_func (callable): What a micro-batch counts for in the effective batch. It is called with the examples of
            the micro-batch, as the iterator gave them, and returns a number, zero or more. The right weight is what the
            loss is divided by: if the loss is a mean over tokens or over valid labels, return their number. By default,
            the number of examples. With a weight of zero, there is no backward pass; if the whole effective batch has
            none, the gradient is zero.
        loss_reduction (str): What the loss is over the examples of a batch: ``'mean'``, or ``'sum'`` to add up the
            gradients as they are. The weights then serve for observations only, whose means are still means: give the
            loss the rule ``'sum'`` in ``observation_rules`` if it is reported.
        epoch_boundary (str): ``'carry'`` lets an effective batch run across the end of an epoch, as a large batch does;
            ``'flush'`` ends it there, with fewer examples.
        observation_rules (dict): Maps keys of the observation, such as ``'main/n_correct'``, to how the values that the
            micro-batches reported become one: ``'mean'`` (by weight), ``'sum'`` or ``'last'``. Without a rule, scalars
            become means, and the last of all other values is reported. ``'mean'`` and ``'sum'`` also merge arrays,
            elementwise. Counts need ``'sum'``, among them the numerator and the denominator of
            :class:`~chainer.training.extensions.MicroAverage`. If the first update does not report a key that has a
            rule, there is a :class:`RuntimeWarning`.
        prefetch (bool): Whether the next micro-batch of an update is read from the iterator and converted in a thread
            while the present one computes. Then one more converted micro-batch is alive at a time. If the iterator, the
            dataset or the converter draws from the random generators that the model draws from, as an iterator that
            shuffles does by default, the order of their draws is left to chance.
        split_when_out_of_memory (bool): Whether an update for which memory does not suffice begins again with smaller
            micro-batches. The examples of an update are then kept until it is over. By default, that is so where the
            iterator has them all in one batch anyway: if ``accumulation_steps`` is 1 and there is a
            ``micro_batch_size``; and with ``micro_batch_size='auto'``, which cannot do without.
        nonfinite (str): What is done with a micro-batch whose loss or gradient is not finite: ``'keep'`` counts it like
            any other; ``'skip'`` leaves it out, with its weight, what it reported and what it did to persistent values,
            and reports how many these were as ``skipped_micro_batches``; ``'raise'`` raises
            :class:`FloatingPointError`. See :func:`~chainer_accum.accumulate`.
        batch_statistics (str): When the running averages of batch normalization move: with each ``'micro_batch'``, or
            once per ``'window'``, that is per update, by the statistics of the whole effective batch. See
            :func:`~chainer_accum.accumulate`.

    Attributes:
        converter: Converter function.
        loss_func: Loss function. If it is ``None``, the target link of the main optimizer is used instead.
        device: Device to which the model is sent.
        input_device: Device to which the training data is sent.
        iteration: Current number of completed updates.
        auto_new_epoch: See the argument.
        accumulation_steps (int): Number of iterator batches that the last update took. Before the first, it is the
            number for that, or 1 if a function is to say. It can be set to all that the argument can be, from the next
            update on.
        effective_batch_size (int): Number of examples in the last update that were not skipped, or ``None`` if that is
            not known: before the first, if the batches of the iterator are no lists, or if :attr:`accumulation_steps`
            is always one and there is no :attr:`micro_batch_size`, so that ``StandardUpdater`` does it.
        micro_batch_size (int): The largest number of examples in one forward/backward pass of the next update, or
            ``None``. It may have been lowered for want of memory.
        weight_func: See the argument.
        loss_reduction: See the argument.
        gradient_norm_interval (int): If it is set, each so many updates, those whose number is a multiple of it, the
            norms of the gradients of all micro-batches are measured.
        gradient_norms (~chainer_accum.gradient_norms.GradientNorms): Those of the last update, or ``None`` if they were
            not measured.
        micro_batch_timings (dict): Seconds per example by micro-batch size, as far as ``'auto'`` has measured them.

    Raises:
        FloatingPointError: If a micro-batch is not finite and ``nonfinite`` is ``'raise'``.
        MemoryError: If memory does not suffice for a single example.
        RuntimeError: If no loss of the first update depends on a parameter of the model.
        TypeError: If an argument is of the wrong type or unknown.
        ValueError: If an argument has an impossible value, or an optimizer has not been set up.

    """

    def __init__(
        self,
        iterator: Any,
        optimizer: Any,
        converter: Callable[..., Any] = concat_examples,
        device: Any = None,
        loss_func: Optional[Callable[..., chainer.Variable]] = None,
        loss_scale: Optional[float] = None,
        auto_new_epoch: bool = True,
        *,
        input_device: Any = None,
        accumulation_steps: Steps = 1,
        micro_batch_size: Union[int, str, None] = None,
        weight_func: Optional[WeightFunc] = None,
        loss_reduction: str = "mean",
        epoch_boundary: str = "carry",
        observation_rules: Optional[Mapping[str, str]] = None,
        prefetch: bool = False,
        split_when_out_of_memory: Optional[bool] = None,
        nonfinite: str = "keep",
        batch_statistics: str = "micro_batch",
        **unknown: NoReturn,
    ) -> None:
        _check_no_unknown(unknown)
        iterators = iterator if isinstance(iterator, dict) else {"main": iterator}
        _check_main("iterator", iterators, "an iterator", "next", "make a SerialIterator of the dataset")
        optimizers = optimizer if isinstance(optimizer, dict) else {"main": optimizer}
        _check_main("optimizer", optimizers, "an optimizer", "update", "the optimizer comes second")
        for name, each in optimizers.items():
            check_set_up(each, f"optimizer {name!r}")
        check_not_accumulating("optimizer", optimizers["main"], "an updater that accumulates")
        check_callable("converter", converter, "to accumulate, pass accumulation_steps or micro_batch_size by keyword")
        if isinstance(converter, chainer.Link):
            raise TypeError(
                f"converter must not be a model, got {type(converter).__name__}; the optimizer has the model, and "
                "a loss function is passed by keyword: loss_func=model"
            )
        if loss_func is not None:
            check_callable("loss_func", loss_func)
        if weight_func is not None:
            check_callable("weight_func", weight_func)
        Schedule(accumulation_steps)  # which checks it
        self._size = _make_size(micro_batch_size)
        if split_when_out_of_memory is not None:
            check_bool("split_when_out_of_memory", split_when_out_of_memory, "use None to decide by what else is asked")
        check_bool("auto_new_epoch", auto_new_epoch, "use False to call optimizer.new_epoch() yourself")
        check_bool("prefetch", prefetch, "use True to convert the next micro-batch in a thread")
        if prefetch and isinstance(converter, ConcatWithAsyncTransfer):
            raise ValueError(
                "converter must not be ConcatWithAsyncTransfer with prefetch=True, got both; it would write to a "
                "buffer that is still being read, so use concat_examples, whose copies are made ahead as well"
            )
        check_choice("nonfinite", nonfinite, NONFINITE)
        check_choice("batch_statistics", batch_statistics, BATCH_STATISTICS)
        check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
        check_choice("epoch_boundary", epoch_boundary, EPOCH_BOUNDARIES)
        rules = ObservationRules(observation_rules)
        _check_loss_scale(loss_scale)
        super().__init__(
            iterators,
            optimizers,
            converter,
            device,
            loss_func,
            loss_scale,
            auto_new_epoch,
            input_device=input_device,
        )
        communicator_of(self.get_optimizer("main"))  # which refuses double buffering
        if self._size.is_tuned and split_when_out_of_memory is False:
            raise ValueError(
                "split_when_out_of_memory must not be False with micro_batch_size='auto', got False; the search meets "
                "sizes that do not fit"
            )
        if self._size.is_tuned and links_communicate(self.get_optimizer("main")):
            raise ValueError(
                "micro_batch_size must be the same on all ranks where links of the model communicate, got 'auto'; "
                "give a number"
            )
        self.weight_func = weight_func
        self.loss_reduction = loss_reduction
        self._epoch_boundary = epoch_boundary
        self._observation_rules = rules
        self._splits_when_out_of_memory = split_when_out_of_memory
        self._prefetches = prefetch
        self._nonfinite = nonfinite
        self._batch_statistics = batch_statistics
        self._steps = 1
        self._largest_weight = 0.0  # of an iterator batch so far
        self._has_failed = False
        self._other_links: Optional[List[chainer.Link]] = None  # that the first window has used
        self._window: Optional[Window] = None  # that is under way
        # Of the last window: epoch_detail as it began, and whether an epoch ended in it. None before the first.
        self._last_window: Optional[Tuple[Optional[float], bool]] = None
        self.effective_batch_size: Optional[int] = None
        self.gradient_norm_interval: Optional[int] = None
        self.gradient_norms: Optional[GradientNorms] = None
        self.accumulation_steps = accumulation_steps

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SET_ONCE:
            raise AttributeError(
                f"{name} cannot be set, got {value!r}; pass it as the updater is made: "
                f"{type(self).__name__}(..., {name}={value!r})"
            )
        super().__setattr__(name, value)

    @property
    def accumulation_steps(self) -> int:
        return self._steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: Steps) -> None:
        self._schedule = Schedule(value)
        self._steps = self._schedule.known(self) or self._steps
        self._is_one_step = value == 1

    @property
    def micro_batch_size(self) -> Optional[int]:
        """The largest number of examples in one forward/backward pass of the next update."""
        return self._size.size

    @property
    def micro_batch_timings(self) -> Dict[int, float]:
        """Seconds per example by micro-batch size, as far as ``micro_batch_size='auto'`` has measured them."""
        return self._size.timings

    @property
    def previous_epoch_detail(self) -> Optional[float]:
        """``epoch_detail`` before the last update, or ``None`` before the first."""
        if self._last_window is None:
            return getattr(self.get_iterator("main"), "previous_epoch_detail", None)
        return self._last_window[0]

    @property
    def is_new_epoch(self) -> bool:
        """Whether an epoch ended within the last effective batch."""
        if self._last_window is None:
            return bool(self.get_iterator("main").is_new_epoch)
        return self._last_window[1]

    def update_core(self) -> None:
        iterator = self.get_iterator("main")
        epoch_detail = getattr(iterator, "epoch_detail", None)  # StandardUpdater does not need it, either
        self.gradient_norms = None
        self._has_failed = True  # until it has not
        if self._is_standard():
            super().update_core()
            is_new_epoch = bool(iterator.is_new_epoch)
        else:
            is_new_epoch = self._update_with_window(self._schedule.ask(self))
        self._last_window = epoch_detail, is_new_epoch
        self._has_failed = False

    def finalize(self) -> None:
        """Finalizes each iterator that can be finalized.

        With a multi-node optimizer, it first takes part in what updates the other ranks have left to do.

        """
        # A rank that failed does not go on, though a Trainer finalizes it as well. Nor does one whose data has ended:
        # then no rank has any.
        if not self._has_failed and not _is_passing_through_trainer(sys.exc_info()[1]):
            finish(self.get_optimizer("main"), self.loss_reduction)
        for iterator in self._iterators.values():
            if hasattr(iterator, "finalize"):
                iterator.finalize()

    def serialize(self, serializer: Any) -> None:
        """Serializes the current state of the updater object.

        Snapshots of :class:`~chainer.training.updaters.StandardUpdater` can be loaded, and it can load these.

        """
        super().serialize(serializer)
        for name, optimizer in self.get_all_optimizers().items():
            serialize_mixed_precision(optimizer, serializer, f"mixed_precision:{name}:")
        if not isinstance(serializer, chainer.Deserializer):
            if self._last_window is not None:
                epoch_detail, is_new_epoch = self._last_window
                serializer("previous_epoch_detail", -1.0 if epoch_detail is None else epoch_detail)
                serializer("is_new_epoch", is_new_epoch)
            return
        self._last_window = None
        with contextlib.suppress(KeyError):  # a snapshot of StandardUpdater, whose iterator knows both
            epoch_detail = serializer("previous_epoch_detail", -1.0)
            if epoch_detail >= 0:
                self._last_window = epoch_detail, serializer("is_new_epoch", False)
        self._steps = self._schedule.known(self) or self._steps

    def _is_standard(self) -> bool:
        is_one_pass = self._is_one_step and self._size.size is None
        is_alone = communicator_of(self.get_optimizer("main")) is None
        return is_one_pass and is_alone and not self._splits_when_out_of_memory and self._nonfinite == "keep"

    def _update_with_window(self, steps: int) -> bool:
        optimizer = self.get_optimizer("main")
        device = optimizer.target.device
        try:
            micro_batches = MicroBatches(
                self.get_iterator("main"),
                steps,
                self._size.size,
                self.weight_func,
                self._epoch_boundary,
                is_repeatable=self._keeps_examples(steps),
                likely_weight=self._largest_weight,
            )
        except StopIteration:
            if not update_without_data(optimizer, self.loss_reduction):
                raise
            self.effective_batch_size = 0
            return False
        self._size.begin_window(device)
        with self._whole_window():
            observation = self._run_passes(micro_batches)
            with DeferredSignals():  # the books are to agree with the step
                self._finish_window(micro_batches, observation)
                shapes, largest_batch = micro_batches.shapes, micro_batches.largest_batch
                self._size.end_window(device, shapes, micro_batches.examples, largest_batch)
        return micro_batches.num_epochs > 0

    @contextlib.contextmanager
    def _whole_window(self) -> Iterator[None]:
        """Context manager that abandons the window that is under way if anything raises."""
        try:
            with reporting_to():
                yield
        except BaseException:
            if self._window is not None:
                self._window.abandon()
            raise
        finally:
            self._window = None

    def _finish_window(self, micro_batches: MicroBatches, observation: Dict[str, Any]) -> None:
        """Updates the parameters, and reports once what the passes and the update have reported."""
        window, of_update = self._window, Observations()
        assert window is not None
        try:
            with of_update.collecting() as reported:
                window.update()
        finally:
            if window.is_done:
                self._keep_books(micro_batches)
        if self._other_links is None:
            known = {id(link) for root in self._links() if root is not None for link in root.links()}
            self._other_links = [link for link in window.links if id(link) not in known]
        of_update.add(reported, 1.0)
        chainer.report({**observation, **of_update.merged()})

    def _keep_books(self, micro_batches: MicroBatches) -> None:
        self._steps = micro_batches.num_batches
        self._largest_weight = max(self._largest_weight, micro_batches.largest_weight)
        self.effective_batch_size = None
        if micro_batches.examples > 0:
            self.effective_batch_size = micro_batches.examples - micro_batches.skipped_examples
        if self.auto_new_epoch:
            for _ in range(micro_batches.num_epochs):
                self.get_optimizer("main").new_epoch(auto=True)

    def _run_passes(self, micro_batches: MicroBatches) -> Dict[str, Any]:
        """Runs all passes of a window, if need be from the beginning again, with smaller micro-batches.

        Returns:
            dict: What they reported.

        """
        random_state = RandomState() if micro_batches.is_repeatable else None
        while True:
            self._window = self._begin_window(micro_batches)
            try:
                return self._try_passes(self._window, micro_batches)
            except _OutOfMemory as error:
                failed, message = error.examples, str(error)
            self._window.abandon()
            self._window = None  # Now all that the failed pass held is free.
            if random_state is not None:
                random_state.restore()
            self._lower_micro_batch_size(failed, message)
            micro_batches.begin_again(self._size.size)

    def _begin_window(self, micro_batches: MicroBatches) -> Window:
        self.gradient_norms = GradientNorms() if self._measures_norms() else None
        return begin_window(
            self.get_optimizer("main"),
            self.loss_reduction,
            micro_batches.regular_weight,
            self._nonfinite,
            self._batch_statistics,
            self.gradient_norms,
            self._links(),
            undoes_passes=False,
            looks_for_links=self._other_links is None,  # in the first window, for it costs some time
        )

    def _links(self) -> List[Optional[chainer.Link]]:
        """Returns the links whose persistent values a pass may change, as far as they are known."""
        targets = [optimizer.target for optimizer in self.get_all_optimizers().values()]
        return [*targets, *_links_of(self.loss_func), *(self._other_links or [])]

    def _try_passes(self, window: Window, micro_batches: MicroBatches) -> Dict[str, Any]:
        """Runs all passes of a window, and returns what they reported."""
        observations = Observations(self._observation_rules)
        prepare = functools.partial(prepare_ahead, device=self.input_device) if self._prefetches else prepare_lazily
        with contextlib.closing(prepare(iter(micro_batches), self._bind_loss)) as prepared:
            for micro_batch, bind_loss in prepared:
                window.weights.expect(micro_batches.expected_weight)
                with fitting(window, micro_batches, micro_batch.examples), observations.collecting() as observation:
                    is_counted = window.add(bind_loss(), weight=micro_batch.weight)
                if is_counted:
                    observations.add(observation, micro_batch.weight)
                else:
                    micro_batches.skip(micro_batch.examples)
                del micro_batch, bind_loss  # its examples are not to be held while the next are read
        return observations.merged()

    def _lower_micro_batch_size(self, failed: int, message: str) -> None:
        if failed == 1:
            raise MemoryError(
                f"one example does not fit in memory: {message}; use a smaller model or smaller examples, "
                "or chainer.functions.forget to compute parts of the graph twice instead of keeping them"
            )
        self._size.lower(failed)
        free_memory(self.get_optimizer("main").target.device)
        warnings.warn(
            f"memory did not suffice for a micro-batch of {failed} examples ({message}); the window begins again, and "
            f"from now on a micro-batch has at most {self._size.size}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _measures_norms(self) -> bool:
        return bool(self.gradient_norm_interval) and (self.iteration + 1) % self.gradient_norm_interval == 0

    def _keeps_examples(self, steps: int) -> bool:
        if self._splits_when_out_of_memory is not None:
            return self._splits_when_out_of_memory
        # A search will meet sizes that do not fit. And if there is one batch only, the iterator has made it anyway.
        return self._size.is_tuned or (self._size.size is not None and steps == 1)

    def _bind_loss(self, micro_batch: MicroBatch) -> Callable[[], chainer.Variable]:
        loss_func = self.loss_func or self.get_optimizer("main").target
        return self._bind(functools.partial(call, "the loss function", loss_func), micro_batch.examples)

    def _bind(self, function: Callable[..., Any], examples: Any) -> Callable[[], Any]:
        """Returns a function that calls this one with the converted examples, in the form in which they come."""
        convert = functools.partial(chainer.dataset.convert._call_converter, self.converter)
        arguments = call("converter", convert, examples, self.input_device)
        if isinstance(arguments, tuple):
            return functools.partial(function, *arguments)
        if isinstance(arguments, dict):
            return functools.partial(function, **arguments)
        return functools.partial(function, arguments)


# Arguments that are no attributes.
_SET_ONCE = frozenset(
    [
        *("micro_batch_size", "epoch_boundary", "observation_rules", "prefetch", "split_when_out_of_memory"),
        *("nonfinite", "batch_statistics"),
    ]
)


class _OutOfMemory(Exception):
    """Memory did not suffice for a pass, which can be run again with fewer examples."""

    def __init__(self, examples: int, error: MemoryError) -> None:
        super().__init__(str(error))
        self.examples = examples


@contextlib.contextmanager
def fitting(window: Window, micro_batches: MicroBatches, examples: Any) -> Iterator[None]:
    """Returns a context for a pass with these examples, from which the window can begin again if memory fails."""
    try:
        yield
    except MemoryError as error:
        if micro_batches.is_repeatable and window.is_repeatable:
            raise _OutOfMemory(len(examples), error) from None
        raise


def _make_size(micro_batch_size: Any) -> MicroBatchSize:
    if isinstance(micro_batch_size, str) and micro_batch_size == "auto":
        return TunedMicroBatchSize()
    if micro_batch_size is None:
        return MicroBatchSize(None)
    remedy = "use None to leave batches whole, or 'auto' to find the fastest"
    return MicroBatchSize(check_int("micro_batch_size", micro_batch_size, 1, remedy))


def _is_passing_through_trainer(error: Optional[BaseException]) -> bool:
    """Returns whether an exception has come out of the Trainer that is finalizing now.

    Another one may be in the process of being handled around the Trainer.

    """
    running = set()
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    traceback = None if error is None else error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is Trainer.run.__code__ and traceback.tb_frame in running:
            return True
        traceback = traceback.tb_next
    return False


def _links_of(function: Any) -> List[chainer.Link]:
    """Returns the links that a function is, or is bound to."""
    if isinstance(function, functools.partial):
        return [link for part in (function.func, *function.args) for link in _links_of(part)]
    return [each for each in (function, getattr(function, "__self__", None)) if isinstance(each, chainer.Link)]


def _check_no_unknown(unknown: Dict[str, Any]) -> None:
    for name, value in unknown.items():
        known = [parameter for parameter in inspect.signature(AccumulatingUpdater).parameters if parameter != "unknown"]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise TypeError(f"{name} is not an argument of AccumulatingUpdater, got {name}={value!r}; {remedy}")


def _check_main(name: str, by_name: Dict[str, Any], what: str, method: str, remedy: str) -> None:
    if "main" not in by_name:
        raise ValueError(f"{name} must have the key 'main', got the keys {sorted(by_name)}; name the one to train with")
    if not callable(getattr(by_name["main"], method, None)):
        raise TypeError(f"{name} must be {what} or a dict of them, got {by_name['main']!r}; {remedy}")


def _check_loss_scale(loss_scale: Any) -> None:
    is_number = isinstance(loss_scale, numbers.Real) and not isinstance(loss_scale, bool)
    if loss_scale is not None and not (is_number and 0 < float(loss_scale) < math.inf):
        raise ValueError(
            f"loss_scale must be a positive number, got {loss_scale!r}; "
            "for dynamic scaling, call optimizer.loss_scaling()"
        )
