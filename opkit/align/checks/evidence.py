"""Is there enough to judge at all."""

from __future__ import annotations

from opkit.align import causes
from opkit.align.checks.subject import MAX_SHOWN, Subject, result
from opkit.align.result import CheckResult, Outcome


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
        if match.e2e.case.past < 0:
            problems.append(f"{where}: nothing says how long the engine's cache was")
        for side, summary in (("mock", match.mock), ("E2E", match.e2e)):
            compared = summary.regions - summary.odd_regions - summary.misreported
            if compared < policy.min_regions:
                problems.append(
                    f"{where}: {compared} {side} region(s), {policy.min_regions} needed"
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
        f"{_of_one_step(subject)}{aside}"
    )
    if not subject.cases:
        problems.append("no case was found on both sides")
    return result("evidence", problems, good, (), advice, Outcome.INCONCLUSIVE)


def _of_one_step(subject: Subject) -> str:
    """The cases whose regions are the layers of a single step: they repeat no step. A step of
    several ranks counts once a rank."""
    once = [match.e2e.case.label() for match in subject.cases if match.steps == 1]
    if not once:
        return ""
    if len(once) == len(subject.cases):
        return "; each case of one step"
    more = f" and {len(once) - MAX_SHOWN} more" if len(once) > MAX_SHOWN else ""
    return f"; of one step: {', '.join(once[:MAX_SHOWN])}{more}"
