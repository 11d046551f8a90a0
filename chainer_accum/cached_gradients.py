"""CachedGradientUpdater: the step of the whole batch for a loss that compares its examples with one another.

The loss of such a batch is no sum over its micro-batches, so their gradients do not add up to its gradient. But it is a
function of what the encoder made of each example, and that is small. So the chain rule is cut there: the micro-batches
are encoded without a graph, the loss of all of them together gives the gradient of each representation, and then the
micro-batches are encoded once more, with a graph, to take these gradients on to the parameters. That is exact as long
as the encoder does the same both times, which is for this module to see to.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, Callable, ContextManager, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import chainer
import numpy
from chainer.dataset import concat_examples

from chainer_accum._arguments import call, check_callable
from chainer_accum._devices import device_of
from chainer_accum.distributed import begin_window, communicator_of
from chainer_accum.micro_batches import MicroBatches, WeightFunc
from chainer_accum.observations import Observations
from chainer_accum.persistent_values import PersistentValues
from chainer_accum.random_state import RandomState, devices_of
from chainer_accum.schedules import Steps
from chainer_accum.updater import AccumulatingUpdater, fitting
from chainer_accum.window import Window

_Name = Union[str, int]

_NO_REPLAY = (
    "encoder must return the same when it is called again with the same examples and random state, got something else; "
    "draw random numbers from the global generators of random, numpy.random and cupy.random only (for dropout, set "
    "chainer.config.use_cudnn = 'never') and keep no state between calls but persistent values of the model"
)


class CachedGradientUpdater(AccumulatingUpdater):
    """Updater for losses that compare the examples of a batch, such as n-pair, triplet and NT-Xent losses.

    One :meth:`update` makes the step that :class:`~chainer.training.updaters.StandardUpdater` would make with the
    whole effective batch and the loss function ``lambda *args: loss_func(*encoder(*args))``, but keeps the graph of the
    encoder for one micro-batch at a time. For this, the encoder runs twice: first without a graph for all
    micro-batches, then, after the loss of all of them, with a graph for one after the other. See: Gao et al. 2021,
    `Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup <https://arxiv.org/abs/2101.06983>`_.

    All that the loss function needs comes from the encoder, and reaches it as the output of a converter reaches the
    encoder: each element of a tuple as an argument, a dictionary as keyword arguments, anything else as the one
    argument. Each is a :class:`~chainer.Variable` or an array, such as one of labels, with an axis of examples in
    front, along which the micro-batches are put together. An encoder of two views or with two towers returns a tuple.

    The second run of the encoder is a replay: it draws the same random numbers and leaves no trace but the gradients.
    What the encoder reports is reported once, and persistent values of the model, such as the running statistics of
    batch normalization, move once per micro-batch. An encoder that cannot be replayed is found out, and refused.

    If anything raises before the optimizer begins to update, the examples of that update are dropped, and parameters,
    persistent values, optimizer and reporter are as before it.

    Args:
        iterator: Dataset iterator for the training dataset, or a dictionary that maps strings to iterators.
        optimizer: Optimizer that has been set up with the model, or a dictionary that maps strings to optimizers. The
            model of the main one has the parameters of the encoder, and those of the loss function if it has any.
        converter: Converter function, called with the examples of each micro-batch, twice.
        device(device specifier): Device to which the model is sent. If ``None``, the device of the model will stay
            unchanged.
        loss_func: Loss function, called with what the encoder returned for all examples of the effective batch. It must
            be given.
        loss_scale (float): Loss scaling factor.
        auto_new_epoch (bool): If ``True``, :meth:`~chainer.Optimizer.new_epoch` of the main optimizer is called when an
            epoch ended within the effective batch.
        input_device (device specifier): Device to which the training data is sent. By default, ``device``.
        encoder: Function that maps converted examples to what the loss function compares. The target link of the main
            optimizer is used by default.
        accumulation_steps: Number of iterator batches per update. See :class:`~chainer_accum.AccumulatingUpdater`.
        micro_batch_size: The largest number of examples that are encoded at a time, or ``'auto'``. An iterator batch
            with more is split as evenly as can be. If ``None``, iterator batches stay whole.
        weight_func (callable): What a micro-batch counts for in the means of what the encoder reports. It is called
            with the examples of the micro-batch, as the iterator gave them. By default, the number of examples.
        epoch_boundary (str): ``'carry'`` lets an effective batch run across the end of an epoch, as a large batch does;
            ``'flush'`` ends it there, with fewer examples.
        observation_rules (dict): Maps keys of the observation to how the values that the encoder reported become one:
            ``'mean'`` (by weight; the default), ``'sum'`` or ``'last'``.
        split_when_out_of_memory (bool): Whether an update begins again with smaller micro-batches if memory does not
            suffice to encode one. See :class:`~chainer_accum.AccumulatingUpdater`.

    Attributes:
        encoder: Encoder function. If it is ``None``, the target link of the main optimizer is used instead.
        loss_func: Loss function.

    Raises:
        TypeError: If an argument is of the wrong type.
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
        encoder: Optional[Callable[..., Any]] = None,
        accumulation_steps: Steps = 1,
        micro_batch_size: Union[int, str, None] = None,
        weight_func: Optional[WeightFunc] = None,
        epoch_boundary: str = "carry",
        observation_rules: Optional[Mapping[str, str]] = None,
        split_when_out_of_memory: Optional[bool] = None,
    ) -> None:
        check_callable("loss_func", loss_func, "pass the loss as a function of what the encoder returns")
        if encoder is not None:
            check_callable("encoder", encoder, "pass a function of the converted examples, or None for the model")
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
            micro_batch_size=micro_batch_size,
            weight_func=weight_func,
            epoch_boundary=epoch_boundary,
            observation_rules=observation_rules,
            split_when_out_of_memory=split_when_out_of_memory,
        )
        if communicator_of(self.get_optimizer("main")) is not None:
            raise ValueError(
                "optimizer must not be a multi-node one, got one with a communicator: each rank would compare its own "
                "examples only; use AccumulatingUpdater, or a single process"
            )
        self.encoder = encoder

    def _is_standard(self) -> bool:
        return False  # the step of StandardUpdater knows of no encoder

    def _begin_window(self, micro_batches: MicroBatches) -> Window:
        # The gradients of the passes are parts of one gradient, not gradients of which to take a mean.
        return begin_window(self.get_optimizer("main"), "sum", links=self._links(), undoes_passes=False)

    def _try_passes(self, window: Window, micro_batches: MicroBatches) -> Dict[str, Any]:
        of_encoder, of_loss = Observations(self._observation_rules), Observations()
        parts = list(micro_batches)
        with fitting(window, micro_batches, parts[0].examples):
            self._initialize_parameters(parts[0].examples)
        before = _State(self._links())
        encoded = []
        for micro_batch in parts:
            with fitting(window, micro_batches, micro_batch.examples), of_encoder.collecting() as observation:
                with before.following(), chainer.no_backprop_mode():
                    encoded.append(_copies(_by_name(self._encode(micro_batch.examples))))
            of_encoder.add(observation, micro_batch.weight)
        cache = _Cache(encoded)
        del encoded  # which the cache has put together
        with of_loss.collecting() as observation:
            window.add(cache.compare, functools.partial(call, "the loss function", self.loss_func))
        of_loss.add(observation, 1.0)
        after = before.checkpoint()
        before.restore()
        for index, micro_batch in enumerate(parts if cache.has_gradient else ()):
            # What is reported has been reported already.
            with fitting(window, micro_batches, micro_batch.examples), of_loss.collecting():
                window.add(cache.replay, index, functools.partial(self._encode, micro_batch.examples))
        cache.check_replay()
        after.restore()
        return {**of_encoder.merged(), **of_loss.merged()}

    def _encode(self, examples: Any) -> Any:
        encode = self._bind(self.encoder or self.get_optimizer("main").target, examples)
        if self.iteration == 0:
            _check_arguments(encode)
        return call("encoder", encode)

    def _initialize_parameters(self, examples: Any) -> None:
        """Initializes the lazy parameters of the encoder, for the random numbers that they draw cannot be replayed.

        Out of training mode, nothing else is changed. After the first update, what is still lazy is not the encoder's.

        """
        optimizer = self.get_optimizer("main")
        if optimizer.t == 0 and not all(param.is_initialized for param in optimizer.target.params()):
            before = PersistentValues(self._links(), has_state=False)
            with Observations().collecting(), chainer.no_backprop_mode(), chainer.using_config("train", False):
                self._encode(examples)
            before.restore()


