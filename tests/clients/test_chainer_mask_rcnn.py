"""Mask R-CNN: one image per pass, as its programs train, and several per update."""

from __future__ import annotations

import functools

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import chainercv_without_gpu  # noqa: F401  (before ChainerCV, which it makes importable)
import numpy
from chainer.optimizers import MomentumSGD
from chainer_mask_rcnn.datasets import concat_examples
from chainer_mask_rcnn.models import MaskRCNN, MaskRCNNTrainChain
from chainer_mask_rcnn.models.region_proposal_network import RegionProposalNetwork
from chainer_mask_rcnn.models.utils import ProposalTargetCreator
from chainercv.links.model.faster_rcnn.utils.anchor_target_creator import AnchorTargetCreator

from helpers import assert_same_parameters, seed, serial

SIZE = 64
N_CLASS = 3


class Extractor(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(3, 8, 16, stride=16)

    def forward(self, x):
        return F.relu(self.conv(x))


class Head(chainer.Chain):
    n_class = N_CLASS

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.cls_loc = L.Linear(8 * 7 * 7, N_CLASS * 4)
            self.score = L.Linear(8 * 7 * 7, N_CLASS)
            self.mask = L.Deconvolution2D(8, N_CLASS - 1, 2, stride=2)

    def forward(self, x, rois, roi_indices):
        # On the host, the package's own roi_align_2d takes minutes.
        pool = F.roi_average_pooling_2d(x, rois, roi_indices, 7, 1 / 16)
        return self.cls_loc(pool), self.score(pool), self.mask(pool)


class Proposals(RegionProposalNetwork):
    """Returns lists, because ``F.concat`` of Chainer 7 refuses the variables that the package gives it."""

    def __call__(self, x, img_size, scales):
        locs, scores, *others = super().__call__(x, img_size, scales)
        return (list(locs), list(scores), *others)


def make_model():
    seed(0)
    rpn = Proposals(8, 8, anchor_scales=(1, 2), feat_stride=16, proposal_creator_params={"min_size": 0})
    model = MaskRCNN(Extractor(), rpn, Head(), mean=numpy.zeros((3, 1, 1), numpy.float32))
    return MaskRCNNTrainChain(
        model,
        anchor_target_creator=AnchorTargetCreator(n_sample=16),
        proposal_target_creator=ProposalTargetCreator(n_sample=8),
    )


def make_images(size=6):
    """Returns images with a bright square each, its box, label and mask, and the scale of the image."""
    random = numpy.random.RandomState(1)
    images = []
    for i in range(size):
        y, x = random.randint(0, 24, 2)
        image = random.standard_normal((3, SIZE, SIZE)).astype(numpy.float32)
        image[:, y : y + 32, x : x + 32] += 3
        mask = numpy.zeros((1, SIZE, SIZE), numpy.int32)
        mask[0, y : y + 32, x : x + 32] = 1
        box = numpy.array([[y, x, y + 32, x + 32]], numpy.float32)
        images.append((image, box, numpy.array([i % 2], numpy.int32), mask, 1.0))
    return images


convert = functools.partial(concat_examples, padding=0, indices_concat=[0, 2, 3, 4], indices_to_device=[0, 1])


def test_gathered_images_make_the_update_of_their_mean_gradient():
    by_hand = MomentumSGD(0.01).setup(make_model())
    seed(1)  # boxes are sampled at random
    images = iter(make_images())
    for _ in range(2):
        by_hand.target.cleargrads()
        for _ in range(3):
            (by_hand.target(*convert([next(images)])) / 3).backward()
        by_hand.update()

    optimizer = MomentumSGD(0.01).setup(make_model())
    updater = chainer_accum.AccumulatingUpdater(
        serial(make_images(), 1), optimizer, converter=convert, accumulation_steps=3
    )
    seed(1)
    updater.update()
    updater.update()
    assert_same_parameters(optimizer.target, by_hand.target, tolerance=1e-5)
