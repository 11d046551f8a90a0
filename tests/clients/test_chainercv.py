"""ChainerCV: losses that are means over matched boxes, and over pixels that are labelled."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import chainercv_without_gpu  # noqa: F401  (before ChainerCV, which it makes importable)
import numpy
import pytest
from chainer.optimizers import MomentumSGD
from chainer.training.updaters import StandardUpdater
from chainercv.experimental.links.model.fcis import ProposalTargetCreator
from chainercv.links import PixelwiseSoftmaxClassifier, SegNetBasic
from chainercv.links.model.ssd import Multibox, multibox_loss

from helpers import assert_same_parameters, assert_same_steps, run, seed, serial


def make(updater_class, make_model, dataset, **kwargs):
    seed(0)
    model = make_model()
    with chainer.no_backprop_mode(), chainer.using_config("train", False):
        model(*chainer.dataset.concat_examples(dataset[-2:]))  # makes the parameters that are made at first use
    optimizer = MomentumSGD(0.01)
    optimizer.setup(model)
    return updater_class(serial(dataset, 8), optimizer, **kwargs)


class SmallSSD(chainer.Chain):
    """One feature map with the head and the loss of SSD."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.features = L.Convolution2D(3, 8, 3, stride=2, pad=1)
            self.multibox = Multibox(n_class=4, aspect_ratios=((2,),))

    def forward(self, imgs, gt_locs, gt_labels):
        locs, confs = self.multibox([F.relu(self.features(imgs))])
        loc_loss, conf_loss = multibox_loss(locs, confs, gt_locs, gt_labels, 3)
        loss = loc_loss + conf_loss
        chainer.report({"loss": loss, "loss/loc": loc_loss, "loss/conf": conf_loss}, self)
        return loss


def make_boxes(size=24):
    """Returns images with offsets and labels of 64 default boxes, most of which match no object."""
    random = numpy.random.RandomState(1)
    n_boxes = 4 * 4 * 4
    return [
        (
            random.standard_normal((3, 8, 8)).astype(numpy.float32),
            random.standard_normal((n_boxes, 4)).astype(numpy.float32),
            (random.randint(0, 4, n_boxes) * (random.rand(n_boxes) < 0.05 * (i % 4))).astype(numpy.int32),
        )
        for i in range(size)
    ]


def matched_boxes(batch):
    return sum((labels > 0).sum() for _, _, labels in batch)


def test_ssd_is_weighted_by_matched_boxes():
    expected = make(StandardUpdater, SmallSSD, make_boxes())
    actual = make(
        chainer_accum.AccumulatingUpdater, SmallSSD, make_boxes(), micro_batch_size=2, weight_func=matched_boxes
    )
    assert_same_steps(run(actual, 6), run(expected, 6))
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target, tolerance=1e-5)


def make_segnet():
    return PixelwiseSoftmaxClassifier(SegNetBasic(n_class=3), class_weight=[0.5, 1.0, 2.0])


def make_scenes(size=8):
    """Returns images with a label per pixel, of which -1 is none."""
    random = numpy.random.RandomState(1)
    return [
        (
            random.standard_normal((3, 16, 16)).astype(numpy.float32),
            random.randint(-1 - i % 2, 3, (16, 16)).clip(-1).astype(numpy.int32),
        )
        for i in range(size)
    ]


def labelled_pixels(batch):
    return sum((t != -1).sum() for _, t in batch)


def test_segnet_is_weighted_by_labelled_pixels_where_batch_normalization_is_fixed():
    expected = make(StandardUpdater, make_segnet, make_scenes())
    actual = make(
        chainer_accum.AccumulatingUpdater, make_segnet, make_scenes(), micro_batch_size=2, weight_func=labelled_pixels
    )
    with chainer.using_config("train", False):
        assert_same_steps(run(actual, 2), run(expected, 2))
    assert_same_parameters(actual.get_optimizer("main").target, expected.get_optimizer("main").target, tolerance=1e-5)


def test_segnet_trains_with_batch_normalization_of_micro_batches():
    updater = make(
        chainer_accum.AccumulatingUpdater,
        make_segnet,
        make_scenes(),
        micro_batch_size=4,
        weight_func=labelled_pixels,
        running_statistics="update",
    )
    steps = run(updater, 10)
    assert steps[-1].observation["main/loss"].array < steps[0].observation["main/loss"].array


def test_fcis_makes_its_targets():
    box = numpy.array([[2, 2, 12, 12]], numpy.float32)
    rois = numpy.array([[2, 2, 12, 13], [0, 0, 4, 4], [3, 2, 12, 12]], numpy.float32)
    mask = numpy.zeros((1, 16, 16), bool)
    mask[0, 2:12, 2:7] = True
    sample_roi, masks, labels, _ = ProposalTargetCreator(n_sample=4)(rois, mask, numpy.array([1], numpy.int32), box)
    assert len(sample_roi) == len(labels)
    positive = masks[labels > 0].astype(numpy.float32)
    assert positive.mean() == pytest.approx(0.5, abs=0.1)
