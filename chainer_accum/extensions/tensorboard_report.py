"""TensorBoardReport: a Trainer extension that writes observed values for TensorBoard."""

from __future__ import annotations

import os
from typing import Any, Optional, Sequence

from chainer.training import Trainer, extension

from chainer_accum._trainer import Trigger
from chainer_accum.observations import dtype_of, is_scalar, value_and_weight


class TensorBoardReport(extension.Extension):
    """Trainer extension that writes observed scalars to TensorBoard event files.

    The step of a value is the number of updates, so that runs with and without accumulation can be compared in one
    plot. The files are written by tensorboardX, which is installed with this package's extra ``tensorboard``.

    Args:
        log_dir (str): Folder of the event files. By default, ``tensorboard`` in the Trainer's output folder.
        keys (sequence of str): Keys of the values to write, such as ``'main/loss'``. By default, all real scalars.
        trigger: Trigger that decides when to write. By default, after each update.

    Raises:
        ImportError: If tensorboardX is not installed.
        TypeError: If ``keys`` is a string.

    """

    default_name = "tensorboard_report"
    priority = extension.PRIORITY_READER

    def __init__(
        self, log_dir: Optional[str] = None, keys: Optional[Sequence[str]] = None, trigger: Trigger = (1, "iteration")
    ) -> None:
        if isinstance(keys, str):
            raise TypeError(f"keys must be a sequence of str, got {keys!r}; pass a list: [{keys!r}]")
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardReport needs tensorboardX; install it with: pip install 'tensorboardX>=2.6'"
            ) from error
        self._writer_class = SummaryWriter
        self._log_dir = log_dir
        self._keys = keys
        self.trigger = trigger
        self._writer: Optional[Any] = None

    def initialize(self, trainer: Trainer) -> None:
        """Opens a new event file. In a resumed run, it continues from the update at which the snapshot was taken."""
        log_dir = os.path.join(trainer.out, "tensorboard") if self._log_dir is None else self._log_dir
        self._writer = self._writer_class(log_dir, purge_step=trainer.updater.iteration + 1)

    def __call__(self, trainer: Trainer) -> None:
        """Writes the observed scalars."""
        assert self._writer is not None, "initialize comes first"
        for key, reported in trainer.observation.items():
            if self._keys is not None and key not in self._keys:
                continue
            value, _ = value_and_weight(reported)
            if is_scalar(value) and dtype_of(value).kind != "c":
                self._writer.add_scalar(key, float(value), trainer.updater.iteration)

    def finalize(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
