"""What the micro-batches of a window reported, merged into one observation.

It knows neither batches nor windows, and imports from no other wing.
"""

from chainer_accum.observations.merging import Observations, reporting_to
from chainer_accum.observations.reports import (
    Number,
    Reported,
    device_of_either,
    dtype_of,
    is_not_zero,
    is_numeric,
    is_scalar,
    value_and_weight,
    where,
    widened,
)
from chainer_accum.observations.rules import ObservationRules, Rule

__all__ = [
    "Number",
    "ObservationRules",
    "Observations",
    "Reported",
    "Rule",
    "device_of_either",
    "dtype_of",
    "is_not_zero",
    "is_numeric",
    "is_scalar",
    "reporting_to",
    "value_and_weight",
    "where",
    "widened",
]
