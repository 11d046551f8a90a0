"""The command that checks a program tells by its exit status whether the steps are equal, differ, or are unknown."""

from __future__ import annotations

import pathlib
import sys
from typing import Any, Callable, Iterator

import chainer_accum  # noqa: F401 - before chainer
import pytest
from chainer_accum.__main__ import main

from helpers import run_python

GOOD = """
import chainer_accum
import chainer
import numpy
from chainer import links as L
from chainer.iterators import MultiprocessIterator, SerialIterator

x = numpy.random.RandomState(0).rand(24, 5).astype("f")
t = numpy.arange(24, dtype="i") % 3


class Noisy(chainer.Chain):
    def __init__(self):
        super().__init__(inner=L.Classifier(L.Linear(5, 3)))

    def forward(self, x, t):
        return chainer.functions.sum(self.inner(x, t)) * len(x)  # a sum over examples


def updater(model=None, batch_size=8, **kwargs):
    optimizer = chainer.optimizers.SGD().setup(model or L.Classifier(L.Linear(5, 3)))
    iterator = SerialIterator(list(zip(x, t)), batch_size)
    return chainer_accum.AccumulatingUpdater(iterator, optimizer, **kwargs)


def wrong_updater():
    return updater(Noisy())


def updater_of_single_examples():
    return updater(batch_size=1, accumulation_steps=8)


def updater_and_batch():
    return updater(), list(zip(x, t))


def model_and_batch():
    return L.Classifier(L.Linear(5, 3)), list(zip(x, t))


def normalizing_model_and_batch():
    return L.Classifier(chainer.Sequential(L.BatchNormalization(5), L.Linear(5, 3))), list(zip(x, t))


def optimizer():
    return updater().get_optimizer("main")


def fails():
    raise KeyError("of the program")


def ends():
    raise SystemExit(0)


def reads_its_arguments():
    import argparse

    argparse.ArgumentParser().parse_args()
    return updater()


def updater_with_workers():
    updated = updater()
    updated._iterators["main"] = MultiprocessIterator(list(zip(x, t)), 8, n_processes=1)
    return updated


number = 3
"""


@pytest.fixture
def script(tmp_path: pathlib.Path, monkeypatch: Any) -> Iterator[str]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["pytest", "--of", "pytest"])
    path = tmp_path / "a_program_to_check.py"
    path.write_text(GOOD)
    yield str(path)
    sys.modules.pop("a_program_to_check", None)


@pytest.fixture
def refusal(capsys: Any) -> Callable[[str], str]:
    def refuse(function: str) -> str:
        with pytest.raises(SystemExit) as error:
            main(["check", function])
        assert error.value.code == 2
        return str(capsys.readouterr().err)

    return refuse


@pytest.mark.parametrize(
    "function",
    ["updater", "updater_of_single_examples", "updater_and_batch", "model_and_batch", "reads_its_arguments"],
)
def test_a_program_whose_steps_are_equal_has_status_0(script: str, function: str, capsys: Any) -> None:
    assert main(["check", f"{script}:{function}"]) == 0
    assert "The accumulated step is the full-batch step" in capsys.readouterr().out


def test_a_program_whose_steps_differ_has_status_1_and_a_remedy(script: str, capsys: Any) -> None:
    assert main(["check", f"{script}:wrong_updater"]) == 1
    assert "Set loss_reduction='sum'." in capsys.readouterr().out


def test_the_options_are_those_of_check_equivalence(script: str, capsys: Any) -> None:
    function = f"{script}:normalizing_model_and_batch"
    assert main(["check", function, "--micro-batch-size", "10"]) == 1
    assert "with micro-batches of 10, 10 and 4 examples" in capsys.readouterr().out
    assert main(["check", function, "--lockstep", "memory"]) == 0


def test_a_module_may_be_named_as_for_an_import(script: str, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(script).parent))
    assert main(["check", "a_program_to_check:updater"]) == 0


@pytest.mark.parametrize(
    "function, message",
    [
        ("script.py", "must be SCRIPT.py:FUNCTION or PACKAGE.MODULE:FUNCTION, got 'script.py'; name both parts"),
        (":make", "got ':make'"),
        ("there/is/none.py:make", "the script must be a file, got there/is/none.py"),
        ("a_module_that_is_not_there:make", "got a_module_that_is_not_there"),
        ("a_package_that_is_not_there.module:make", "got a_package_that_is_not_there.module"),
        ("{script}:make", "must define the function make, got only Noisy, updater, wrong_updater,"),
        ("{script}:number", "must define the function number"),
        ("{script}:optimizer", "must return an AccumulatingUpdater, (updater, batch) or (model, batch), got SGD"),
        ("{script}:ends", "must not end the program when it is called, got exit status 0"),
    ],
)
def test_a_function_that_is_not_there_or_returns_something_else_has_status_2(
    script: str, function: str, message: str, refusal: Callable[[str], str]
) -> None:
    assert message in " ".join(refusal(function.format(script=script)).split())


def test_a_script_that_ends_the_program_is_not_taken_for_one_that_is_right(
    script: str, refusal: Callable[[str], str]
) -> None:
    pathlib.Path(script).write_text("raise SystemExit(0)")
    assert "below `if __name__ == '__main__':`" in refusal(f"{script}:updater")


def test_a_script_with_the_name_of_another_module_is_to_be_renamed(script: str, refusal: Callable[[str], str]) -> None:
    other = pathlib.Path(script).with_name("helpers.py")
    other.write_text(GOOD)
    assert "rename it" in refusal(f"{other}:updater")


@pytest.mark.parametrize("text", [GOOD, "import a_module_that_is_not_there", "1 / 0", "syntax error"])
def test_a_program_that_fails_has_status_2_and_its_traceback(script: str, text: str, capsys: Any) -> None:
    pathlib.Path(script).write_text(text)
    assert main(["check", f"{script}:fails"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_program_is_checked_from_the_command_line(script: str) -> None:
    check = ("-m", "chainer_accum", "check")
    assert "is the full-batch step" in run_python(*check, f"{script}:updater_with_workers")
    assert "is not the full-batch step" in run_python(*check, f"{script}:wrong_updater", status=1)
    assert "usage: python -m chainer_accum check" in run_python(*check, f"{script}:make", status=2)
