"""Are they the same kernels: launched alike, named alike, as often, in the same order."""

from __future__ import annotations

from collections import Counter

from opkit.align import causes
from opkit.align.checks.subject import (
    NAMED,
    ONE_SIDED,
    Subject,
    all_pairs,
    grouped,
    microseconds,
    result,
)
from opkit.align.result import CaseMatch, CheckResult, KernelPair, Level


def names(subject: Subject) -> CheckResult:
    """Every key kernel occurs on both sides, as the same kernel or a variant of it."""
    key = [(m, p) for m, p in all_pairs(subject) if p.key]
    # Another element type is never good enough, however short the kernel.
    bad = [
        (m, p)
        for m, p in all_pairs(subject)
        if (p.key and p.level not in NAMED) or p.level is Level.DTYPE
    ]

    def say(pair: KernelPair) -> str:
        if pair.level is Level.DTYPE and pair.mock and pair.e2e:
            return f"{pair.name}: other element types, mock {pair.mock.name}, E2E {pair.e2e.name}"
        return f"{pair.name}: {pair.level}"

    levels = Counter(str(p.level) for _, p in key)
    good = f"{len(key)} key kernels: " + ", ".join(f"{n} {level}" for level, n in levels.items())
    advice = causes.advise_names([p for _, p in bad]) if bad else None
    return result("names", grouped(bad, say), good, (p.name for _, p in bad), advice)


def counts(subject: Subject) -> CheckResult:
    """Each key kernel as often per forward on both sides; all launches per forward within
    tolerance."""
    problems, kernels, bad = [], [], []
    for match in subject.cases:
        sides: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for pair in match.pairs:
            if not pair.key:
                continue
            if pair.mock:
                sides[0][pair.name] += 1
            if pair.e2e:
                sides[1][pair.name] += 1
        for name in sorted(set(sides[0]) | set(sides[1])):
            if sides[0][name] != sides[1][name]:
                problems.append(
                    f"{match.e2e.case.label()}: {name} {sides[0][name]}× in the mock, "
                    f"{sides[1][name]}× in E2E"
                )
                kernels.append(name)
                bad += [p for p in match.pairs if p.name == name and p.level in ONE_SIDED]
        launched = (match.mock.launches, match.e2e.launches)
        if abs(launched[0] - launched[1]) > subject.policy.launches * launched[1]:
            problems.append(
                f"{match.e2e.case.label()}: {launched[0]} launches per forward in the mock, "
                f"{launched[1]} in E2E"
            )
            bad += [p for p in match.pairs if p.level in ONE_SIDED]
    per = {f"{m.mock.launches}" for m in subject.cases}
    good = f"each key kernel as often on both sides; {'/'.join(sorted(per))} launches per forward"
    return result("counts", problems, good, kernels, causes.advise_names(bad) if bad else None)


def missing_extra(subject: Subject) -> CheckResult:
    """Nothing key on one side only; glue on one side only stays within the policy's share; same
    order."""
    problems: list[str] = []
    rows: list[tuple[CaseMatch, KernelPair]] = []
    listed = 0
    crossed: dict[tuple[str, ...], list[str]] = {}
    for match in subject.cases:
        if found := _crossed(match):
            crossed.setdefault(found, []).append(match.e2e.case.label())
        alone = [p for p in match.pairs if p.level in ONE_SIDED]
        glue = [p for p in alone if p.glue and not p.key]
        over = sum(p.share for p in glue) > subject.policy.glue_share
        moved = {p.name for p in alone if p.level is Level.MOCK_ONLY} & {
            p.name for p in alone if p.level is Level.E2E_ONLY
        }
        rows += [(match, p) for p in alone if p.key or over or p.name in moved]
        listed += len(glue) if not over else 0
    by_side = {Level.MOCK_ONLY: "extra in the mock", Level.E2E_ONLY: "missing in the mock"}

    def say(pair: KernelPair) -> str:
        side = pair.mock or pair.e2e
        assert side is not None
        return (
            f"{by_side[pair.level]}: {pair.name}, {microseconds(side.median_ns)}, {pair.share:.1%}"
        )

    for side in by_side:
        chosen = [(m, p) for m, p in rows if p.level is side]
        names_cases: dict[str, list[str]] = {}
        for match, pair in chosen:
            names_cases.setdefault(pair.name, []).append(
                f"{match.e2e.case.label()} {_side_time(pair)}"
            )
        problems += [
            f"{by_side[side]}: {name} ({', '.join(where)})" for name, where in names_cases.items()
        ]
    problems += [
        f"in another order: {', '.join(shorts)} (at {', '.join(cases)})"
        for shorts, cases in crossed.items()
    ]
    good = "no kernel on one side only" if not listed else f"{listed} glue kernels on one side only"
    advice = causes.advise_names([p for _, p in rows]) if rows else causes.OTHER_ORDER
    kernels = [p.name for _, p in rows] + [short for shorts in crossed for short in shorts]
    return result("missing/extra", problems, good, kernels, advice)


