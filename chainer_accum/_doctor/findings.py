"""Findings of the doctor, and how they are printed."""

from __future__ import annotations

import json
import textwrap
from typing import Mapping, NamedTuple

OK, NOTE, WRONG = "ok", "note", "wrong"


class Finding(NamedTuple):
    """What a check has found.

    Attributes:
        status (str): ``'ok'``, ``'note'`` (nothing is wrong, but something may be missing or slow) or ``'wrong'``.
        found (str): What there is.
        advice (str): What it means, and what to do. Empty if the status is ``'ok'``.
        command (str): The command that mends it. Empty if there is none.

    """

    status: str
    found: str
    advice: str = ""
    command: str = ""


def is_well(findings: Mapping[str, Finding]) -> bool:
    """Returns whether nothing is wrong."""
    return all(finding.status != WRONG for finding in findings.values())


def as_text(findings: Mapping[str, Finding]) -> str:
    """Returns a table of the findings, with the advice and the command below each one that has them."""
    width = max(map(len, findings))
    indent = " " * (len(WRONG) + 2 + width + 2)
    lines = []
    for name, finding in findings.items():
        lines.append(f"{finding.status:{len(WRONG)}}  {name:{width}}  {finding.found}")
        lines += textwrap.wrap(finding.advice, 120, initial_indent=indent, subsequent_indent=indent)
        if finding.command:
            lines.append(f"{indent}    {finding.command}")
    wrong = [name for name, finding in findings.items() if finding.status == WRONG]
    return "\n".join([*lines, "", f"Wrong: {', '.join(wrong)}." if wrong else "Nothing is wrong."])


def as_json(findings: Mapping[str, Finding]) -> str:
    """Returns the findings as a JSON object, by name."""
    return json.dumps({name: finding._asdict() for name, finding in findings.items()}, indent=2)
