from typing import Any

from chainer.link import Link

class _ForwardPreprocessCallbackArgs:
    link: Link
    forward_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

class LinkHook:
    name: str
    def forward_preprocess(self, args: _ForwardPreprocessCallbackArgs) -> None: ...
