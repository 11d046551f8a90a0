"""Batch normalization in a model, in each way that moves running averages and does not act upon what is learnt.

With micro-batches, what is normalized is normalized by the statistics of its micro-batch. So its output is not used;
but the running averages are to move as with the whole batch.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Tuple

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from model_shapes import IMAGE, WIDTH


class FrozenBatchNormalization(L.BatchNormalization):
    def forward(self, x: Any, **kwargs: Any) -> Any:
        with chainer.using_config("train", False):
            return super().forward(x, **kwargs)


class HalfBatchNormalization(L.BatchNormalization):
    def forward(self, x: Any, **kwargs: Any) -> Any:
        return super().forward(x[:, : WIDTH // 2], **kwargs)


class ListBatchNormalization(L.BatchNormalization):
    def forward(self, xs: Any, **kwargs: Any) -> Any:
        return super().forward(F.concat(xs, axis=0), **kwargs)


class Watcher(chainer.Chain):
    """Batch normalization whose running averages move and whose output is not used."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make, self._watch = WATCHERS[name]
        with self.init_scope():
            self.normalization = make()
        for key in ("mean", "var"):
            self.add_persistent(key, numpy.ones(WIDTH))

    def forward(self, h: Any) -> Any:
        return self._watch(self, h)


def _call(watcher: Any, h: Any) -> Any:
    watcher.normalization(h)
    return h


def _call_twice(watcher: Any, h: Any) -> Any:
    watcher.normalization(h)
    watcher.normalization(3 * h + 1)
    return h


def _call_forward(watcher: Any, h: Any) -> Any:
    watcher.normalization.forward(h)
    return h


def _call_to_finetune(watcher: Any, h: Any) -> Any:
    watcher.normalization(h, finetune=True)
    return h


def _call_with_images(watcher: Any, h: Any) -> Any:
    watcher.normalization(F.reshape(h, (len(h), *IMAGE)))
    return h


def _call_with_list(watcher: Any, h: Any) -> Any:
    watcher.normalization([h, h + 1])
    return h


def _call_without_graph(watcher: Any, h: Any) -> Any:
    with chainer.no_backprop_mode():
        watcher.normalization(h)
    return h


def _call_in_forget(watcher: Any, h: Any) -> chainer.Variable:
    return h + 0 * F.forget(watcher.normalization, chainer.as_variable(h))  # so that it is computed again


def _call_function(watcher: Any, h: Any) -> Any:
    ones = numpy.ones(WIDTH)
    F.batch_normalization(h, ones, ones, running_mean=watcher.mean, running_var=watcher.var, decay=0.7)
    return h


def _call_in_test_mode(watcher: Any, h: Any) -> Any:
    with chainer.using_config("train", False):
        watcher.normalization(h)
    return h


_normal = functools.partial(L.BatchNormalization, WIDTH)
# By name: the link, and what calls it.
WATCHERS: Dict[str, Tuple[Callable[[], chainer.Link], Callable[[Any, Any], Any]]] = {
    "a call": (_normal, _call),
    "a call, other decay, no beta": (functools.partial(_normal, decay=0.3, use_beta=False), _call),
    "a call, lazy": (functools.partial(L.BatchNormalization, axis=0), _call),
    "two calls": (_normal, _call_twice),
    "forward": (_normal, _call_forward),
    "finetune": (_normal, _call_to_finetune),
    "images": (functools.partial(L.BatchNormalization, IMAGE[0]), _call_with_images),
    "axis": (functools.partial(L.BatchNormalization, axis=(0, 2), size=(2, 4)), _call_with_images),
    "frozen": (functools.partial(FrozenBatchNormalization, WIDTH), _call),
    "half": (functools.partial(HalfBatchNormalization, WIDTH // 2), _call),
    "list": (functools.partial(ListBatchNormalization, WIDTH), _call_with_list),
    "without graph": (_normal, _call_without_graph),
    "in forget": (_normal, _call_in_forget),
    "function": (_normal, _call_function),
    "test mode": (_normal, _call_in_test_mode),
    "BatchRenormalization": (functools.partial(L.BatchRenormalization, WIDTH), _call),
}
