"""Objects that are remembered as they are, to be put back in place.

A snapshot is not enough for that. Chainer cannot load one into what has become something else since, such as a
parameter whose shape was not known yet or an update rule that had no state, and it leaves out hyperparameters, what a
stateful link remembers and every random generator. So it is remembered which attributes an object has, and what is in
the arrays, lists and dictionaries among these. They are put back in place, since others hold references to them. Only
iterators are serialized, because part of them is alive: threads, processes and batches that were read ahead.
"""

from __future__ import annotations

import collections
import contextlib
import random
import sys
import sysconfig
import types
import weakref
from typing import Any, Callable, Dict, Iterator, List

import chainer
import numpy
from chainer.backends import cuda
from chainer.serializers import DictionarySerializer, NpzDeserializer

from chainer_accum._devices import device_of
from chainer_accum.recorded_arrays import RecordedArray
from chainer_accum.touched_links import Touches

# What of Chainer takes part in training, besides iterators, and keeps in its attributes what changes.
_PARTICIPANTS = (
    chainer.Optimizer,
    chainer.UpdateRule,
    chainer.optimizer.Hyperparameter,
    chainer.Link,
    chainer.LinkHook,  # a link's own, such as spectral normalization
    chainer.Initializer,  # may draw from a generator of its own
)
_MAPPINGS = (dict, weakref.WeakKeyDictionary)
_CONTAINERS = (*_MAPPINGS, list, set, tuple, collections.deque)
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_GENERATORS = (random.Random, numpy.random.RandomState, numpy.random.Generator)


class Remembered:
    """Objects with all that training changes about them, each as it was when it was added.

    That is: attributes of links, optimizers, update rules, hyperparameters and initializers, and of this package's
    objects; what these refer to, if it is an array, a variable, a container, a random generator, an iterator or again
    one of these; and what a link refers to, if it is an object of the user's. Arrays are copied to host memory.

    """

    def __init__(self) -> None:
        self._put_back: List[Callable[[], None]] = []
        self._seen: Dict[int, Any] = {}  # by identity, which is unique for as long as an object is referred to

    @property
    def links(self) -> List[chainer.Link]:
        """The links that were added, with those below them and those that turned up."""
        return [value for value in self._seen.values() if isinstance(value, chainer.Link)]

    def add(self, value: Any) -> None:
        """Remembers an object.

        Raises:
            TypeError: If it refers to an iterator that cannot be serialized.

        """
        self._remember(value, is_owned=False)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Context manager for passes, in which links, running averages and parameters are added as they turn up."""
        touches = Touches(self._seen, self.add, self.add, self.add)
        try:
            touches.begin()
            yield
        finally:
            try:
                touches.end()
            except BaseException:  # an interrupt
                touches.end()
                raise

    def restore(self) -> None:
        """Puts everything back. It can be called any number of times."""
        try:
            self._restore()
        except BaseException:  # an interrupt, which is not to leave half of it
            self._restore()
            raise

    def _restore(self) -> None:
        for put_back in self._put_back:
            put_back()

    def _remember(self, value: Any, is_owned: bool) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, chainer.Variable):
            self._remember_variable(value)
        elif isinstance(value, _CONTAINERS):
            self._remember_container(value, is_owned)
        elif isinstance(value, (numpy.ndarray, cuda.ndarray)):
            self._remember_array(value)
        elif isinstance(value, _PARTICIPANTS) or _library_of(value) == "chainer_accum":
            self._remember_object(value, is_owned or isinstance(value, chainer.Link))
        elif isinstance(value, _GENERATORS):
            self._remember_generator(value)
        elif callable(getattr(value, "next", None)):
            self._remember_iterator(value, is_owned)
        elif is_owned and _is_of_the_user(value):
            self._remember_object(value, is_owned)

    def _remember_object(self, value: Any, is_owned: bool) -> None:
        self._seen[id(value)] = value
        self._remember_container(getattr(value, "__dict__", {}), is_owned)

    def _remember_variable(self, variable: chainer.Variable) -> None:
        self._seen[id(variable)] = variable
        if variable.layout is None:
            array = variable.array
            # Its node is told of shape and dtype this way.
            self._put_back.append(lambda: setattr(variable, "array", array))
        self._remember_container(vars(variable), is_owned=True)

    def _remember_container(self, container: Any, is_owned: bool) -> None:
        self._seen[id(container)] = container
        content: Any = container if isinstance(container, tuple) else container.copy()
        if isinstance(container, _MAPPINGS):
            for name, value in content.items():
                if isinstance(value, RecordedArray) and value.recording is not None:
                    content[name] = value.recording.plain(value)
        if not isinstance(container, tuple):

            def put_back() -> None:
                container.clear()
                (container.update if isinstance(container, (*_MAPPINGS, set)) else container.extend)(content)

            self._put_back.append(put_back)
        for value in content.values() if isinstance(container, _MAPPINGS) else content:
            self._remember(value, is_owned)

    def _remember_array(self, array: Any) -> None:
        self._seen[id(array)] = array
        if not getattr(array.flags, "writeable", True):
            return
        content = array.get() if isinstance(array, cuda.ndarray) else array.copy()

        def put_back() -> None:
            with device_of(array):
                array[...] = chainer.backend.get_array_module(array).asarray(content)

        self._put_back.append(put_back)

    def _remember_generator(self, generator: Any) -> None:
        self._seen[id(generator)] = generator
        if isinstance(generator, random.Random):
            python_state = generator.getstate()
            self._put_back.append(lambda: generator.setstate(python_state))
        elif isinstance(generator, numpy.random.RandomState):
            numpy_state = generator.get_state(legacy=False)
            self._put_back.append(lambda: generator.set_state(numpy_state))
        else:
            bits = generator.bit_generator
            bits_state = bits.state
            self._put_back.append(lambda: setattr(bits, "state", bits_state))

    def _remember_iterator(self, iterator: Any, is_owned: bool) -> None:
        serialize = getattr(iterator, "serialize", None)
        # Chainer's own does nothing.
        if serialize is None or getattr(serialize, "__func__", None) is chainer.dataset.Iterator.serialize:
            if is_owned:
                return
            raise TypeError(
                f"iterator must be serializable to be put back, got {type(iterator).__name__}; give it a method "
                "serialize, as chainer.iterators.SerialIterator has"
            )
        self._seen[id(iterator)] = iterator
        serializer = DictionarySerializer()
        serialize(serializer)
        content = {key: numpy.array(value) for key, value in serializer.target.items()}  # which may be shared
        self._put_back.append(lambda: serialize(NpzDeserializer(content)))
        # Anything that can be called will do as an order sampler, so there is no class to tell it by.
        self._remember_container(getattr(getattr(iterator, "order_sampler", None), "__dict__", {}), is_owned)


def _is_of_the_user(value: Any) -> bool:
    """Returns whether a value is an object with attributes, of a class that no library defines.

    What a library keeps may be alive, such as a thread, a logger or what writes to a file.

    """
    if isinstance(value, types.SimpleNamespace):
        return True
    module = type(value).__module__
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    is_of_library = module in sys.builtin_module_names or path.startswith(_LIBRARIES)
    is_of_library = is_of_library or _library_of(value) in ("chainer", "chainermn", "cupy", "numpy")
    return isinstance(getattr(value, "__dict__", None), dict) and not is_of_library


def _library_of(value: Any) -> str:
    return type(value).__module__.split(".")[0]
