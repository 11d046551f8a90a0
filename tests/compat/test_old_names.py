"""Names that old programs look up are put back on request, where they are missing, and never otherwise."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Dict

import chainer_accum
import numpy
import pytest
from chainer_accum._compat import old_names

ROOT = Path(chainer_accum.__file__).parent.parent
VALUES = {
    (removed.module, name): value for removed in old_names.REMOVED_NAMES for name, value in removed.values.items()
}
IDS = [".".join(key) for key in VALUES]

# Prints which of the names are there.
LOOK_UP = """
import importlib, warnings
warnings.simplefilter("ignore")
def has(module, name):
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False
"""
LOOK_UP += f"print([has(module, name) for module, name in {list(VALUES)!r}])\n"


@pytest.fixture(autouse=True)
def _modules_as_they_were(monkeypatch: Any) -> None:
    """Puts back what a test changes in the modules."""
    for removed in old_names.REMOVED_NAMES:
        module = sys.modules.get(removed.module)
        if module is None:
            monkeypatch.setitem(sys.modules, removed.module, types.ModuleType(removed.module))
            continue
        for name in removed.values:
            if name in vars(module):
                monkeypatch.setitem(vars(module), name, vars(module)[name])
            else:
                monkeypatch.setitem(vars(module), name, None)
                del vars(module)[name]


def hide(monkeypatch: Any, module_name: str, name: str) -> None:
    module = importlib.import_module(module_name)
    vars(module).pop(name, None)
    monkeypatch.setitem(vars(module), "__getattr__", _raise_attribute_error)  # some versions have names of NumPy there


def _raise_attribute_error(name: str) -> None:
    raise AttributeError(name)


def look_up(before: str, **environment: str) -> str:
    """Returns what a fresh interpreter prints about the names after ``before``."""
    inherited: Dict[str, str] = {name: value for name, value in os.environ.items() if name != "CHAINER_ACCUM_COMPAT"}
    process = subprocess.run(
        [sys.executable, "-c", before + LOOK_UP],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.mark.parametrize(("module", "name"), VALUES, ids=IDS)
def test_a_missing_name_is_put_back(module: str, name: str, monkeypatch: Any) -> None:
    hide(monkeypatch, module, name)
    chainer_accum.restore_removed_names()
    assert vars(importlib.import_module(module))[name] is VALUES[module, name]


@pytest.mark.parametrize(("module", "name"), VALUES, ids=IDS)
def test_a_name_that_is_there_is_left_alone(module: str, name: str, monkeypatch: Any) -> None:
    original = object()
    monkeypatch.setitem(vars(importlib.import_module(module)), name, original)
    chainer_accum.restore_removed_names()
    assert vars(importlib.import_module(module))[name] is original


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy 1.20 to 1.23, where some are only deprecated
def test_every_value_is_there_where_its_name_is_missing() -> None:
    chainer_accum.restore_removed_names()
    for module, name in VALUES:
        assert getattr(importlib.import_module(module), name) is not None, name


@pytest.mark.skipif(numpy.__version__ < "2", reason="older versions have an alias of the Python type, or nothing")
def test_the_scalar_types_of_numpy_2_stay() -> None:
    chainer_accum.restore_removed_names()
    assert issubclass(numpy.bool, numpy.generic) and issubclass(numpy.long, numpy.generic)


def test_nothing_is_put_back_unless_asked() -> None:
    untouched = look_up("")
    assert "False" in untouched
    assert look_up("import chainer_accum, chainer\n") == untouched
    assert look_up("import chainer_accum\n", CHAINER_ACCUM_COMPAT="1") == untouched


def test_the_environment_variable_does_what_the_function_does() -> None:
    everything = f"{[True] * len(VALUES)}\n"
    assert look_up("import chainer_accum\nchainer_accum.restore_removed_names()\n") == everything
    assert look_up("import chainer_accum\n", CHAINER_ACCUM_COMPAT="all") == everything


def test_a_call_counts_even_where_the_environment_says_no() -> None:
    call = "import numpy, chainer_accum._compat.old_names as old_names\nold_names.restore_removed_names()\n"
    # Chainer itself may not be importable there, so only the module is asked for.
    script = "import sys, types\nsys.modules['chainer_accum'] = package = types.ModuleType('chainer_accum')\n"
    script += f"package.__path__ = [{str(ROOT / 'chainer_accum')!r}]\n" + call
    assert look_up(script, CHAINER_ACCUM_COMPAT="0") == f"{[True] * len(VALUES)}\n"


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_child_processes_find_the_names(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        """
import multiprocessing
import sys

import chainer_accum

chainer_accum.restore_removed_names()

def work(queue):
    import collections
    queue.put(hasattr(collections, "MutableSet"))

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    child.join()
    print(child.exitcode, queue.get())
"""
    )
    printed = subprocess.check_output(
        [sys.executable, str(script), start_method], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=120
    )
    assert printed == "0 True\n"


def test_the_documentation_lists_all_names() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`.*?`) \| [\w .]+ \| [^|]+ \|$", page, re.MULTILINE)
    listed = [(module, name) for module, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(listed) == sorted(VALUES)


def test_in1d_finds_the_elements_of_one_array_in_another() -> None:
    in1d = VALUES["numpy", "in1d"]
    assert in1d([[0, 1], [2, -1]], [1, -1]).tolist() == [False, True, False, True]
    assert in1d([0, 1, 2], [1, -1], invert=True).tolist() == [True, False, True]


def test_asscalar_returns_a_python_number() -> None:
    assert type(VALUES["numpy", "asscalar"](numpy.array([0.5], numpy.float32))) is float


def test_getargspec_tells_the_arguments_by_the_old_names() -> None:
    def function(x: Any, y: Any = 1, *rest: Any, **others: Any) -> None: ...

    spec = VALUES["inspect", "getargspec"](function)
    assert (spec.args, spec.varargs, spec.keywords, spec.defaults) == (["x", "y"], "rest", "others", (1,))


def test_load_source_imports_a_file_of_any_name(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.txt"
    path.write_text("n_units = 3")
    monkeypatch.setitem(sys.modules, "old_model", None)
    module = VALUES["imp", "load_source"]("old_model", str(path))
    assert module.n_units == 3 and sys.modules["old_model"] is module


def test_a_network_of_caffe_computes_with_the_python_implementation_of_protobuf(tmp_path: Path) -> None:
    script = f"""
import chainer_accum, numpy
from chainer.links.caffe import CaffeFunction
from chainer.links.caffe.protobuf3 import caffe_pb2

net = caffe_pb2.NetParameter(name="net")
layer = net.layer.add(name="score", type="InnerProduct", bottom=["data"], top=["score"])
layer.inner_product_param.num_output = 2
layer.blobs.add(num=1, channels=1, height=2, width=3, data=range(6))
layer.blobs.add(num=1, channels=1, height=1, width=2, data=[0, 0])
path = {str(tmp_path / "net.caffemodel")!r}
with open(path, "wb") as file:
    file.write(net.SerializeToString())
(score,) = CaffeFunction(path)(inputs={{"data": numpy.ones((1, 3), "f")}}, outputs=["score"])
print(score.array.tolist())
"""
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.stdout, process.returncode) == ("[[3.0, 12.0]]\n", 0), process.stderr
