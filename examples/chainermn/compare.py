"""Runs train_digits.py on 1, 2 and 4 ranks, with 1 and with 8 accumulation steps, and compares them in a table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import numpy

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import show_table

PROGRAM = Path(__file__).with_name("train_digits.py")
RANKS = 1, 2, 4
ACCUMULATION_STEPS = 1, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epoch", type=int, default=5, help="number of epochs")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    rows = []
    for steps in ACCUMULATION_STEPS:
        reference = None
        for ranks in RANKS:
            out = args.out / f"{ranks}_ranks_{steps}_steps"
            result = run(ranks, steps, args.epoch, out)
            parameters = numpy.load(out / "parameters.npy")
            reference = parameters if reference is None else reference
            rows.append(make_row(steps, result, float(abs(parameters - reference).max())))
    show_table(rows, args.out, text_columns=0)


def run(ranks: int, steps: int, epochs: int, out: Path) -> Dict[str, Any]:
    """Runs the program as an MPI job, with one thread per rank, and returns its result."""
    out.mkdir(parents=True, exist_ok=True)
    command = [mpiexec(), "-n", str(ranks), sys.executable, str(PROGRAM)]
    command += ["--accumulation-steps", str(steps), "--epoch", str(epochs), "--out", str(out)]
    subprocess.run(
        command, check=True, timeout=600, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    result: Dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return result


def mpiexec() -> str:
    """Returns the mpiexec of this environment, or else that of the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=path)
    if found is None:
        raise SystemExit("mpiexec must be installed; for example with: pip install mpich mpi4py")
    return found


def make_row(steps: int, result: Dict[str, Any], difference: float) -> Dict[str, str]:
    return {
        "accumulation_steps": str(steps),
        "ranks": str(result["ranks"]),
        "updates": str(result["updates"]),
        "all-reduces": str(result["all_reduces"]),
        "MB from each rank": f"{result['bytes'] / 1e6:.1f}",
        "ranks differ by": f"{result['ranks_differ_by']:.2g}",
        "differs from 1 rank by": f"{difference:.2g}",
        "validation accuracy": f"{result['accuracy']:.2%}",
    }


if __name__ == "__main__":
    main()
