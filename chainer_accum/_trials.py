"""Steps that are tried out with a model, which is put back afterwards."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.dataset import convert
from chainer.utils.type_check import InvalidType

from chainer_accum.micro_batches import WeightFunc
from chainer_accum.observations import reporting_to
from chainer_accum.random_state import RandomState, devices_of
from chainer_accum.remembered import Remembered
from chainer_accum.touched_links import links_behind
from chainer_accum.updater import AccumulatingUpdater

Gradient = Dict[str, numpy.ndarray]  # by names of parameters, in host memory

# Functions that normalize by the statistics of the batch; in test mode, other functions take their places.
_BATCH_NORMALIZATIONS = ("BatchNormalization", "BatchRenormalizationFunction", "DecorrelatedBatchNormalization")


class Settings(NamedTuple):
    """What is tried out: the model, and how an updater is to train it."""

    target: chainer.Link
    converter: Callable[..., Any]
    loss_func: Any
    micro_batch_size: Optional[int]
    weight_func: Optional[WeightFunc]
    loss_reduction: str
    input_device: Any
    loss_scale: Optional[float]


class Trials:
    """Makes steps, each from the present state of the model and of the random generators unless told otherwise.

    Args:
        settings (Settings): What is tried out.
        batch (list): Examples.
        parts (list): The same examples as micro-batches.

    """

    def __init__(self, settings: Settings, batch: Any, parts: Sequence[Any]) -> None:
        self.settings = settings
        self.batch = batch
        self.parts = parts
        self._witness = _Witness()
        self._is_wide = False
        self._trained = _names_of_trained(settings.target)
        links = links_behind(settings.target, settings.loss_func)
        self._random = RandomState(devices_of(links))
        self._remembered = Remembered()
        # No pass updates the model. Without its update rules, their state, which is large, needs not be remembered.
        self._rules = [(param, param.update_rule) for param in settings.target.params()]
        with self._without_rules():
            for link in links:
                self._remembered.add(link)
        self._born: List[Callable[[], None]] = []

    @property
    def itemsize(self) -> int:
        """The bytes of the narrowest float with which the model computes."""
        return 4 if self._is_wide else self._witness.itemsize

    @property
    def normalizes_batches(self) -> bool:
        """Whether the statistics of a batch entered the computation."""
        return self._witness.normalizes_batches

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Context manager for steps, after which the model is as it was, and so are other links that they used."""
        try:
            # Micro-batches of one example, or without a valid label, make models warn as training might never do.
            with warnings.catch_warnings(), reporting_to({}), self._without_rules(), self._remembered.following():
                warnings.simplefilter("ignore")
                yield
        finally:
            with self._without_rules():
                self._remembered.restore()
            self._random.restore()

    def initialize(self) -> None:
        """Takes a first step to see what it computes, and gives uninitialized parameters the values they got in it."""
        with self._witness:
            self._run([self.batch], micro_batch_size=len(self.batch))  # in a window, which checks the loss
        links = self._remembered.links
        arrays = [(param, param.array) for link in links for param in link.params(include_uninit=False)]
        # Such as the averages of batch normalization. Chainer has no public way to ask for the names.
        values = [(link, name, getattr(link, name)) for link in links for name in link._persistent]
        self._remembered.restore()
        for param, array in arrays:
            if param.array is None:
                self._born.append(functools.partial(_give, param, "array", array))
                self._born.append(param.cleargrad)  # a forward pass may look at it, as that of a static graph does
        for link, name, value in values:
            if getattr(link, name, value) is None:
                self._born.append(functools.partial(_give, link, name, value))

    def full_batch(self, same_state: bool = True, same_random: bool = True) -> Gradient:
        """Returns the gradient of the whole batch, made by :class:`~chainer.training.updaters.StandardUpdater`."""
        return self._run([self.batch], same_state, same_random)

    def accumulated(self) -> Gradient:
        """Returns the gradient of the micro-batches, with random numbers that follow those of the pass before.

        With the same ones, a micro-batch could chance to draw what its part of the batch drew.

        """
        return self._run(self.parts, same_random=False)

    def single(self, part: Any) -> Gradient:
        """Returns the gradient of a micro-batch by itself."""
        return self._run([part])

    def widened(self) -> Optional[Gradient]:
        """Returns the gradient of the whole batch in float32, in which all steps are from then on.

        If that fails, because the model itself makes float16 arrays, this returns ``None`` and changes nothing.

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
        self, batches: Sequence[Any], same_state: bool = True, same_random: bool = True, **kwargs: Any
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
        with chainer.using_config("dtype", numpy.float32 if self._is_wide else chainer.config.dtype):
            updater.update()
        host = chainer.get_device("@numpy")
        params = settings.target.namedparams(include_uninit=False)
        return {name: numpy.array(host.send(param.grad)) for name, param in params if name in self._trained}

    def _go_to_start(self) -> None:
        self._remembered.restore()
        for give in self._born:
            give()
        if self._is_wide:
            for link in self._remembered.links:
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
    """Gives the batches of a list."""

    epoch = 0
    epoch_detail = 0.0
    is_new_epoch = False

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = iter(batches)

    def __next__(self) -> Any:
        return next(self._batches)


class _NoUpdate(chainer.GradientMethod):
    """Leaves the parameters as they are, so that the gradients are all there is to a step."""

    def create_update_rule(self) -> None:
        return None


class _Witness(chainer.FunctionHook):
    """Sees with which floats a model computes, and whether it normalizes by the statistics of the batch."""

    def __init__(self) -> None:
        self.name = f"chainer_accum.check_equivalence {id(self)}"  # a loss function may be checked within another
        self.itemsize = 8
        self.normalizes_batches = False

    def forward_preprocess(self, function: Any, in_data: Tuple[Any, ...]) -> None:
        for array in in_data:
            if array is not None and array.dtype.kind == "f":
                self.itemsize = min(self.itemsize, array.dtype.itemsize)
        if function.label in _BATCH_NORMALIZATIONS:
            # Instances are normalized by the same function, each as a channel of a batch of one.
            is_over_batch = len(in_data[0]) > 1 and 0 in (getattr(function, "axis", None) or (0,))
            self.normalizes_batches = self.normalizes_batches or is_over_batch


def _names_of_trained(target: chainer.Link) -> List[str]:
    names = [
        name for name, param in target.namedparams() if param.update_rule is None or bool(param.update_rule.enabled)
    ]
    if not names:
        raise ValueError(
            f"the model must have a parameter to train, got {type(target).__name__} without one; "
            "assign parameters and links within init_scope(), and call enable_update() on some"
        )
    return names


def _give(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute to a copy."""
    setattr(owner, name, copy.deepcopy(value))


class _WideConverter(chainer.dataset.Converter):
    """Returns what another converter returns, with float32 in place of float16."""

    def __init__(self, converter: Callable[..., Any]) -> None:
        self._converter = converter

    def __call__(self, batch: Any, device: Any) -> Any:
        return _widen(convert._call_converter(self._converter, batch, device))


def _widen(value: Any) -> Any:
    """Returns the value with float32 in place of float16, be it an array, a variable or some of these."""
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
