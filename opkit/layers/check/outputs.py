"""Rules over single cases: inputs, outputs, whether a case runs, operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from opkit.layers.check.cases import Role
from opkit.layers.check.facts import Observation, Seen, TensorFact
from opkit.layers.check.lines import absent, forgiven, line, listed, trouble, unseen
from opkit.layers.check.result import Line, Numbers, Outcome
from opkit.layers.op import Case, GemmCase, MoeCase
from opkit.layers.operands import degenerate

SMALL = 1024  # elements: fewer say nothing of variety
BASE = (Role.CONTEXT, Role.PREFIX, Role.GENERATION, Role.LONG)
SMALLEST = (Role.FIRST, Role.SECOND)


def runs(seen: Seen, name: str, roles: Sequence[Role]) -> Line:
    """Every case of these roles runs; its output is what the probe says."""
    found = seen.of(*roles)
    broken = [o for o in found if not o.ran and not forgiven(seen, o)]
    if not broken and (early := unseen(seen, name, roles)):
        return early
    ran = [o for o in found if o.ran]
    problems = [trouble(o) for o in broken]
    if roles is not BASE:  # for these the output's own rules speak
        problems += [p for o in ran for p in (*misshapen(o), *unsound(o))]
    left = [f"{o.label()} left out: {o.refused}" for o in found if forgiven(seen, o)]
    good = "\n".join([f"{listed(ran)} ran", *left])
    return line(name, problems, good, fix=next((o.fix for o in broken if o.fix), ""))


def inputs(seen: Seen, name: str) -> Line:
    """Types, shapes, packed rows, finite and varied values of what the module is called with."""
    ran = [o for o in seen.observations if o.ran]
    if not ran:
        return unseen(seen, name, tuple(Role)) or absent(name, "nothing ran")
    problems = [f"{o.label()}: {problem}" for o in ran for problem in _input_problems(o, seen)]
    first = _leading(ran[0])
    shape = f"{first.name} {list(first.shape)} {first.dtype}" if first else ""
    count = sum(len(o.inputs) for o in ran)
    return line(name, problems, f"{count} inputs of {len(ran)} cases; first {shape}")


def _input_problems(observation: Observation, seen: Seen) -> list[str]:
    problems = []
    leading = _leading(observation)
    if leading is None:
        return ["the probe names no floating-point input"]
    if seen.activations and leading.dtype not in seen.activations:
        problems.append(
            f"{leading.name} is {leading.dtype}, the mock says {', '.join(seen.activations)}"
        )
    rows = _rows(observation)
    if rows and leading.shape[0] != rows[0] and tuple(leading.shape[:2]) != rows[1:]:
        problems.append(f"{leading.name} {list(leading.shape)} has no row for each of {rows[0]:,}")
    for item in observation.inputs:
        if not item.packed:
            problems.append(f"{item.name}: the values of a row do not lie side by side")
        if item.bad:
            problems.append(f"{item.name}: {item.bad:,} values are nan or infinite")
        large = item.sample is not None and math.prod(item.shape) >= SMALL
        if large and item.sample is not None and (text := degenerate(item.sample)):
            problems.append(text)
    return problems


def _leading(observation: Observation) -> TensorFact | None:
    """The largest floating-point input."""
    floating = [item for item in observation.inputs if item.floating]
    return max(floating, key=lambda item: math.prod(item.shape), default=None)


def _rows(observation: Observation) -> tuple[int, int, int] | None:
    """Rows of a case's input; then its first two dimensions, if it keeps requests apart."""
    case = observation.asked.planned.case
    if isinstance(case, Case):
        return case.batch * case.tokens, case.batch, case.tokens
    if isinstance(case, MoeCase):
        return case.tokens, 1, case.tokens
    return (case.m, 1, case.m) if isinstance(case, GemmCase) else None


