"""Trial steps of a model, after which the model is restored."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.utils.type_check import InvalidType

from chainer_accum._devices import Array, DeviceSpec
from chainer_accum.batches import Arguments, WeightFunc
from chainer_accum.diagnostics.padding import pad_alike
from chainer_accum.lockstep import StoreSpec
from chainer_accum.observations import reporting_to
from chainer_accum.state import RandomState, TrainingState, devices_of, links_behind
from chainer_accum.updater import AccumulatingUpdater

Gradient = Dict[str, numpy.ndarray]  # by name of the parameter, in host memory

# Functions that normalize by the statistics of the batch; in test mode, Chainer uses other functions.
_BATCH_NORMALIZATIONS = ("BatchNormalization", "BatchRenormalizationFunction", "DecorrelatedBatchNormalization")


class Settings(NamedTuple):
    """The model under test, and the arguments of the updater that trains it."""

    target: chainer.Link
    converter: Callable[..., Any]
    loss_func: Optional[Callable[..., chainer.Variable]]
    micro_batch_size: Optional[int]
    weight_func: Optional[WeightFunc]
    loss_reduction: str
    input_device: Optional[chainer.backend.Device]
    loss_scale: Optional[float]
    lockstep: StoreSpec = None


class Trials:
    """Runs trial steps, each from the initial state of the model and of the random generators unless told otherwise.

    Args:
        settings (Settings): The model and the arguments of its updater.
        batch (list): Examples.
        parts (list): The same examples as micro-batches.

    """

    def __init__(self, settings: Settings, batch: Sequence[Any], parts: Sequence[Sequence[Any]]) -> None:
        self.settings = settings
        self.batch = batch
        self.parts = parts
        self._witness = _Witness()
        self._is_wide = False
        self._trained = _names_of_trained(settings.target)
        links = links_behind(settings.target, settings.loss_func)
        self._random = RandomState(devices_of(links))
        self._state = TrainingState()
        # No pass updates the model. So its update rules are left out, and their state, which is large, is not copied.
        self._rules = [(param, param.update_rule) for param in settings.target.params()]
        with self._without_rules():
            for link in links:
                self._state.add(link)
        self._born: List[Callable[[], None]] = []

    @property
    def itemsize(self) -> int:
        """The number of bytes of the narrowest float that the model uses."""
        return 4 if self._is_wide else self._witness.itemsize

    @property
    def normalizes_batches(self) -> bool:
        """Whether the model normalizes by the statistics of the batch."""
        return self._witness.normalizes_batches

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Context manager for trial steps that afterwards restores the model and other links that they used."""
        try:
            # Micro-batches of one example, or without a valid label, cause warnings that training may never cause.
            with warnings.catch_warnings(), reporting_to({}), self._without_rules():
                warnings.simplefilter("ignore")
                yield
        finally:
            with self._without_rules():
                self._state.restore()
            self._random.restore()

    def initialize(self) -> None:
        """Takes a first step to observe the model, and keeps the values with which it initializes lazy parameters."""
        with self._witness:
            self._run([self.batch], micro_batch_size=len(self.batch))  # in a window, because that checks the loss
        links = self._state.links
        arrays = [(param, param.array) for link in links for param in link.params(include_uninit=False)]
        # Persistent values, such as running averages. Chainer has no public way to list their names.
        values = [(link, name, getattr(link, name)) for link in links for name in link._persistent]
        self._state.restore()
        for param, array in arrays:
            if param.array is None:
                self._born.append(functools.partial(_give, param, "array", array))
                self._born.append(param.cleargrad)  # a forward pass may read the gradient, as with a static graph
        for link, name, value in values:
            if getattr(link, name, value) is None:
                self._born.append(functools.partial(_give, link, name, value))

    def full_batch(self, same_state: bool = True, same_random: bool = True) -> Gradient:
        """Returns the gradient of the whole batch, computed by :class:`~chainer.training.updaters.StandardUpdater`."""
        return self._run([self.batch], same_state, same_random)

    def accumulated(self) -> Gradient:
        """Returns the gradient of the micro-batches, with random numbers that follow those of the last pass.

        With the same random numbers, a micro-batch could by chance draw what its part of the batch drew. In lockstep,
        it must draw just that.

        """
        if self.settings.lockstep is not None:
            return self.in_lockstep(self.settings.lockstep)
        return self._run(self.parts, same_random=False)

    def in_lockstep(self, lockstep: StoreSpec = "memory") -> Gradient:
        """Returns the gradient of the micro-batches in lockstep, with the random numbers of the whole batch."""
        return self._run(self.parts, lockstep=lockstep)

    def single(self, part: Sequence[Any]) -> Gradient:
        """Returns the gradient of a single micro-batch."""
        return self._run([part])

    def padded_alike(self) -> Optional[Trials]:
        """Returns the same trials with all parts padded like the whole batch, or ``None``. See :func:`pad_alike`."""
        settings = self.settings
        converter = pad_alike(settings.converter, self.batch, self.parts, settings.input_device)
        if converter is None:
            return None
        trials = copy.copy(self)
        trials.settings = settings._replace(converter=converter)
        return trials

    def widened(self) -> Optional[Gradient]:
        """Returns the gradient of the whole batch in float32, and makes all further steps use float32.

        If that fails, because the model itself creates float16 arrays, this returns ``None`` and changes nothing.

        """
        self._is_wide = True
        witness = _Witness()
        with contextlib.suppress(InvalidType, TypeError), witness:
            gradient = self.full_batch()
            if witness.itemsize > 2:
                return gradient
        self._is_wide = False
        return None

    def _run(
        self, batches: Sequence[Sequence[Any]], same_state: bool = True, same_random: bool = True, **kwargs: Any
    ) -> Gradient:
        if same_state:
            self._go_to_start()
        if same_random:
            self._random.restore()
        settings = self.settings
        updater = AccumulatingUpdater(
            _Batches(batches),
            _NoUpdate().setup(settings.target),
            converter=_WideConverter(settings.converter) if self._is_wide else settings.converter,
            loss_func=settings.loss_func,
            loss_scale=settings.loss_scale,
            input_device=settings.input_device,
            accumulation_steps=len(batches),
            weight_func=settings.weight_func,
            loss_reduction=settings.loss_reduction,
            **kwargs,
        )
        dtype = numpy.float32 if self._is_wide else chainer.config.dtype
        with chainer.using_config("dtype", dtype), self._state.following():
            updater.update()
        host = chainer.get_device("@numpy")
        params = settings.target.namedparams(include_uninit=False)
        return {name: numpy.array(host.send(param.grad)) for name, param in params if name in self._trained}

    def _go_to_start(self) -> None:
        self._state.restore()
        for give in self._born:
            give()
        if self._is_wide:
            for link in self._state.links:
                vars(link).update({name: _widen(value) for name, value in vars(link).items()})

    @contextlib.contextmanager
    def _without_rules(self) -> Iterator[None]:
        try:
            for param, _ in self._rules:
                param.update_rule = None
            yield
        finally:
            for param, rule in self._rules:
                param.update_rule = rule


