"""The source of the package computes with the arrays it is given where they are, be that the host or a GPU."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import chainer_accum
import pytest

PACKAGE = Path(chainer_accum.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# What is not about the values of arrays: dtypes, types, and how NumPy warns.
ANYWHERE = {"promote_types", "finfo", "can_cast", "errstate", "ndarray", "generic", "dtype"}
ANYWHERE |= {"float16", "float32", "float64", "int64", "complex128"}

# Where NumPy computes, and why what it is given is in host memory. "*" is anything.
ON_THE_HOST: Dict[str, Tuple[str, str]] = {
    "_blas.py": ("it looks for the library of NumPy, to which only NumPy's arrays go", "__file__ ascontiguousarray"),
    "_compat.py": ("it is about the module itself", "*"),
    "_convolution.py": ("only NumPy's arrays go there", "pad lib"),
    "_repairs.py": ("only where NumPy computes does Chainer fail; what it tries itself is in host memory", "*"),
    "_old_names.py": ("it is about the module itself", "*"),
    "_trials.py": ("gradients are sent to the host to be compared", "array"),
    "cached_gradients.py": ("the lengths of micro-batches are ints", "cumsum"),
    "diagnostics.py": ("gradients have been sent to the host to be compared", "*"),
    "distributed.py": ("parameters are sent to the host to be broadcast; weights are floats", "array array_equal"),
    "extensions/learning_rate_survey.py": ("learning rates and losses are floats", "geomspace argmin"),
    "_weight_gradients.py": ("sums of what only the host has a shortcut for", "zeros"),
    "gradient_sums.py": ("names are text", "frombuffer uint8"),
    "random_state.py": ("the state of NumPy's generator is saved", "random array uint8 uint32 frombuffer"),
    "recorded_arrays.py": ("only NumPy's arrays are recorded", "array may_share_memory empty"),
    "remembered.py": ("generators are told by type; iterators serialize to the host", "random array"),
    "snapshots.py": ("a file is read to the host; an array is made only to ask for names", "load empty"),
    "taken_gradients.py": ("only on the host is it asked whether a parameter has just been made", "isnan"),
    "thread_state.py": ("how NumPy works is not about arrays", "geterr geterrcall getbufsize setbufsize"),
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
    source = MODULES["window.py"].read_text(encoding="utf-8")
    assert len(unexplained("window.py", f"{source}\n{line}\n")) == 1