def _crossed(match: CaseMatch) -> tuple[str, ...]:
    """Variants of one kernel that stand in each other's place."""
    beside = {
        (p.mock.name, p.e2e.name): p.e2e.short
        for p in match.pairs
        if p.level is Level.VARIANT and p.mock and p.e2e
    }
    return tuple(sorted({short for (m, e), short in beside.items() if (e, m) in beside}))


def _side_time(pair: KernelPair) -> str:
    side = pair.mock or pair.e2e
    assert side is not None
    return f"{microseconds(side.median_ns)}, {pair.share:.1%}"


def launch(subject: Subject) -> CheckResult:
    """Same shape, same launch mode, and equal grid and block for kernels of equal name."""
    problems, modes_differ, shapes_differ = [], False, False
    for match in subject.cases:
        where = match.e2e.case.label()
        if match.mock.mode != match.e2e.mode or match.mock.mode is None:
            mock_mode, e2e_mode = match.mock.mode or "mixed", match.e2e.mode or "mixed"
            problems.append(f"{where}: mock {mock_mode}, E2E {e2e_mode}")
            modes_differ = True
        if not _same_shape(match):
            problems.append(f"mock ran {match.mock.case.label()}, E2E ran {where}")
            shapes_differ = True
    rows = [
        (m, p)
        for m, p in all_pairs(subject)
        if p.level is Level.SAME
        and p.mock
        and p.e2e
        and (p.mock.grid, p.mock.block) != (p.e2e.grid, p.e2e.block)
    ]

    def say(pair: KernelPair) -> str:
        assert pair.mock is not None
        assert pair.e2e is not None
        return (
            f"{pair.name}: grid {pair.mock.grid} block {pair.mock.block} in the mock, "
            f"grid {pair.e2e.grid} block {pair.e2e.block} in E2E"
        )

    problems += grouped(rows, say)
    if shapes_differ:
        advice = causes.OTHER_SHAPE
    elif modes_differ:
        advice = causes.EAGER_NOT_GRAPH
    else:
        advice = causes.AUTOTUNED if all(_of_triton(p) for _, p in rows) else causes.OTHER_GRIDS
    modes = sorted({str(m.e2e.mode) for m in subject.cases})
    good = f"equal grids and blocks; {', '.join(modes)} on both sides"
    return result("launch", problems, good, (p.name for _, p in rows), advice)


def _of_triton(pair: KernelPair) -> bool:
    """Triton's kernels, and Inductor's of other families (casts), by their names."""
    side = pair.e2e or pair.mock
    return side is not None and (side.family == "triton" or "triton" in side.name.lower())


def _same_shape(match: CaseMatch) -> bool:
    """Equal batch and new tokens; cached tokens equal, or within a step's drift, or unknown."""
    mock, e2e = match.mock.case, match.e2e.case
    same = (mock.batch, mock.tokens) == (e2e.batch, e2e.tokens)
    near = e2e.past < 0 or abs(mock.past - e2e.past) <= max(16, 0.02 * e2e.past)
    return same and near
