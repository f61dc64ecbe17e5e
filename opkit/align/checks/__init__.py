"""The checks: one function a rule, each over all matched cases of one phase.

Rules and thresholds are in ``docs/checks.md``. A check returns what it found even when it passes: a
verdict without numbers convinces nobody. Nothing here reads a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from opkit.align import causes
from opkit.align.checks.evidence import evidence
from opkit.align.checks.identity import counts, launch, missing_extra, names
from opkit.align.checks.subject import Subject
from opkit.align.checks.timing import data, latency, strict
from opkit.align.result import CheckResult, Outcome
from opkit.align.shapes import UNKNOWN_PAST

__all__ = ["Subject", "run_checks"]

IDENTITY = ("names", "counts", "missing/extra")


def run_checks(subject: Subject) -> tuple[CheckResult, ...]:
    """All checks, in the order in which a reader wants them."""
    if not subject.cases:  # nothing to compare: one sentence why, no empty rules
        return _of_two_frameworks(subject, (evidence(subject),))
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
    results = _led_back(tuple(check(subject) for check in checks))
    results = _of_unknown_length(subject, _explained_by_shape(results))
    return _of_two_frameworks(subject, results)


def _led_back(results: tuple[CheckResult, ...]) -> tuple[CheckResult, ...]:
    """Where another check found why the time differs, *latency* gives that as its cause too."""
    by_name = {r.check: r for r in results}
    data = by_name["data"]
    if data.outcome is Outcome.FAIL:
        advice = causes.Advice(data.cause, data.next_step)
    elif any(by_name[name].outcome is Outcome.FAIL for name in IDENTITY):
        advice = causes.FOLLOWS_KERNELS
    else:
        return results
    return tuple(
        replace(r, cause=advice.cause, next_step=advice.next_step)
        if r.check == "latency" and r.outcome is Outcome.FAIL
        else r
        for r in results
    )


def _of_two_frameworks(
    subject: Subject, results: tuple[CheckResult, ...]
) -> tuple[CheckResult, ...]:
    """A mock of one framework beside an engine of another: all that differs comes of it."""
    if not subject.frameworks:
        return results
    first, follows = causes.OTHER_FRAMEWORK, causes.FOLLOWS_FRAMEWORK
    return tuple(
        r
        if r.outcome is Outcome.PASS or r.cause == causes.DEGENERATE.cause
        else replace(r, cause=first.cause, next_step=first.next_step)
        if r.check == "evidence"
        else replace(r, cause=follows.cause, next_step=follows.next_step)
        for r in results
    )


def _of_unknown_length(
    subject: Subject, results: tuple[CheckResult, ...]
) -> tuple[CheckResult, ...]:
    """Grids and times of decode steps follow the cache's length: unknown, they fail nothing."""
    if all(case.e2e.case.past != UNKNOWN_PAST for case in subject.cases):
        return results
    advice = causes.UNKNOWN_LENGTH
    return tuple(
        replace(r, outcome=Outcome.INCONCLUSIVE, cause=advice.cause, next_step=advice.next_step)
        if r.outcome is Outcome.FAIL
        and r.check in ("launch", "latency", "data")
        and r.cause != causes.DEGENERATE.cause
        else r
        for r in results
    )


def _explained_by_shape(results: tuple[CheckResult, ...]) -> tuple[CheckResult, ...]:
    """Where another shape ran, what else differs is its consequence, and is said to be."""
    shaped = (causes.OTHER_SHAPE.cause, causes.OTHER_GRIDS.cause)
    if not any(r.cause in shaped for r in results):
        return results
    follows = causes.FOLLOWS_SHAPE
    return tuple(
        replace(r, cause=follows.cause, next_step=follows.next_step)
        if r.outcome is Outcome.FAIL and r.check != "launch" and r.cause != causes.DEGENERATE.cause
        else r
        for r in results
    )
