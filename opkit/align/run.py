"""The live path: profile the engine, read the shapes it ran, profile the mock at those shapes,
judge.

Everything made goes into one folder of the run: reports, exports, logs, the mock's plan, the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.align.engine import engine_shapes
from opkit.align.judge import Question, judge
from opkit.align.policy import Policy
from opkit.align.profile.capture import plan_capture, run_capture
from opkit.align.profile.e2e import E2EPlan, E2ERequest, plan_e2e, run_e2e
from opkit.align.profile.mock import MockRequest, plan_mock, run_mock
from opkit.align.result import AlignResult
from opkit.align.shapes import CaseSteps
from opkit.errors import BadInput
from opkit.layers.geometry import read_geometry
from opkit.layers.manifest import Answer, sidecar_of
from opkit.layers.op import Case, LaunchMode, Op, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.nsys_parsers.tool import export_sqlite

MIN_DECODE_STEPS = 3

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LiveRequest:
    """A live alignment as asked for.

    Attributes:
        op: the op.
        backend: the engine whose classes build the mock.
        e2e: the engine's run; its ``out_dir`` holds everything.
        policy: thresholds.
        phases: phases to judge.
        strict: run the mock a second time out of the engine's own decoder layer.
        python: interpreter that has the framework, for the mock.
        iterations: measured iterations of each mock case.
        traces: the engine's side as recorded before; empty: it is run.
        inputs: how the mock's activations are made, one of ``opkit.layers.plan.INPUTS``.
        captured: folder of captured inputs; None: with ``inputs`` = ``captured`` they are captured
            first, by a run of the engine.
        layer: the engine's layer whose inputs are captured.
    """

    op: Op
    backend: str
    e2e: E2ERequest
    policy: Policy
    phases: tuple[Phase, ...]
    strict: bool
    python: str
    iterations: int = 20
    traces: tuple[Path, ...] = ()
    inputs: str = "tokens"
    captured: Path | None = None
    layer: int = 0


def dry_run(request: LiveRequest) -> str:
    """Every command that would run, as text."""
    e2e = plan_e2e(request.e2e, dry_run=True)
    folder = request.e2e.out_dir
    recorded = "".join(f"# read {path}\n" for path in request.traces)
    parts = ["# 1. the serving engine", recorded or e2e.text()]
    if _captures(request):
        parts += [
            "# then the engine again, to store the op's inputs",
            plan_capture(e2e, request.op, _layer(request, e2e), folder / "captured").text(),
        ]
    for number, strict in enumerate([False, True] if request.strict else [False], start=2):
        mock = plan_mock(_mock_request(request, e2e, folder, strict), dry_run=True)
        name = "mock, out of the engine's decoder layer" if strict else "mock"
        parts += [f"# {number}. the {name}, at the shapes read from 1", mock.text()]
    return "\n".join(parts)


def align_live(request: LiveRequest, progress: Progress) -> AlignResult:
    """Profile both sides and judge.

    Raises:
        OpkitError: what could not be run or read.
        KeyboardInterrupt: after everything started has been ended.
    """
    folder = request.e2e.out_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    e2e = plan_e2e(request.e2e, dry_run=bool(request.traces))
    if request.traces:
        engine = list(request.traces)
    else:
        engine = [_export(report, progress) for report in run_e2e(e2e, progress)]
    if _captures(request):
        run_capture(e2e, request.op, _layer(request, e2e), folder / "captured", progress)
    ran, manifest = engine_shapes(engine)
    layers = manifest.model.get("num_hidden_layers") if manifest else None
    # A model of unknown depth has layers enough: what is too little, the verdict says.
    layers = int(layers or request.policy.min_regions)
    scarce = [case for case, _ in ran if _transient(case, layers, request.policy)]
    shapes = _worth_a_mock(ran, scarce, request.phases)
    if not shapes:
        raise BadInput("the engine ran none of the phases asked for in the recorded window")
    if any(case.case.past < 0 for case, _ in shapes):
        raise BadInput(
            "the engine's step labels do not add up to the requests sent, so the cache lengths of "
            "its decode steps are unknown",
            "was something else sending requests to the server? send the waves alone",
        )
    listed = ", ".join(f"{case.case.phase} {case.case.label()} ({mode})" for case, mode in shapes)
    progress(f"the engine ran {listed}")
    cases = tuple(PlannedCase(case.case, mode) for case, mode in shapes)
    answers = manifest.answers if manifest is not None else ()
    mock = _run_mock(request, e2e, cases, answers, False, progress)
    strict = _run_mock(request, e2e, cases, answers, True, progress) if request.strict else None
    progress("judging")
    return judge(
        Question(
            request.op,
            mock,
            tuple(engine),
            request.backend,
            request.policy,
            request.phases,
            strict,
        )
    )


def _layer(request: LiveRequest, e2e: E2EPlan) -> int:
    """The layer to capture: the one asked for, or the first after it that has the op's modules."""
    if not request.op.routed or e2e.model_dir is None:
        return request.layer
    experts = read_geometry(e2e.model_dir).experts
    return max(request.layer, experts.first_dense if experts else 0)


