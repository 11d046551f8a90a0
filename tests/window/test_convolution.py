"""The gradient of the weight of a convolution is that of Chainer, however the convolution goes over its input."""

from __future__ import annotations

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils.conv import get_conv_outsize
from chainer_accum.window import convolution as _convolution
from chainer_accum.window.gradient_sums import GradientSums
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


class Convolution(chainer.Link):
    """A weight, and a loss that passes it through a convolution."""

    def __init__(self, x, weight, **kwargs):
        super().__init__()
        self._x, self._kwargs = x, kwargs
        with self.init_scope():
            self.weight = chainer.Parameter(weight)

    def forward(self):
        return F.sum(F.convolution_2d(self._x, self.weight, **self._kwargs) ** 2)


def make_link(shape, weight_shape, dtype="f", **kwargs):
    random = numpy.random.RandomState(0)
    x = random.standard_normal(shape).astype(dtype)
    return Convolution(x, random.standard_normal(weight_shape).astype(dtype), **kwargs)


def assert_same_as_chainer(link, passes=2):
    link.cleargrads()
    loss = link()
    loss.backward()
    expected = passes * link.weight.grad.astype("d")
    sums = GradientSums(link)
    for _ in range(passes):
        loss = link()
        with sums.adding():
            loss.backward()
    tolerance = {"e": 1e-2, "f": 1e-4, "d": 1e-12}[link.weight.dtype.char]
    scale = abs(expected).max() or 1.0
    numpy.testing.assert_allclose(sums.get(link.weight) / scale, expected / scale, rtol=0, atol=tolerance)


@settings(max_examples=100)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    filter_size=pairs,
    stride=pairs,
    pad=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilate=pairs,
    cover_all=st.booleans(),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    images=st.integers(1, 5),
    dtype=st.sampled_from("fd"),
)
def test_the_gradient_is_that_of_chainer(size, filter_size, stride, pad, dilate, cover_all, channels, images, dtype):
    for axis in range(2):
        assume(get_conv_outsize(size[axis], filter_size[axis], stride[axis], pad[axis], cover_all, dilate[axis]) > 0)
    options = {"stride": stride, "pad": pad, "dilate": dilate, "cover_all": cover_all}
    link = make_link((images, channels[0], *size), (channels[1], channels[0], *filter_size), dtype, **options)
    with chainer.using_config("type_check", False):  # which knows no more of the sizes than the function does
        assert_same_as_chainer(link)


@pytest.mark.parametrize("limit", [1, 4000, 2**21], ids=["an image at a time", "some images", "all images"])
def test_the_gradient_does_not_depend_on_how_many_images_are_laid_out_at_a_time(monkeypatch, limit):
    monkeypatch.setattr(_convolution, "_BYTES_OF_PATCHES", limit)
    assert_same_as_chainer(make_link((7, 3, 6, 5), (4, 3, 3, 2), pad=1))


def test_an_input_and_a_gradient_that_are_views_will_do():
    link = make_link((6, 5, 4, 7), (4, 4, 2, 2))
    link._x = link._x.transpose(2, 0, 3, 1)[:, 1:5]
    assert_same_as_chainer(link)


@pytest.mark.parametrize(
    "link, calls",
    [
        (make_link((2, 3, 6, 6), (4, 3, 3, 3)), 2),
        (make_link((2, 3, 6, 6), (4, 3, 3, 3), "e"), 0),
        (make_link((2, 4, 6, 6), (4, 2, 3, 3), groups=2), 0),
    ],
    ids=["float32", "float16", "groups"],
)
def test_what_it_does_not_know_is_left_to_chainer(monkeypatch, link, calls):
    made = []
    monkeypatch.setattr(
        "chainer_accum.window.weight_gradients.add_convolution_weight",
        lambda *args: made.append(args) or _convolution.add_convolution_weight(*args),
    )
    assert_same_as_chainer(link)
    assert len(made) == calls
