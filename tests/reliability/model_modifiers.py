"""The ways in which a model uses a piece: as it is, frozen, without a graph, computed twice, for some examples only."""

from __future__ import annotations

from typing import Any, Callable, Dict

import chainer_accum  # noqa: F401
import chainer
import chainer.functions as F
import numpy
from model_functions import as_differentiable
from model_pieces import FLOAT32, PIECES


class Modified(chainer.Chain):
    """A piece that a model uses in one of the ways in which programs use parts of theirs."""

    def __init__(self, name: str, modifier: str) -> None:
        super().__init__()
        self._modifier = "float32" if name in FLOAT32 else modifier
        with self.init_scope():
            with chainer.using_config("dtype", numpy.float32 if self._modifier == "float32" else chainer.config.dtype):
                self.piece = PIECES[name]()
        if modifier == "frozen":
            self.piece.disable_update()

    def forward(self, h: Any, ids: Any) -> chainer.Variable:
        return h + 0.5 * MODIFIERS[self._modifier](self.piece, h, ids)


def _plainly(piece: Any, h: Any, ids: Any) -> Any:
    return piece(h, ids)


def _without_graph(piece: Any, h: Any, ids: Any) -> Any:
    with chainer.no_backprop_mode():
        return piece(h, ids)


def _unchained(piece: Any, h: Any, ids: Any) -> Any:
    y = piece(h, ids)
    y.unchain_backward()
    return y


def _forgotten(piece: Any, h: Any, ids: Any) -> Any:
    return F.forget(lambda h: piece(h, ids), as_differentiable(h))


def _for_some_rows(piece: Any, h: Any, ids: Any) -> Any:
    rows = numpy.flatnonzero(ids[:, 0] % 2)
    if len(rows) == 0:
        return h
    return F.scatter_add(chainer.as_variable(h), rows, piece(h[rows], ids[rows]))


def _twice(piece: Any, h: Any, ids: Any) -> Any:
    return piece(piece(h, ids), ids)


def _in_float32(piece: Any, h: Any, ids: Any) -> Any:
    with chainer.using_config("dtype", numpy.float32):
        return F.cast(piece(F.cast(h, numpy.float32), ids), h.dtype)


MODIFIERS: Dict[str, Callable[..., Any]] = {
    "": _plainly,
    "frozen": _plainly,
    "without graph": _without_graph,
    "unchained": _unchained,
    "forgotten": _forgotten,
    "for some rows": _for_some_rows,
    "twice": _twice,
    "float32": _in_float32,
}
