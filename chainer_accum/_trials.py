"""Steps that are tried out with a model that stays as it is.

The links of the model hold copies of what is theirs while steps are made: of parameters, persistent values and all
else that a call may change. To copy the links themselves would not do, because a loss function that refers to a link
must meet the copies, too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import chainer
import numpy
from chainer.dataset import convert
from chainer.utils.type_check import InvalidType

from chainer_accum.micro_batches import WeightFunc
from chainer_accum.observations import reporting_to
from chainer_accum.random_state import RandomState, devices_of
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
        links = {id(link): link for thing in (settings.target, settings.loss_func) for link in _links_behind(thing)}
        self._links = list(links.values())
        self._random = RandomState(devices_of(self._links))
        rules = [param.update_rule for link in self._links for param in link.params()]
        # A copy refers to the links themselves, and has no update rules, whose state is large.
        self._memo = {**links, **{id(rule): None for rule in rules}}
        self._start = self._copy([vars(link) for link in self._links])

    @property
    def itemsize(self) -> int:
        """The bytes of the narrowest float with which the model computes."""
        return 4 if self._is_wide else self._witness.itemsize

    @property
    def normalizes_batches(self) -> bool:
        """Whether the statistics of a batch entered the computation."""
        return self._witness.normalizes_batches

    @contextlib.contextmanager
    def on_copies(self) -> Iterator[None]:
        """Returns a context in which the links hold copies of what is theirs."""
        own = [vars(link) for link in self._links]
        try:
            # Micro-batches of one example, or without a valid label, make models warn as training might never do.
            with warnings.catch_warnings(), reporting_to({}):
                warnings.simplefilter("ignore")
                yield
        finally:
            for link, contents in zip(self._links, own):
                link.__dict__ = contents
            self._random.restore()

    def initialize(self) -> None:
        """Makes a first step to see what it computes, and gives uninitialized parameters the values they got in it."""
        with self._witness:
            self._run([self.batch], micro_batch_size=len(self.batch))  # in a window, which checks the loss
        for link, contents in zip(self._links, self._start):
            for name, value in contents.items():
                now: Any = getattr(link, name, None)
                if isinstance(value, chainer.Parameter) and value.array is None and now.array is not None:
                    value.copydata(now)
                # Such as the averages of batch normalization. Chainer has no public way to ask for the names.
                elif value is None and name in link._persistent:
                    contents[name] = self._copy(now)

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
        for link, contents in zip(self._links, self._copy(self._start)):
            link.__dict__ = contents
            if self._is_wide:
                contents.update({name: _widen(value) for name, value in contents.items()})

    def _copy(self, contents: Any) -> Any:
        return copy.deepcopy(contents, dict(self._memo))


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

    name = "chainer_accum.check_equivalence"

    def __init__(self) -> None:
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


def _links_behind(thing: Any) -> Iterator[chainer.Link]:
    """Returns an iterator over the links that a model or a loss function changes when it is called."""
    if isinstance(thing, chainer.Link):
        yield from thing.links()
    elif isinstance(thing, functools.partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _links_behind(part)
    elif inspect.ismethod(thing):
        yield from _links_behind(thing.__self__)
        yield from _links_behind(thing.__func__)
    elif thing is not None:
        variables = inspect.getclosurevars(thing)[:2] if inspect.isfunction(thing) else [getattr(thing, "__dict__", {})]
        for value in [value for names in variables for value in names.values()]:
            if isinstance(value, chainer.Link):
                yield from value.links()


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
