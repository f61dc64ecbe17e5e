"""From two traces to a verdict: the straight path, top to bottom.

Steps, shapes and regions of the engine (``engine``, with ``shapes``, ``regions``, ``sequence``) →
beside the mock's (``match``) → checks → phases → result.
"""

from __future__ import annotations

import hashlib
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import opkit
from opkit.align.checks import Subject, run_checks
from opkit.align.engine import Engine, Search, distance, read_engine
from opkit.align.files import (
    Files,
    engine_backend,
    framework_version,
    said_backend,
    two_frameworks,
)
from opkit.align.match import match_regions
from opkit.align.policy import Policy
from opkit.align.profile.command_line import read_command
from opkit.align.regions import (
    CaseRegions,
    Region,
    Times,
    intruders,
    mock_regions,
    silent_iterations,
    sum_times,
)
from opkit.align.result import (
    MAX_SAMPLES,
    AlignResult,
    CaseMatch,
    KernelShare,
    Method,
    PhaseResult,
    SideSummary,
    worst,
)
from opkit.align.sorting import Sorted, sort_regions
from opkit.errors import BadInput
from opkit.layers.manifest import Manifest
from opkit.layers.op import Case, Op, Phase
from opkit.nsys_parsers.export import TraceFacts
from opkit.nsys_parsers.trace import open_trace

# Names listed of what lies outside the op's regions: enough to see whether something of it is
# missing there.
MAX_NAMES = 12


@dataclass(frozen=True)
class Question:
    """What is to be judged.

    Attributes:
        op: the op.
        mock: the mock's trace.
        e2e: the engine's traces, one per rank.
        backend: whose region pattern applies; empty: what the manifests say.
        policy: thresholds.
        phases: the phases to judge.
        strict: trace of the mock's strict variant (the module of the engine's own decoder layer).
        method: force one way of finding regions; None takes the best that applies.
    """

    op: Op
    mock: Path
    e2e: tuple[Path, ...]
    backend: str = ""
    policy: Policy = field(default_factory=Policy)
    phases: tuple[Phase, ...] = (Phase.CONTEXT, Phase.GENERATION)
    strict: Path | None = None
    method: Method | None = None


def judge(question: Question) -> AlignResult:
    """Compare a mock's trace with the engine's and judge both phases.

    Raises:
        BadInput: a trace cannot be used, is given twice, is of another backend than was asked for,
            or holds nothing of the op.
    """
    _region_of(question.op, question.backend)
    files = Files(question.backend)
    with open_trace(question.mock) as trace:
        mock_facts = trace.facts
        mock_manifest = files.admit(trace)
        regions = mock_regions(trace, question.op.name)
        silent = silent_iterations(trace, question.op.name)
        strange = intruders(trace, question.op.name)
    strict_losses: list[str] = []
    if question.strict is not None:
        with open_trace(question.strict) as trace:
            files.admit(trace, alone=False)
            strict_losses = _losses(trace.facts, "strict")
            found = mock_regions(trace, question.op.name)
            regions += [region for region in found if region.variant == "strict"]
    backend = question.backend or said_backend(mock_manifest) or engine_backend(question.e2e[0])
    _region_of(question.op, backend)
    engine = read_engine(
        question.e2e,
        Search(
            question.op,
            backend,
            regions,
            question.method,
            mock_manifest.tp_size if mock_manifest else 1,
        ),
        files,
    )
    engine.frameworks = two_frameworks(mock_manifest, engine.manifest)
    both = strict_losses + _other_system(mock_facts, mock_manifest, engine)
    for phase in question.phases:
        engine.losses.setdefault(phase, []).extend(both)
    for case, count in strange.items():
        engine.losses.setdefault(case.phase, []).append(
            f"mock: {count} kernels ran amid iterations of {case.label()}, not launched in them"
        )
    phases = tuple(
        _judge_phase(question, phase, regions, silent, engine, mock_facts, mock_manifest)
        for phase in question.phases
    )
    return AlignResult(
        op=question.op.name,
        backend=backend,
        verdict=worst([phase.verdict for phase in phases]),
        phases=phases,
        provenance=_provenance(question, backend, mock_facts, mock_manifest, engine),
        notes=tuple(dict.fromkeys(engine.notes)),
    )


