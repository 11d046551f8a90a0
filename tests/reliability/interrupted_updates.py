"""The updates that are interrupted: one of each kind, with all the state that an update may change."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer import optimizer_hooks
from chainer.iterators import SerialIterator
from chainer.serializers import DictionarySerializer, NpzDeserializer

State = Dict[str, Any]
STEPS = 3
SIZE = 4  # of a micro-batch


class Model(chainer.Chain):
    """A classifier with running averages and a persistent value that is no array."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(5, 8)
            self.normalization = L.BatchNormalization(8)
            self.last = L.Linear(8, 3)
        self.add_persistent("seen", 0)

    def encode(self, x: Any, t: Any) -> Tuple[chainer.Variable, Any]:
        self.seen += len(x)
        return self.last(F.tanh(self.normalization(self.first(x)))), t

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        loss = F.softmax_cross_entropy(*self.encode(x, t))
        chainer.report({"loss": loss})
        return loss


def make_examples(*, is_spoilt: bool = False) -> List[Any]:
    """Returns the examples of two updates; if they are spoilt, the first of the second update are not finite."""
    random = numpy.random.RandomState(1)
    x = random.standard_normal((2 * STEPS * SIZE, 5)).astype("f")
    if is_spoilt:
        x[STEPS * SIZE] = numpy.nan
    return list(zip(x, random.randint(3, size=len(x)).astype("i")))


PARTS = [
    chainer.dataset.concat_examples(make_examples()[start : start + SIZE]) for start in range(0, 2 * STEPS * SIZE, SIZE)
]


class Update:
    """An update that can be run once and again, and the state that it changes.

    Args:
        run (callable): Runs the update.
        owner: Updater that can be serialized, or the optimizer if there is none.
        optimizer (~chainer.Optimizer): Optimizer, not a wrapped one.

    """

    def __init__(self, run: Callable[[], None], owner: Any, optimizer: Any) -> None:
        self.run = run
        self._owner = owner
        self._optimizer = optimizer
        self._start = self.save()

    def aftermath(self) -> Dict[str, State]:
        """Returns the states after what comes next: here, the update from its start."""
        self.load(self._start)
        self.run()
        return {"the next update": self.state()}

    def save(self) -> Dict[str, Any]:
        """Returns copies of all that can be put back."""
        serializer = DictionarySerializer()
        self._owner.serialize(serializer["owner"])
        self._optimizer.target.serialize(serializer["model"])
        return {key: numpy.copy(value) for key, value in serializer.target.items()}

    def load(self, saved: Dict[str, Any]) -> None:
        """Puts back what was saved."""
        deserializer = NpzDeserializer(saved)
        self._owner.serialize(deserializer["owner"])
        self._optimizer.target.serialize(deserializer["model"])

    def state(self) -> State:
        """Returns what an update changes as a whole or not at all, each value as bytes."""
        serializer = DictionarySerializer()
        self._optimizer.serialize(serializer["optimizer"])
        self._optimizer.target.serialize(serializer["model"])
        for name, link in self._optimizer.target.namedlinks():
            for key, value in vars(link).items():
                if isinstance(value, (int, float)):
                    serializer(f"attribute {name}/{key}", value)
        serializer("loss scale", self._optimizer._loss_scale or 0.0)
        return {key: numpy.asarray(value).tobytes() for key, value in serializer.target.items()}


def _set_up(optimizer: Any = None) -> Any:
    numpy.random.seed(0)
    optimizer = optimizer or chainer.optimizers.Adam(0.01)
    optimizer.setup(Model())
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.1))
    return optimizer


def _with_updater(
    updater_class: Any = chainer_accum.AccumulatingUpdater,
    batch_size: int = STEPS * SIZE,
    is_spoilt: bool = False,
    loss_func: Any = None,
    is_scaled: bool = False,
    **kwargs: Any,
) -> Update:
    optimizer = _set_up()
    if is_scaled:
        optimizer.loss_scaling()
    iterator = SerialIterator(make_examples(is_spoilt=is_spoilt), batch_size, shuffle=False)
    if updater_class is chainer_accum.CachedGradientUpdater:
        kwargs["encoder"] = optimizer.target.encode
    updater = updater_class(iterator, optimizer, loss_func=loss_func, **kwargs)
    updater.update()  # so that momentum and all other state is there; the next update ends an epoch
    return Update(updater.update, updater, optimizer)


