"""Models made of pieces, and the loss functions that real programs give them."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from model_modifiers import Modified
from model_shapes import IDS, IDS_PER_EXAMPLE, WIDTH
from model_watchers import Watcher

CLASSES = 4
TWISTS = (
    "constant loss",  # if no example of the batch has a label
    "gradient penalty",
    "adversarial examples",
    "own backward pass",
    "preset gradient",
    "link outside the target",
    "input with a gradient",
    "window within the loss",
)
NEED_INPUT = {"gradient penalty", "adversarial examples", "input with a gradient"}


class Batch(NamedTuple):
    """Examples, as the loss function gets them."""

    x: Any
    ids: Any
    labels: Any  # -1 for none
    weights: Any
    numbers: Any

    @property
    def is_labelled(self) -> Any:
        return self.labels >= 0


def make_examples(size: int, spoilt: Sequence[int] = ()) -> List[Tuple[Any, ...]]:
    """Returns a dataset. Many of its examples have no label or no weight, but the first has both."""
    random = numpy.random.RandomState(3)
    x = random.standard_normal((size, WIDTH))
    x[list(spoilt)] = numpy.nan
    ids = random.randint(IDS, size=(size, IDS_PER_EXAMPLE))
    labels = numpy.where(random.random_sample(size) < 0.5, random.randint(CLASSES, size=size), -1)
    weights = random.choice([0, 0, 1e-30, 0.5, 1, 3, 1e30], size=size)
    labels[0], weights[0] = 1, 1
    return list(zip(*Batch(x, ids.astype("i"), labels.astype("i"), weights, numpy.arange(size))))


class Normalization(NamedTuple):
    """What a loss is divided by: which share of it is that of each example, and what a micro-batch counts for."""

    shares: Callable[[Batch], Any]
    weight: Optional[Callable[[Batch], Any]]


NORMALIZATIONS: Dict[str, Normalization] = {
    "examples": Normalization(lambda batch: numpy.full(len(batch.x), 1 / len(batch.x)), None),
    "labels": Normalization(
        lambda batch: batch.is_labelled / max(batch.is_labelled.sum(), 1), lambda batch: batch.is_labelled.sum()
    ),
    "weights": Normalization(
        lambda batch: batch.weights / (batch.weights.sum() or 1), lambda batch: batch.weights.sum()
    ),
    "sum": Normalization(lambda batch: numpy.ones(len(batch.x)), None),
}
# What makes the weight of a report of a number.
REPORTS: Dict[str, Optional[Callable[[int], Any]]] = {
    "none": None,
    "int": int,
    "float": float,
    "NumPy": numpy.int64,
    "array": numpy.array,
    "Variable": lambda number: chainer.Variable(numpy.array(float(number))),
}


class Task(NamedTuple):
    """What a model is made of and what its loss is, all of it by name."""

    pieces: Tuple[Tuple[str, str], ...]  # each with a modifier
    watchers: Tuple[str, ...]
    twists: Tuple[str, ...]
    normalization: str
    reports: str


class Model(chainer.Chain):
    """A model and its losses: one that is a mean or a sum over the examples, and one that compares them."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task
        self.outside = L.Linear(WIDTH, WIDTH)  # no child
        self.outside.cleargrads()
        self._inner = chainer.optimizers.SGD(0).setup(L.Linear(WIDTH, 1))
        with self.init_scope():
            self.pieces = chainer.ChainList(*[Modified(*piece) for piece in task.pieces])
            self.watchers = chainer.ChainList(*[Watcher(name) for name in task.watchers])
            self.head = L.Linear(WIDTH, CLASSES)
        self.add_persistent("seen", 0)
        self.add_persistent("bank", numpy.zeros((64, WIDTH)))

    def forward(self, *args: Any) -> chainer.Variable:
        """Returns the loss of a batch whose examples have nothing to do with one another."""
        batch = Batch(*args)
        shares = NORMALIZATIONS[self._task.normalization].shares(batch)
        if self._has("constant loss"):
            shares = shares * batch.is_labelled
            if not batch.is_labelled.any():
                return self._finish(chainer.Variable(numpy.zeros(())), batch)
        x = self._input(batch)
        if self._has("own backward pass"):
            F.sum(self.head(self._hidden(x, batch))).backward()
        if self._has("adversarial examples"):
            F.sum(self._losses(self._hidden(x, batch), batch)).backward()
            x = chainer.Variable(batch.x + 0.1 * x.grad)
        if self._has("window within the loss"):
            with chainer_accum.accumulate(self._inner, running_statistics="update") as window:
                window.add(lambda: F.mean(self._inner.target(batch.x)))
        h = self._remember(self._hidden(x, batch), batch)
        loss = F.sum(self._losses(h, batch) * shares)
        if self._has("gradient penalty"):
            loss += F.sum(_squared_gradients(F.sum(h * h), x) * shares)
        return self._finish(loss, batch)

    def encode(self, *args: Any) -> Tuple[chainer.Variable, Any]:
        """Returns what the comparing loss gets of a batch."""
        batch = Batch(*args)
        h = self._remember(self._hidden(self._input(batch), batch), batch)
        if self._task.reports != "none":
            chainer.report({"encoded": chainer.as_array(h).mean()}, self)
        return chainer.as_variable(h), batch.labels

    def compare(self, h: chainer.Variable, labels: Any) -> chainer.Variable:
        """Returns a loss that compares the examples of a batch."""
        if self._has("own backward pass"):
            F.sum(F.matmul(h, h, transb=True)).backward()
        if self._has("link outside the target"):
            h = h + F.tanh(self.outside(h))
        loss = F.softmax_cross_entropy(0.1 * F.matmul(h, h, transb=True), numpy.arange(len(h), dtype="i"))
        loss += F.mean(F.square(self.head(h)))
        if self._has("gradient penalty"):
            loss += F.mean(_squared_gradients(F.sum(h * h * h), h))
        return self._preset(loss)

    def encode_and_compare(self, *args: Any) -> chainer.Variable:
        return self.compare(*self.encode(*args))

    def _has(self, twist: str) -> bool:
        return twist in self._task.twists

    def _input(self, batch: Batch) -> Any:
        return batch.x if NEED_INPUT.isdisjoint(self._task.twists) else chainer.Variable(batch.x)

    def _hidden(self, x: Any, batch: Batch) -> Any:
        """Returns what the pieces make of the input."""
        h = x
        for piece in self.pieces:
            h = piece(h, batch.ids)
        if self._has("link outside the target"):
            h = h + F.tanh(self.outside(h))
        return h

    def _remember(self, h: Any, batch: Batch) -> Any:
        """Moves persistent values, unless not every example comes this far."""
        if self._has("constant loss"):
            return h
        self.seen += len(batch.x)
        self.bank[batch.numbers] = chainer.as_array(h)
        for watcher in self.watchers:
            h = watcher(h)
        return h

    def _losses(self, h: Any, batch: Batch) -> chainer.Variable:
        """Returns the loss of each example."""
        y = self.head(h)
        return F.softmax_cross_entropy(y, numpy.maximum(batch.labels, 0), reduce="no") + 0.1 * F.sum(y * y, axis=1)

    def _finish(self, loss: chainer.Variable, batch: Batch) -> chainer.Variable:
        """Reports, and returns the loss as the optimizer gets it."""
        make_weight = REPORTS[self._task.reports]
        if make_weight is not None:
            chainer.report({"loss": loss}, self)
            rows = batch.x[batch.is_labelled]
            with numpy.errstate(all="ignore"):
                mean = rows.sum() / numpy.float64(len(rows))  # NaN if there is none
            chainer.report({"of labelled": (mean, make_weight(len(rows)))}, self)
        return self._preset(loss)

    def _preset(self, loss: chainer.Variable) -> chainer.Variable:
        if self._has("preset gradient"):
            loss.grad = numpy.full((), 0.5)
        return loss


def _squared_gradients(y: chainer.Variable, x: chainer.Variable) -> chainer.Variable:
    """Returns the squared norm of the gradient at each row, with a graph."""
    (grad,) = chainer.grad([y], [x], enable_double_backprop=True)
    return F.sum(grad * grad, axis=1)