class _Cache:
    """What the encoder returned for all micro-batches, put together, and its gradient once the loss has been added.

    Args:
        parts: What it returned for each micro-batch, by name. Variables among it get gradients.

    """

    def __init__(self, parts: Sequence[Dict[_Name, Any]]) -> None:
        self._whole: Dict[_Name, Any] = {}
        self._rows: Dict[_Name, List[slice]] = {}
        self._differences: List[Any] = []  # whether the replay of an output is another, each a value on its device
        for name, first in parts[0].items():
            arrays = [chainer.as_array(part[name]) for part in parts]
            with device_of(arrays[0]):
                whole = chainer.backend.get_array_module(arrays[0]).concatenate(arrays)
            self._whole[name] = chainer.Variable(whole) if isinstance(first, chainer.Variable) else whole
            ends = numpy.cumsum([len(array) for array in arrays]).tolist()
            self._rows[name] = [slice(start, end) for start, end in zip([0, *ends], ends)]

    @property
    def has_gradient(self) -> bool:
        """Whether the loss depends on what the encoder returned."""
        return any(variable.grad is not None for variable in self._variables().values())

    def compare(self, loss_func: Callable[..., chainer.Variable]) -> chainer.Variable:
        """Returns the loss of all micro-batches together."""
        args = [value for name, value in self._whole.items() if isinstance(name, int)]
        loss = loss_func(*args, **{name: value for name, value in self._whole.items() if isinstance(name, str)})
        for variable in self._variables().values():
            variable.cleargrad()  # of a backward pass that the loss function may have run, as for the parameters
        return loss

    def replay(self, index: int, encode: Callable[[], Any]) -> chainer.Variable:
        """Encodes a micro-batch again and returns a scalar whose gradient leads on from the cached gradients."""
        encoded = _by_name(encode())
        outputs, grads = [], []
        for name, whole in self._variables().items():
            output, rows = encoded[name], self._rows[name][index]
            if output.shape != whole.array[rows].shape:
                raise RuntimeError(_NO_REPLAY)
            self._differences.append(_differs(output.array, whole.array[rows]))
            if whole.grad is not None:
                outputs.append(output)
                grads.append(whole.grad[rows])
        (scalar,) = _GivenGradients(grads).apply(outputs)
        return scalar

    def check_replay(self) -> None:
        """Raises RuntimeError unless the encoder returned the same both times."""
        if any(map(bool, self._differences)):
            raise RuntimeError(_NO_REPLAY)

    def _variables(self) -> Dict[_Name, chainer.Variable]:
        return {name: value for name, value in self._whole.items() if isinstance(value, chainer.Variable)}


