"""The recipe of an update: fetch micro-batches, pass each through the model, take one step, report."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import chainer
from chainer.training.updaters import StandardUpdater

from chainer_accum._arguments import call
from chainer_accum._devices import parameter_bytes
from chainer_accum._late_weights import LateWeights
from chainer_accum._trainer import is_trainer_failing
from chainer_accum.batches import (
    Arguments,
    EpochRecord,
    Gathering,
    Load,
    MicroBatch,
    MicroBatches,
    MicroBatchSize,
    OutOfMemory,
    Schedule,
    WeightFunc,
    costliest_to_cut,
    count_examples,
    prepare_ahead,
    prepare_lazily,
    together,
)
from chainer_accum.observations import ObservationRules, Observations, Reported, reporting_to
from chainer_accum.state import DeferredSignals, RandomState, UsedLinks, serialize_mixed_precision
from chainer_accum.window import (
    GradientNorms,
    Window,
    WindowOptions,
    communicator_of,
    join_remaining_updates,
    join_update,
    total_loss,
    window_class,
)


class Passes(NamedTuple):
    """What the passes of a window reported, merged, and the number of examples in skipped micro-batches."""

    observation: Dict[str, Reported]
    num_skipped_examples: int


class WindowUpdater(StandardUpdater):
    """Updater whose update is a window of micro-batches and one step.

    :class:`~chainer_accum.AccumulatingUpdater` is this updater with arguments instead of policies.

    Args:
        *args: Positional arguments of :class:`~chainer.training.updaters.StandardUpdater`.
        schedule (Schedule): How many iterator batches a window has.
        size (MicroBatchSize): How many examples a micro-batch has at most.
        options (WindowOptions): What a window does with losses, non-finite values and running averages.
        rules (ObservationRules): How the reports of a window are merged.
        weight_func (callable): Weight of a micro-batch, or ``None`` for its number of examples.
        epoch_boundary (str): ``'carry'`` or ``'flush'``.
        prefetch (bool): Whether a thread prepares the next micro-batch.
        **kwargs: Keyword arguments of ``StandardUpdater``.

    """

    def __init__(
        self,
        *args: Any,
        schedule: Schedule,
        size: MicroBatchSize,
        options: WindowOptions,
        rules: ObservationRules,
        weight_func: Optional[WeightFunc],
        epoch_boundary: str,
        prefetch: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._schedule = schedule
        self._size = size
        self._options = options
        self._rules = rules
        self.weight_func = weight_func
        self._late_weights = LateWeights()
        self._epoch_boundary = epoch_boundary
        self._prepare = functools.partial(prepare_ahead, device=self.input_device) if prefetch else prepare_lazily
        self._steps = schedule.known(self) or 1  # of the last window
        self._largest_weight = 0.0  # the largest weight of an iterator batch so far
        self._epochs = EpochRecord()
        self._used_links = UsedLinks()
        self._has_failed = False
        self._window: Optional[Window] = None  # the current window
        self._effective_batch_size: Optional[int] = None
        self.gradient_norm_interval: Optional[int] = None
        self.gradient_norms: Optional[GradientNorms] = None

    def update_core(self) -> None:
        epoch_detail = getattr(self.get_iterator("main"), "epoch_detail", None)  # optional, as for StandardUpdater
        self.gradient_norms = None
        self._has_failed = True  # reset at the end
        num_epochs = self._update_at_once() if self._is_standard() else self._update_with_window()
        self._epochs.record(epoch_detail, num_epochs > 0)
        self._has_failed = False

    def finalize(self) -> None:
        """Finalizes the iterators that have a method ``finalize``.

        With a multi-node optimizer, it first takes part in the updates that other ranks have yet to run.

        """
        # A Trainer finalizes a failed updater as well, but a failed rank must not go on. An update that raised
        # StopIteration also counts as failed: no rank had data left.
        if not self._has_failed and not is_trainer_failing():
            join_remaining_updates(self.get_optimizer("main"), self._options)
        for iterator in self._iterators.values():
            if hasattr(iterator, "finalize"):
                iterator.finalize()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the current state of the updater object.

        Snapshots are interchangeable with those of :class:`~chainer.training.updaters.StandardUpdater`, in both
        directions.

        """
        super().serialize(serializer)
        for name, optimizer in self.get_all_optimizers().items():
            serialize_mixed_precision(optimizer, serializer, f"mixed_precision:{name}:")
        self._epochs.serialize(serializer)
        self._size.serialize(serializer)
        if isinstance(serializer, chainer.Deserializer):
            self._steps = self._schedule.known(self) or self._steps

    def _is_standard(self) -> bool:
        """Returns whether ``StandardUpdater`` can take the step: one pass, and nothing else to do."""
        is_one_pass = self._size.leaves_whole and not self._size.keeps_examples(True) and self._schedule.is_always_one
        is_alone = communicator_of(self.get_optimizer("main")) is None
        has_more_to_do = self._options.checks_values or self._options.skip_update or self._rules.change_single_reports
        return is_one_pass and is_alone and not has_more_to_do

    def _update_at_once(self) -> int:
        """Takes the step as ``StandardUpdater`` does, and returns the number of epochs that ended."""
        iterator = self.get_iterator("main")
        batch = iterator.next()
        arguments = Arguments(self.converter, batch, self.input_device)
        loss_func = functools.partial(total_loss, call, "the loss function", self._loss_func())
        self.get_optimizer("main").update(loss_func, *arguments.args, **arguments.kwargs)
        num_epochs = int(iterator.is_new_epoch)
        self._keep_books(1, count_examples(batch), num_epochs)
        return num_epochs

    def _update_with_window(self) -> int:
        """Takes the step with a window of micro-batches, and returns the number of epochs that ended."""
        optimizer = self.get_optimizer("main")
        try:
            micro_batches = self._fetch(self._schedule.ask(self))
        except StopIteration:
            if not join_update(optimizer, self._options):
                raise
            self._effective_batch_size = 0
            return 0
        self._size.begin_window(optimizer.target.device, functools.partial(parameter_bytes, optimizer.target))
        with self._whole_window():
            passes = self._run_passes(micro_batches)
            with DeferredSignals():  # so that the counters agree with the step
                self._finish_window(micro_batches, passes)
        return micro_batches.num_epochs

    def _fetch(self, gathering: Gathering) -> MicroBatches:
        """Returns the micro-batches of the next window, after reading the first iterator batch."""
        return MicroBatches(
            self.get_iterator("main"),
            gathering,
            self._size,
            self._late_weights.early(self.weight_func),
            self._epoch_boundary,
            is_repeatable=self._size.keeps_examples(gathering.to_come == 1),
            likely_weight=self._largest_weight,
        )

    @contextlib.contextmanager
    def _whole_window(self) -> Iterator[None]:
        """Context manager that abandons the current window if anything raises."""
        try:
            with reporting_to():
                yield
        except BaseException:
            if self._window is not None:
                self._window.abandon()
            raise
        finally:
            self._window = None

    def _run_passes(self, micro_batches: MicroBatches) -> Passes:
        """Runs all passes, and restarts with smaller micro-batches if memory runs out."""
        random_state = RandomState() if micro_batches.is_repeatable else None
        while True:
            observations = Observations(self._rules)
            self._window = self._begin_window(micro_batches, observations)
            try:
                return self._try_passes(self._window, micro_batches, observations)
            except OutOfMemory as error:
                failed = error
            self._window.abandon()
            self._window = None  # frees everything that the failed pass held
            if random_state is not None:
                random_state.restore()
            self._size.make_room(failed, self.get_optimizer("main").target.device)
            micro_batches.begin_again()

    def _begin_window(self, micro_batches: MicroBatches, observations: Observations) -> Window:
        measures_norms = self.gradient_norm_interval and (self.iteration + 1) % self.gradient_norm_interval == 0
        self.gradient_norms = GradientNorms() if measures_norms else None
        optimizer = self.get_optimizer("main")
        return window_class(optimizer, self._options)(
            optimizer,
            self._options,
            expected_weight=micro_batches.regular_weight,
            norms=self.gradient_norms,
            links=self._links(),
            undoes_passes=False,
            looks_for_links=not self._used_links.are_known,
            on_reported=observations.add,
        )

    def _try_passes(self, window: Window, micro_batches: MicroBatches, observations: Observations) -> Passes:
        """Runs all passes of a window."""
        num_skipped_examples, loads = 0, []
        with contextlib.closing(self._prepare(iter(micro_batches), self._convert)) as prepared:
            for micro_batch, get_arguments in prepared:
                window.weights.expect(micro_batches.expected_weight)
                window.num_examples = count_examples(micro_batch.examples)
                loads.append(micro_batch.load)
                with self._running([micro_batch.load], micro_batches, is_whole=not window.waits):
                    with observations.collecting() as observation:
                        forward = functools.partial(get_arguments().call, "the loss function", self._loss_func())
                        loss_func = self._late_weights.late(self.weight_func, forward, micro_batch.examples)
                        is_counted = window.add(loss_func, weight=micro_batch.weight)
                if is_counted:
                    observations.add(observation, window.report_weight)
                else:
                    num_skipped_examples += count_examples(micro_batch.examples) or 0
                del micro_batch, get_arguments, forward, loss_func  # release the examples before the next are read
        with self._running(loads, micro_batches, is_whole=window.waits):
            window.run_passes()
        return Passes(observations.merged(), num_skipped_examples)

    @contextlib.contextmanager
    def _running(self, loads: Sequence[Load], micro_batches: MicroBatches, is_whole: bool) -> Iterator[None]:
        """Context manager for passes that run together, which are measured if they are complete when the block ends."""
        assert self._window is not None
        with self._size.retrying(costliest_to_cut(loads), self._window, micro_batches):
            with self._size.measuring(together(loads)) if is_whole else contextlib.nullcontext():
                yield

    def _finish_window(self, micro_batches: MicroBatches, passes: Passes) -> None:
        """Updates the parameters, and reports once what the passes and the update have reported."""
        window, of_update = self._window, Observations()
        assert window is not None
        try:
            with of_update.collecting() as reported:
                window.update()
                chainer.report(window.observation)
        finally:
            if window.is_done:
                num_counted = micro_batches.num_examples - passes.num_skipped_examples
                num_examples = num_counted if micro_batches.num_examples > 0 else None
                self._largest_weight = max(self._largest_weight, micro_batches.largest_weight)
                self._keep_books(micro_batches.num_batches, num_examples, micro_batches.num_epochs)
        if not self._used_links.are_known:
            self._used_links.record(self._links(), window.links)
        of_update.add(reported, 1.0)
        of_size = self._size.end_window(micro_batches.shapes, micro_batches.costliest)
        of_passes = {} if window.is_skipped else passes.observation
        chainer.report({**of_passes, **of_update.merged(), **of_size})

    def _keep_books(self, num_batches: int, num_examples: Optional[int], num_epochs: int) -> None:
        """Records how many batches, examples and epochs the step consumed."""
        self._steps = num_batches
        self._effective_batch_size = num_examples
        if self.auto_new_epoch:
            for _ in range(num_epochs):
                self.get_optimizer("main").new_epoch(auto=True)

    def _links(self) -> List[Optional[chainer.Link]]:
        """Returns the known links whose persistent values a pass may change."""
        return self._used_links.named_by(self.get_all_optimizers().values(), self.loss_func)

    def _loss_func(self) -> Callable[..., chainer.Variable]:
        return self.loss_func or self.get_optimizer("main").target

    def _convert(self, micro_batch: MicroBatch) -> Arguments:
        return Arguments(self.converter, micro_batch.examples, self.input_device)
