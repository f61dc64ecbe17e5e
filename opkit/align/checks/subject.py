"""What the checks of one phase look at, and how they word what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from opkit.align import causes
from opkit.align.policy import Policy
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
        inputs: how the mock's activations were made, one of ``opkit.layers.plan.INPUTS``; empty
            when its trace does not say.
        strict: summed GPU time of the strict variant over the mock's, by case label; empty without
            ``--strict``.
        frameworks: the mock's and the engine's, where they are two; else empty.
    """

    op: Op
    cases: tuple[CaseMatch, ...]
    policy: Policy
    losses: tuple[str, ...] = ()
    operands: tuple[Operand, ...] | None = None
    inputs: str = ""
    strict: dict[str, float] | None = None
    frameworks: str = ""


def result(
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


def all_pairs(subject: Subject) -> list[tuple[CaseMatch, KernelPair]]:
    return [(match, pair) for match in subject.cases for pair in match.pairs]


def microseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:.1f} µs"


def grouped(
    rows: Sequence[tuple[CaseMatch, KernelPair]], text: Callable[[KernelPair], str]
) -> list[str]:
    """One sentence per kernel, naming the cases it holds for."""
    where: dict[str, list[str]] = {}
    for match, pair in rows:
        where.setdefault(text(pair), []).append(match.e2e.case.label())
    return [f"{what} (at {', '.join(dict.fromkeys(cases))})" for what, cases in where.items()]
