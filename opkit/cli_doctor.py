"""The command that looks before a run: options in, one call, a report out, an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from opkit import __version__
from opkit.cli_output import PathType, show, shown
from opkit.doctor.examine import Asked, Facts, before_run, examine
from opkit.doctor.finding import Diagnosis, Group, Status
from opkit.doctor.machine import Machine
from opkit.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAIL,
    EXIT_PASS,
    EXIT_TOOL_MISSING,
    OpkitError,
    WrongUsage,
)
from opkit.reports.doctor import print_doctor
from opkit.reports.progress import Progress

SCHEMA = "opkit.doctor/1"
# What may stop a run before it starts, and its exit code: only what cannot go well.
STOPPING = {
    "GPUs": EXIT_TOOL_MISSING,
    "compute mode": EXIT_TOOL_MISSING,
    "output folder": EXIT_BAD_INPUT,
    "disk space": EXIT_BAD_INPUT,
    "temporary folder": EXIT_BAD_INPUT,
}


@click.command()
@click.option(
    "--only", default="", metavar="nsys,gpu,host,frameworks", help="Look at these groups only."
)
@click.option("--gpus", default="", metavar="0,1", help="GPUs, by nvidia-smi's numbers.")
@click.option("--python", default=sys.executable, help="Interpreter that has the framework.")
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--quick", is_flag=True, help="Without the self-test of nsys and without imports.")
@click.option("--strict", is_flag=True, help="Exit with 1 on warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    only: str, gpus: str, python: str, out: Path, quick: bool, strict: bool, as_json: bool
) -> int:
    """Find what would spoil a run, before it, each with the fix. Changes nothing.

    Exit code: 0 nothing would, 1 something would (--strict: or might).
    """  # fmt: skip
    asked = Asked(out, python, _numbers(gpus), _groups(only), quick)
    with Progress() as progress:
        diagnosis, facts = examine(asked, Machine(), progress)
    if as_json:
        show(json.dumps(doctor_json(diagnosis, facts, strict), indent=1) + "\n")
    else:
        show(shown(lambda console: print_doctor(diagnosis, console)))
    return EXIT_FAIL if diagnosis.spoiled(strict) else EXIT_PASS


def look_before_run(
    out: Path,
    say: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    nsys: bool = True,
    gpus: Sequence[str] | None = None,
) -> None:
    """What a command that runs something looks at first, in well under a second.

    Args:
        out: the folder of results.
        say: takes a line for each warning.
        env: variables that the run sets beside those of this process.
        nsys, gpus: see :func:`opkit.doctor.examine.before_run`.

    Raises:
        OpkitError: the run cannot go well.
    """
    machine = Machine(environ={**os.environ, **(env or {})})
    for finding in before_run(out, machine, nsys=nsys, gpus=gpus).findings:
        if finding.status is Status.FAIL and finding.name in STOPPING:
            raise OpkitError(
                f"{finding.name}: {finding.says}",
                STOPPING[finding.name],
                f"{finding.fix}\nor go on regardless: --no-doctor",
            )
        if finding.status in (Status.WARN, Status.FAIL):
            say(f"doctor: {finding.name}: {finding.says} (fix: {finding.fix})")


def doctor_json(diagnosis: Diagnosis, facts: Facts, strict: bool) -> dict[str, Any]:
    """The findings and what they were judged from, as one object."""
    return {
        "schema": SCHEMA,
        "opkit": __version__,
        "ok": not diagnosis.spoiled(strict),
        "strict": strict,
        "counts": diagnosis.counts(),
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "facts": facts.plain(),
    }


def _numbers(text: str) -> tuple[int, ...]:
    if text in ("", "all"):
        return ()
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as error:
        raise WrongUsage(f"--gpus {text}: numbers and commas, or all") from error


def _groups(text: str) -> tuple[Group, ...]:
    if not text:
        return tuple(Group)
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word not in tuple(Group)]
    if wrong:
        raise WrongUsage(f"--only {wrong[0]}: there are {', '.join(Group)}")
    return tuple(group for group in Group if group in words)
