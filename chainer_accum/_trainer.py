"""Whether a Trainer finalizes its updater because training has failed."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Callable, Optional, Tuple, Union

from chainer.training import Trainer

# What Chainer takes as a trigger, where None is never.
Trigger = Union[Tuple[float, str], Callable[[Trainer], bool], None]


def is_trainer_failing() -> bool:
    """Returns whether the exception being handled was raised by the Trainer that is running now.

    It may instead be an unrelated exception, during whose handling the Trainer was started.

    """
    running = set()
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    error = sys.exc_info()[1]
    traceback = None if error is None else error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is Trainer.run.__code__ and traceback.tb_frame in running:
            return True
        traceback = traceback.tb_next
    return False
