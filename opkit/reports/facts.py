"""What several reports say the same way, in a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opkit.align.policy import changes
from opkit.align.result import AlignResult, CaseMatch, Level, Outcome

WIDEST = 120  # a wider table only moves its numbers away from its names
SEPARATOR = " · "

OUTCOME_SIGN = {Outcome.PASS: "✓", Outcome.FAIL: "✗", Outcome.INCONCLUSIVE: "?"}
LEVEL_SIGN = {
    Level.SAME: "=",
    Level.VARIANT: "~",
    Level.ROLE: "≈",
    Level.DTYPE: "≠",
    Level.MOCK_ONLY: "+",
    Level.E2E_ONLY: "−",
}
ALIKE = (Level.SAME, Level.VARIANT, Level.ROLE)


def pairs_text(values: dict[str, Any] | None) -> str:
    """Names with their values, one after the other; what is not there is not named."""
    # The GPU has a line of its own.
    return SEPARATOR.join(
        f"{name} {value}"
        for name, value in (values or {}).items()
        if value and value != "none" and name != "gpu"
    )


def model_text(known: dict[str, Any]) -> str:
    """The model in a line, from what is known of an alignment or a mock."""
    model = dict(known.get("model") or {})
    parts = [str(model.pop("architecture", "") or "")]
    # Digests identify, they do not inform; lists and objects are for the JSON; 0 and "" say that
    # the model lacks the thing (window_size 0).
    parts += [
        f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}"
        for name, value in model.items()
        if value and isinstance(value, (int, str)) and "digest" not in name and "sha256" not in name
    ]
    if known.get("tp_size"):
        parts.append(f"tp {known['tp_size']}")
    return SEPARATOR.join(part for part in parts if part)


def policy_text(known: dict[str, Any]) -> str:
    """Every threshold that is not the default's, with the default in brackets; empty for none."""
    return SEPARATOR.join(
        f"{name} {len(own)} (none)" if name == "roles" else f"{name} {own} ({default})"
        for name, (own, default) in changes(known.get("policy") or {}).items()
    )


def files_text(known: dict[str, Any]) -> str:
    """The compared traces, each with the beginning of its digest."""
    return SEPARATOR.join(
        f"{file.get('name', '?')} ({str(file.get('sha256', ''))[:8]})"
        for file in known.get("files") or ()
    )


def unlike(case: CaseMatch) -> int:
    """Kernels that have no like on the other side, glue left out."""
    return sum(1 for pair in case.pairs if pair.level not in ALIKE and not pair.glue)


def shown_cases(cases: Sequence[CaseMatch], verbose: bool) -> list[CaseMatch]:
    """The cases whose kernels are shown: those with a mismatch, or else the one farthest from 1."""
    if verbose:
        return list(cases)
    differing = [case for case in cases if unlike(case)]
    if differing or not cases:
        return differing
    return [max(cases, key=lambda case: abs((gpu_ratio(case) or 1.0) - 1.0))]


def next_step(result: AlignResult) -> str:
    """What to do about a verdict."""
    if result.verdict is Outcome.PASS and policy_text(result.provenance):
        return f"`opkit collect {result.op} --model DIR --policy FILE`: this policy is your own"
    if result.verdict is Outcome.PASS:
        return f"`opkit collect {result.op} --model DIR` once `opkit status` lists it"
    steps = [
        check.next_step
        for phase in result.phases
        for check in phase.checks
        if check.outcome is result.verdict and check.next_step
    ]
    return steps[0] if steps else "see the checks above"


def modes_text(case: CaseMatch) -> str:
    """Launch mode, of mock and engine where they differ."""
    mock, e2e = (str(side.mode or "mixed") for side in (case.mock, case.e2e))
    return mock if mock == e2e else f"{mock} / {e2e}"


def two_counts(mock: int | None, e2e: int | None) -> str:
    """A pair of counts, or one number when both sides agree."""
    if mock == e2e and mock is not None:
        return f"{mock:,}"
    return " / ".join("–" if count is None else f"{count:,}" for count in (mock, e2e))


def gpu_ratio(case: CaseMatch) -> float | None:
    """The mock's GPU time over the engine's."""
    return ratio(case.mock.gpu_ns, case.e2e.gpu_ns)


def ratio(mock: int, e2e: int) -> float | None:
    """Mock over engine; None where the engine took no time."""
    return mock / e2e if e2e else None


def us(ns: int) -> str:
    """Nanoseconds as microseconds, without the unit."""
    return f"{ns / 1000:,.1f}"


def rows_of(count: int) -> str:
    """``1 row``, ``1,234 rows``."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def percent(share: float) -> str:
    """A share of 1 as percent."""
    return f"{100 * share:.1f} %"
