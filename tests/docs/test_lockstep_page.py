"""What docs/lockstep.md promises holds for the code on the page."""

from __future__ import annotations

import pathlib
import re
import runpy

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.training.updaters import StandardUpdater

from helpers import serial

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lockstep.md").read_text(encoding="utf-8")


def definitions():
    """Returns what the page defines."""
    namespace = {"chainer": chainer}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for part in re.split(r"\n\n\n", block):
            if part.startswith(("import", "from", "class", "def")):
                exec(part, namespace)
    return namespace


class Centering(chainer.Chain):
    """Uses the layer of the page."""

    def __init__(self):
        super().__init__()
        self.center = definitions()["center"]
        with self.init_scope():
            self.first = L.Linear(5, 8)
            self.last = L.Linear(8, 3)

    def forward(self, x, t):
        return F.softmax_cross_entropy(self.last(F.tanh(self.center(self.first(x)))), t)


MODELS = {"whole_batch": lambda: definitions()["Contrastive"](), "sum_over_batch": Centering}


def train(updater_class, make_model, **kwargs):
    """Returns the parameters after three updates in float64, as one array."""
    random = numpy.random.RandomState(0)
    data = list(zip(random.standard_normal((24, 5)), random.randint(3, size=24).astype(numpy.int32)))
    numpy.random.seed(0)
    with chainer.using_config("dtype", numpy.float64):
        optimizer = chainer.optimizers.MomentumSGD(0.1).setup(make_model())
        updater = updater_class(serial(data, 12), optimizer, **kwargs)
        for _ in range(3):
            updater.update()
    return numpy.concatenate([param.array.ravel() for _, param in sorted(optimizer.target.namedparams())])


@pytest.mark.parametrize("name", MODELS)
def test_a_function_of_the_whole_batch_is_exact_in_lockstep_only(name):
    expected = train(StandardUpdater, MODELS[name])
    for lockstep, is_exact in (("memory", True), ("file", True), (None, False)):
        actual = train(chainer_accum.AccumulatingUpdater, MODELS[name], micro_batch_size=5, lockstep=lockstep)
        assert (abs(actual - expected).max() < 1e-10) == is_exact, lockstep


def test_the_drawing_is_what_its_program_draws():
    program = runpy.run_path(str(ROOT / "tools" / "draw_lockstep.py"))
    assert (ROOT / "docs" / "lockstep.svg").read_text(encoding="utf-8") == program["draw"]()