def _captures(request: LiveRequest) -> bool:
    """Whether the engine is run once more, to store the op's inputs."""
    return request.inputs == "captured" and request.captured is None


def _transient(shape: CaseSteps, layers: int, policy: Policy) -> bool:
    """A batch seen for a step or two: too little to judge by.

    Decode batches as a wave begins or ends; prefill batches as the scheduler splits a wave once.
    """
    if shape.case.phase is Phase.GENERATION:
        return len(shape.steps) < MIN_DECODE_STEPS
    return len(shape.steps) * layers < policy.min_regions


def _worth_a_mock(
    ran: Sequence[tuple[CaseSteps, LaunchMode]],
    scarce: Sequence[CaseSteps],
    phases: Sequence[Phase],
) -> list[tuple[CaseSteps, LaunchMode]]:
    """The shapes to run: all but the scarce ones, which the verdict then names as not run.

    Prefills that are all scarce are run all the same: the verdict says what was too little.
    """
    enough = {case.case.phase for case, _ in ran if case not in scarce} | {Phase.GENERATION}
    return [
        (case, mode)
        for case, mode in ran
        if case.case.phase in phases and not (case in scarce and case.case.phase in enough)
    ]


def _mock_request(request: LiveRequest, e2e: E2EPlan, folder: Path, strict: bool) -> MockRequest:
    name = "strict" if strict else "mock"
    return MockRequest(
        plan=folder / f"{name}.plan.json",
        report=folder / f"{name}.nsys-rep",
        python=request.python,
        # Variables in front of the serving command choose its backends, and so the mock's.
        env={**e2e.server.env, **request.e2e.env},
    )


def _run_mock(
    request: LiveRequest,
    e2e: E2EPlan,
    cases: tuple[PlannedCase[Case], ...],
    answers: tuple[Answer, ...],
    strict: bool,
    progress: Progress,
) -> Path:
    if e2e.model_dir is None:
        raise BadInput("the model's folder is not known", "give it with --model")
    asked = _mock_request(request, e2e, e2e.request.out_dir, strict)
    captured = request.captured or e2e.request.out_dir / "captured"
    plan = Plan(
        op=request.op.name,
        backend=request.backend,
        model=str(e2e.model_dir.absolute()),
        cases=cases,
        manifest=str(sidecar_of(asked.report)),
        engine_args=e2e.server.engine_args,
        tp_size=e2e.server.tp_size,
        seed=request.e2e.seed,
        iterations=request.iterations,
        strict=strict,
        inputs=request.inputs,
        captured=str(captured.absolute()) if request.inputs == "captured" else "",
        layer=request.layer,
        answers=answers,
    )
    plan.write(asked.plan)
    return _export(run_mock(plan_mock(asked), progress), progress)


def _export(report: Path, progress: Progress) -> Path:
    progress(f"exporting {report.name}")
    return export_sqlite(report, report.with_suffix(".sqlite"))