def _judge_phase(
    question: Question,
    phase: Phase,
    mock: list[Region],
    silent: dict[Case, int],
    engine: Engine,
    mock_facts: TraceFacts,
    manifest: Manifest | None,
) -> PhaseResult:
    matches: list[CaseMatch] = []
    # Two frameworks explain what else differs, so they stand first.
    losses = [engine.frameworks] if engine.frameworks else []
    losses += _losses(mock_facts, "mock")
    losses += [loss for facts in engine.facts for loss in _losses(facts, "E2E")]
    losses += engine.losses.get(phase, [])
    notes: list[str] = []
    strict: dict[str, float] = {}
    engine_cases = [case for case in engine.cases if case.phase is phase]
    pairs, unmatched = _pair_cases(
        sorted({r.case for r in mock if r.case.phase is phase and r.variant == "mock"}),
        engine_cases,
    )
    notes += [f"E2E also ran {case.label()}; the mock did not" for case in unmatched]
    for shape in engine.shapes:
        if shape.case.phase is phase and shape.case not in engine.cases:
            losses.append(f"the op was not found in E2E steps of {shape.case.label()}")
    losses += [
        f"mock: {count} iterations of {case.label()} hold no kernel"
        for case, count in silent.items()
        if case.phase is phase
    ]
    losses += [
        f"E2E: {part.silent_steps} of {len(part.steps.steps)} steps of {case.label()} hold no "
        "kernel of the op"
        for case in engine_cases
        for part in engine.cases[case]
        if part.silent_steps
    ]
    for mock_case, e2e_case in pairs:
        own = [r for r in mock if r.case == mock_case]
        matches.append(_match(question, own, engine.cases[e2e_case]))
        if question.strict is not None:
            ratio = _strict_ratio(own, question.policy.min_regions)
            if ratio is not None:
                strict[mock_case.label()] = ratio
    subject = Subject(
        op=question.op,
        cases=tuple(matches),
        policy=question.policy,
        losses=tuple(dict.fromkeys(losses)),
        operands=manifest.operands if manifest else None,
        inputs=manifest.recipe.get("inputs", "") if manifest else "",
        strict=strict if question.strict is not None else None,
        frameworks=engine.frameworks,
    )
    checks = run_checks(subject)
    methods = [match.method for match in matches]
    return PhaseResult(
        phase=phase,
        verdict=worst([check.outcome for check in checks]),
        method=max(methods, key=list(Method).index) if methods else None,
        attributed=min((match.attributed for match in matches), default=0.0),
        cases=tuple(matches),
        checks=checks,
        notes=tuple(notes),
    )


def _pair_cases(mock: list[Case], e2e: list[Case]) -> tuple[list[tuple[Case, Case]], list[Case]]:
    """Pair every mock case with the E2E case nearest in shape; also the E2E cases left over."""
    pairs: list[tuple[Case, Case]] = []
    free = list(e2e)
    # Exact shapes first, so that a wrong shape cannot take the partner of a right one.
    for case in sorted(mock, key=lambda c: min((distance(c, o) for o in e2e), default=(0, 0, 0))):
        if not e2e:
            break
        partner = min(free or e2e, key=lambda other: distance(case, other))
        pairs.append((case, partner))
        if partner in free:
            free.remove(partner)
    return sorted(pairs), free


def _match(question: Question, own: list[Region], found: list[CaseRegions]) -> CaseMatch:
    mock = sort_regions(region for region in own if region.variant == "mock")
    e2e = sort_regions(region for part in found for region in part.regions)
    return CaseMatch(
        mock=_side(mock, 0),
        e2e=_side(e2e, sum(part.unattributed for part in found)),
        method=max((part.method for part in found), key=list(Method).index),
        attributed=min(part.attributed for part in found),
        explained=min(part.explained for part in found),
        pairs=match_regions(mock.modal, e2e.modal, question.policy),
        steps=sum(len(part.steps.steps) for part in found),
        unattributed=_shares([part.lost for part in found], found),
        outside=_shares([part.outside for part in found], found),
    )


def _shares(
    parts: Sequence[tuple[Times, ...]], found: Sequence[CaseRegions]
) -> tuple[KernelShare, ...]:
    """The names with most time, the rest as one entry; shares of the steps' GPU time."""
    total = max(1, sum(case.gpu_ns for case in found))
    names = list(sum_times(times for part in parts for times in part))
    rest = names[MAX_NAMES:]
    if rest:
        said = f"{len(rest)} other names"
        names[MAX_NAMES:] = sum_times(Times(said, x.launches, x.gpu_ns) for x in rest)
    return tuple(KernelShare(x.name, x.launches, x.gpu_ns, x.gpu_ns / total) for x in names)


def _side(found: Sorted, unattributed: int) -> SideSummary:
    regions = found.modal
    modes = {region.mode for region in regions}
    return SideSummary(
        case=regions[0].case,
        mode=modes.pop() if len(modes) == 1 else None,
        regions=len(regions) + len(found.odd) + len(found.misreported),
        odd_regions=len(found.odd),
        misreported=len(found.misreported),
        launches=len(regions[0].launches),
        gpu_ns=_median([region.gpu_ns for region in regions]),
        elapsed_ns=_median([region.elapsed_ns for region in regions]),
        unattributed=unattributed,
        samples_ns=tuple(region.gpu_ns for region in _evenly(regions)),
    )


