"""The deviation of one gradient from another, relative to the largest entry of each parameter."""

from __future__ import annotations

import math
from typing import Dict, Tuple

import numpy

from chainer_accum.diagnostics.trials import Gradient

# By the itemsize of the narrowest float that the model uses. Real differences are far larger.
TOLERANCES = {2: 2e-2, 4: 1e-4, 8: 1e-6}

# A gradient that is zero up to rounding, such as that of a bias before batch normalization, has no useful scale. So the
# scale of a parameter is at least this share of the largest gradient.
_SMALLEST_SHARE = 1e-2


def compare(actual: Gradient, expected: Gradient) -> Tuple[float, str]:
    """Returns the largest relative deviation and the name of its parameter."""
    deviations = {}
    for name, scale in largest_scales(expected).items():
        deviation = _largest(actual[name].astype(float) - expected[name]) / scale
        deviations[name] = math.inf if math.isnan(deviation) else deviation
    parameter = max(deviations, key=lambda name: deviations[name])
    return deviations[parameter], parameter


def largest_scales(gradient: Gradient) -> Dict[str, float]:
    """Returns the number by which the deviation of each parameter's gradient is divided."""
    sizes = {name: _largest(array) for name, array in gradient.items()}
    return {name: max(size, _SMALLEST_SHARE * max(sizes.values())) for name, size in sizes.items()}


def _largest(gradient: numpy.ndarray) -> float:
    return float(numpy.abs(gradient).max(initial=0))


def check_usable(full: Gradient) -> None:
    """Raises ValueError if the gradient is zero or not finite, so that nothing can be compared with it."""
    for name, gradient in full.items():
        wrong = gradient[~numpy.isfinite(gradient)]
        if wrong.size > 0:
            raise ValueError(
                f"the gradient of the whole batch must be finite, got {wrong[0]} for {name}; "
                "pass a batch with a finite loss, and use a smaller loss scale if there is one"
            )
    if not any(gradient.any() for gradient in full.values()):
        raise ValueError(
            "the gradient of the whole batch must not be zero, got zero for all parameters; "
            "pass examples with something to learn from, and use loss scaling in float16"
        )
