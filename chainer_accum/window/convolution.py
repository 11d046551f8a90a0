"""Weight gradients of convolutions that are added to a sum while they are computed.

Chainer extracts the patches of all images of a batch, which take as many times the memory of the images as a filter has
pixels. Then it copies them into another order for one matrix product. Here, patches are extracted directly in that
order, for only as many images at a time as fit in a cache, because each product is added to the sum anyway.
"""

from __future__ import annotations

from typing import Tuple

import numpy

from chainer_accum.window.blas import add_matrix_product

# About the size of a core's private cache. Smaller parts mean more matrix products, each with its overhead.
_BYTES_OF_PATCHES = 2**21


def add_convolution_weight(
    total: numpy.ndarray,
    x: numpy.ndarray,
    gy: numpy.ndarray,
    stride: Tuple[int, int],
    pad: Tuple[int, int],
    dilate: Tuple[int, int],
) -> None:
    """Adds the gradient of the weight of a two-dimensional convolution without groups to ``total`` in place.

    All arrays have the same dtype.

    Args:
        total (numpy.ndarray): Sum of shape ``(c_out, c_in, k_h, k_w)``, C-contiguous.
        x (numpy.ndarray): Input of shape ``(n, c_in, h, w)``.
        gy (numpy.ndarray): Gradient of the output, of shape ``(n, c_out, h_out, w_out)``.
        stride (tuple): Vertical and horizontal stride.
        pad (tuple): Height and width of the padding.
        dilate (tuple): Vertical and horizontal dilation.

    """
    patches = _patches(x, total.shape[2:], gy.shape[2:], stride, pad, dilate)
    images = max(_BYTES_OF_PATCHES // max(patches[:1].nbytes, 1), 1)
    for start in range(0, len(x), images):
        part = slice(start, start + images)
        columns = patches[part].transpose(1, 2, 3, 0, 4, 5).reshape(total[0].size, -1)
        rows = gy[part].transpose(1, 0, 2, 3).reshape(len(total), -1)
        add_matrix_product(total.reshape(len(total), -1), rows.T, columns.T)


def _patches(
    x: numpy.ndarray,
    filter_size: Tuple[int, ...],
    out_size: Tuple[int, ...],
    stride: Tuple[int, int],
    pad: Tuple[int, int],
    dilate: Tuple[int, int],
) -> numpy.ndarray:
    """Returns a view of shape ``(n, c_in, k_h, k_w, h_out, w_out)`` of the padded input."""
    # With cover_all, the last step of a convolution may reach beyond the padding, by less than a stride.
    widths = [(each_pad, each_pad + each_stride - 1) for each_pad, each_stride in zip(pad, stride)]
    x = numpy.pad(x, [(0, 0), (0, 0), *widths])
    image, channel, row, column = x.strides
    return numpy.lib.stride_tricks.as_strided(
        x,
        (*x.shape[:2], *filter_size, *out_size),
        (image, channel, row * dilate[0], column * dilate[1], row * stride[0], column * stride[1]),
        writeable=False,
    )
