"""After a window in lockstep, nothing of its graph is left, whatever the model keeps, and windows do not add up."""

from __future__ import annotations

import gc

import chainer_accum
import chainer
import chainer.links as L
import numpy
import pytest
from chainer.iterators import SerialIterator
from chainer_accum.lockstep.batch_normalization import NormalizationVisit
from chainer_accum.lockstep.link_states import LinkStates


@pytest.mark.parametrize("lockstep", ["memory", "file"])
def test_a_model_that_keeps_its_output_does_not_keep_windows(lockstep: str) -> None:
    model = L.Classifier(chainer.Sequential(L.Linear(3, 4), L.BatchNormalization(4), L.Linear(4, 2)))
    optimizer = chainer.optimizers.SGD().setup(model)
    examples = [(numpy.full(3, number, chainer.get_dtype()), numpy.int32(number % 2)) for number in range(4)]
    updater = chainer_accum.AccumulatingUpdater(
        SerialIterator(examples, 4), optimizer, micro_batch_size=2, lockstep=lockstep
    )
    for _ in range(2):
        updater.update()
    assert model.y is not None
    gc.collect()
    assert [each for each in gc.get_objects() if isinstance(each, (NormalizationVisit, LinkStates))] == []
