"""The engine's side of an alignment: its shapes, and the op's regions in each of its traces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from opkit.align import sequence
from opkit.align.files import Files, read_manifest
from opkit.align.regions import (
    CaseRegions,
    Launch,
    Region,
    StepKernels,
    mark_layers,
    nvtx_regions,
    read_steps,
)
from opkit.align.result import Method
from opkit.align.shapes import CaseSteps, case_steps, read_labels
from opkit.align.sorting import sort_regions
from opkit.errors import BadInput
from opkit.layers.manifest import Manifest
from opkit.layers.op import Case, LaunchMode, Op, Phase
from opkit.nsys_parsers.export import TraceFacts
from opkit.nsys_parsers.trace import Trace, open_trace

# Steps of one shape that are read: enough for medians, and bounded however long the trace is.
MAX_STEPS = 16
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Search:
    """What is looked for in the engine's traces.

    Attributes:
        op: the op.
        backend: whose region pattern applies.
        mock: the mock's regions: the sequence to find where no module range reaches.
        method: force one way of finding regions; None takes the best that applies.
        tp_size: ranks that the mock stands for one of; above 1 collectives are no part of the op.
    """

    op: Op
    backend: str
    mock: Sequence[Region]
    method: Method | None = None
    tp_size: int = 1


@dataclass
class Engine:
    """The engine's side, over all ranks.

    Attributes:
        cases: what was found of each shape, one entry a rank.
        shapes: every shape that ran, found or not.
        facts: of each trace.
        manifest: of the first trace that has one.
        notes: what the reader should know.
        losses: per phase, what makes the evidence incomplete.
        not_found: shapes that a rank ran without the op being found: file name and shape.
        ran: the phases that each rank ran: file name and phases.
        frameworks: the mock's and the engine's, where the files say that they are two; else empty.
    """

    cases: dict[Case, list[CaseRegions]] = field(default_factory=dict)
    shapes: list[CaseSteps] = field(default_factory=list)
    facts: list[TraceFacts] = field(default_factory=list)
    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)
    losses: dict[Phase, list[str]] = field(default_factory=dict)
    not_found: list[tuple[str, Case]] = field(default_factory=list)
    ran: list[tuple[str, frozenset[Phase]]] = field(default_factory=list)
    frameworks: str = ""


def engine_shapes(
    paths: Sequence[Path],
) -> tuple[list[tuple[CaseSteps, LaunchMode]], Manifest | None]:
    """The shapes that the engine really ran, and how: from its first trace, for the mock to run.

    Returns:
        Shapes with their launch mode, and what the trace tells of its run, if it does.

    Raises:
        BadInput: no labelled forward step, or none of a uniform shape.
    """
    with open_trace(paths[0]) as trace:
        manifest = read_manifest(trace.facts)
        steps = read_labels(trace)
        cases, notes = case_steps(steps, manifest.waves if manifest else ())
        replayed = dict(
            trace.rows(
                "SELECT s.range_id, avg((k.graph_node IS NOT NULL)::INT) FROM step_of s "
                "JOIN kernel k ON k.id = s.kernel_id GROUP BY 1"
            )
        )
    if not cases:
        raise BadInput(
            f"{paths[0]}: no forward step with a readable label"
            + ("; " + notes[0] if notes else ""),
            "step labels need the engine's NVTX switches; `opkit align --dry-run` shows them",
        )
    shapes = []
    for case in cases:
        shares = [replayed.get(step, 0.0) for step in case.steps]
        graph = sum(shares) / len(shares) > 0.5
        shapes.append((case, LaunchMode.GRAPH if graph else LaunchMode.EAGER))
    return shapes, manifest


def read_engine(paths: Sequence[Path], search: Search, files: Files | None = None) -> Engine:
    """Find the op's regions in every trace.

    Args:
        paths: the engine's traces, one per rank.
        search: what to look for.
        files: those opened before, which must be other recordings.

    Raises:
        BadInput: a trace cannot be used, is one given before, or has no labelled forward step.
    """
    engine = Engine()
    files = files or Files()
    for path in paths:
        with open_trace(path) as trace:
            own = files.admit(trace)
            engine.facts.append(trace.facts)
            engine.manifest = engine.manifest or own
            _read_rank(search, trace, own, engine)
    _compare_ranks(engine)
    return engine


def _compare_ranks(engine: Engine) -> None:
    """What one rank shows and another does not is missing there, and makes the evidence thin."""
    for name, case in engine.not_found:
        if case in engine.cases:  # else it is missing everywhere, which the judge says
            engine.losses.setdefault(case.phase, []).append(
                f"{name}: the op was not found in steps of {case.label()}"
            )
    for phase in {phase for _, phases in engine.ran for phase in phases}:
        engine.losses.setdefault(phase, []).extend(
            f"{name}: no step of this phase, but other ranks have some"
            for name, phases in engine.ran
            if phase not in phases
        )


def _read_rank(search: Search, trace: Trace, own: Manifest | None, engine: Engine) -> None:
    pattern = search.op.region[search.backend]
    labels = read_labels(trace)
    if not labels:
        raise BadInput(
            f"{trace.facts.path}: no forward step is labelled, so no shape can be read",
            "run the engine with its NVTX switches; `opkit align --dry-run` shows them",
        )
    cases, notes = case_steps(labels, own.waves if own else ())
    engine.shapes += [case for case in cases if case not in engine.shapes]
    engine.notes += notes
    name = trace.facts.path.name
    engine.ran.append((name, frozenset(case.case.phase for case in cases)))
    mark_layers(trace, pattern)
    chosen = {case.case: _spread(_comparable(search.op, case)) for case in cases}
    steps = read_steps(trace, [step for ids in chosen.values() for step in ids])
    learned = sequence.learn(list(steps.values()))
    for case in cases:
        limited = replace(case, steps=chosen[case.case])
        found = None
        if search.method is not Method.SEQUENCE:
            found = nvtx_regions(limited, steps)
        if found is not None:
            _count_marked(limited, steps, learned.layers, engine)
        elif search.method in (Method.LAUNCH_NVTX, Method.NODE_NVTX):
            engine.losses.setdefault(case.case.phase, []).append(
                f"{name}: --regions nvtx, and no module range reaches the kernels of some steps "
                "(--window process records the ranges of graphs)"
            )
        elif peer := _nearest_mock(case.case, search.mock):
            found = sequence.sequence_regions(limited, steps, peer[0].launches, learned, pattern)
            if found is not None:
                _count_layers(found, case.case, len(learned.layers), engine)
        if found is not None and search.tp_size > 1:
            found = _without_communication(found, engine)
        if found is not None:
            engine.cases.setdefault(case.case, []).append(found)
        else:
            engine.not_found.append((name, case.case))


def _count_marked(
    case: CaseSteps, steps: dict[int, StepKernels], layers: frozenset[int], engine: Engine
) -> None:
    """By module ranges every layer must be found in every step in which any is found."""
    short = 0
    for step in (steps[i] for i in case.steps if i in steps):
        marked = {layer for layer in step.layers if layer is not None}
        short += bool(marked) and marked != layers
    if short:
        engine.losses.setdefault(case.case.phase, []).append(
            f"E2E: {short} of {len(case.steps)} steps of {case.case.label()} lack some of the "
            f"{len(layers)} layers"
        )


def _without_communication(found: CaseRegions, engine: Engine) -> CaseRegions | None:
    """The same without collectives: a mock of one rank has nobody to talk to.

    None when nothing else was found.
    """
    regions = tuple(
        replace(r, launches=tuple(x for x, out in _communicating(r.launches) if not out))
        for r in found.regions
    )
    left = {
        launch.name.short
        for region in found.regions
        for launch, out in _communicating(region.launches)
        if out
    }
    if left:
        listed = ", ".join(sorted(left))
        engine.notes.append(f"communication left out of the engine's regions: {listed}")
    regions = tuple(region for region in regions if region.launches)
    return replace(found, regions=regions) if regions else None


def _communicating(launches: Sequence[Launch]) -> Iterator[tuple[Launch, bool]]:
    """Each launch, and whether it communicates or copies for what communicates next.

    Outside graphs vLLM's own all-reduce first copies its input into a buffer that all ranks see
    (``CustomAllreduce.all_reduce``, ``registered=False``).
    """
    after = [*launches[1:], None]
    for launch, following in zip(launches, after, strict=True):
        staging = (
            following is not None
            and following.name.communication
            and not launch.from_graph
            and launch.name.demangled == "[memcpy DtoD]"
        )
        yield launch, launch.name.communication or staging


def _count_layers(found: CaseRegions, case: Case, layers: int, engine: Engine) -> None:
    """By sequence every layer but the first (no border on its left) must be found in every step."""
    if not layers:
        engine.notes.append("no module range shows how many layers the model has")
        return
    engine.notes.append("by sequence the first layer is left out: it has no border on its left")
    per_step = len(found.regions) / max(1, len(found.steps.steps))
    if per_step < layers - 1:
        engine.losses.setdefault(case.phase, []).append(
            f"{case.label()}: {per_step:g} of {layers} layers found by sequence"
        )


def _comparable(op: Op, case: CaseSteps) -> tuple[int, ...]:
    """The steps that the mock's case stands for: all of the shape, or of a routed op just those.

    Decode steps of a wave send their few tokens to other experts each: on an H100 a Mixtral layer's
    4 tokens took 584 µs in one step (5 experts) and 696 in the next (6).
    """
    return case.exact if op.routed and case.exact else case.steps


def _spread(ids: tuple[int, ...]) -> tuple[int, ...]:
    """At most ``MAX_STEPS`` ids over the window: one of each of as many equal parts, never at equal
    distances.

    What a decode step takes may follow its token, and tokens may alternate: on an H100 SGLang's
    top-k took 9 µs in even steps and 7 in odd ones; every fourth step would show one kind alone.
    The place within a part moves by the golden ratio (Weyl's sequence), so no period is hit.
    """
    if len(ids) <= MAX_STEPS:
        return ids
    ends = [i * len(ids) // MAX_STEPS for i in range(MAX_STEPS + 1)]
    return tuple(
        ids[start + int((end - start) * (number * GOLDEN_RATIO % 1))]
        for number, (start, end) in enumerate(pairwise(ends))
    )


def _nearest_mock(case: Case, mock: Sequence[Region]) -> list[Region]:
    """The mock's regions of the case nearest in shape within the phase; most frequent sequence
    only."""
    cases = {r.case for r in mock if r.case.phase is case.phase and r.variant == "mock"}
    if not cases:
        return []
    nearest = min(cases, key=lambda c: distance(c, case))
    own = [r for r in mock if r.case == nearest and r.variant == "mock"]
    return list(sort_regions(own).modal)


def distance(a: Case, b: Case) -> tuple[float, float, float]:
    """Ratio of batches first, then of new tokens, then difference of cached tokens."""
    return (  # a range's text may say 0, which is nearest to nothing
        max(a.batch, b.batch) / max(1, min(a.batch, b.batch)),
        max(a.tokens, b.tokens) / max(1, min(a.tokens, b.tokens)),
        abs(a.past - b.past),
    )
