"""The converted examples of a micro-batch, as arguments for the loss function."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

import chainer

from chainer_accum._arguments import call
from chainer_accum._devices import DeviceSpec


class Arguments:
    """Arguments for one forward pass, made by a converter.

    A converter may return a tuple of arguments, a dictionary of keyword arguments, or a single argument.

    Args:
        converter (callable): Converter function of an updater.
        examples: Examples, as the iterator returned them.
        device (device specifier): Device to which they are sent, or ``None``.

    Attributes:
        args (tuple): Positional arguments.
        kwargs (dict): Keyword arguments.

    """

    def __init__(self, converter: Callable[..., Any], examples: Any, device: Optional[DeviceSpec]) -> None:
        # Chainer has no public function that calls both kinds of converters.
        convert = chainer.dataset.convert._call_converter
        converted = call("converter", convert, converter, examples, device)
        self.args: Tuple[Any, ...] = converted if isinstance(converted, tuple) else ()
        self.kwargs: Dict[str, Any] = converted if isinstance(converted, dict) else {}
        if not isinstance(converted, (tuple, dict)):
            self.args = (converted,)

    def __len__(self) -> int:
        return len(self.args) + len(self.kwargs)

    def call(self, name: str, function: Callable[..., Any]) -> Any:
        """Calls a user's function with the arguments and returns its result. Error messages refer to it by ``name``."""
        return call(name, function, *self.args, **self.kwargs)
