"""What a pass sets on links is its own while it runs; what it leaves there is what the whole batch leaves."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.link_hooks import SpectralNormalization
from lockstep_helpers import (
    STORES,
    Net,
    as_option,
    assert_exact,
    classification,
    exact_or_refused,
    in_lockstep,
    make_vectors,
    unchanged,
)


class Spectral(Net):
    """Spectral normalization iterates once for each pass, and moves a persistent array in place."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.first.add_hook(SpectralNormalization(**kwargs))
        self.last.add_hook(SpectralNormalization(**kwargs))


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("kwargs", [{}, {"n_power_iteration": 3}, {"use_gamma": True}])
def test_spectral_normalization_iterates_once_for_a_window(store: str, kwargs: Any) -> None:
    assert_exact(lambda: Spectral(**kwargs), make_vectors(), lockstep=store)


def test_spectral_normalization_of_a_layer_without_a_size_asks_for_it() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__(is_lazy=True)
            self.first.add_hook(SpectralNormalization())

    run = in_lockstep(Model, make_vectors())
    with pytest.raises(RuntimeError, match="got 'W_u' of .*; call the model once before training, or give its"):
        run.update()
    assert run.optimizer.t == 0

    def make_model() -> chainer.Chain:
        model = Model()
        model(*chainer.dataset.concat_examples(make_vectors(4)))  # as the message says
        return model

    assert_exact(make_model, make_vectors())


class Recurrent(chainer.Chain):
    """A stateful recurrent layer, which normalizes at each time step.

    Args:
        make_layer (callable): Function that takes the sizes and returns the layer.
        goes_on (str): How a pass goes on from the state that the last one left: ``'no'``; ``'first'`` or ``'last'``,
            if the state loses its graph first or last in a pass; or ``'with its graph'``.

    """

    def __init__(self, make_layer: Any, goes_on: str = "no") -> None:
        super().__init__()
        self.goes_on = goes_on
        with self.init_scope():
            self.layer = make_layer(5, 6)
            self.normalization = L.BatchNormalization(6)
            self.last = L.Linear(6, 3)

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        if self.goes_on == "no":
            self.layer.reset_state()
        if self.goes_on == "first" and self.layer.h is not None:
            self.layer.c.unchain()
            self.layer.h.unchain()
        for shift in range(3):
            h = self.normalization(self.layer(chainer.Variable(numpy.roll(x, shift, axis=1))))
        loss = classification(self, self.last(F.dropout(h, 0.2)), t)
        if self.goes_on == "last":
            self.layer.set_state(*[chainer.Variable(each.array) for each in (self.layer.c, self.layer.h)])
        return loss


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("make_layer", [L.LSTM, L.StatefulGRU, L.StatefulPeepholeLSTM, L.StatefulMGU])
def test_a_recurrent_layer_has_the_state_of_its_micro_batch(make_layer: Any, store: str) -> None:
    assert_exact(lambda: Recurrent(make_layer), make_vectors(), lockstep=store)


def test_the_state_of_a_layer_with_zoneout() -> None:
    assert_exact(lambda: Recurrent(lambda n_in, n_out: L.StatefulZoneoutLSTM(n_in, n_out, 0.3, 0.4)), make_vectors())


@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("micro_batch_size", [3, 7, 10])
@pytest.mark.parametrize("goes_on", ["first", "last"])
def test_row_by_row_a_state_goes_on_from_the_last_update(goes_on: str, micro_batch_size: int, store: str) -> None:
    """In the whole batch, row 11 goes on from row 11. A micro-batch must not go on from rows of another one."""
    assert_exact(lambda: Recurrent(L.LSTM, goes_on), make_vectors(), lockstep=store, micro_batch_size=micro_batch_size)


def test_a_state_that_goes_on_with_its_graph_is_refused() -> None:
    """The whole batch would go back through a graph that grows with each update."""
    run = in_lockstep(lambda: Recurrent(L.LSTM, "with its graph"), make_vectors())
    run.update()
    with pytest.raises(RuntimeError, match=r"with a graph from before the pass; .* cut its graph with unchain\(\)"):
        run.update()


