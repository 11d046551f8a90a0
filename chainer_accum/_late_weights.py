"""LateWeights: a weight function that asks the model, and so is called after the forward pass."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

from chainer_accum._arguments import call, check_callable, check_weight, takes
from chainer_accum.batches import WeightFunc, count_examples
from chainer_accum.state import links_behind


def check_weight_func(weight_func: Any) -> None:
    """Raises TypeError unless a weight function is ``None``, or can be called with the examples or with nothing."""
    if weight_func is None:
        return
    check_callable("weight_func", weight_func)
    if not takes(weight_func, None) and not takes(weight_func):
        raise TypeError(
            f"weight_func must take one list of examples, or nothing, got {weight_func!r}; write lambda examples: ..., "
            "or, if the model knows the weight after its forward pass, lambda: ..."
        )


def is_late(weight_func: Optional[Callable[..., Any]]) -> bool:
    """Returns whether a weight function must be called after the pass: it takes no argument or refers to a link."""
    return weight_func is not None and (not takes(weight_func, None) or bool(links_behind(weight_func)))


class LateWeights:
    """When an updater calls its weight function.

    It remembers the answer for the last function, since looking for links may take time.

    """

    def __init__(self) -> None:
        self._known: Tuple[Optional[Callable[..., Any]], bool] = (None, False)

    def early(self, weight_func: Optional[WeightFunc]) -> Optional[WeightFunc]:
        """Returns a function that weighs a micro-batch before its pass, or ``None`` to count the examples.

        If the weight becomes known later, it stands for the examples, which tell how much of the window is left.

        """
        return _count_or_one if self._is_late(weight_func) else weight_func

    def late(
        self, weight_func: Optional[Callable[..., Any]], loss_func: Callable[[], Any], examples: Any
    ) -> Callable[[], Any]:
        """Returns the loss function of a micro-batch, which returns the weight as well if that becomes known late."""
        if weight_func is None or not self._is_late(weight_func):
            return loss_func
        args = (examples,) if takes(weight_func, None) else ()
        return _WithWeight(loss_func, weight_func, args)

    def _is_late(self, weight_func: Optional[Callable[..., Any]]) -> bool:
        if weight_func is not self._known[0]:
            self._known = weight_func, is_late(weight_func)
        return self._known[1]


class _WithWeight:
    """Loss function that asks for its weight when it has run, unless it returns weights itself."""

    def __init__(self, loss_func: Callable[[], Any], weight_func: Callable[..., Any], args: Tuple[Any, ...]) -> None:
        self._loss_func = loss_func
        self._weight_func = weight_func
        self._args = args

    def __call__(self) -> Any:
        returned = self._loss_func()
        if isinstance(returned, (tuple, list)):
            return returned
        return returned, check_weight(call("weight_func", self._weight_func, *self._args), "the value of weight_func")


def _count_or_one(examples: Any) -> float:
    return float(count_examples(examples) or 1)
