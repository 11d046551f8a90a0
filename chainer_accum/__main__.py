"""The command line: ``python -m chainer_accum doctor`` and ``python -m chainer_accum check``."""

from __future__ import annotations

import argparse
import sys
import traceback
from typing import Optional, Sequence

from chainer_accum._doctor import as_json, as_text, examine, is_well


def main(arguments: Optional[Sequence[str]] = None, failure: Optional[Exception] = None) -> int:
    """Runs a command and returns its exit status.

    Args:
        arguments (list of str): Arguments of the command line. By default, those of this process.
        failure (Exception): Why chainer_accum cannot be imported, or ``None`` if it can.

    """
    parser = argparse.ArgumentParser("python -m chainer_accum", description="Exact gradient accumulation for Chainer.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="examine this environment, and print the command that mends each thing that is wrong",
        epilog="exit status: 0 if nothing is wrong, 1 if something is, 2 for a wrong command line",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser(
        "check",
        help="check that the accumulated step of a program is the step of the whole batch",
        epilog="exit status: 0 if the steps are equal, 1 if they are not, 2 if this could not be checked",
    )
    check.add_argument(
        "function",
        metavar="SCRIPT.py:FUNCTION",
        help="function, also as PACKAGE.MODULE:FUNCTION, that takes no arguments and returns an AccumulatingUpdater, "
        "(updater, batch) or (model, batch)",
    )
    check.add_argument("--micro-batch-size", type=int, metavar="N", help="by default, that of the updater")
    check.add_argument("--lockstep", metavar="STORE", help="memory, host, file or a folder; by default, as the updater")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        findings = examine(failure)
        print(as_json(findings) if options.json else as_text(findings))
        return 0 if is_well(findings) else 1
    if failure is not None:
        traceback.print_exception(type(failure), failure, failure.__traceback__)
        return 2  # as below
    return _check(check, options)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from chainer_accum.diagnostics import WrongProgram, check_program

    sys.argv = [options.function.rpartition(":")[0]]  # the script may parse its arguments
    try:
        result = check_program(options.function, options.micro_batch_size, options.lockstep)
    except WrongProgram as error:
        parser.error(str(error))
    except Exception:  # by default, Python would exit with the status of a step that differs
        traceback.print_exc()
        return 2
    print(result)
    return 0 if result else 1


if __name__ == "__main__":
    sys.exit(main())
