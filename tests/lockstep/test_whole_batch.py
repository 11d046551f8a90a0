"""Functions of the whole batch: each micro-batch hands in its rows, and gets those of the outcome back."""

from __future__ import annotations

from typing import Any, Callable

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum.functions import sum_over_batch, whole_batch
from lockstep_helpers import Net, assert_exact, classification, in_lockstep, make_vectors, unchanged


class Comparing(Net):
    """A network whose loss compares examples.

    Args:
        compare (callable): Function of the model and the outputs that returns the loss of a micro-batch.

    """

    def __init__(self, compare: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.compare = compare
        with self.init_scope():
            self.scale = chainer.Parameter(0.5, ())

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        y = self.last(self.normalization(self.first(x)))
        loss = self.compare(self, y, t)
        chainer.report({"loss": loss}, self)
        return loss  # type: ignore[no-any-return]


def contrastive(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    def losses(z: chainer.Variable) -> chainer.Variable:
        similarities = F.matmul(z, z, transb=True) * F.broadcast_to(model.scale, (len(z), len(z)))
        return F.softmax_cross_entropy(similarities, numpy.roll(numpy.arange(len(z), dtype="i"), 1), reduce="no")

    return F.mean(whole_batch(losses, F.normalize(y)))


def scalar(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    return whole_batch(lambda z: F.sum(F.mean(z, axis=0) ** 2), y)  # type: ignore[no-any-return]


def several(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    mean, rows = whole_batch(lambda z, labels: (F.mean(z), F.cumsum(z, axis=0) * labels[:, None]), y, t)
    return mean + F.mean(rows)


def reversed_order(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    return F.mean(whole_batch(lambda z: z[::-1], y) * y)


def drawing(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    return F.mean(F.dropout(whole_batch(lambda z: F.dropout(z, 0.3), F.dropout(y, 0.2)), 0.4) ** 2)


def centered(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    total, count = sum_over_batch(F.sum(y, axis=0), chainer.Variable(numpy.full((), len(y), y.dtype)))
    return F.mean((y - F.broadcast_to(total / F.broadcast_to(count, total.shape), y.shape)) ** 2)


def single_sum(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    return F.mean(y * F.broadcast_to(sum_over_batch(F.sum(y)), y.shape))


def without_graph(model: Any, y: chainer.Variable, t: Any) -> chainer.Variable:
    with chainer.no_backprop_mode():
        center = whole_batch(lambda z: F.broadcast_to(F.mean(z, axis=0, keepdims=True), z.shape), y)
    return F.mean((y - center) ** 2)


LOSSES = [contrastive, scalar, several, reversed_order, drawing, centered, single_sum, without_graph]


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_function_of_the_whole_batch_is_exact(loss: Any, store: str) -> None:
    assert_exact(lambda: Comparing(loss), make_vectors(), lockstep=store)


def test_outside_of_lockstep_the_function_is_called_with_its_inputs() -> None:
    x = chainer.Variable(numpy.arange(6.0).reshape(3, 2))
    numpy.testing.assert_array_equal(whole_batch(F.exp, x).array, numpy.exp(x.array))
    assert sum_over_batch(x) is x
    assert sum_over_batch(x, x) == (x, x)


def test_layers_run_in_the_function_as_anywhere() -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            return classification(self, whole_batch(lambda z: self.last(self.normalization(z)), self.first(x)), t)

    assert_exact(Model, make_vectors())


REFUSED = {
    "a list": ([1.0], TypeError, "the inputs of whole_batch must be Variables or arrays, got list"),
    "a scalar": (
        chainer.Variable(numpy.zeros(())),
        ValueError,
        "the inputs of whole_batch must have rows, got a scalar",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_without_rows_are_refused(name: str) -> None:
    value, error, message = REFUSED[name]
    run = in_lockstep(lambda: Comparing(lambda model, y, t: whole_batch(F.exp, value)), make_vectors())
    with unchanged(run), pytest.raises(error, match=message):
        run.update()


def test_another_number_of_rows_is_refused() -> None:
    run = in_lockstep(lambda: Comparing(lambda model, y, t: F.mean(whole_batch(lambda z: z[1:], y))), make_vectors())
    with unchanged(run), pytest.raises(ValueError, match="must return one row for each row of its first input"):
        run.update()


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="function must be callable"):
        whole_batch(None, numpy.zeros(3))  # type: ignore[arg-type]


def test_accumulate_merges_what_compares_examples() -> None:
    examples = make_vectors(12)
    x, t = (numpy.stack(each) for each in zip(*examples))
    models = []
    for lockstep in (None, "memory"):
        numpy.random.seed(0)
        model = Comparing(contrastive)
        optimizer = chainer.optimizers.SGD(0.1).setup(model)
        with chainer_accum.accumulate(optimizer, lockstep=lockstep) as window:
            for part in [slice(0, 12)] if lockstep is None else [slice(0, 5), slice(5, 12)]:
                window.add(model, x[part], t[part], weight=len(x[part]))
        models.append(model)
    for expected, actual in zip(*(model.params() for model in models)):
        numpy.testing.assert_allclose(actual.array, expected.array, atol=1e-12)


def test_a_link_of_ones_own_uses_it() -> None:
    class Centered(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.layer = L.Linear(5, 3)

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            return classification(self, centered_rows(self.layer(x)), t)

    def centered_rows(y: chainer.Variable) -> chainer.Variable:
        return whole_batch(lambda z: z - F.broadcast_to(F.mean(z, axis=0, keepdims=True), z.shape), y)

    assert_exact(Centered, make_vectors())
