"""tools/chainer_examples compares what a program trains with large batches and with accumulation."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# In the place of Chainer's program of that name, with the part of its command line that the tool uses.
PROGRAM = """
import argparse

import chainer
import chainer.functions as F
from chainer import training

parser = argparse.ArgumentParser()
parser.add_argument("-b", type=int)
parser.add_argument("--dim-h", type=int)
args = parser.parse_args()
model = chainer.links.Linear(784, args.dim_h)
optimizer = chainer.optimizers.Adam()
optimizer.setup(model)
train, _ = chainer.datasets.get_mnist(withlabel=False)
updater = training.updaters.StandardUpdater(
    chainer.iterators.SerialIterator(train, args.b), optimizer, loss_func=lambda x: F.{reduction}(F.tanh(model(x)) ** 2)
)
training.Trainer(updater, (20, "epoch")).run()
raise AssertionError("the tool stops a program after a few updates")
"""


def run_tool(checkout, *programs):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "chainer_examples"), str(checkout), *programs],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("reduction, is_large_batch, finding", [("mean", True, "equivalent"), ("sum", False, "sum")])
def test_the_difference_shows_whether_the_options_suit_the_loss(reduction, is_large_batch, finding, tmp_path):
    folder = tmp_path / "examples" / "vae"
    folder.mkdir(parents=True)
    (folder / "train_vae.py").write_text(PROGRAM.replace("{reduction}", reduction))
    result = run_tool(tmp_path, "vae")
    assert result.returncode == 0, result.stderr
    name, change, difference, _, found = result.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert (name, change, found) == ("vae", "`micro_batch_size=4`", finding)
    assert (float(difference) < 1e-10) == is_large_batch


def test_a_program_that_fails_is_a_line_of_the_table(tmp_path):
    (tmp_path / "examples").mkdir()
    result = run_tool(tmp_path, "vae")
    assert result.returncode == 0
    assert "FileNotFoundError" in result.stdout.splitlines()[-1]


def test_a_folder_that_is_no_copy_of_chainer_is_refused(tmp_path):
    result = run_tool(tmp_path)
    assert result.returncode == 2
    assert "checkout must be a copy of Chainer's repository" in result.stderr
