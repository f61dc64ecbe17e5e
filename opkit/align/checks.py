"""The checks: one function a rule, each over all matched cases of one phase. Rules are in
``docs/checks.md``.

A check returns what it found even when it passes: a verdict without numbers convinces nobody.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from opkit.align import causes
from opkit.align.policy import HARD_CEILING, Policy
from opkit.align.result import CaseMatch, CheckResult, KernelPair, Level, Outcome
from opkit.layers.manifest import Operand
from opkit.layers.op import Op

ONE_SIDED = (Level.MOCK_ONLY, Level.E2E_ONLY)
MAX_SHOWN = 4  # problems spelled out in a check's detail
NAMED = (Level.SAME, Level.VARIANT, Level.ROLE)


@dataclass(frozen=True)
class Subject:
    """What the checks of one phase look at.

    Attributes:
        op: the op.
        cases: matched cases.
        policy: thresholds.
        losses: what nsys or the parser reports as lost, for either side.
        operands: the mock's sampled operands; None when its trace does not say.
        strict: summed GPU time of the strict variant over the mock's, by case label; empty without
            ``--strict``.
    """

    op: Op
    cases: tuple[CaseMatch, ...]
    policy: Policy
    losses: tuple[str, ...] = ()
    operands: tuple[Operand, ...] | None = None
    strict: dict[str, float] | None = None


def run_checks(subject: Subject) -> tuple[CheckResult, ...]:
    """All checks, in the order in which a reader wants them."""
    if not subject.cases:  # nothing to compare: one sentence why, no empty rules
        return (evidence(subject),)
    # Another shape or launch mode explains most of what follows it.
    checks: list[Callable[[Subject], CheckResult]] = [
        evidence,
        launch,
        names,
        counts,
        missing_extra,
        latency,
        data,
    ]
    if subject.strict is not None:
        checks.append(strict)
    return _explained_by_shape(tuple(check(subject) for check in checks))


def _explained_by_shape(results: tuple[CheckResult, ...]) -> tuple[CheckResult, ...]:
    """Where another shape ran, what else differs is its consequence, and is said to be."""
    if not any(r.cause == causes.OTHER_SHAPE.cause for r in results):
        return results
    follows = causes.FOLLOWS_SHAPE
    return tuple(
        replace(r, cause=follows.cause, next_step=follows.next_step)
        if r.outcome is Outcome.FAIL and r.check != "launch" and r.cause != causes.DEGENERATE.cause
        else r
        for r in results
    )


def _result(
    check: str,
    problems: Sequence[str],
    good: str,
    kernels: Iterable[str] = (),
    advice: causes.Advice | None = None,
    outcome: Outcome = Outcome.FAIL,
) -> CheckResult:
    if not problems:
        return CheckResult(check, Outcome.PASS, good)
    return CheckResult(
        check,
        outcome,
        _shortened(list(dict.fromkeys(problems))),
        tuple(dict.fromkeys(kernels)),
        advice.cause if advice else "",
        advice.next_step if advice else "",
    )


def _shortened(problems: list[str]) -> str:
    """The first few problems; the report's table and ``kernels`` hold them all."""
    shown = "; ".join(problems[:MAX_SHOWN])
    rest = len(problems) - MAX_SHOWN
    return f"{shown}; and {rest} more" if rest > 0 else shown


def evidence(subject: Subject) -> CheckResult:
    """Enough was recorded to judge at all; otherwise inconclusive, never pass."""
    policy = subject.policy
    problems = list(subject.losses)
    for match in subject.cases:
        where = match.e2e.case.label()
        if match.attributed < policy.min_attributed:
            problems.append(
                f"{where}: {match.attributed:.1%} of the step's kernels are linked to a launch, "
                f"{policy.min_attributed:.0%} needed"
            )
        for side, summary in (("mock", match.mock), ("E2E", match.e2e)):
            if summary.regions < policy.min_regions:
                problems.append(
                    f"{where}: {summary.regions} {side} region(s), {policy.min_regions} needed"
                )
            if summary.odd_regions > policy.max_odd_share * summary.regions:
                problems.append(
                    f"{where}: {summary.odd_regions} of {summary.regions} {side} regions launch "
                    "another kernel sequence than the rest"
                )
    least = min((m.attributed for m in subject.cases), default=0.0)
    regions = sum(m.e2e.regions for m in subject.cases)
    advice = causes.Advice(
        "the record is incomplete or the engine's regions differ among themselves",
        "record again (longer window, fewer other traces on); see the cases named",
    )
    wrong = sum(m.e2e.misreported + m.mock.misreported for m in subject.cases)
    aside = f"; {wrong} regions set aside: nsys calls a graph's kernel a copy" if wrong else ""
    good = (
        f"{regions} E2E regions, at least {least:.1%} of their steps' kernels linked to launches"
        f"{aside}"
    )
    if not subject.cases:
        problems.append("no case was found on both sides")
    return _result("evidence", problems, good, (), advice, Outcome.INCONCLUSIVE)


