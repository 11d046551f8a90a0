"""cvfinetune: the class of its updater is an argument."""

from __future__ import annotations

import chainer_accum
import chainercv_without_gpu  # noqa: F401  (before ChainerCV, which it makes importable)
from chainer.optimizers import MomentumSGD
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from cvfinetune.finetuner import DefaultFinetuner

from helpers import assert_same_parameters, make_dataset, make_model, serial


class Finetuner(DefaultFinetuner):
    """The finetuner with data, a model and an optimizer of the test's own, in place of what it loads from files."""

    def __init__(self, **kwargs):
        super().__init__(
            optimizer="sgd",
            classifier_cls=None,
            model_type="",
            data="",
            dataset="",
            dataset_cls=None,
            no_sacred=True,
            **kwargs,
        )

    def read_annotations(self):
        pass

    def init_model(self):
        self.model = make_model()

    def init_datasets(self):
        self.train_data = self.val_data = make_dataset(48)

    def init_iterators(self):
        self.train_iter = serial(self.train_data, 16)
        self.val_iter = serial(self.val_data, 16, repeat=False)

    def init_classifier(self):
        self.clf = self.model

    def load_weights(self):
        pass

    def init_optimizer(self):
        self.opt = MomentumSGD(0.1).setup(self.clf)


def train(out, **kwargs):
    finetuner = Finetuner(**kwargs)
    trainer = Trainer(finetuner.updater, (3, "epoch"), out=str(out))
    trainer.extend(finetuner.evaluator)
    trainer.run()
    return finetuner, trainer


def test_updater_cls_and_updater_kwargs_make_the_training_of_the_large_batch(tmp_path):
    expected, expected_trainer = train(tmp_path / "expected", updater_cls=StandardUpdater)
    actual, trainer = train(
        tmp_path / "actual",
        updater_cls=chainer_accum.AccumulatingUpdater,
        updater_kwargs={"micro_batch_size": 4},
    )
    assert actual.updater.iteration == expected.updater.iteration == 9
    assert trainer.observation.keys() == expected_trainer.observation.keys()
    assert_same_parameters(actual.clf, expected.clf)