KINDS: Dict[str, Callable[[Any], Any]] = {
    "Variable": lambda h: chainer.Variable(h.array),
    "Variable of more axes": lambda h: chainer.Variable(h.array.reshape(-1, 2, 4)),
    "Variable with a graph that ends in it": lambda h: F.copy(chainer.Variable(h.array), -1),
    "array": lambda h: h.array.copy(),
    "tuple": lambda h: (h.array, h.array),
    "list": lambda h: [chainer.Variable(h.array)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_carried_from_update_to_update_is_exact_or_refused(kind: str) -> None:
    class Model(Net):
        carried: Any = None

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.first(x)
            if self.carried is not None:
                value = self.carried[0] if isinstance(self.carried, (list, tuple)) else self.carried
                h = h + F.reshape(value, h.shape)
            h = self.normalization(h)
            self.carried = KINDS[kind](h)
            return classification(self, self.last(F.tanh(h)), t)

    exact_or_refused(Model, make_vectors(), "carried|lockstep", before=1, micro_batch_size=5)


@pytest.mark.parametrize("store", ["memory", "file"])
def test_unchaining_what_was_computed_before_the_passes_waited_is_exact_or_refused(store: str) -> None:
    """In the whole batch, no gradient goes back from a function to an input that has been unchained since."""

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.first(x)
            y = F.tanh(self.normalization(h))
            h.unchain()
            return classification(self, self.last(y + h), t)

    exact_or_refused(Model, make_vectors(), "unchain", lockstep=store)


class Counter(Net):
    """Counts its passes in an attribute, in a persistent number and in an array, and computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.add_persistent("calls", 0)
        self.add_persistent("array", numpy.zeros(2))
        self.scale = 1.0

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        self.calls += 1
        self.array += [1, 0.5]
        self.scale = 1 / self.calls
        h = self.normalization(self.scale * self.first(x))
        self.array *= 2
        loss = classification(self, self.last(h * float(self.array[1]) * self.scale), t)
        self.scale /= 2
        return loss


@pytest.mark.parametrize("store", STORES)
def test_a_counter_counts_windows(store: str, tmp_path: Any) -> None:
    actual, expected = assert_exact(Counter, make_vectors(), lockstep=as_option(store, tmp_path))
    assert (actual.model.calls, actual.model.scale) == (expected.model.calls, expected.model.scale) == (4, 1 / 8)


class Keeping(Net):
    """Sets Variables on itself and on another link, before and after the passes wait, and uses them later."""

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        self.x = x
        self.h = self.first(self.x)
        self.first.output = F.tanh(self.h)
        h = self.normalization(self.h)
        self.y = F.relu(h) + self.first.output
        self.normalization(self.y)
        del self.h
        self.y = self.last(self.y)
        loss = classification(self, self.y, t) + 0.1 * F.mean_squared_error(self.x, self.x * F.sum(self.first.W))
        del self.first.output, self.x, self.y
        return loss


@pytest.mark.parametrize("store", STORES)
def test_a_pass_finds_the_attributes_that_it_has_set_itself(store: str, tmp_path: Any) -> None:
    actual, _ = assert_exact(Keeping, make_vectors(), lockstep=as_option(store, tmp_path))
    assert not {"x", "h", "y", "output"} & {*vars(actual.model), *vars(actual.model.first)}


def test_no_pass_finds_the_attributes_of_another() -> None:
    found: List[bool] = []

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            found.append(hasattr(self, "kept"))
            self.kept = x
            loss = super().forward(x, t)
            assert self.kept is x
            return loss

    run = in_lockstep(Model, make_vectors())
    run.update()
    assert found == [False, False, False]


def test_an_attribute_that_stays_has_the_last_rows_of_the_whole_batch() -> None:
    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            self.y = self.last(self.normalization(self.first(x)))
            return classification(self, self.y, t)

    actual, expected = assert_exact(Model, make_vectors())
    numpy.testing.assert_allclose(
        actual.model.y.array, expected.model.y.array[-len(actual.model.y) :], rtol=0, atol=1e-12
    )


def test_a_classifier_keeps_the_last_rows_of_the_whole_batch() -> None:
    def make_model() -> chainer.Chain:
        return L.Classifier(chainer.Sequential(L.Linear(5, 8), L.BatchNormalization(8), L.Linear(8, 3)))

    actual, expected = assert_exact(make_model, make_vectors())
    numpy.testing.assert_allclose(
        actual.model.y.array, expected.model.y.array[-len(actual.model.y) :], rtol=0, atol=1e-12
    )
    assert actual.model.loss.array.shape == ()


def test_links_that_no_one_has_named_have_a_state_too() -> None:
    other = L.LSTM(8, 4)

    class Model(Net):
        def forward(self, x: Any, t: Any) -> chainer.Variable:
            other.reset_state()
            h = self.first(x)
            h = self.normalization(F.concat([other(h), other(h)]))
            h = F.concat([other(h), other(h)])
            return classification(self, self.last(h), t)

    weights = other.copy("copy")
    for each in (other, weights):
        assert each.h is None
    assert_exact(Model, make_vectors())


def test_a_persistent_value_that_depends_on_the_examples_is_exact_or_refused() -> None:
    """A moving average that a link of your own keeps would be that of the last micro-batch only."""

    class Averaging(Net):
        def __init__(self) -> None:
            super().__init__()
            self.add_persistent("average", numpy.zeros(8))

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            h = self.first(x)
            self.average *= 0.9
            self.average += 0.1 * h.array.mean(axis=0)
            return classification(self, self.last(self.normalization(h)), t)

    exact_or_refused(Averaging, make_vectors(), "average")


@pytest.mark.parametrize("when", ["before", "after"])
def test_after_an_error_links_have_what_they_had_before(when: str) -> None:
    class Model(Counter):
        is_failing = True

        def forward(self, x: Any, t: Any) -> chainer.Variable:
            self.extra = x
            self.first.extra = x
            if when == "before" and self.is_failing:
                raise ConnectionError
            loss = super().forward(x, t)
            if when == "after" and self.is_failing:
                raise ConnectionError
            return loss

    run = in_lockstep(Model, make_vectors())
    with unchanged(run), pytest.raises(ConnectionError):
        run.update()
    assert not hasattr(run.model.first, "extra")
