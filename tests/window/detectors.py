"""What the tests of late weights share: a network with several losses whose divisors are known in the forward pass."""

from __future__ import annotations

from typing import Any, Callable, List, Tuple

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer import optimizers


def make_boxes(size: int, seed: int = 0) -> List[Any]:
    """Returns examples in float64: an input, a label that may be -1, a target, and whether the target counts."""
    random = numpy.random.RandomState(seed)
    inputs, targets = random.standard_normal((size, 5)), random.standard_normal(size)
    labels, matched = random.randint(-1, 3, size).astype("i"), random.randint(0, 2, size).astype("i")
    return list(zip(inputs, labels, targets, matched))


class Detector(chainer.Chain):
    """A network that classifies, and that regresses where examples are matched, all in float64.

    Args:
        normalizes (bool): Whether it has batch normalization.

    Attributes:
        num_labels (int): Number of labels in the last pass that are not ignored.

    """

    def __init__(self, normalizes: bool = False) -> None:
        super().__init__()
        random = numpy.random.RandomState(1)
        with self.init_scope():
            self.body = L.Linear(5, 6, initialW=random.standard_normal((6, 5)))
            self.head = L.Linear(6, 3, initialW=random.standard_normal((3, 6)))
            self.box = L.Linear(6, 1, initialW=random.standard_normal((1, 6)))
            if normalizes:
                self.norm = L.BatchNormalization(6, dtype=numpy.float64)
        for param in self.params():
            param.array = param.array.astype(numpy.float64)
        self.num_labels = 0

    def features(self, x: Any) -> chainer.Variable:
        h = self.body(x)
        return F.tanh(self.norm(h) if hasattr(self, "norm") else h)

    def of_labels(self, x: Any, t: Any, y: Any, m: Any) -> Tuple[chainer.Variable, int]:
        """Returns the mean over the labels that are not ignored, and their number."""
        self.num_labels = int((t >= 0).sum())
        return F.softmax_cross_entropy(self.head(self.features(x)), t), self.num_labels

    def of_all(self, x: Any, t: Any, y: Any, m: Any) -> List[Tuple[chainer.Variable, float]]:
        """Returns three losses: a mean over labels, one over matches, NaN if there is none, and one over examples."""
        h = self.features(x)
        num_labels, num_matched = int((t >= 0).sum()), int(m.sum())
        label = F.softmax_cross_entropy(self.head(h), t)
        box = F.sum((self.box(h)[:, 0] - y) ** 2 * m) * (1 / num_matched if num_matched else numpy.nan)
        chainer.report({"label": label, "box": box.array, "size": float(len(x))}, self)
        return [(label, num_labels), (box, num_matched), (F.mean(h * h), len(x))]


def summed(lossfun: Callable[..., Any]) -> Callable[..., chainer.Variable]:
    """Returns a loss function for StandardUpdater: the sum of the losses that have a weight."""

    def total(*args: Any) -> chainer.Variable:
        returned = lossfun(*args)
        pairs = [returned] if isinstance(returned, tuple) else returned
        zero = chainer.Variable(numpy.zeros(()))
        return sum((loss for loss, weight in pairs if weight > 0), zero)

    return total


def set_up(model: Any = None, optimizer: Any = None) -> Any:
    """Returns an optimizer with momentum and a model."""
    optimizer = optimizers.MomentumSGD(0.1) if optimizer is None else optimizer
    return optimizer.setup(Detector() if model is None else model)


def split(examples: Any, sizes: Any) -> List[Any]:
    """Returns the arrays of micro-batches of these sizes."""
    ends = numpy.cumsum(sizes)
    return [chainer.dataset.concat_examples(examples[end - size : end]) for size, end in zip(sizes, ends)]
