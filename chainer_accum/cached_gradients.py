"""CachedGradientUpdater: the full-batch step for a loss that compares examples with one another.

Such a loss is not a sum over micro-batches, so the gradients of the micro-batches do not add up to the gradient of the
batch. But the loss is a function of the representations that the encoder computes, and these are small. So the chain
rule is split there: the micro-batches are encoded without a graph; the loss of all representations together gives the
gradient of each; then the micro-batches are encoded again, with a graph, to propagate these gradients to the
parameters. The result is exact if the encoder does the same both times, which this module ensures.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Union

import chainer
from chainer.dataset import concat_examples

from chainer_accum._arguments import call, check_callable
from chainer_accum._devices import DeviceSpec
from chainer_accum._late_weights import is_late
from chainer_accum._window_updater import Passes
from chainer_accum.batches import (
    Arguments,
    Limit,
    MemoryLimit,
    MicroBatch,
    MicroBatches,
    Steps,
    TokenBudget,
    WeightFunc,
    together,
)
from chainer_accum.observations import Observations, Rule
from chainer_accum.state import PersistentValues, RandomState, devices_of
from chainer_accum.updater import AccumulatingUpdater
from chainer_accum.window import (
    Representations,
    Window,
    WindowOptions,
    by_name,
    communicator_of,
    copies_of,
    total_loss,
)


class CachedGradientUpdater(AccumulatingUpdater):
    """Updater for losses that compare the examples of a batch, such as n-pair, triplet and NT-Xent losses.

    One :meth:`update` takes the step that :class:`~chainer.training.updaters.StandardUpdater` would take with the whole
    effective batch and the loss function ``lambda *args: loss_func(*encoder(*args))``, but keeps the graph of the
    encoder for only one micro-batch at a time. To this end, the encoder runs twice: first without a graph, for all
    micro-batches; then, after the loss of all of them together, with a graph, for one micro-batch at a time. See: Gao
    et al. 2021, `Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
    <https://arxiv.org/abs/2101.06983>`_.

    The loss function receives only what the encoder returns, so labels must pass through the encoder. A tuple becomes
    positional arguments, a dictionary becomes keyword arguments, and anything else is the only argument. Each value is
    a :class:`~chainer.Variable` or an array whose first axis is that of the examples; the values of the micro-batches
    are concatenated along it. An encoder for two views, or with two towers, returns a tuple.

    The second run of the encoder is a replay: it draws the same random numbers, and its only effect is on the
    gradients. What the encoder reports is reported once. Persistent values of the model, such as the running statistics
    of batch normalization, move once per micro-batch. If the replay returns something else, the update raises.

    If anything raises before the optimizer updates the parameters, the examples of that update are dropped; parameters,
    persistent values, optimizer and reporter are as they were before it.

    Args:
        iterator: Dataset iterator for the training dataset, or a dictionary that maps strings to iterators.
        optimizer: Optimizer that has been set up with the model, or a dictionary that maps strings to optimizers. The
            model of the main one has the parameters of the encoder, and those of the loss function if there are any.
        converter: Converter function, called twice with the examples of each micro-batch.
        device (device specifier): Device to which the model is sent. If ``None``, the model stays where it is.
        loss_func: Loss function, called with what the encoder returned for all examples of the effective batch.
            Required.
        loss_scale (float): Loss scaling factor.
        auto_new_epoch (bool): As in ``StandardUpdater``, but for each epoch that ended within the effective batch.
        input_device (device specifier): Device to which the training data is sent. By default, ``device``.
        encoder: Function that maps converted examples to what the loss function compares. The target link of the main
            optimizer is used by default.
        accumulation_steps: Number of iterator batches per update. See :class:`~chainer_accum.AccumulatingUpdater`.
        effective_batch_size: Number of examples or tokens per update, instead of ``accumulation_steps``. See
            :class:`~chainer_accum.AccumulatingUpdater`.
        micro_batch_size: The limit of what is encoded at a time: a number of examples, ``'auto'``, a
            :class:`~chainer_accum.TokenBudget`, or a function of the examples. The loss function gets the outputs in
            the order of the iterator. If ``None``, iterator batches stay whole. See
            :class:`~chainer_accum.AccumulatingUpdater`.
        weight_func (callable): Function that takes the examples of a micro-batch, as the iterator returned them, and
            returns its weight in the means of what the encoder reports. By default, the number of examples.
        epoch_boundary (str): ``'carry'`` lets an effective batch cross the end of an epoch, as a large batch does;
            ``'flush'`` ends it there, with fewer examples.
        observation_rules (dict): Maps keys of the observation to how the values that the encoder reported are merged:
            the name of a rule, or a function of values and weights. See :class:`~chainer_accum.AccumulatingUpdater`.
        split_when_out_of_memory (bool): Whether an update restarts with smaller micro-batches when memory runs out. See
            :class:`~chainer_accum.AccumulatingUpdater`.
        memory_limit: How much memory may be in use during the search of ``'auto'``. See
            :class:`~chainer_accum.AccumulatingUpdater`.

    Attributes:
        encoder: Encoder function. If it is ``None``, the target link of the main optimizer is used instead.
        loss_func: Loss function.

    Raises:
        RuntimeError: If the encoder returns something else in the replay.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an invalid value, or an optimizer has not been set up.

    """

    loss_func: Callable[..., chainer.Variable]

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
        encoder: Optional[Callable[..., Any]] = None,
        accumulation_steps: Steps = 1,
        effective_batch_size: Union[Steps, TokenBudget, None] = None,
        micro_batch_size: Limit = None,
        weight_func: Optional[WeightFunc] = None,
        epoch_boundary: str = "carry",
        observation_rules: Optional[Mapping[str, Rule]] = None,
        split_when_out_of_memory: Optional[bool] = None,
        memory_limit: MemoryLimit = None,
    ) -> None:
        check_callable("loss_func", loss_func, "pass a function of what the encoder returns")
        if encoder is not None:
            check_callable("encoder", encoder, "pass a function of the converted examples, or None for the model")
        if is_late(weight_func):
            raise ValueError(
                "weight_func must be a function of the examples alone, got one that takes no argument or refers to a "
                f"model, {weight_func!r}: it weights what the encoder reports; count examples, tokens or labels"
            )
        super().__init__(
            iterator,
            optimizer,
            converter,
            device,
            loss_func,
            loss_scale,
            auto_new_epoch,
            input_device=input_device,
            accumulation_steps=accumulation_steps,
            effective_batch_size=effective_batch_size,
            micro_batch_size=micro_batch_size,
            weight_func=weight_func,
            epoch_boundary=epoch_boundary,
            observation_rules=observation_rules,
            split_when_out_of_memory=split_when_out_of_memory,
            memory_limit=memory_limit,
        )
        if communicator_of(self.get_optimizer("main")) is not None:
            raise ValueError(
                "optimizer must not be a multi-node one, got one with a communicator: each rank would compare only "
                "its own examples; use AccumulatingUpdater, or a single process"
            )
        self.encoder = encoder

    def _is_standard(self) -> bool:
        return False  # StandardUpdater has no encoder

    def _begin_window(self, micro_batches: MicroBatches, observations: Observations) -> Window:
        # The gradients of the passes are parts of one gradient, so they are added and not averaged.
        return Window(self.get_optimizer("main"), WindowOptions("sum"), links=self._links(), undoes_passes=False)

    def _try_passes(self, window: Window, micro_batches: MicroBatches, observations: Observations) -> Passes:
        parts = list(micro_batches)
        with self._size.measuring(together(micro_batch.load for micro_batch in parts)):
            return self._encode_and_replay(window, micro_batches, parts, observations)

    def _encode_and_replay(
        self, window: Window, micro_batches: MicroBatches, parts: Sequence[MicroBatch], observations: Observations
    ) -> Passes:
        of_encoder, of_loss = observations, Observations()
        with self._size.retrying(parts[0].load, window, micro_batches):
            self._initialize_parameters(parts[0].examples)
        # Other state is not replayed: if it matters, the encoder does not process each micro-batch independently.
        before = PersistentValues(self._links(), has_state=False)
        before.add(RandomState(devices_of(self._links())))
        encoded = []
        for micro_batch in parts:
            with self._size.retrying(micro_batch.load, window, micro_batches):
                with of_encoder.collecting() as observation, before.following(), chainer.no_backprop_mode():
                    encoded.append(copies_of(by_name(self._encode(micro_batch.examples))))
            of_encoder.add(observation, micro_batch.weight)
        representations = Representations(encoded, micro_batches.order)
        del encoded  # now concatenated in representations
        with of_loss.collecting() as observation:
            loss_func = functools.partial(total_loss, call, "the loss function", self.loss_func)
            window.add(representations.compare, loss_func)
        of_loss.add(observation, 1.0)
        after = before.checkpoint()
        before.restore()
        for index, micro_batch in enumerate(parts if representations.has_gradient else ()):
            # The first run has reported already, so these reports are dropped.
            with self._size.retrying(micro_batch.load, window, micro_batches), of_loss.collecting():
                window.add(representations.replay, index, functools.partial(self._encode, micro_batch.examples))
        representations.check_replay()
        after.restore()
        return Passes({**of_encoder.merged(), **of_loss.merged()}, num_skipped_examples=0)

    def _encode(self, examples: Any) -> Any:
        encoder = self.encoder or self.get_optimizer("main").target
        arguments = Arguments(self.converter, examples, self.input_device)
        if self.iteration == 0:
            _check_arguments(encoder, arguments)
        return arguments.call("encoder", encoder)

    def _initialize_parameters(self, examples: Any) -> None:
        """Initializes the encoder's lazy parameters first, since the random numbers they draw cannot be replayed.

        With training mode off, the pass changes nothing else. Parameters still uninitialized after the first update do
        not belong to the encoder.

        """
        optimizer = self.get_optimizer("main")
        if optimizer.t == 0 and not all(param.is_initialized for param in optimizer.target.params()):
            before = PersistentValues(self._links(), has_state=False)
            with Observations().collecting(), chainer.no_backprop_mode(), chainer.using_config("train", False):
                self._encode(examples)
            before.restore()


def _check_arguments(encoder: Any, arguments: Arguments) -> None:
    """Raises TypeError if an encoder cannot take the arguments.

    A link often has optional arguments, such as a number of axes. Labels must not be passed as one of those.

    """
    signature = None
    is_link = isinstance(encoder, chainer.Link) and type(encoder).__call__ is chainer.Link.__call__
    with contextlib.suppress(TypeError, ValueError):  # a function that is not written in Python may have none
        signature = inspect.signature(encoder.forward if is_link else encoder)
    if signature is None:
        return
    try:
        bound = signature.bind(*arguments.args, **arguments.kwargs).arguments
    except TypeError:
        is_wrong = True
    else:
        options = [name for name in bound if isinstance(signature.parameters[name].default, (bool, int, float, str))]
        is_wrong = any(isinstance(bound[name], (chainer.Variable, *chainer.get_array_types())) for name in options)
    if is_wrong:
        raise TypeError(
            f"encoder must take all that the converter returns, got {len(arguments)} arguments for {encoder!r}, which "
            f"takes {signature}; pass labels and the like through unchanged: encoder=lambda x, t: (model(x), t)"
        )
