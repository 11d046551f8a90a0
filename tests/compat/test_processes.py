"""Processes that Chainer starts work under any start method, or the program ends with the remedy."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from chainer.iterators import multiprocess_iterator
from chainer.training.extensions import snapshot_writers
from chainer_accum._compat import processes

from helpers import run_python

START_METHODS = ["fork", "spawn", "forkserver"]
NEW_INTERPRETERS = ["spawn", "forkserver"]


@pytest.mark.parametrize("start_method", START_METHODS)
def test_the_workers_of_an_iterator_train_the_same_model(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        """
import multiprocessing
import sys

import chainer_accum
import chainer
import chainer.links as L
import numpy
from chainer.iterators import MultiprocessIterator, SerialIterator

def train(iterator):
    model = L.Classifier(L.Linear(3, 2, initialW=0.5))
    updater = chainer_accum.AccumulatingUpdater(
        iterator, chainer.optimizers.SGD().setup(model), accumulation_steps=2
    )
    for _ in range(3):
        updater.update()
    iterator.finalize()
    return model.predictor.W.array

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    dataset = [(numpy.full(3, i, numpy.float32), numpy.int32(i % 2)) for i in range(10)]
    actual = train(MultiprocessIterator(dataset, 4, shuffle=False, n_processes=2))
    numpy.testing.assert_array_equal(actual, train(SerialIterator(dataset, 4, shuffle=False)))
    print("trained")
"""
    )
    assert run_python(str(script), start_method) == "trained\n"


# Start of a program without a script that a new interpreter could import, as in a notebook.
BEGIN = """
import multiprocessing, os, sys
import chainer_accum, chainer, numpy
from chainer.iterators import MultiprocessIterator
from chainer.training.extensions import snapshot_writers

multiprocessing.set_start_method(sys.argv[1])
"""

READ_RANGE = """
dataset = chainer.datasets.TupleDataset(numpy.arange(3), numpy.arange(3) + 5)
# One worker, which is replaced after each batch: the next batch is asked for while there is none.
iterator = MultiprocessIterator(dataset, 2, shuffle=False, n_processes=1, maxtasksperchild=2)
batches = [[int(value) for value, _ in iterator.next()] for _ in range(3)]
iterator.finalize()
print(batches)  # last, since a process that is forked in between would print it as well
"""


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_program_without_a_script_has_workers_and_replaces_them(start_method: str) -> None:
    assert run_python("-c", BEGIN + READ_RANGE, start_method) == "[[0, 1], [2, 0], [1, 2]]\n"


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_program_without_a_script_writes_snapshots_in_processes(start_method: str, tmp_path: Path) -> None:
    script = """
for writer_class in [snapshot_writers.ProcessWriter, snapshot_writers.ProcessQueueWriter]:
    writer = writer_class()
    for number in range(2):
        writer(f"{writer_class.__name__}-{number}", sys.argv[2], {"number": numpy.array(number)})
    writer.finalize()
print([int(numpy.load(os.path.join(sys.argv[2], name))["number"]) for name in sorted(os.listdir(sys.argv[2]))])
"""
    assert run_python("-c", BEGIN + script, start_method, str(tmp_path)) == "[0, 1, 0, 1]\n"


@pytest.mark.parametrize("start_method", NEW_INTERPRETERS)
def test_what_a_new_interpreter_cannot_find_is_an_error_at_once(start_method: str) -> None:
    script = """
class Dataset(chainer.dataset.DatasetMixin):
    def __len__(self):
        return 3
    def get_example(self, i):
        return numpy.float32(i)

def save(path, target):
    raise AssertionError("never called")

for use in [
    lambda: MultiprocessIterator(Dataset(), 2, n_processes=2).next(),
    lambda: MultiprocessIterator(chainer.datasets.TransformDataset([1], lambda x: x), 1, n_processes=2).next(),
    lambda: snapshot_writers.ProcessQueueWriter(save),
    lambda: snapshot_writers.ProcessWriter(save)("name", ".", {}),
]:
    try:
        use()
    except RuntimeError as error:
        print(f"error: {error}", flush=True)
"""
    printed = run_python("-c", BEGIN + script, start_method)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    causes = ["attribute 'Dataset'", "<lambda>"] + ["attribute 'save'"] * 2
    assert len(errors) == len(causes)
    for error, cause in zip(errors, causes):
        assert error.startswith("error: a worker process of Chainer cannot start: ")
        assert cause in error
        assert f"The start method '{start_method}' makes it a new interpreter" in error
        assert "multiprocessing.set_start_method('fork', force=True)" in error


@pytest.mark.parametrize("start_method", NEW_INTERPRETERS)
def test_a_script_that_trains_when_it_is_imported_is_an_error_at_once(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(BEGIN.replace("start_method(sys.argv[1])", "start_method(sys.argv[1], force=True)") + READ_RANGE)
    printed = run_python(str(script), start_method, status=1)
    assert "RuntimeError: a worker process of Chainer cannot start: " in printed
    assert "Put what the script runs below `if __name__ == '__main__':`" in printed


@pytest.mark.parametrize("start_method", NEW_INTERPRETERS)
def test_an_import_in_the_guarded_part_of_a_script_is_enough(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("if __name__ == '__main__':" + (BEGIN + READ_RANGE).replace("\n", "\n    "))
    assert run_python(str(script), start_method) == "[[0, 1], [2, 0], [1, 2]]\n"


@pytest.mark.parametrize("module", [multiprocess_iterator, snapshot_writers])
def test_chainer_starts_processes_by_itself_when_switched_off(module: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("CHAINER_ACCUM_COMPAT", "0")
    monkeypatch.setattr(module, "multiprocessing", multiprocessing)
    processes.let_chainer_start_processes()
    assert module.multiprocessing is multiprocessing
