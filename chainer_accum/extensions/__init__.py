"""Trainer extensions for training with gradient accumulation."""

from chainer_accum.extensions.accumulate import Accumulate
from chainer_accum.extensions.example_mean import ExampleMean
from chainer_accum.extensions.exponential_moving_average import ExponentialMovingAverage
from chainer_accum.extensions.gradient_noise_scale import GradientNoiseScale
from chainer_accum.extensions.keep_random_state import KeepRandomState
from chainer_accum.extensions.learning_rate_survey import LearningRateSurvey
from chainer_accum.extensions.tensorboard_report import TensorBoardReport

__all__ = [
    "Accumulate",
    "ExampleMean",
    "ExponentialMovingAverage",
    "GradientNoiseScale",
    "KeepRandomState",
    "LearningRateSurvey",
    "TensorBoardReport",
]
