"""Touches: detects which links, arrays and parameters passes are about to change.

A loss function may access links in any way, so the links that it uses cannot be determined in advance. But Chainer
notifies its hooks of each link that is called and of each function that is applied, early enough to store an object
before it changes. Only one kind of change goes unnoticed: what a loss function does to a link before its first call,
such as resetting its state. For that, :func:`links_behind` finds the links to which the loss function refers directly.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, Callable, Container, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import chainer

from chainer_accum._devices import Array


class Touches:
    """Passes objects that passes are about to change, and that are not known yet, to a callback.

    Args:
        known: Ids of the known objects. The callback must add new ones, and may be called with known ones.
        add (callable): Called with an object before it changes.
        links (bool): Whether to watch links, which are found before their forward pass.
        functions (bool): Whether to watch functions as well, to find a running average before it moves.
        parameters (bool): Whether to find a parameter before a backward pass sets its gradient.

    """

    def __init__(
        self,
        known: Container[int],
        add: Callable[[object], None],
        links: bool = True,
        functions: bool = True,
        parameters: bool = False,
    ) -> None:
        self._hooks: List[Union[chainer.LinkHook, chainer.FunctionHook]] = []
        if links:
            self._hooks.append(_LinkHook(known, add))
        if links and functions:
            self._hooks.append(_FunctionHook(known, add))
        if parameters:
            self._hooks.append(_GradientHook(known, add))
        self._tables: List[Tuple[Dict[str, Any], str]] = []

    def begin(self) -> None:
        """Starts to watch. Call :meth:`end` before calling it again."""
        for hook in self._hooks:
            is_of_links = isinstance(hook, chainer.LinkHook)
            # The hook is added here and not with its own ``with``, which may be interrupted right after it is entered.
            table: Dict[str, Any] = chainer._get_link_hooks() if is_of_links else chainer.get_function_hooks()
            name = f"chainer_accum.{type(hook).__name__} {id(hook)}"  # several may be active
            self._tables.append((table, name))
            table[name] = hook

    def end(self) -> None:
        """Stops, if started. If interrupted, it can be called again."""
        for table, name in self._tables:
            table.pop(name, None)
        self._tables.clear()


class _Watch:
    """What the hooks have in common."""

    def __init__(self, known: Container[int], add: Callable[[object], None]) -> None:
        self._known = known
        self._add = add


class _LinkHook(_Watch, chainer.LinkHook):
    def forward_preprocess(self, args: Any) -> None:
        if id(args.link) not in self._known:
            for link in _with_those_that_run(args.link):
                self._add(link)


class _FunctionHook(_Watch, chainer.FunctionHook):
    def forward_preprocess(self, function: chainer.FunctionNode, in_data: Tuple[Array, ...]) -> None:
        if isinstance(function, chainer.FunctionAdapter):
            function = function.function
        kind: type = type(function)
        if not _may_move_arrays(kind):
            return
        names = [name for name in vars(function) if _is_moving(name)]
        for array in [getattr(function, name) for name in names]:
            if isinstance(array, chainer.get_array_types()) and id(array) not in self._known:
                for link in _with_those_that_run():
                    self._add(link)
                self._add(array)


class _GradientHook(_Watch, chainer.FunctionHook):
    def backward_preprocess(
        self, function: chainer.FunctionNode, in_data: Tuple[Array, ...], out_grad: Tuple[Optional[Array], ...]
    ) -> None:
        for node in function.inputs:
            if node.creator_node is None:
                variable = node.get_variable_or_none()
                if isinstance(variable, chainer.Parameter) and id(variable) not in self._known:
                    self._add(variable)


@functools.lru_cache(maxsize=None)
def _may_move_arrays(kind: type) -> bool:
    """Returns whether functions of a class may keep running averages: Chainer's own, and others with similar names."""
    methods = [each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, types.FunctionType)]
    return any(_is_moving(name) for method in methods for name in method.__code__.co_names)


def _is_moving(name: str) -> bool:
    return any(part in name for part in ("running", "moving", "avg"))


def _with_those_that_run(link: Optional[chainer.Link] = None) -> Iterator[chainer.Link]:
    """Yields a link, the links of which a method is running, and all links below them.

    Chainer does not notify hooks of methods that are called directly, such as ``lstm.forward(x)``.

    """
    running = [] if link is None else [link]
    frame: Optional[types.FrameType] = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, chainer.Link):
            running.append(owner)
        frame = frame.f_back
    for each in running:
        yield from each.links()


def links_behind(*things: object) -> List[chainer.Link]:
    """Returns the links to which models, loss functions and similar objects refer, and all links below them."""
    links: Dict[int, chainer.Link] = {}
    seen: Dict[int, object] = {}
    queue = list(things)
    while queue:
        thing = queue.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            if isinstance(thing, chainer.Link):
                links.update((id(link), link) for link in thing.links())
            queue.extend(_referred(thing))
    return list(links.values())


def _referred(thing: object) -> Iterable[object]:
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, (list, tuple, set)):
        return thing
    if isinstance(thing, functools.partial):
        return thing.func, thing.args, thing.keywords
    if isinstance(thing, types.MethodType):
        return thing.__self__, thing.__func__
    library = type(thing).__module__.split(".")[0]
    if isinstance(thing, (chainer.dataset.Iterator, chainer.dataset.DatasetMixin)):
        return ()  # may contain millions of objects
    if isinstance(thing, types.FunctionType):
        if (thing.__module__ or "").split(".")[0] == "chainer":
            return ()
        return [*captured_by(thing), thing.__defaults__, thing.__kwdefaults__]
    if isinstance(thing, chainer.Link) or library not in ("chainer", "numpy", "cupy", "builtins"):
        return getattr(thing, "__dict__", {}).values()
    return ()


def captured_by(function: types.FunctionType) -> List[object]:
    """Returns what a function finds when it is called: the contents of its closure, and the globals that it names."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    return [*cells, *[function.__globals__.get(name) for name in _names_in(function.__code__)]]


def _names_in(code: types.CodeType) -> List[str]:
    """Returns the names of globals and attributes in a function and in the functions defined inside it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names
