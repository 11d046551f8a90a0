"""What passes are about to change, found while they run.

A loss function may reach a link by any way there is, so it cannot be seen beforehand which links it will use. But
Chainer tells its hooks of each link that is called and of each function that is applied, in time to remember a thing
before it is changed. Only what a loss function does to a link before it calls it for the first time goes unseen, such
as to reset its state; for that, there are the links to which it refers in a plain way.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, Callable, Container, Dict, Iterable, Iterator, List, Optional, Tuple

import chainer


class Touches:
    """Tells of what passes are about to change that is not known yet.

    Args:
        known: Ids of the links, arrays and parameters that are known. What is told of is to be added to them.
        on_link (callable): Called with a link before its forward pass runs, if it is given.
        on_array (callable): Called with a running average before a function moves it, if it is given.
        on_parameter (callable): Called with a parameter before a backward pass sets its gradient, if it is given.

    """

    def __init__(
        self,
        known: Container[int],
        on_link: Optional[Callable[[chainer.Link], None]],
        on_array: Optional[Callable[[Any], None]] = None,
        on_parameter: Optional[Callable[[chainer.Parameter], None]] = None,
    ) -> None:
        hooks: List[Any] = []
        if on_link is not None:
            hooks.append(_LinkHook(known, on_link))
        if on_link is not None and on_array is not None:
            hooks.append(_FunctionHook(known, on_link, on_array))
        if on_parameter is not None:
            hooks.append(_GradientHook(known, on_parameter))
        self._hooks = hooks
        self._tables: List[Tuple[Dict[str, Any], str]] = []

    def begin(self) -> None:
        """Begins to tell. It is not to be called again before :meth:`end`."""
        for hook in self._hooks:
            is_of_links = isinstance(hook, chainer.LinkHook)
            # A hook is entered here and not by its own ``with``, which may be interrupted as soon as it is in.
            table = chainer._get_link_hooks() if is_of_links else chainer.get_function_hooks()
            name = f"chainer_accum.{type(hook).__name__} {id(hook)}"  # others may be active
            self._tables.append((table, name))
            table[name] = hook

    def end(self) -> None:
        """Ends it, if it has begun. If that is interrupted, it can be called again."""
        for table, name in self._tables:
            table.pop(name, None)
        self._tables.clear()


class _LinkHook(chainer.LinkHook):
    def __init__(self, known: Container[int], on_link: Callable[[chainer.Link], None]) -> None:
        self._known = known
        self._on_link = on_link

    def forward_preprocess(self, args: Any) -> None:
        if id(args.link) not in self._known:
            for link in _with_those_that_run(args.link):
                if id(link) not in self._known:
                    self._on_link(link)


class _FunctionHook(chainer.FunctionHook):
    def __init__(
        self, known: Container[int], on_link: Callable[[chainer.Link], None], on_array: Callable[[Any], None]
    ) -> None:
        self._known = known
        self._on_link = on_link
        self._on_array = on_array

    def forward_preprocess(self, function: Any, in_data: Any) -> None:
        if isinstance(function, chainer.FunctionAdapter):
            function = function.function
        kind: Any = type(function)
        if not _may_move_arrays(kind):
            return
        names = [name for name in vars(function) if _is_moving(name)]
        for array in [getattr(function, name) for name in names]:
            if isinstance(array, chainer.get_array_types()) and id(array) not in self._known:
                for link in _with_those_that_run():
                    if id(link) not in self._known:
                        self._on_link(link)
                if id(array) not in self._known:
                    self._on_array(array)


class _GradientHook(chainer.FunctionHook):
    def __init__(self, known: Container[int], on_parameter: Callable[[chainer.Parameter], None]) -> None:
        self._known = known
        self._on_parameter = on_parameter

    def backward_preprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
        for node in function.inputs:
            if node.creator_node is None:
                variable = node.get_variable_or_none()
                if isinstance(variable, chainer.Parameter) and id(variable) not in self._known:
                    self._on_parameter(variable)


@functools.lru_cache(maxsize=None)
def _may_move_arrays(kind: type) -> bool:
    """Returns whether functions of a class may keep running averages, Chainer's or those made after these."""
    methods = [each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, types.FunctionType)]
    return any(_is_moving(name) for method in methods for name in method.__code__.co_names)


def _is_moving(name: str) -> bool:
    return any(part in name for part in ("running", "moving", "avg"))


def _with_those_that_run(link: Optional[chainer.Link] = None) -> Iterator[chainer.Link]:
    """Returns an iterator over a link and those of which a method runs, with all below them.

    Of a method that is called by itself, as ``lstm.forward(x)``, Chainer tells nobody.

    """
    running = [] if link is None else [link]
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, chainer.Link):
            running.append(owner)
        frame = frame.f_back
    for each in running:
        yield from each.links()


def links_behind(*things: Any) -> List[chainer.Link]:
    """Returns the links to which models, loss functions and the like refer, with all below them."""
    links: Dict[int, chainer.Link] = {}
    seen: Dict[int, Any] = {}
    queue = list(things)
    while queue:
        thing = queue.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            if isinstance(thing, chainer.Link):
                links.update((id(link), link) for link in thing.links())
            queue.extend(_referred(thing))
    return list(links.values())


def _referred(thing: Any) -> Iterable[Any]:
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
        return ()  # of which there may be millions
    if isinstance(thing, types.FunctionType):
        if (thing.__module__ or "").split(".")[0] == "chainer":
            return ()
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        names = _names_in(thing.__code__)
        return [*cells, thing.__defaults__, thing.__kwdefaults__, *[thing.__globals__.get(name) for name in names]]
    if isinstance(thing, chainer.Link) or library not in ("chainer", "numpy", "cupy", "builtins"):
        return getattr(thing, "__dict__", {}).values()
    return ()


def _names_in(code: types.CodeType) -> List[str]:
    """Returns the names of globals and attributes in a function and in those that are defined within it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names
