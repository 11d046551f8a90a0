"""Chainer Chemistry: several labels per molecule, of which some are unknown."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.optimizers import Adam
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_chemistry.dataset.converters import concat_mols
from chainer_chemistry.models import GGNN
from chainer_chemistry.models.prediction import Classifier, GraphConvPredictor
from chainer_chemistry.training.extensions import ROCAUCEvaluator
from chainer_chemistry.utils.train_utils import run_train

from helpers import assert_same_parameters, assert_same_steps, run, seed, serial

N_ATOMS = 6
N_LABELS = 3


def make_molecules(size=48):
    """Returns graphs of carbon, nitrogen and oxygen, with labels of which one in three is unknown."""
    random = numpy.random.RandomState(1)
    molecules = []
    for _ in range(size):
        atoms = random.choice([6, 7, 8], N_ATOMS).astype(numpy.int32)
        bonds = random.randint(0, 2, (4, N_ATOMS, N_ATOMS)).astype(numpy.float32)
        labels = (atoms[:N_LABELS] == 8).astype(numpy.int32)
        labels[random.rand(N_LABELS) < 1 / 3] = -1
        molecules.append((atoms, numpy.maximum(bonds, bonds.transpose(0, 2, 1)), labels))
    return molecules


def make_classifier():
    seed(0)
    predictor = GraphConvPredictor(GGNN(out_dim=8, hidden_channels=8, n_update_layers=2), L.Linear(8, N_LABELS))
    with chainer.no_backprop_mode():
        predictor(*concat_mols(make_molecules(2))[:-1])  # makes the parameters that are made at first use
    return Classifier(predictor, lossfun=F.sigmoid_cross_entropy, metrics_fun=F.binary_accuracy)


def make(updater_class, **kwargs):
    optimizer = Adam()
    optimizer.setup(make_classifier())
    return updater_class(serial(make_molecules(), 16), optimizer, converter=concat_mols, **kwargs)


def known_labels(batch):
    return sum((labels != -1).sum() for *_, labels in batch)


def test_unknown_labels_have_no_weight_and_the_update_is_that_of_the_large_batch():
    expected = make(StandardUpdater)
    actual = make(chainer_accum.AccumulatingUpdater, micro_batch_size=4, weight_func=known_labels)
    assert_same_steps(run(actual, 9), run(expected, 9))
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target, tolerance=1e-5)


def test_without_the_weights_it_is_another_update():
    expected = make(StandardUpdater)
    actual = make(chainer_accum.AccumulatingUpdater, micro_batch_size=4)
    expected.update()
    actual.update()
    with pytest.raises(AssertionError):
        assert_same_parameters(
            actual.get_optimizer("main").target, expected.get_optimizer("main").target, tolerance=1e-5
        )


def test_padding_counts_in_a_ggnn():
    (atoms, bonds, _), *_ = make_molecules(1)
    predictor = make_classifier().predictor
    padded = concat_mols([(atoms, bonds), (numpy.zeros(8, "i"), numpy.zeros((4, 8, 8), "f"))])
    alone, beside_a_larger_one = predictor(*concat_mols([(atoms, bonds)])).array, predictor(*padded).array[:1]
    assert not numpy.allclose(alone, beside_a_larger_one, rtol=1e-3, atol=1e-3)


def test_an_evaluator_of_the_area_under_the_curve_runs(tmp_path):
    updater = make(chainer_accum.AccumulatingUpdater, micro_batch_size=4, weight_func=known_labels)
    model = updater.get_optimizer("main").target
    trainer = Trainer(updater, (20, "epoch"), out=str(tmp_path))
    valid = serial(make_molecules(), 16, repeat=False)
    trainer.extend(
        ROCAUCEvaluator(valid, model, converter=concat_mols, eval_func=model.predictor, ignore_labels=-1, name="val")
    )
    trainer.extend(chainer.training.extensions.LogReport())
    trainer.run()
    log = trainer.get_extension("LogReport").log
    assert log[-1]["val/main/roc_auc"] > max(0.7, log[0]["val/main/roc_auc"])


def test_run_train_takes_an_accumulating_optimizer(tmp_path):
    optimizer = chainer_accum.create_accumulating_optimizer(Adam(), accumulation_steps=4)
    model = make_classifier()
    run_train(
        model,
        serial(make_molecules(), 4),
        epoch=1,
        optimizer=optimizer,
        out=str(tmp_path),
        converter=concat_mols,
        use_default_extensions=False,
    )
    assert optimizer.t == 48 // 4 // 4
