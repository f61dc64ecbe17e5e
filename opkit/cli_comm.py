"""``opkit comm``: options in, one call, a report out, an exit code."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from opkit.cli_output import PathType, show, shown
from opkit.collect.comm.plan import CUSTOM_BACKENDS, DEVICES, DTYPES, CommOptions
from opkit.collect.comm.run import CommPlan, CommResult, plan_comm, run_comm
from opkit.collect.comm.sizes import OPS
from opkit.errors import EXIT_FAIL, EXIT_PASS, WrongUsage
from opkit.reports.comm import print_comm, print_comm_plan
from opkit.reports.progress import Progress

Seconds = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option(
    "--gpus",
    default="",
    metavar="2,4",
    help="Numbers of GPUs, the first ones each time; default: 2, 4, 8 … up to those present.",
)
@click.option(
    "--ops",
    default="",
    metavar="OP,…",
    help=f"Of {', '.join(OPS)}; default: all, or none beside --all-reduce-backend.",
)
@click.option(
    "--dtype",
    default=",".join(DTYPES),
    show_default=True,
    metavar="DTYPE,…",
    help="Of the collectives; an engine's all-reduce is always bfloat16.",
)
@click.option("--min-bytes", type=int, help="Smallest message; default: the field's.")
@click.option("--max-bytes", type=int, help="Largest message, at most; default: the field's.")
@click.option("--factor", type=int, default=2, show_default=True, help="From one size to the next.")
@click.option(
    "--all-reduce-backend",
    type=click.Choice(CUSTOM_BACKENDS),
    help="Measure this engine's own all-reduce, and of NCCL only what --ops names.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default=DEVICES[0],
    show_default=True,
    help="cpu: gloo instead of NCCL, to try everything but the numbers.",
)
@click.option("--python", default=sys.executable, help="Interpreter that has torch and the engine.")
@click.option(
    "--case-timeout",
    "case_limit_s",
    type=Seconds,
    default=CommOptions.case_limit_s,
    show_default=True,
    help="Seconds that a case may take.",
)
@click.option(
    "--start-timeout",
    "start_limit_s",
    type=Seconds,
    default=CommOptions.start_limit_s,
    show_default=True,
    help="Seconds that a set of ranks may take to start.",
)
@click.option("--seed", default=0, show_default=True, help="Of the data.")
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--plan", "plan_only", is_flag=True, help="Print counts and an estimate, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def comm(
    gpus: str,
    ops: str,
    dtype: str,
    all_reduce_backend: str | None,
    plan_only: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Measure collectives between the GPUs of this host and write perf tables.

    Exit code: 0 every case has a value, 1 some have none or were kept out of their table.
    """  # fmt: skip
    options = CommOptions(
        gpus=_numbers("--gpus", gpus),
        ops=_words("--ops", ops) if ops else (),
        dtypes=_words("--dtype", dtype),
        all_reduce_backend=all_reduce_backend or "",
        **given,
    )
    if plan_only:
        plan = plan_comm(options)
        if as_json:
            show(json.dumps(_plan_json(plan), indent=1) + "\n")
        else:
            show(shown(lambda console: print_comm_plan(plan, console)))
        return EXIT_PASS
    with Progress() as progress:
        found = run_comm(options, progress)
    if as_json:
        show(json.dumps(_comm_json(found), indent=1) + "\n")
    else:
        show(shown(lambda console: print_comm(found, console)))
    return EXIT_PASS if found.ok else EXIT_FAIL


def _words(option: str, text: str) -> tuple[str, ...]:
    """The words of a list with commas. WrongUsage: one is empty."""
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise WrongUsage(f"{option} takes words and commas, not {text!r}")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers of a list with commas; none of an empty text. WrongUsage: one is no number."""
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise WrongUsage(f"{option} takes numbers and commas, as 2,4, not {text!r}") from error


def _plan_json(plan: CommPlan) -> dict[str, Any]:
    return {
        "schema": "opkit.comm-plan/1",
        "cases": plan.cases,
        "seconds": plan.seconds,
        "worlds": [
            {"implementation": world.implementation, "ranks": world.ranks,
             "cases": [asdict(case) for case in world.cases]}
            for world in plan.worlds
        ],
    }  # fmt: skip


def _comm_json(found: CommResult) -> dict[str, Any]:
    return {
        "schema": "opkit.comm/1",
        "ok": found.ok,
        "folder": str(found.folder),
        "rows": [asdict(line) for line in found.lines()],
        "tables": [
            {"name": made.name, "rows": made.rows, "status": made.status,
             "csv": str(made.csv), "parquet": str(made.parquet),
             "provenance": str(made.provenance)}
            for made in found.tables
        ],
        "problems": [asdict(problem) for problem in found.problems],
        "notes": list(found.notes),
        "resumed": found.resumed,
        "seconds": found.seconds,
    }  # fmt: skip
