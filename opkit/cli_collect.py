"""The commands of collection: options in, one call, a report out, an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from opkit.align.ledger import Ledger
from opkit.cli_doctor import look_before_run
from opkit.cli_output import PathType, show, shown
from opkit.collect import repeat
from opkit.collect.install.proof import FACTOR
from opkit.collect.install.proof import install as run_install
from opkit.collect.install.questions import Asked
from opkit.collect.measurement import L2_STATES, PACINGS, Timing
from opkit.collect.options import CollectOptions, Job, Where, prepare, where_of
from opkit.collect.record import the_record
from opkit.collect.run import TABLES, Collected
from opkit.collect.run import collect as run_collect
from opkit.collect.tables.latency import Latency
from opkit.collect.verify import SAMPLE
from opkit.collect.workers.parts import read_parts
from opkit.errors import EXIT_FAIL, EXIT_PASS
from opkit.layers.op import Phase
from opkit.layers.registry import find_op
from opkit.reports.collecting import (
    print_collected,
    print_fidelity,
    print_installed,
    print_plan,
    print_verified,
)
from opkit.reports.progress import Progress
from opkit.reports.run_bar import RunBar

DEFAULT = Timing()
Command = Callable[..., Any]


def places(command: Command) -> Command:
    """The options that say where work runs."""
    for option in reversed(
        (
            click.option("--gpus", default="all", show_default=True, metavar="0,1|all",
                         help="GPUs of this host to use, one worker each."),
            click.option("--python", default=sys.executable,
                         help="Interpreter that has the framework."),
            click.option("--engine", type=click.Choice(["local", "ray"]), default="local",
                         show_default=True, help="Run on this host, or on a Ray cluster."),
            click.option("--ray-address", default="", help="A running Ray cluster."),
            click.option("--ray-workers", type=click.IntRange(min=1),
                         help="Workers on the cluster; default: one a GPU."),
            click.option("--case-timeout", type=click.FloatRange(min=0, min_open=True),
                         default=120.0, show_default=True, help="Seconds that a case may take."),
            click.option("--build-timeout", type=click.FloatRange(min=0, min_open=True),
                         default=900.0, show_default=True, help="Seconds that a build may take."),
            click.option("--out", type=PathType, default=Path("opkit-out"), show_default=True,
                         help="Output folder."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def timings(command: Command) -> Command:
    """The options that say how a case is measured."""
    for option in reversed(
        (
            click.option("--pacing", type=click.Choice(PACINGS), default=DEFAULT.pacing,
                         show_default=True, help="Rest between iterations, or back to back."),
            click.option("--l2", type=click.Choice(L2_STATES), default=DEFAULT.l2,
                         show_default=True, help="State of the L2 cache before an iteration."),
            click.option("--warmups", type=click.IntRange(min=1), default=DEFAULT.warmups,
                         show_default=True, help="Least iterations before the measured ones."),
            click.option("--iterations", type=click.IntRange(min=1),
                         default=DEFAULT.max_iterations, show_default=True,
                         help="Measured iterations of a case, at most."),
            click.option("--spread", type=click.FloatRange(min=0, min_open=True),
                         default=DEFAULT.spread, show_default=True,
                         help="Iterate until the median is known to this share."),
            click.option("--max-seconds", type=click.FloatRange(min=0, min_open=True),
                         default=DEFAULT.max_seconds, show_default=True,
                         help="Seconds of iterations of a case, at most."),
            click.option("--gpu-time/--no-gpu-time", default=True, show_default=True,
                         help="Also take the kernels' own times, in a pass that is not timed."),
            click.option("--measure-power", is_flag=True, help="Also measure power."),
            click.option("--power-test-duration-sec", "power_seconds",
                         type=click.FloatRange(min=0, min_open=True),
                         default=DEFAULT.power_seconds, show_default=True,
                         help="Least duration of the power measurement, seconds."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("op")
@click.option("--backend", default="", help="Engine whose classes build the mock (vllm, torch).")
@click.option("--model", type=PathType, help="Folder with the model's config.json.")
@click.option("--engine-args", default="", help="The server's flags; default: the aligned ones.")
@click.option(
    "--phase",
    "phases",
    multiple=True,
    type=click.Choice([phase.value for phase in Phase]),
    help="Only this phase.",
)
@click.option(
    "--tp",
    multiple=True,
    type=click.IntRange(min=1),
    help="Tensor-parallel size to simulate; repeatable.",
)
@click.option("--sweep", type=PathType, help="TOML or YAML file with other grids.")
@click.option(
    "--case-filter",
    multiple=True,
    metavar="COND",
    help="Only cases for which it holds, as batch<=16,past=0; repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Cases of each tp size, at most.")
@click.option("--smoke", is_flag=True, help="Three small cases of each phase.")
@click.option("--shuffle", type=int, metavar="SEED", help="Measure in a random order.")
@click.option("--plan", "plan_only", is_flag=True, help="Print counts and an estimate, and stop.")
@click.option(
    "--waive",
    default="",
    metavar="REASON",
    help="Collect without a verdict that admits it; the reason stands in every row.",
)
@click.option("--policy", type=PathType, help="Policy that the verdict must have been judged by.")
@click.option(
    "--latency",
    type=click.Choice([choice.value for choice in Latency]),
    default=Latency.AUTO.value,
    show_default=True,
    help="The time that tables hold.",
)
@click.option("--eager", is_flag=True, help="Launch kernels one by one, whatever the engine does.")
@click.option("--retry-failed", is_flag=True, help="Measure quarantined cases again.")
@click.option("--seed", default=0, show_default=True, help="Of prompts and operands.")
@click.option("--no-doctor", is_flag=True, help="Run whatever `opkit doctor` would say.")
@timings
@places
def collect(plan_only: bool, no_doctor: bool, as_json: bool, **given: Any) -> int:
    """Measure OP's cases and write perf tables, if the ledger admits it.

    Exit code: 0 every planned row is in a table, 1 some are not, 7 refused.
    """  # fmt: skip
    timing = Timing(
        pacing=given.pop("pacing"),
        l2=given.pop("l2"),
        warmups=given.pop("warmups"),
        max_iterations=given["iterations"],
        min_iterations=min(DEFAULT.min_iterations, given.pop("iterations")),
        spread=given.pop("spread"),
        max_seconds=given.pop("max_seconds"),
        gpu_time=given.pop("gpu_time"),
        power=given.pop("measure_power"),
        power_seconds=given.pop("power_seconds"),
    )
    job = prepare(CollectOptions(timing=timing, **given), only_plan=plan_only)
    if plan_only:
        keys = {task.key for group in job.groups for task in group.tasks}
        done = sum(row.ok for key, row in read_parts(job.folder).rows.items() if key in keys)
        refused = () if given["waive"] else job.admission.differences
        if as_json:
            show(json.dumps(_plan_json(job, done, refused), indent=1) + "\n")
        else:
            show(shown(lambda console: print_plan(job.sweep, job.groups, done, refused, console)))
        return EXIT_PASS
    with RunBar() as bar:
        if not no_doctor:
            uuids = tuple(gpu.uuid for gpu in job.where.gpus)
            look_before_run(job.folder, bar.aside, nsys=False, gpus=uuids)
        found = run_collect(job, bar)
    if as_json:
        show(json.dumps(_collected_json(found), indent=1) + "\n")
    else:
        show(shown(lambda console: print_collected(found, console)))
    return EXIT_PASS if found.ok else EXIT_FAIL


@click.command()
@click.argument("op")
@click.option("--backend", default="", help="Of the collection; default: the newest.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=SAMPLE,
    show_default=True,
    help="Rows to measure again.",
)
@click.option("--seed", type=int, help="Of the sample; default: another one each time.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Share by which a row may deviate; default 0.02, against the engine 0.03.",
)
@click.option(
    "--against-e2e",
    is_flag=True,
    help="Compare with the GPU time that the engine spent in the aligned trace.",
)
@click.option(
    "--shipped",
    multiple=True,
    type=PathType,
    help="Another perf table (parquet) to show beside the engine; repeatable.",
)
@places
def verify(
    op: str,
    backend: str,
    sample: int,
    seed: int | None,
    tolerance: float | None,
    against_e2e: bool,
    shipped: tuple[Path, ...],
    as_json: bool,
    **given: Any,
) -> int:
    """Measure a sample of a collection again, or compare it with the engine itself.

    Exit code: 0 all within the tolerance, 1 not.
    """  # fmt: skip
    out = given["out"]
    folder, record = the_record(out, op, backend)
    where = _where(given)
    options = repeat.VerifyOptions(sample, seed, tolerance, shipped)
    with RunBar() as bar:
        if against_e2e:
            ledger = Ledger(out / "ledger.db")
            engine = repeat.verify_against_engine(folder, record, ledger, where, options, bar)
        else:
            found = repeat.verify_sample(folder, record, where, options, bar)
    if against_e2e:
        if as_json:
            data = {"schema": "opkit.fidelity/1", **asdict(engine), "passed": engine.passed}
            show(json.dumps(data, indent=1) + "\n")
        else:
            show(shown(lambda console: print_fidelity(engine, console)))
        return EXIT_PASS if engine.passed else EXIT_FAIL
    if as_json:
        data = {
            "schema": "opkit.verify/1", **asdict(found), "passed": found.passed,
            "median": found.median if found.rows else None,
            "worst": found.worst if found.rows else None,
        }  # fmt: skip
        show(json.dumps(data, indent=1) + "\n")
    else:
        show(shown(lambda console: print_verified(found, console)))
    return EXIT_PASS if found.passed else EXIT_FAIL


@click.command()
@click.argument("op")
@click.option(
    "--backend",
    default="",
    help="Whose tables they are to be; default: the framework that they name.",
)
@click.option("--version", default="", help="Of the backend; default: the one that they name.")
@click.option(
    "--systems",
    type=PathType,
    required=True,
    help="Overlay folder to make or add to: aiconfigurator's --systems-paths.",
)
@click.option("--system", required=True, help="aiconfigurator's name of the system (h100_sxm).")
@click.option(
    "--tables", type=PathType, help="Folder of the tables; default: the newest collection's."
)
@click.option("--aiconfigurator", default="", help="Interpreter that has it, or its program.")
@click.option(
    "--fill/--no-fill",
    default=True,
    show_default=True,
    help="Take rows that were not collected from the installed table of this version.",
)
@click.option(
    "--prove/--no-prove",
    default=True,
    show_default=True,
    help="Prove by scaling that the estimate reads the tables.",
)
@click.option(
    "--factor",
    type=click.FloatRange(min=1, min_open=True, max=100),
    default=FACTOR,
    show_default=True,
    help="By which the proof scales.",
)
@click.option("--model-path", default="", help="Of the estimate; default: follows from the table.")
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def install(
    op: str,
    backend: str,
    version: str,
    systems: Path,
    system: str,
    tables: Path | None,
    aiconfigurator: str,
    fill: bool,
    prove: bool,
    factor: float,
    model_path: str,
    out: Path,
    as_json: bool,
) -> int:
    """Lay OP's tables out for aiconfigurator and prove that it reads them.

    Exit code: 0 installed and proved, 1 the proof does not hold.
    """  # fmt: skip
    folder = tables or the_record(out, op, "")[0] / TABLES
    with Progress() as progress:
        found = run_install(
            find_op(op), folder, systems, system, backend=backend, version=version,
            aiconfigurator=aiconfigurator, fill=fill, prove=prove, factor=factor,
            asked=Asked(model_path=model_path), say=progress,
        )  # fmt: skip
    if as_json:
        data = {"schema": "opkit.installed/1", **asdict(found), "ok": found.ok}
        show(json.dumps(data, indent=1, default=str) + "\n")
    else:
        show(shown(lambda console: print_installed(found, console)))
    return EXIT_PASS if found.ok else EXIT_FAIL


def _where(given: dict[str, Any]) -> Where:
    return where_of(
        given["gpus"], given["python"], given["engine"], given["ray_address"],
        given["ray_workers"], given["case_timeout"], given["build_timeout"],
    )  # fmt: skip


def _plan_json(job: Job, done: int, refused: Sequence[str]) -> dict[str, Any]:
    return {
        "schema": "opkit.plan_of_collection/1",
        "sweep": job.sweep.origin,
        "tp": list(job.sweep.tp),
        "groups": {group.name: len(group.tasks) for group in job.groups},
        "rows": job.sweep.count(),
        "done": done,
        "estimate_s": job.sweep.estimate_s() * (1 - done / max(1, job.sweep.count())),
        "refused": list(refused),
    }


def _collected_json(found: Collected) -> dict[str, Any]:
    outcome = found.outcome
    return {
        "schema": "opkit.collected/1",
        "folder": str(found.folder),
        "tables": [
            {"name": made.name, "rows": made.rows, "status": made.status,
             "csv": str(made.csv), "parquet": str(made.parquet),
             "provenance": str(made.provenance)}
            for made in found.written.tables
        ],
        "planned": outcome.planned,
        "done": outcome.done,
        "already": found.already + outcome.skipped,
        "failed": outcome.failed_by_cause,
        "quarantined": len(found.quarantined),
        "elsewhere": found.elsewhere,
        "ok": found.ok,
        "not_run": {left.group.name: len(left.tasks) for left in outcome.not_run},
        "stopped": outcome.stopped,
        "wall_s": outcome.wall_s,
        "busy_s": outcome.busy_s,
        "lanes": outcome.lanes,
        "activities_s": dict(outcome.activities),
        "problems": [asdict(problem) for problem in found.written.problems],
        "unaligned_kernels": dict(found.unaligned),
        "record": asdict(found.record),
    }  # fmt: skip