def _pairs(subject: Subject) -> list[tuple[CaseMatch, KernelPair]]:
    return [(match, pair) for match in subject.cases for pair in match.pairs]


def _microseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:.1f} µs"


def _grouped(
    rows: Sequence[tuple[CaseMatch, KernelPair]], text: Callable[[KernelPair], str]
) -> list[str]:
    """One sentence per kernel, naming the cases it holds for."""
    where: dict[str, list[str]] = {}
    for match, pair in rows:
        where.setdefault(text(pair), []).append(match.e2e.case.label())
    return [f"{what} (at {', '.join(dict.fromkeys(cases))})" for what, cases in where.items()]


def names(subject: Subject) -> CheckResult:
    """Every key kernel occurs on both sides, as the same kernel or a variant of it."""
    key = [(m, p) for m, p in _pairs(subject) if p.key]
    bad = [(m, p) for m, p in key if p.level not in NAMED]

    def say(pair: KernelPair) -> str:
        if pair.level is Level.DTYPE and pair.mock and pair.e2e:
            return f"{pair.name}: other element types, mock {pair.mock.name}, E2E {pair.e2e.name}"
        return f"{pair.name}: {pair.level}"

    levels = Counter(str(p.level) for _, p in key)
    good = f"{len(key)} key kernels: " + ", ".join(f"{n} {level}" for level, n in levels.items())
    advice = causes.advise_names([p for _, p in bad]) if bad else None
    return _result("names", _grouped(bad, say), good, (p.name for _, p in bad), advice)


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
    return _result("counts", problems, good, kernels, causes.advise_names(bad) if bad else None)


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
            f"{by_side[pair.level]}: {pair.name}, {_microseconds(side.median_ns)}, {pair.share:.1%}"
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
    return _result("missing/extra", problems, good, kernels, advice)


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
    return f"{_microseconds(side.median_ns)}, {pair.share:.1%}"


