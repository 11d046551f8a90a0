"""All that training changes, to go back to.

A snapshot is not enough for that. Chainer cannot load one into what has become something else since, such as a
parameter whose shape was not known yet or an update rule that had no state, and it leaves out hyperparameters, what a
stateful link remembers and every random generator. So the objects that take part in training are remembered as they
are: which attributes they have, and what is in the arrays, lists and dictionaries among these. They are put back in
place, since others hold references to them. Only iterators are serialized, because part of them is alive: threads,
processes and batches that were read ahead.
"""

from __future__ import annotations

import random
from typing import Any, Callable, Dict, List

import chainer
import numpy
from chainer.backends import cuda
from chainer.dataset import Iterator
from chainer.serializers import DictionarySerializer, NpzDeserializer

from chainer_accum._devices import device_of
from chainer_accum.gradient_sums import GradientSums
from chainer_accum.random_state import RandomState, devices_of
from chainer_accum.window import Window

# What takes part in training, besides iterators, and keeps in its attributes what changes.
_PARTICIPANTS = (
    chainer.Optimizer,
    chainer.UpdateRule,
    chainer.optimizer.Hyperparameter,
    chainer.Link,
    chainer.Parameter,
    chainer.Initializer,  # may draw from a generator of its own
    Window,  # may be under way
    GradientSums,
)


class TrainingState:
    """Where a training is: all that its next updates will change.

    That is: the updater, its optimizers with their update rules and hyperparameters, their models with parameters,
    persistent values and other attributes, the positions of its iterators, and the random generators: those of Python,
    NumPy and CuPy, see :class:`~chainer_accum.random_state.RandomState`, and those that are attributes of an order
    sampler, an initializer or a link.

    Arrays are copied to host memory. Datasets, converters and hooks are left alone, and so is whatever else is not one
    of Chainer's kinds of objects.

    Args:
        updater (~chainer.training.Updater): Updater that trains.

    Raises:
        TypeError: If an iterator cannot be serialized.

    """

    def __init__(self, updater: Any) -> None:
        self._put_back: List[Callable[[], None]] = []
        self._seen: Dict[int, Any] = {}  # by identity, which is unique for as long as an object is referred to
        optimizers = updater.get_all_optimizers().values()
        for root in (updater, *optimizers):  # not all of which are of Chainer's classes: an optimizer may be wrapped
            self._remember_container(vars(root))
        self._random_state = RandomState(devices_of(optimizer.target for optimizer in optimizers))

    def restore(self) -> None:
        """Puts everything back. It can be called any number of times."""
        for put_back in self._put_back:
            put_back()
        self._random_state.restore()

    def _remember(self, value: Any) -> None:
        if isinstance(value, _PARTICIPANTS):
            self._remember_container(vars(value))
        elif isinstance(value, (dict, list, set, tuple)):
            self._remember_container(value)
        elif isinstance(value, (numpy.ndarray, cuda.ndarray)):
            self._remember_array(value)
        elif isinstance(value, (random.Random, numpy.random.RandomState, numpy.random.Generator)):
            self._remember_generator(value)
        elif callable(getattr(value, "next", None)):
            self._remember_iterator(value)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    def _remember_container(self, container: Any) -> None:
        if not self._is_new(container):
            return
        if not isinstance(container, tuple):
            content = container.copy()

            def put_back() -> None:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)

            self._put_back.append(put_back)
        for value in container.values() if isinstance(container, dict) else container:
            self._remember(value)

    def _remember_array(self, array: Any) -> None:
        if not self._is_new(array) or not getattr(array.flags, "writeable", True):
            return
        content = array.get() if isinstance(array, cuda.ndarray) else array.copy()

        def put_back() -> None:
            with device_of(array):
                array[...] = chainer.backend.get_array_module(array).asarray(content)

        self._put_back.append(put_back)

    def _remember_generator(self, generator: Any) -> None:
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

    def _remember_iterator(self, iterator: Any) -> None:
        serialize = getattr(iterator, "serialize", None)
        if serialize is None or getattr(serialize, "__func__", None) is Iterator.serialize:  # which does nothing
            raise TypeError(
                f"iterator must be serializable to be put back, got {type(iterator).__name__}; give it a method "
                "serialize, as chainer.iterators.SerialIterator has"
            )
        serializer = DictionarySerializer()
        serialize(serializer)
        content = {key: numpy.array(value) for key, value in serializer.target.items()}  # which may be shared
        self._put_back.append(lambda: serialize(NpzDeserializer(content)))
        # Anything that can be called will do as an order sampler, so there is no class to tell it by.
        self._remember_container(getattr(getattr(iterator, "order_sampler", None), "__dict__", {}))