def misshapen(o: Observation) -> list[str]:
    """Problems with the output's dimensions."""
    if o.output is None:
        return [f"{o.label()}: the forward returns nothing"]
    if o.output.shape == o.shape:
        return []
    return [f"{o.label()}: {list(o.output.shape)} instead of {list(o.shape)}"]


def unsound(o: Observation) -> list[str]:
    """Problems with the output's values."""
    if o.output is None:
        return []
    if o.output.bad:
        return [f"{o.label()}: {o.output.bad:,} of {math.prod(o.output.shape):,} values are nan "
                "or infinite"]  # fmt: skip
    if o.output.zeros:
        return [f"{o.label()}: all zeros"]
    if o.output.zero_rows:
        return [f"{o.label()}: {o.output.zero_rows:,} of {o.output.shape[0]:,} rows are all zeros"]
    return []


def _over_outputs(
    seen: Seen, name: str, problems: Callable[[Observation], list[str]], good: str
) -> Line:
    if early := unseen(seen, name, tuple(Role)):
        return early
    ran = [o for o in seen.observations if o.ran]
    return line(name, (p for o in ran for p in problems(o)), good.format(count=len(ran)))


def shapes(seen: Seen, name: str) -> Line:
    """The output's dimensions are those that the probe names."""
    return _over_outputs(seen, name, misshapen, "as the probe says, in {count} cases")


def dtypes(seen: Seen, name: str) -> Line:
    """The output's element type is the one that the probe names."""

    def problems(o: Observation) -> list[str]:
        if o.output is None or o.output.dtype == o.dtype:
            return []
        return [f"{o.label()}: {o.output.dtype} instead of {o.dtype}"]

    types = ", ".join(sorted({o.dtype for o in seen.observations if o.ran}))
    return _over_outputs(seen, name, problems, f"{types} in {{count}} cases")


def finite(seen: Seen, name: str) -> Line:
    """No nan, no infinity, no row of nothing but zeros."""
    return _over_outputs(
        seen, name, unsound, "no nan, no infinity, no row of zeros in {count} cases"
    )


def untouched(seen: Seen, name: str) -> Line:
    """A forward leaves its inputs as they were."""
    if early := unseen(seen, name, tuple(Role)):
        return early
    problems = [
        f"{o.label()}: {item.name} is another after two forwards"
        for o in seen.observations
        for item in o.inputs
        if item.changed
    ]
    count = sum(len(o.inputs) for o in seen.observations)
    return line(name, problems, f"{count} inputs the same after two forwards, bit for bit")


def operands(seen: Seen, name: str) -> Line:
    """What the large kernels are given is not degenerate."""
    if seen.operands_broke:
        return line(name, [f"they cannot be sampled: {seen.operands_broke}"], "")
    if seen.operands is None:
        return Line(name, Outcome.NOT_RUN, "the check ended before")
    if not seen.operands:
        return line(name, ["the mock samples no operand"], "")
    problems = [text for operand in seen.operands if (text := degenerate(operand))]
    numbers: Numbers = {
        item.name: {"distinct": item.distinct, "zeros": item.zeros, "equal_rows": item.equal_rows}
        for item in seen.operands
    }
    least = min(seen.operands, key=lambda item: item.distinct)
    good = f"{len(seen.operands)} sampled; least distinct {least.name} {least.distinct:.1%}"
    return line(name, problems, good, numbers)


def own(seen: Seen, name: str) -> Line:
    """Cases that only this op has, as it is collected."""
    found = seen.of(Role.OWN)
    if not any(asked.role is Role.OWN for asked in seen.asked):
        return absent(name, f"{seen.op} is collected at cases like those above")
    problems = [trouble(o) for o in found if o.broke]
    if not problems and (early := unseen(seen, name, (Role.OWN,))):
        return early
    ran = [o for o in found if o.ran]
    problems += [p for o in ran for p in (*misshapen(o), *unsound(o))]
    left = [f"{o.label()} not here: {o.refused}" for o in found if o.refused]
    return line(name, problems, "\n".join([f"{listed(ran)} ran", *left]))
