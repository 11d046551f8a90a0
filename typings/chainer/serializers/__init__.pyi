from typing import Any, Mapping

from chainer.serializer import Deserializer, Serializer

class DictionarySerializer(Serializer):
    target: dict[str, Any]

class NpzDeserializer(Deserializer):
    def __init__(self, npz: Mapping[str, Any], path: str = ..., strict: bool = ...) -> None: ...
