"""Shapes the engine really ran: step labels read against the requests that were sent.

Labels give requests and new tokens of a step; how long each request's cache was follows from
replaying the waves of requests over the steps. A trace without waves gives what its labels say and
no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from opkit.layers.manifest import Wave
from opkit.layers.op import Case, Phase
from opkit.nsys_parsers.ranges import STEP_SQL, StepLabel, assign, parse_step
from opkit.nsys_parsers.trace import Trace

UNKNOWN_PAST = -1  # Case.past of a decode step when nothing tells the cache's length


@dataclass(frozen=True)
class Step:
    """One labelled forward step. ``id`` is the NVTX range's id, ``start`` in ns.

    ``pid``: the process that labelled it; all tensor-parallel ranks of one trace label the step
    that they run together.
    """

    id: int
    start: int
    label: StepLabel
    pid: int = 0


@dataclass(frozen=True)
class CaseSteps:
    """Steps of one shape.

    Attributes:
        case: the shape.
        steps: ids of the steps, in the order of the waves.
        past_range: smallest and largest cache length among decode steps.
        exact: ids of those that ran just this case, cache length and all.
    """

    case: Case
    steps: tuple[int, ...]
    past_range: tuple[int, int]
    exact: tuple[int, ...] = ()


@dataclass
class _Shapes:
    """Result under construction."""

    steps: list[tuple[Step, Case, int]] = field(default_factory=list)  # step, case, wave
    skipped: list[str] = field(default_factory=list)


def read_labels(trace: Trace) -> list[Step]:
    """Labelled steps in time order; creates table ``step_of`` (kernels launched in each)."""
    where = f"regexp_matches(text, '{STEP_SQL}')"
    assign(trace.db, "step_of", where)
    rows = trace.rows(f"SELECT id, start, text, pid FROM nvtx WHERE {where} ORDER BY start")
    steps = []
    for identifier, start, text, pid in rows:
        label = parse_step(text)
        # vLLM labels idle turns of its loop too: no request, no kernel.
        if label is not None and (label.context_requests or label.generation_requests):
            steps.append(Step(identifier, start, label, pid))
    return steps


def case_steps(steps: list[Step], waves: tuple[Wave, ...]) -> tuple[list[CaseSteps], list[str]]:
    """Group steps by shape.

    Args:
        steps: labelled steps in time order.
        waves: requests sent in the recorded window, in order; empty when unknown.

    Returns:
        The shapes, and a note for each kind of step that was left out.
    """
    found = _replay_each(steps, waves) if waves else None
    if found is None:
        found = _labels_alone(steps)
        if waves:
            found.skipped.append(
                "step labels do not add up to the requests sent; shapes are from labels alone"
            )
    groups: dict[tuple[Case, int], list[tuple[Step, Case]]] = {}
    for step, case, wave in found.steps:
        # Decode steps of one wave differ only in the cache's length: one case, its middle length.
        same = case if case.phase is Phase.CONTEXT else replace(case, past=0)
        groups.setdefault((same, wave), []).append((step, case))
    merged: dict[Case, CaseSteps] = {}
    for members in groups.values():
        pasts = sorted(case.past for _, case in members)
        case = replace(members[0][1], past=pasts[len(pasts) // 2])
        ids = tuple(step.id for step, _ in members)
        exact = tuple(step.id for step, own in members if own.past == case.past)
        if case in merged:
            ids, exact = merged[case].steps + ids, merged[case].exact + exact
            pasts = sorted([*pasts, *merged[case].past_range])
        merged[case] = CaseSteps(case, ids, (pasts[0], pasts[-1]), exact)
    return sorted(merged.values(), key=lambda c: c.case), sorted(set(found.skipped))


def _replay_each(steps: list[Step], waves: tuple[Wave, ...]) -> _Shapes | None:
    """Replay the waves over the steps of each process; None when one of them does not add up."""
    all_found = _Shapes()
    for pid in dict.fromkeys(step.pid for step in steps):
        own = [step for step in steps if step.pid == pid]
        # Steps before the waves are those of the priming request, some of them cut by the window,
        # or of all warm-up (SGLang labels from its start): the waves are what the steps end with.
        least = sum(max(wave.output, 1) for wave in waves)
        tries = (_replay(own, waves, begin) for begin in range(len(own) - least, -1, -1))
        found = next((replayed for replayed in tries if replayed is not None), None)
        if found is None:
            return None
        all_found.steps += found.steps
        all_found.skipped += found.skipped
    return all_found if steps else None


def _labels_alone(steps: list[Step]) -> _Shapes:
    found = _Shapes()
    for step in steps:
        label = step.label
        if label.context_requests and label.generation_requests:
            found.skipped.append("steps that mix both phases were left out")
        elif label.context_requests and label.context_tokens:
            tokens, rest = divmod(label.context_tokens, label.context_requests)
            if rest:
                found.skipped.append("steps with prompts of unequal length were left out")
            else:
                case = Case(Phase.CONTEXT, label.context_requests, tokens, 0)
                found.steps.append((step, case, 0))
        elif label.generation_requests and _speculative(label):
            found.skipped.append("decode steps of more than one token a request were left out")
        elif label.generation_requests:
            case = Case(Phase.GENERATION, label.generation_requests, 1, UNKNOWN_PAST)
            found.steps.append((step, case, 0))
        elif label.context_requests:
            found.skipped.append("context steps whose label gives no token count were left out")
    return found


def _speculative(label: StepLabel) -> bool:
    """Whether the decoding requests of a step have other than one new token each."""
    return label.generation_tokens not in (None, label.generation_requests)


def _scheduled_ahead(label: StepLabel, last: StepLabel) -> bool:
    """Whether the step repeats a wave's last decode step, whose requests had all ended by then.

    SGLang's overlapped scheduler launches the next step before it knows that none is needed.
    """
    return not label.context_requests and label.generation_requests == last.generation_requests


def _replay(steps: list[Step], waves: tuple[Wave, ...], at: int) -> _Shapes | None:
    """Replay the waves over the steps from number ``at`` on; None when they do not add up."""
    found = _Shapes()
    if any(wave.requests < 1 or wave.prompt < 1 for wave in waves):
        return None  # no request of this world
    for number, wave in enumerate(waves):
        waiting = wave.requests  # requests whose prompt has not begun
        chunk = 0  # tokens done of a prompt that is being processed in chunks
        running: list[int] = []  # cached tokens of each decoding request
        finished = 0
        last = StepLabel(0, 0, 0, 0)
        while finished < wave.requests:
            if at >= len(steps):
                return None
            step = steps[at]
            at += 1
            label = step.label
            if label.generation_requests != len(running) or label.context_tokens is None:
                return None
            if _speculative(label) or bool(label.context_requests) != bool(label.context_tokens):
                return None
            done = chunk + label.context_tokens
            prompts, rest = divmod(done, wave.prompt)
            if prompts > waiting or (rest and prompts == waiting):
                return None
            mixed = bool(label.context_requests and running)
            if mixed:
                found.skipped.append("steps that mix both phases were left out")
            elif label.context_requests:
                whole = chunk == 0 and rest == 0
                if whole:
                    case = Case(Phase.CONTEXT, prompts, wave.prompt, 0)
                    found.steps.append((step, case, number))
                elif label.context_requests == 1:
                    case = Case(Phase.CONTEXT, 1, label.context_tokens, chunk)
                    found.steps.append((step, case, number))
                else:
                    found.skipped.append("steps with prompts of unequal length were left out")
            elif running:
                case = Case(Phase.GENERATION, len(running), 1, max(running))
                found.steps.append((step, case, number))
            running = [past + 1 for past in running]
            still = [past for past in running if past - wave.prompt < wave.output - 1]
            finished += len(running) - len(still)
            running = still
            waiting -= prompts
            chunk = rest
            # The prompt's own step samples the first token; one more per decode step.
            if wave.output > 1:
                running += [wave.prompt] * prompts
            else:
                finished += prompts
            last = label
        if at < len(steps) and _scheduled_ahead(steps[at].label, last):
            found.skipped.append("a decode step scheduled after the last token was left out")
            at += 1
    return None if at < len(steps) else found
