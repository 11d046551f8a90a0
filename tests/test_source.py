"""The source of the package computes with the arrays it is given where they are, be that the host or a GPU."""

from __future__ import annotations

import ast
import importlib
import types
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import chainer_accum
import pytest

PACKAGE = Path(chainer_accum.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# What is not about the values of arrays: dtypes, types, and how NumPy warns.
ANYWHERE = {"promote_types", "finfo", "can_cast", "errstate", "ndarray", "generic", "dtype"}
ANYWHERE |= {"float16", "float32", "float64", "int64", "complex128"}

# Where NumPy computes, and why what it is given is in host memory. "*" is anything.
ON_THE_HOST: Dict[str, Tuple[str, str]] = {
    "window/blas.py": (
        "it looks for the library of NumPy, which takes only its arrays",
        "__file__ ascontiguousarray",
    ),
    "_doctor/blas.py": ("it measures the library of NumPy, which takes only its arrays", "*"),
    "_doctor/packages.py": ("it is about the module itself", "__version__"),
    "_compat/names.py": ("it is about the module itself", "*"),
    "window/convolution.py": ("only NumPy's arrays go there", "pad lib"),
    "diagnostics/trials.py": ("gradients are sent to the host to be compared", "array"),
    "window/representations.py": ("the lengths of micro-batches are ints", "cumsum"),
    "diagnostics/causes.py": ("gradients have been sent to the host to be compared", "*"),
    "diagnostics/comparison.py": ("gradients have been sent to the host to be compared", "*"),
    "window/distributed.py": ("weights are floats", "array"),
    "window/shared_parameters.py": ("parameters are broadcast from the host", "array_equal"),
    "window/loss_sums.py": ("a sum of losses in host memory is a float", "asarray"),
    "_compat/repairs.py": ("only where NumPy computes does Chainer fail; what it tries itself is in host memory", "*"),
    "_compat/old_names.py": ("it is about the module itself", "*"),
    "extensions/learning_rate_survey.py": ("learning rates and losses are floats", "geomspace argmin"),
    "window/weight_gradients.py": ("sums of what only the host has a shortcut for", "zeros"),
    "window/gradient_sums.py": ("names are text", "frombuffer uint8"),
    "state/random_state.py": ("the state of NumPy's generator is saved", "random array uint8 uint32 frombuffer"),
    "state/recorded_arrays.py": ("only NumPy's arrays are recorded", "array may_share_memory empty"),
    "state/training_state.py": ("generators are told by type; iterators serialize to the host", "random array"),
    "state/snapshots.py": ("a file is read to the host; an array is made only to ask for names", "load empty"),
    "window/taken_gradients.py": ("only on the host is it asked whether a parameter has just been made", "isnan"),
    "lockstep/crossing.py": ("the checksum of any array is of this dtype", "uint64"),
    "lockstep/generators.py": ("the state of NumPy's generator is set", "random"),
    "lockstep/store.py": ("what waits in a file has been sent to the host", "ascontiguousarray empty uint8"),
    "batches/search.py": ("limits, times and numbers of bytes are floats", "array interp"),
    "state/thread_state.py": ("how NumPy works is not about arrays", "geterr geterrcall getbufsize setbufsize"),
}


def numpy_names(source: str) -> Iterator[Tuple[int, str]]:
    """Returns an iterator over lines and the names that are looked up in NumPy there."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "numpy":
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "numpy" and (alias.name, alias.asname) != ("numpy", None):
                    yield node.lineno, f"import of {alias.name} as {alias.asname}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy":
            yield node.lineno, f"from {node.module} import"


def unexplained(name: str, source: str) -> List[str]:
    allowed = ON_THE_HOST.get(name, ("", ""))[1].split()
    return [
        f"{name}:{line}: numpy.{attribute}"
        for line, attribute in numpy_names(source)
        if attribute not in ANYWHERE and attribute not in allowed and "*" not in allowed
    ]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_numpy_computes_only_what_is_on_the_host(name: str) -> None:
    assert unexplained(name, MODULES[name].read_text(encoding="utf-8")) == []


def test_each_exception_is_one_that_is_needed() -> None:
    for name, (_, allowed) in ON_THE_HOST.items():
        used = {attribute for _, attribute in numpy_names(MODULES[name].read_text(encoding="utf-8"))} - ANYWHERE
        assert used, name
        assert allowed == "*" or set(allowed.split()) == used, name


LINES = ["y = numpy.asarray(loss.array)", "f = numpy.add", "numpy.random.rand(3)"]
LINES += ["import numpy as np", "from numpy import isfinite"]


@pytest.mark.parametrize("line", LINES)
def test_a_call_on_any_array_is_found(line: str) -> None:
    source = MODULES["window/window.py"].read_text(encoding="utf-8")
    assert len(unexplained("window.py", f"{source}\n{line}\n")) == 1


# The wings, and what each may import of the others, in the order in which data flows.
WINGS: Dict[str, Tuple[str, ...]] = {
    "_compat": (),
    "batches": ("state", "observations"),
    "window": ("lockstep", "state", "observations"),
    "lockstep": ("state", "observations"),
    "state": (),
    "observations": (),
}
NEIGHBOURS = {"_arguments", "_devices", "_remedies"}


def imports(name: str) -> Iterator[Tuple[int, str]]:
    """Returns an iterator over lines and the modules of the package that a module imports."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chainer_accum."):
            yield node.lineno, str(node.module).split(".", 1)[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_wing_is_entered_by_its_door(name: str) -> None:
    wing = name.split("/")[0]
    for line, module in imports(name):
        other, _, inside = module.partition(".")
        assert other == wing or other not in WINGS or not inside, f"{name}:{line}: import from chainer_accum.{other}"
        assert wing not in WINGS or other in {wing, *WINGS[wing], *NEIGHBOURS}, f"{name}:{line}: {module}"


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_door_lists_what_lies_behind_it(wing: str) -> None:
    door = importlib.import_module(f"chainer_accum.{wing}")
    modules = [name for name in vars(door) if isinstance(getattr(door, name), types.ModuleType)]
    assert sorted(door.__all__) == sorted(name for name in vars(door) if name[0] != "_" and name not in modules)


# The names of Chainer and Python that are used although they are private, and why there is no other way.
PRIVATE_NAMES = {
    "_DoubleBufferingOptimizer": "ChainerMN has no public name for what create_multi_node_optimizer returns",
    "_MultiNodeOptimizer": "the same",
    "_call_converter": "StandardUpdater calls both kinds of converters by it",
    "_check_old_style_gradient": "it is the one method that each backward pass calls on the node of a parameter",
    "_fp32_param": "Chainer leaves the float32 parameters of mixed precision out of snapshots",
    "_get_link_hooks": "hooks are listed in no other place",
    "_getframe": "inspect.currentframe reads a whole source file for what is one frame",
    "_impl_selector": "batch normalization has no public way to be given its statistics, and ChainerMN's uses this one",
    "_iterators": "StandardUpdater has get_iterator for one by name, and no list of them",
    "_local": "a thread's configuration can be read and put back as a whole only there",
    "_loss_scale": "set_loss_scale and the backward pass set it, and nothing returns it",
    "_loss_scaling_is_dynamic": "the same",
    "_loss_scaling_isnan_ever": "the same, for snapshots",
    "_node": "an old-style function has no public way to be copied, and refers to its node",
    "_persistent": "a link lists its parameters, but not its persistent values",
    "_use_fp32_update": "use_fp32_update sets it, and nothing returns it",
}


def private_names_used() -> Set[str]:
    """Returns the private attributes that the package looks up and does not define."""
    defined, used = set(), set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[:2] != "__":
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (defined if is_own and isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    return used - defined - {"_replace", "_asdict"}  # public methods of named tuples


def test_each_private_name_of_chainer_has_a_reason() -> None:
    assert private_names_used() == set(PRIVATE_NAMES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_longer_than_300_lines(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 300
