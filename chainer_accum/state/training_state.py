"""TrainingState: stores everything that training changes, and restores it in place.

A snapshot is not enough. Chainer cannot load it into an object that has changed since, such as a parameter whose shape
was not known yet or an update rule that had no state, and it leaves out hyperparameters, the state of stateful links
and all random generators. So the attributes of an object are stored, and the content of the arrays, lists and
dictionaries among them. They are restored in place, because others refer to them. Only iterators are serialized,
because they own live resources: threads, processes and prefetched batches.
"""

from __future__ import annotations

import collections
import random
import sys
import sysconfig
import types
import weakref
from typing import Any, Optional, Union

import chainer
import numpy
from chainer.backends import cuda
from chainer.serializers import DictionarySerializer, NpzDeserializer
from chainer.training.updaters import StandardUpdater

from chainer_accum.state.random_state import RandomState, devices_of
from chainer_accum.state.recorded_arrays import RecordedArray
from chainer_accum.state.stored import Stored
from chainer_accum.state.touched_links import links_behind

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


class TrainingState(Stored):
    """Stored state of a training: everything that its next updates will change.

    This covers the updater, its optimizers with their update rules and hyperparameters, their models with parameters,
    persistent values and other attributes, the positions of its iterators, and the random generators. The latter are
    the global ones, see :class:`~chainer_accum.state.RandomState`, and those that are attributes of an order sampler,
    an initializer or a link. Inside :meth:`following`, other links that a loss function uses are covered as well.

    Other objects can be added, each with its attributes and what these refer to, if that is an array, a variable, a
    container, a random generator, an iterator, or an object of Chainer, of this package or, below a link, of the user.

    Arrays are copied to host memory. Datasets, converters and optimizer hooks are not restored, and neither is any
    other object that is not of Chainer's kinds, unless it belongs to a link.

    Args:
        updater (~chainer.training.Updater): Updater that trains, or ``None`` to store only what is added.

    Raises:
        TypeError: If an iterator cannot be serialized.

    """

    _looks_for_parameters = True
    _is_on_host = True

    def __init__(self, updater: Optional[StandardUpdater] = None) -> None:
        super().__init__()
        if updater is None:
            return
        optimizers = updater.get_all_optimizers().values()
        for root in (updater, *optimizers):  # not all are of Chainer's classes: an optimizer may be wrapped
            self.add(vars(root))
        for link in links_behind(vars(updater)):
            self.add(link)
        self.add(RandomState(devices_of(optimizer.target for optimizer in optimizers)))

    def _store(self, value: object, is_owned: bool = False) -> None:
        if id(value) in self._known:
            return
        if isinstance(value, chainer.Variable):
            self._store_variable(value)
        elif isinstance(value, _CONTAINERS):
            self._store_container(value, is_owned)
        elif isinstance(value, (numpy.ndarray, cuda.ndarray)):
            self._store_array(value)
        elif isinstance(value, _PARTICIPANTS) or _library_of(value) == "chainer_accum":
            self._store_object(value, is_owned or isinstance(value, chainer.Link))
        elif isinstance(value, _GENERATORS):
            self._store_generator(value)
        elif callable(getattr(value, "next", None)):
            self._store_iterator(value, is_owned)
        elif is_owned and _is_of_the_user(value):
            self._store_object(value, is_owned)

    def _store_object(self, value: object, is_owned: bool) -> None:
        self._known[id(value)] = value
        self._store_container(getattr(value, "__dict__", {}), is_owned)

    def _store_variable(self, variable: chainer.Variable) -> None:
        self._known[id(variable)] = variable
        if variable.layout is None:
            array = variable.array
            # This also updates shape and dtype of its node.
            self._undo.append(lambda: setattr(variable, "array", array))
        self._store_container(vars(variable), is_owned=True)

    def _store_container(self, container: Any, is_owned: bool) -> None:
        self._known[id(container)] = container
        content: Any = container if isinstance(container, tuple) else container.copy()
        if isinstance(container, _MAPPINGS):
            for name, value in content.items():
                if isinstance(value, RecordedArray) and value.recording is not None:
                    content[name] = value.recording.plain(value)
        if not isinstance(container, tuple):

            def put_back() -> None:
                container.clear()
                (container.update if isinstance(container, (*_MAPPINGS, set)) else container.extend)(content)

            self._undo.append(put_back)
        for value in content.values() if isinstance(container, _MAPPINGS) else content:
            self._store(value, is_owned)

    def _store_generator(self, generator: _Generator) -> None:
        self._known[id(generator)] = generator
        if isinstance(generator, random.Random):
            python_state = generator.getstate()
            self._undo.append(lambda: generator.setstate(python_state))
        elif isinstance(generator, numpy.random.RandomState):
            numpy_state = generator.get_state(legacy=False)
            self._undo.append(lambda: generator.set_state(numpy_state))
        else:
            bits = generator.bit_generator
            bits_state = bits.state
            self._undo.append(lambda: setattr(bits, "state", bits_state))

    def _store_iterator(self, iterator: Any, is_owned: bool) -> None:
        serialize = getattr(iterator, "serialize", None)
        # Chainer's default method does nothing.
        if serialize is None or getattr(serialize, "__func__", None) is chainer.dataset.Iterator.serialize:
            if is_owned:
                return
            raise TypeError(
                f"iterator must be serializable to be restored, got {type(iterator).__name__}; give it a method "
                "serialize, like that of chainer.iterators.SerialIterator"
            )
        self._known[id(iterator)] = iterator
        serializer = DictionarySerializer()
        serialize(serializer)
        content = {
            key: numpy.array(value) for key, value in serializer.target.items()
        }  # a copy, since arrays may be shared
        self._undo.append(lambda: serialize(NpzDeserializer(content)))
        # Any callable may be an order sampler, so it has no class by which to recognize it.
        self._store_container(getattr(getattr(iterator, "order_sampler", None), "__dict__", {}), is_owned)


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