class _GivenGradients(chainer.FunctionNode):
    """A scalar, zero, in whose backward pass the inputs get the given gradients as they are.

    The gradient of the scalar is left out of account: it is the loss scale, which the given gradients have in them.

    """

    def __init__(self, grads: Sequence[Any]) -> None:
        self._grads = grads

    def forward(self, inputs: Tuple[Any, ...]) -> Tuple[Any, ...]:
        xp = chainer.backend.get_array_module(*inputs)
        return (xp.zeros((), inputs[0].dtype),)

    def backward(self, indexes: Tuple[int, ...], grad_outputs: Any) -> Tuple[chainer.Variable, ...]:
        return tuple(chainer.Variable(self._grads[index]) for index in indexes)


class _State:
    """What a forward pass changes without returning it: random generators and persistent values.

    Args:
        links: Links whose persistent values and whose devices are meant, as far as they are known.
        values (PersistentValues): Their persistent values, if these are remembered already.

    """

    def __init__(self, links: Sequence[Optional[chainer.Link]], values: Optional[PersistentValues] = None) -> None:
        self._links = links
        self._random = RandomState(devices_of(links))
        # Other state is not to be replayed: if it matters, the encoder does not treat a micro-batch by itself.
        self._values = PersistentValues(links, has_state=False) if values is None else values

    def following(self) -> ContextManager[None]:
        """Context manager for passes that may call other links, which are remembered as well."""
        return self._values.following()

    def checkpoint(self) -> _State:
        """Returns the present state of the same."""
        return _State(self._links, self._values.checkpoint())

    def restore(self) -> None:
        """Goes back to the state."""
        self._random.restore()
        self._values.restore()


