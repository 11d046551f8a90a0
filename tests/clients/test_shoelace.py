"""shoelace: a batch is a query with its documents, and the loss compares them."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.optimizers import MomentumSGD
from shoelace.dataset import LtrDataset
from shoelace.iterator import LtrIterator
from shoelace.loss.listwise import listnet

from helpers import assert_same_parameters, seed

N_QUERIES = 8


class Ranker(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.predictor = L.Linear(4, 1)

    def forward(self, x, t):
        loss = listnet(self.predictor(x), t)
        chainer.report({"loss": loss}, self)
        return loss


def make_optimizer():
    seed(0)
    return MomentumSGD(1.0).setup(Ranker())


def make_iterator():
    random = numpy.random.RandomState(1)
    sizes = random.randint(3, 9, N_QUERIES)
    x = random.standard_normal((sizes.sum(), 4)).astype(numpy.float32)
    relevance = x[:, :1].round().clip(0, 2)
    dataset = LtrDataset(x, relevance, numpy.hstack([[0], numpy.cumsum(sizes)]), list(range(N_QUERIES)), N_QUERIES)
    return LtrIterator(dataset, repeat=True, shuffle=False)


def test_gathered_queries_make_the_update_of_their_mean_loss():
    by_hand, iterator = make_optimizer(), make_iterator()
    for _ in range(4):
        batches = [chainer.dataset.concat_examples(iterator.next()) for _ in range(4)]
        loss = F.average(F.stack([by_hand.target(x, t) for x, t in batches]))
        by_hand.target.cleargrads()
        loss.backward()
        by_hand.update()

    optimizer = make_optimizer()
    updater = chainer_accum.AccumulatingUpdater(
        make_iterator(), optimizer, accumulation_steps=4, weight_func=lambda batch: 1
    )
    for _ in range(4):
        updater.update()
    assert updater.epoch == 2
    assert_same_parameters(optimizer.target, by_hand.target)


def test_without_weights_a_query_counts_for_its_documents():
    alike, by_documents = make_optimizer(), make_optimizer()
    for optimizer, kwargs in ((alike, {"weight_func": lambda batch: 1}), (by_documents, {})):
        chainer_accum.AccumulatingUpdater(make_iterator(), optimizer, accumulation_steps=4, **kwargs).update()
    with pytest.raises(AssertionError):
        assert_same_parameters(by_documents.target, alike.target, tolerance=1e-4)