def _with_block(**kwargs: Any) -> Update:
    optimizer = _set_up(chainer.optimizers.MomentumSGD())
    optimizer.update(optimizer.target, *PARTS[0])

    def run() -> None:
        with chainer_accum.accumulate(optimizer, **kwargs) as window:
            for x, t in PARTS[1 : 1 + STEPS]:
                window.add(optimizer.target, x, t, weight=len(x))

    return Update(run, optimizer, optimizer)


def _loss_of_encoded(y: chainer.Variable, t: Any) -> chainer.Variable:
    return F.softmax_cross_entropy(y, t)


split = functools.partial(_with_updater, micro_batch_size=SIZE)
gathered = functools.partial(_with_updater, batch_size=SIZE, accumulation_steps=STEPS)
by_label = chainer_accum.TokenBudget(2 * SIZE, lambda example: 1 + int(example[1]), across_window=True)
UPDATES: Dict[str, Callable[[], Update]] = {
    "split": split,
    "split, not kept for want of memory": functools.partial(split, split_when_out_of_memory=False),
    "gathered": gathered,
    "gathered, statistics of the window": functools.partial(gathered, running_statistics="update"),
    "gathered, skipping": functools.partial(gathered, nonfinite="skip", is_spoilt=True),
    "split, skipping, statistics of the window": functools.partial(
        split, nonfinite="skip", is_spoilt=True, running_statistics="update"
    ),
    "prefetched": functools.partial(gathered, prefetch=True),
    "scaled": functools.partial(gathered, loss_scale=128.0),
    "scaled dynamically": functools.partial(split, is_scaled=True),
    "split, in lockstep": functools.partial(split, lockstep="memory"),
    "gathered, in lockstep": functools.partial(gathered, lockstep="file"),
    "gathered, cut by length": functools.partial(gathered, micro_batch_size=by_label),
    "cached": functools.partial(split, updater_class=chainer_accum.CachedGradientUpdater, loss_func=_loss_of_encoded),
    "block": _with_block,
    "block, in lockstep": functools.partial(_with_block, lockstep="memory"),
    "block, skipping, statistics of the window": functools.partial(
        _with_block, nonfinite="skip", running_statistics="update"
    ),
}


class Call(Update):
    """A call of an optimizer that accumulates, after the first calls of a window.

    Args:
        calls (int): How many calls of the window have been made before.
        is_own_pass (bool): Whether the caller has run the forward and the backward pass.

    """

    def __init__(self, calls: int, is_own_pass: bool) -> None:
        plain = _set_up()
        self._wrapped = chainer_accum.create_accumulating_optimizer(plain, STEPS)
        self._model = plain.target
        self._is_own_pass = is_own_pass
        self._run_window()  # so that momentum and all other state is there
        super().__init__(lambda: None, plain, plain)
        for part in PARTS[:calls]:
            self._prepare(part)()
        self.run = self._prepare(PARTS[calls])

    def aftermath(self) -> Dict[str, State]:
        """Returns the states after what comes next: the end of the window that is under way, and a whole window."""
        self._wrapped.flush()
        rest = {key: value for key, value in self.state().items() if "/avg_" not in key and "seen" not in key}
        self.load(self._start)
        self._run_window()
        return {"the rest of the window": rest, "the next window": self.state()}

    def _run_window(self) -> None:
        for part in PARTS[:STEPS]:
            self._prepare(part)()

    def _prepare(self, part: Any) -> Callable[[], None]:
        """Returns the call of a micro-batch, once all that comes before it is done."""
        if not self._is_own_pass:
            return functools.partial(self._wrapped.update, self._model, *part)
        loss = self._model(*part)
        self._model.cleargrads()
        loss.backward()
        return self._wrapped.update  # type: ignore[no-any-return]
