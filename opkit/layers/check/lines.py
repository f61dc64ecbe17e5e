"""How a rule of the checklist ends, whatever it is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opkit.layers.check.cases import Role
from opkit.layers.check.causes import ADVICE
from opkit.layers.check.facts import Observation, Seen
from opkit.layers.check.result import Line, Numbers, Outcome

SHOWN = 3  # problems that a line spells out


def absent(name: str, why: str) -> Line:
    """Does not apply, and why."""
    return Line(name, Outcome.NOT_APPLICABLE, why)


def line(
    name: str,
    problems: Iterable[str],
    good: str,
    numbers: Numbers | None = None,
    fix: str = "",
) -> Line:
    """Failed with its problems, or passed with ``good``."""
    wrong = list(dict.fromkeys(problems))
    if not wrong:
        return Line(name, Outcome.PASS, good, numbers=numbers or {})
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    cause, advice = ADVICE[name]
    detail = "\n".join([*wrong[:SHOWN], *more])
    return Line(name, Outcome.FAIL, detail, cause, fix or advice, numbers or {})


def unseen(seen: Seen, name: str, roles: Sequence[Role]) -> Line | None:
    """A line when nothing of these roles ran: not asked, not reached, or none worked."""
    if any(o.ran for o in seen.of(*roles)):
        return None
    if not any(asked.role in roles for asked in seen.asked):
        return absent(name, f"{seen.op} has no such case")
    if not seen.of(*roles):
        return Line(name, Outcome.NOT_RUN, "the check ended before")
    refusals = [o.refused for o in seen.of(*roles) if o.refused]
    if refusals and len(refusals) == len(seen.of(*roles)):
        return absent(name, refusals[0])
    return Line(name, Outcome.NOT_RUN, "no case of it ran: see the other lines")


def trouble(observation: Observation) -> str:
    """What kept a case from running, as a problem."""
    return f"{observation.label()}: {observation.refused or observation.broke}"


def forgiven(seen: Seen, observation: Observation) -> bool:
    """Whether a refusal is no failure: a capture holds what it holds, and an engine without
    cached prefixes has none."""
    role = observation.asked.role
    return bool(observation.refused) and (seen.inputs == "captured" or role is Role.PREFIX)


def listed(observations: Sequence[Observation]) -> str:
    """The cases, one after the other."""
    return ", ".join(o.label() for o in observations)