class _Batches(chainer.dataset.Iterator):
    """Iterator over the batches of a list."""

    epoch = 0
    epoch_detail = 0.0
    is_new_epoch = False

    def __init__(self, batches: Sequence[Sequence[Any]]) -> None:
        self._batches = iter(batches)

    def __next__(self) -> Any:
        return next(self._batches)


class _NoUpdate(chainer.GradientMethod):
    """Optimizer that leaves the parameters as they are, since only the gradients matter."""

    def create_update_rule(self) -> None:
        return None


class _Witness(chainer.FunctionHook):
    """Observes which floats a model uses, and whether it normalizes by the statistics of the batch."""

    def __init__(self) -> None:
        self.name = f"chainer_accum.check_equivalence {id(self)}"  # checks may be nested
        self.itemsize = 8
        self.normalizes_batches = False

    def forward_preprocess(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        for array in in_data:
            if array is not None and array.dtype.kind == "f":
                self.itemsize = min(self.itemsize, array.dtype.itemsize)
        if function.label in _BATCH_NORMALIZATIONS:
            # Instance normalization uses the same function, on a batch of one that has each instance as a channel.
            is_over_batch = len(in_data[0]) > 1 and 0 in (getattr(function, "axis", None) or (0,))
            self.normalizes_batches = self.normalizes_batches or is_over_batch


def _names_of_trained(target: chainer.Link) -> List[str]:
    names = [
        name for name, param in target.namedparams() if param.update_rule is None or bool(param.update_rule.enabled)
    ]
    if not names:
        raise ValueError(
            f"the model must have a parameter to train, got {type(target).__name__} without one; "
            "assign parameters and links inside init_scope(), and enable some with enable_update()"
        )
    return names


def _give(owner: object, name: str, value: object) -> None:
    """Sets an attribute to a copy of a value."""
    setattr(owner, name, copy.deepcopy(value))


class _WideConverter(chainer.dataset.Converter):
    """Converter that wraps another one and replaces float16 by float32."""

    def __init__(self, converter: Callable[..., Any]) -> None:
        self._converter = converter

    def __call__(self, batch: Any, device: Optional[DeviceSpec]) -> Any:
        arguments = Arguments(self._converter, batch, device)
        return _widen(arguments.kwargs or arguments.args)


def _widen(value: Any) -> Any:
    """Returns the value with float32 in place of float16: an array, a Variable, or a tuple, list or dict of them."""
    if isinstance(value, chainer.Variable):
        if value.array is not None:
            value.cleargrad()
            value.array = _widen(value.array)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_widen(each) for each in value)
    if isinstance(value, dict):
        return {key: _widen(each) for key, each in value.items()}
    return value.astype(numpy.float32) if getattr(value, "dtype", None) == numpy.float16 else value
