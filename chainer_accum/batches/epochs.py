"""The epoch attributes of an updater that reads several iterator batches per update."""

from __future__ import annotations

import contextlib
from typing import Optional, Tuple

import chainer


class EpochRecord:
    """Record of the epochs in the last update, since the iterator describes only its last batch.

    Before the first update, and after loading a snapshot of ``StandardUpdater``, the attributes of the iterator are
    used.

    """

    def __init__(self) -> None:
        # epoch_detail at the start of the last update, and whether an epoch ended in it.
        self._last: Optional[Tuple[Optional[float], bool]] = None

    def record(self, epoch_detail: Optional[float], is_new_epoch: bool) -> None:
        """Records an update.

        Args:
            epoch_detail (float): ``epoch_detail`` of the iterator at the start of the update, or ``None`` if it has
                none.
            is_new_epoch (bool): Whether an epoch ended in the update.

        """
        self._last = epoch_detail, is_new_epoch

    def previous_epoch_detail(self, iterator: chainer.dataset.Iterator) -> Optional[float]:
        """Returns ``epoch_detail`` before the last update, or ``None`` before the first."""
        return getattr(iterator, "previous_epoch_detail", None) if self._last is None else self._last[0]

    def is_new_epoch(self, iterator: chainer.dataset.Iterator) -> bool:
        """Returns whether an epoch ended in the last update."""
        return bool(iterator.is_new_epoch) if self._last is None else self._last[1]

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Serializes the record."""
        if not isinstance(serializer, chainer.Deserializer):
            if self._last is not None:
                epoch_detail, is_new_epoch = self._last
                serializer("previous_epoch_detail", -1.0 if epoch_detail is None else epoch_detail)
                serializer("is_new_epoch", is_new_epoch)
            return
        self._last = None
        with contextlib.suppress(KeyError):  # a snapshot of StandardUpdater, whose iterator knows both
            epoch_detail = serializer("previous_epoch_detail", -1.0)
            if epoch_detail >= 0:
                self._last = epoch_detail, serializer("is_new_epoch", False)