def launch(subject: Subject) -> CheckResult:
    """Same shape, same launch mode, and equal grid and block for kernels of equal name."""
    problems, kernels = [], []
    advice = causes.OTHER_SHAPE
    for match in subject.cases:
        where = match.e2e.case.label()
        if match.mock.mode != match.e2e.mode:
            problems.append(f"{where}: mock {match.mock.mode}, E2E {match.e2e.mode}")
            advice = causes.EAGER_NOT_GRAPH
        if not _same_shape(match):
            problems.append(f"mock ran {match.mock.case.label()}, E2E ran {where}")
            advice = causes.OTHER_SHAPE
    rows = [
        (m, p)
        for m, p in _pairs(subject)
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

    problems += _grouped(rows, say)
    kernels += [p.name for _, p in rows]
    modes = sorted({str(m.e2e.mode) for m in subject.cases})
    good = f"equal grids and blocks; {', '.join(modes)} on both sides"
    return _result("launch", problems, good, kernels, advice)


def _same_shape(match: CaseMatch) -> bool:
    """Equal batch and new tokens; cached tokens equal, or within a step's drift, or unknown."""
    mock, e2e = match.mock.case, match.e2e.case
    same = (mock.batch, mock.tokens) == (e2e.batch, e2e.tokens)
    near = e2e.past < 0 or abs(mock.past - e2e.past) <= max(16, 0.02 * e2e.past)
    return same and near


def _tolerance(pair: KernelPair, policy: Policy) -> float:
    """Allowed difference of two medians in ns: relative, widened by spread, never below the
    floor."""
    assert pair.mock is not None
    assert pair.e2e is not None
    spread = policy.kernel_spread * (pair.mock.mad_ns + pair.e2e.mad_ns)
    return max(policy.kernel_latency * pair.e2e.median_ns, spread, policy.kernel_floor_us * 1000)


def _deviates(pair: KernelPair, policy: Policy) -> bool:
    if pair.mock is None or pair.e2e is None:
        return False
    difference = abs(pair.mock.median_ns - pair.e2e.median_ns)
    if pair.key and difference > _tolerance(pair, policy):
        return True
    ratio = max(pair.mock.median_ns, 1) / max(pair.e2e.median_ns, 1)
    return (
        max(ratio, 1 / ratio) > policy.odd_kernel_ratio
        and difference > policy.odd_kernel_floor_us * 1000
    )


def _ratio_text(pair: KernelPair) -> str:
    assert pair.mock is not None
    assert pair.e2e is not None
    return (
        f"{pair.name}: mock {_microseconds(pair.mock.median_ns)}, "
        f"E2E {_microseconds(pair.e2e.median_ns)} ({pair.ratio:.2f}×)"
    )


def latency(subject: Subject) -> CheckResult:
    """GPU time per forward within tolerance, and each kernel within what its own spread allows."""
    policy = subject.policy
    problems, kernels = [], []
    ratios = []
    for match in subject.cases:
        ratio = match.mock.gpu_ns / max(1, match.e2e.gpu_ns)
        ratios.append(ratio)
        if abs(ratio - 1) > policy.latency or not 1 / HARD_CEILING < ratio < HARD_CEILING:
            problems.append(
                f"{match.e2e.case.label()}: GPU time per forward "
                f"{_microseconds(match.mock.gpu_ns)} in the mock, "
                f"{_microseconds(match.e2e.gpu_ns)} in E2E ({ratio:.3f}×)"
            )
        for pair in match.pairs:
            if pair.level in NAMED and _deviates(pair, policy):
                problems.append(f"{match.e2e.case.label()}: {_ratio_text(pair)}")
                kernels.append(pair.name)
    good = f"GPU time per forward mock/E2E {min(ratios):.3f} to {max(ratios):.3f}"
    return _result("latency", problems, good, kernels, causes.SLOW_SIDE)


def data(subject: Subject) -> CheckResult:
    """Times of equal kernels agree; if not, says whether data or clock; operands are not
    degenerate."""
    policy = subject.policy
    if subject.operands is None and policy.require_operands:
        return CheckResult(
            "data",
            Outcome.INCONCLUSIVE,
            "the mock's trace does not say what its operands were",
            cause="no manifest in the mock's trace",
            next_step="make the mock's trace with `opkit align`, or set require_operands = false",
        )
    degenerate = [text for o in subject.operands or () if (text := _degenerate(o, policy))]
    if degenerate:
        return _result("data", degenerate, "", (), causes.DEGENERATE)
    scaled = [text for match in subject.cases if (text := _all_heavy_scale(match, policy))]
    if scaled:
        return _result("data", scaled, "", (), causes.OPERAND_DATA)
    rows = [
        (m, p)
        for m, p in _pairs(subject)
        if p.key
        and p.level is Level.SAME
        and p.mock
        and p.e2e
        and p.mock.grid == p.e2e.grid
        and _deviates(p, policy)
    ]
    known = [p for _, p in rows if _is_data_dependent(subject.op, p)]
    good = (
        f"{len(subject.operands or ())} operands sampled, none degenerate; equal kernels take "
        "equal time"
    )
    advice = causes.DATA_DEPENDENT if known or rows else None
    return _result("data", _grouped(rows, _ratio_text), good, (p.name for _, p in rows), advice)


def _is_data_dependent(op: Op, pair: KernelPair) -> bool:
    side = pair.e2e or pair.mock
    return side is not None and any(re.search(p, side.name) for p in op.data_dependent)


def _degenerate(operand: Operand, policy: Policy) -> str:
    shown = f"{operand.name} {list(operand.shape)} {operand.dtype}"
    if operand.zeros > policy.max_zeros:
        return f"{shown}: {operand.zeros:.0%} zeros"
    if operand.equal_rows > policy.max_equal_rows:
        return f"{shown}: {operand.equal_rows:.0%} of the sampled rows are equal"
    if operand.distinct < policy.min_distinct:
        return f"{shown}: {operand.distinct:.2%} distinct values"
    return ""


def _all_heavy_scale(match: CaseMatch, policy: Policy) -> str:
    """A sentence when every heavy kernel of equal name and grid differs the same way, else
    empty."""
    ratios = [
        p.ratio
        for p in match.pairs
        if p.level is Level.SAME
        and p.ratio is not None
        and p.share >= policy.heavy_share
        and p.mock
        and p.e2e
        and p.mock.grid == p.e2e.grid
        and p.e2e.median_ns > 10 * policy.kernel_floor_us * 1000
    ]
    if len(ratios) < 3:
        return ""
    middle = statistics.median(ratios)
    alike = all((r > 1) == (middle > 1) for r in ratios)
    if not alike or abs(middle - 1) <= policy.heavy_scale:
        return ""
    return (
        f"{match.e2e.case.label()}: all {len(ratios)} heavy kernels take {middle:.2f}× E2E's time "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def strict(subject: Subject) -> CheckResult:
    """The module of the engine's own decoder layer against the mock: GPU time within the policy's
    share."""
    found = subject.strict or {}
    limit = subject.policy.strict
    problems = [
        f"{case}: decoder layer's module takes {ratio:.4f}× the mock's GPU time"
        for case, ratio in found.items()
        if abs(ratio - 1) > limit
    ]
    if not found:
        return CheckResult(
            "strict",
            Outcome.INCONCLUSIVE,
            "no strict regions in the mock's trace",
            next_step="run the mock with --strict",
        )
    good = f"within {limit:.0%} in {len(found)} cases"
    return _result("strict", problems, good, (), causes.OTHER_KERNEL)
