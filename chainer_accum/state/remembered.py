"""Remembered: stores objects as they are, and restores them in place.

A snapshot is not enough. Chainer cannot load it into an object that has changed since, such as a parameter whose shape
was not known yet or an update rule that had no state, and it leaves out hyperparameters, the state of stateful links
and all random generators. So the attributes of an object are stored, and the content of the arrays, lists and
dictionaries among them. They are restored in place, because others refer to them. Only iterators are serialized,
because they own live resources: threads, processes and prefetched batches.
"""

from __future__ import annotations

import collections
import contextlib
import random
import sys
import sysconfig
import types
import weakref
from typing import Any, Callable, Dict, Iterator, List, Union

import chainer
import numpy
from chainer.backends import cuda
from chainer.serializers import DictionarySerializer, NpzDeserializer

from chainer_accum._devices import Array, device_of
from chainer_accum.state.recorded_arrays import RecordedArray
from chainer_accum.state.touched_links import Touches

# Classes of Chainer whose attributes change during training, besides iterators.
_PARTICIPANTS = (
    chainer.Optimizer,
    chainer.UpdateRule,
    chainer.optimizer.Hyperparameter,
    chainer.Link,
    chainer.LinkHook,  # a hook of one link, such as spectral normalization
    chainer.Initializer,  # may have its own random generator
)
_MAPPINGS = (dict, weakref.WeakKeyDictionary)
_CONTAINERS = (*_MAPPINGS, list, set, tuple, collections.deque)
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_Generator = Union[random.Random, numpy.random.RandomState, numpy.random.Generator]
_GENERATORS = (random.Random, numpy.random.RandomState, numpy.random.Generator)


class Remembered:
    """Stored objects, each with everything that training changes, as it was when the object was added.

    This covers the attributes of links, optimizers, update rules, hyperparameters, initializers and this package's
    objects. It also covers what these refer to, if that is an array, a variable, a container, a random generator, an
    iterator or again one of these; and the user's objects to which a link refers. Arrays are copied to host memory.

    """

    def __init__(self) -> None:
        self._put_back: List[Callable[[], None]] = []
        self._seen: Dict[int, object] = {}  # by id, which is unique while the object is referred to

    @property
    def links(self) -> List[chainer.Link]:
        """The links that were added or found, with all links below them."""
        return [value for value in self._seen.values() if isinstance(value, chainer.Link)]

    def add(self, value: object) -> None:
        """Stores an object.

        Raises:
            TypeError: If it refers to an iterator that cannot be serialized.

        """
        self._remember(value, is_owned=False)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Context manager for passes that adds further links, running averages and parameters before they change."""
        touches = Touches(self._seen, self.add, self.add, self.add)
        try:
            touches.begin()
            yield
        finally:
            try:
                touches.end()
            except BaseException:  # interrupted
                touches.end()
                raise

    def restore(self) -> None:
        """Restores everything. It can be called any number of times."""
        try:
            self._restore()
        except BaseException:  # interrupted; do not leave it half restored
            self._restore()
            raise

    def _restore(self) -> None:
        for put_back in self._put_back:
            put_back()

    def _remember(self, value: object, is_owned: bool) -> None:
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

    def _remember_object(self, value: object, is_owned: bool) -> None:
        self._seen[id(value)] = value
        self._remember_container(getattr(value, "__dict__", {}), is_owned)

    def _remember_variable(self, variable: chainer.Variable) -> None:
        self._seen[id(variable)] = variable
        if variable.layout is None:
            array = variable.array
            # This also updates shape and dtype of its node.
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

    def _remember_array(self, array: Array) -> None:
        self._seen[id(array)] = array
        if not getattr(array.flags, "writeable", True):
            return
        content = array.get() if isinstance(array, cuda.ndarray) else array.copy()

        def put_back() -> None:
            with device_of(array):
                array[...] = chainer.backend.get_array_module(array).asarray(content)

        self._put_back.append(put_back)

    def _remember_generator(self, generator: _Generator) -> None:
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
        # Chainer's default method does nothing.
        if serialize is None or getattr(serialize, "__func__", None) is chainer.dataset.Iterator.serialize:
            if is_owned:
                return
            raise TypeError(
                f"iterator must be serializable to be restored, got {type(iterator).__name__}; give it a method "
                "serialize, like that of chainer.iterators.SerialIterator"
            )
        self._seen[id(iterator)] = iterator
        serializer = DictionarySerializer()
        serialize(serializer)
        content = {
            key: numpy.array(value) for key, value in serializer.target.items()
        }  # a copy, since arrays may be shared
        self._put_back.append(lambda: serialize(NpzDeserializer(content)))
        # Any callable may be an order sampler, so it has no class by which to recognize it.
        self._remember_container(getattr(getattr(iterator, "order_sampler", None), "__dict__", {}), is_owned)


def _is_of_the_user(value: object) -> bool:
    """Returns whether a value is an object with attributes whose class is not defined by a library.

    Objects of libraries may own live resources, such as a thread, a logger or an open file.

    """
    if isinstance(value, types.SimpleNamespace):
        return True
    module = type(value).__module__
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    is_of_library = module in sys.builtin_module_names or path.startswith(_LIBRARIES)
    is_of_library = is_of_library or _library_of(value) in ("chainer", "chainermn", "cupy", "numpy")
    return isinstance(getattr(value, "__dict__", None), dict) and not is_of_library


def _library_of(value: object) -> str:
    return type(value).__module__.split(".")[0]