def _check_arguments(encode: Any) -> None:
    """Raises TypeError if an encoder cannot take the arguments to which it is bound.

    A link for a layer often takes further arguments by default, such as a number of axes, for which labels are taken.

    """
    encoder, signature = encode.func, None
    is_link = isinstance(encoder, chainer.Link) and type(encoder).__call__ is chainer.Link.__call__
    with contextlib.suppress(TypeError, ValueError):  # of what is not written in Python, there may be no signature
        signature = inspect.signature(encoder.forward if is_link else encoder)
    if signature is None:
        return
    try:
        bound = signature.bind(*encode.args, **encode.keywords).arguments
    except TypeError:
        is_wrong = True
    else:
        options = [name for name in bound if isinstance(signature.parameters[name].default, (bool, int, float, str))]
        is_wrong = any(isinstance(bound[name], (chainer.Variable, *chainer.get_array_types())) for name in options)
    if is_wrong:
        arguments = [*encode.args, *encode.keywords]
        raise TypeError(
            f"encoder must take all that the converter returns, got {len(arguments)} arguments for {encoder!r}, which "
            f"takes {signature}; pass on what is not encoded, such as labels: encoder=lambda x, t: (model(x), t)"
        )


def _by_name(encoded: Any) -> Dict[_Name, Any]:
    """Returns what an encoder returned by the names that the arguments of the loss function have, or their numbers."""
    by_name: Dict[_Name, Any] = encoded if isinstance(encoded, dict) else {0: encoded}
    if isinstance(encoded, tuple):
        by_name = dict(enumerate(encoded))
    types = ", ".join(type(value).__name__ for value in by_name.values())
    if not all(isinstance(value, (chainer.Variable, *chainer.get_array_types())) for value in by_name.values()):
        raise TypeError(f"encoder must return Variables and arrays, got {types}; return a tuple or a dict of them")
    if any(value.ndim == 0 for value in by_name.values()):
        raise ValueError("encoder must return rows for the examples, got a scalar; leave means to loss_func")
    if not any(isinstance(value, chainer.Variable) for value in by_name.values()):
        raise TypeError(f"encoder must return a Variable, got {types}; return the representations with their graph")
    return by_name


def _copies(encoded: Dict[_Name, Any]) -> Dict[_Name, Any]:
    """Returns copies, for an array may be a view of a larger one, which it would keep alive."""
    copies = {}
    for name, value in encoded.items():
        with device_of(chainer.as_array(value)):
            array = chainer.as_array(value).copy()
        copies[name] = chainer.Variable(array) if isinstance(value, chainer.Variable) else array
    return copies


def _differs(array: Any, expected: Any) -> Any:
    """Returns whether two arrays differ by more than the order of additions can explain, as a value on their device.

    Where they are not finite, they do not: that is for loss scaling to find.

    """
    if array.size == 0 or array.dtype.kind != "f":
        return False
    with device_of(array), numpy.errstate(invalid="ignore"):
        return abs(array - expected).max() > float(numpy.finfo(array.dtype).eps) ** 0.5 * abs(expected).max()