def _evenly(regions: Sequence[Region]) -> Sequence[Region]:
    """At most ``MAX_SAMPLES`` regions, evenly over the trace."""
    if len(regions) <= MAX_SAMPLES:
        return regions
    return [regions[i * len(regions) // MAX_SAMPLES] for i in range(MAX_SAMPLES)]


def _median(values: list[int]) -> int:
    return round(statistics.median(values))


def _strict_ratio(own: list[Region], least: int) -> float | None:
    """GPU time of the strict variant over the mock's; infinite when their kernels differ.

    None when there are fewer than ``least`` strict regions.
    """
    plain = sort_regions(r for r in own if r.variant == "mock").modal
    strict = sort_regions(r for r in own if r.variant == "strict").modal
    if not plain or not strict or len(strict) < least:
        return None
    if plain[0].signature != strict[0].signature:
        return float("inf")
    return _median([r.gpu_ns for r in strict]) / max(1, _median([r.gpu_ns for r in plain]))


def _losses(facts: TraceFacts, side: str) -> list[str]:
    return [f"{side}: nsys says {text!r}" for text in facts.losses]


def _region_of(op: Op, backend: str) -> None:
    if backend and backend not in op.region:
        raise BadInput(f"op {op.name} has no region pattern for backend {backend!r}")


def _other_system(mock_facts: TraceFacts, mock: Manifest | None, engine: Engine) -> list[str]:
    """Where the files say that mock and engine ran on other hardware, version, model or flags."""
    said: list[tuple[str, set[Any], set[Any]]] = [
        ("GPU", set(mock_facts.gpus), set(facts.gpus)) for facts in engine.facts
    ]
    if mock is not None and engine.manifest is not None:
        ours, theirs = mock, engine.manifest
        backend = said_backend(mock)
        for what, left, right in (
            (backend, framework_version(ours, backend), framework_version(theirs, backend)),
            ("model", ours.model.get("config_sha256"), theirs.model.get("config_sha256")),
            ("ranks", ours.tp_size, theirs.tp_size),
            ("flags", shlex.join(ours.engine_args), _flags(theirs)),
        ):
            said.append((what, {left} - {None, ""}, {right} - {None, ""}))
    return [
        f"{what}: mock {', '.join(map(str, sorted(left)))}, "
        f"E2E {', '.join(map(str, sorted(right)))}"
        for what, left, right in said
        if left and right and not left & right
    ]


def _flags(engine: Manifest) -> str:
    """The engine's own flags out of its command, as a mock of it is given them; empty: unknown."""
    command = read_command(shlex.join(engine.command)) if engine.command else None
    return shlex.join(command.engine_args) if command and command.recognised else ""


def _provenance(
    question: Question, backend: str, mock_facts: TraceFacts, mock: Manifest | None, engine: Engine
) -> dict[str, Any]:
    e2e = engine.manifest
    pattern = question.op.region[backend]
    gpus = [gpu for facts in (mock_facts, *engine.facts) for gpu in facts.gpus]
    versions: dict[str, str] = {**(mock.versions if mock else {}), **(e2e.versions if e2e else {})}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "opkit": opkit.__version__,
        "op": question.op.name,
        "gpu": ", ".join(sorted(set(gpus))),
        "versions": versions,
        "model": (mock.model if mock else {}) or (e2e.model if e2e else {}),
        "dtypes": mock.dtypes if mock else {},
        "tp_size": mock.tp_size if mock else 1,
        "engine_args": list(mock.engine_args) if mock else [],
        "region": {"module": pattern.module, "borders": list(pattern.borders)},
        "layer_source": mock.layer_source if mock else {},
        "recipe": mock.recipe if mock else {},
        "operands": [asdict(operand) for operand in mock.operands] if mock else [],
        "waves": [asdict(wave) for wave in e2e.waves] if e2e else [],
        "commands": {
            "mock": list(mock.command) if mock else [],
            "e2e": list(e2e.command) if e2e else [],
        },
        "files": [_file(question.mock, "mock")] + [_file(path, "e2e") for path in question.e2e],
        "policy": asdict(question.policy),
        "policy_digest": question.policy.digest(),
        "nsys_warnings": sorted({w for f in (mock_facts, *engine.facts) for w in f.warnings}),
        "notes": list((mock.notes if mock else ()) + (e2e.notes if e2e else ())),
    }


def _file(path: Path, side: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "side": side,
        "name": path.name,
        "sha256": digest.hexdigest(),
        "bytes": path.stat().st_size,
    }
