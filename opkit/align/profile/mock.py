"""Profile the mock: ``python -m opkit.layers.drive PLAN.json`` under nsys."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from opkit.align.profile.modes import nsys_output
from opkit.align.profile.perform import perform
from opkit.align.profile.plan import Command, Finish, ProfilePlan, Start
from opkit.align.profile.process import Grace, Progress
from opkit.errors import BadInput, RunFailed, ToolMissing
from opkit.layers.manifest import sidecar_of
from opkit.layers.nvtx import NSYS_VERSION
from opkit.nsys_parsers.tool import find_nsys


@dataclass(frozen=True)
class MockRequest:
    """What to profile.

    Attributes:
        plan: the JSON file that ``opkit.layers.drive`` reads.
        report: the ``.nsys-rep`` to write; drive writes ``sidecar_of(report)``.
        python: the interpreter that has the framework.
        env: variables to set for it.
        limit_s: seconds it may take in all.
    """

    plan: Path
    report: Path
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)
    limit_s: float = 1800.0


def plan_mock(request: MockRequest, *, dry_run: bool = False) -> ProfilePlan:
    """Decide what to run; the plan's ``text()`` is the dry run.

    Args:
        dry_run: the plan is only to be read: it may lack nsys and the mock's plan file.

    Raises:
        BadInput: the mock's plan file is not there.
        ToolMissing: no nsys.
    """
    if not dry_run and not request.plan.is_file():
        raise BadInput(f"{request.plan}: no such mock plan")
    env = dict(request.env)
    try:
        found = find_nsys()
        nsys, env[NSYS_VERSION] = found.path, found.version
    except ToolMissing:
        if not dry_run:
            raise
        nsys = Path("nsys")
    report = request.report.absolute()
    session = f"opkit-{uuid4().hex[:8]}"
    argv = [str(nsys), "profile", f"--session-new={session}", "-t", "cuda,nvtx"]
    argv += ["--cuda-graph-trace=node", "--sample=none", "--cpuctxsw=none"]
    # drive opens the range after its warm-up; after `stop` it runs on to its own end and exit code.
    argv += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    argv += ["-o", nsys_output(report), "--force-overwrite=true"]
    argv += [request.python, "-m", "opkit.layers.drive", str(request.plan.absolute())]
    return ProfilePlan(
        steps=(
            Start(Command(tuple(argv), "run the mock under nsys", env)),
            Finish(request.limit_s),
        ),
        reports=(report,),
        log=report.with_suffix(".log"),
        nsys=nsys,
        sessions=(session,),
        missing="the mock has ended without opening its range (cudaProfilerStart)",
    )


def run_mock(plan: ProfilePlan, progress: Progress, grace: Grace | None = None) -> Path:
    """Run the mock's plan; return its new report. nsys passes on the exit code of drive.

    Raises:
        RunFailed: drive failed, took too long, never opened its capture range, or left no sidecar.
        ToolMissing, BadInput, KeyboardInterrupt: see :func:`perform`.
    """
    report = plan.reports[0]
    sidecar_of(report).unlink(missing_ok=True)
    perform(plan, progress, grace=grace)
    if not sidecar_of(report).is_file():
        raise RunFailed(f"the mock left no manifest ({sidecar_of(report)})", f"its log: {plan.log}")
    return report
