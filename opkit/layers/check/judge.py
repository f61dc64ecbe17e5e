"""The checklist: each rule over what was seen of a mock. Plain numbers in, lines out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from opkit.layers.check.cases import Role
from opkit.layers.check.causes import ADVICE
from opkit.layers.check.facts import CacheFact, Difference, Observation, Pair, Seen, TensorFact
from opkit.layers.check.result import Line, Numbers, Outcome
from opkit.layers.op import Case, GemmCase, MoeCase
from opkit.layers.operands import degenerate

SMALL = 1024  # elements: fewer say nothing of variety
SHOWN = 3  # problems that a line spells out


@dataclass(frozen=True)
class Tolerance:
    """How far two outputs may lie apart, by the output's type.

    Attributes:
        same: largest difference over the largest magnitude, for the same computation again or
            replayed: kernels may add up in another order.
        other: the same, for the same tokens on another path (another phase or batch).
        cosine: least cosine on another path.
    """

    same: float
    other: float
    cosine: float = 0.999


# Some roundings of each type: bfloat16 rounds by up to 2^-9 (0.2 %) of a value, and a layer's chain
# of a few products rounds a few times; float16 eight times finer. float32 allows for TF32.
TOLERANCES = {
    "float64": Tolerance(1e-10, 1e-8),
    "float32": Tolerance(1e-4, 1e-3),
    "float16": Tolerance(0.01, 0.02),
    "bfloat16": Tolerance(0.03, 0.06),
}
COARSE = Tolerance(0.03, 0.25, 0.99)  # an 8-bit cache rounds by up to 2^-4 (6 %) of a value
LEAST_CHANGE = 1e-3  # of the output when its past is blanked; more than a repetition's noise

_BASE = (Role.CONTEXT, Role.PREFIX, Role.GENERATION, Role.LONG)
_SMALLEST = (Role.FIRST, Role.SECOND)
_MANY = (Role.MANY_CONTEXT, Role.MANY_GENERATION)
_GRAPHS = (Role.GRAPH, Role.MANY_GRAPH)


def judge(seen: Seen) -> tuple[Line, ...]:
    """The whole checklist over what was seen, in its order."""
    rules: Sequence[tuple[str, Callable[[Seen, str], Line]]] = (
        ("forward", lambda s, n: _runs(s, n, _BASE)),
        ("input format", _inputs),
        ("output shape", _shapes),
        ("output dtype", _dtypes),
        ("finite output", _finite),
        ("KV cache present", _cache_present),
        ("KV cache written", _cache_written),
        ("KV cache read", _cache_read),
        ("batch 1, length 1", lambda s, n: _runs(s, n, _SMALLEST)),
        ("large batch", _large),
        ("CUDA graph", _graphs),
        ("graph = eager", _graph_same),
        ("repeatable", _repeatable),
        ("input untouched", _untouched),
        ("context = generation", _phases),
        ("operands", _operands),
        ("own cases", _own),
    )
    return tuple(rule(seen, name) for name, rule in rules)


def tolerance(seen: Seen, dtype: str) -> Tolerance:
    """What an output of ``dtype`` is held to; see :data:`TOLERANCES`."""
    if any("8" in cache for cache in seen.cache_dtypes):
        return COARSE
    return TOLERANCES.get(dtype, TOLERANCES["bfloat16"])


# How a rule ends.


def _absent(name: str, why: str) -> Line:
    return Line(name, Outcome.NOT_APPLICABLE, why)


def _line(
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
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    cause, advice = ADVICE[name]
    detail = "; ".join(wrong[:SHOWN]) + more
    return Line(name, Outcome.FAIL, detail, cause, fix or advice, numbers or {})


def _unseen(seen: Seen, name: str, roles: Sequence[Role]) -> Line | None:
    """A line when nothing of these roles ran: not asked, not reached, or none worked."""
    if any(o.ran for o in seen.of(*roles)):
        return None
    if not any(asked.role in roles for asked in seen.asked):
        return _absent(name, f"{seen.op} has no such case")
    if not seen.of(*roles):
        return Line(name, Outcome.NOT_RUN, "the check ended before")
    refusals = [o.refused for o in seen.of(*roles) if o.refused]
    if refusals and len(refusals) == len(seen.of(*roles)):
        return _absent(name, refusals[0])
    return Line(name, Outcome.NOT_RUN, "no case of it ran: see the other lines")


def _trouble(observation: Observation) -> str:
    """What kept a case from running, as a problem."""
    return f"{observation.label()}: {observation.refused or observation.broke}"


def _forgiven(seen: Seen, observation: Observation) -> bool:
    """Whether a refusal is no failure: a capture holds what it holds, and an engine without
    cached prefixes has none."""
    role = observation.asked.role
    return bool(observation.refused) and (seen.inputs == "captured" or role is Role.PREFIX)


# Rules over single cases.


def _runs(seen: Seen, name: str, roles: Sequence[Role]) -> Line:
    """Every case of these roles runs; its output is what the probe says."""
    found = seen.of(*roles)
    broken = [o for o in found if not o.ran and not _forgiven(seen, o)]
    if not broken and (line := _unseen(seen, name, roles)):
        return line
    ran = [o for o in found if o.ran]
    problems = [_trouble(o) for o in broken]
    if roles is not _BASE:  # for these the output's own rules speak
        problems += [p for o in ran for p in (*_misshapen(o), *_unsound(o))]
    left = [f"{o.label()} left out: {o.refused}" for o in found if _forgiven(seen, o)]
    good = "; ".join([f"{_listed(ran)} ran", *left])
    return _line(name, problems, good, fix=next((o.fix for o in broken if o.fix), ""))


def _inputs(seen: Seen, name: str) -> Line:
    """Types, shapes, packed rows, finite and varied values of what the module is called with."""
    ran = [o for o in seen.observations if o.ran]
    if not ran:
        return _unseen(seen, name, tuple(Role)) or _absent(name, "nothing ran")
    problems = [f"{o.label()}: {problem}" for o in ran for problem in _input_problems(o, seen)]
    first = _leading(ran[0])
    shape = f"{first.name} {list(first.shape)} {first.dtype}" if first else ""
    count = sum(len(o.inputs) for o in ran)
    return _line(name, problems, f"{count} inputs of {len(ran)} cases; first {shape}")


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


def _misshapen(o: Observation) -> list[str]:
    if o.output is None:
        return [f"{o.label()}: the forward returns nothing"]
    if o.output.shape == o.shape:
        return []
    return [f"{o.label()}: {list(o.output.shape)} instead of {list(o.shape)}"]


def _unsound(o: Observation) -> list[str]:
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
    if line := _unseen(seen, name, tuple(Role)):
        return line
    ran = [o for o in seen.observations if o.ran]
    return _line(name, (p for o in ran for p in problems(o)), good.format(count=len(ran)))


def _shapes(seen: Seen, name: str) -> Line:
    return _over_outputs(seen, name, _misshapen, "as the probe says, in {count} cases")


def _dtypes(seen: Seen, name: str) -> Line:
    def problems(o: Observation) -> list[str]:
        if o.output is None or o.output.dtype == o.dtype:
            return []
        return [f"{o.label()}: {o.output.dtype} instead of {o.dtype}"]

    types = ", ".join(sorted({o.dtype for o in seen.observations if o.ran}))
    return _over_outputs(seen, name, problems, f"{types} in {{count}} cases")


def _finite(seen: Seen, name: str) -> Line:
    return _over_outputs(
        seen, name, _unsound, "no nan, no infinity, no row of zeros in {count} cases"
    )


# Rules over caches.


def _cache_line(
    seen: Seen, name: str, judged: Callable[[Observation, CacheFact], str | None], good: str
) -> Line:
    """A rule over every cache of every case; ``judged`` returns a problem, "" or None (no say)."""
    if not seen.keeps_cache:
        return _absent(name, f"{seen.op} keeps no cache")
    if line := _unseen(seen, name, tuple(Role)):
        return line
    problems, passed = [], 0
    numbers: Numbers = {}
    for o in seen.observations:
        if not o.ran:
            continue
        for cache in o.caches:
            text = judged(o, cache)
            if text is None:
                continue
            problems += [f"{o.label()}: {cache.name} {text}"] if text else []
            passed += 1
            numbers[f"{o.label()} {cache.name}"] = {
                "new": cache.new, "written": cache.written, "past": cache.past,
                **({"change": cache.read.relative} if cache.read else {}),
            }  # fmt: skip
    if not passed:
        return _line(name, ["no case has a cache to look at"], "")
    names = ", ".join(dict.fromkeys(c.name for o in seen.observations for c in o.caches))
    return _line(name, problems, f"{names}: {good.format(count=passed)}", numbers)


def _cache_present(seen: Seen, name: str) -> Line:
    missing = [o.label() for o in seen.observations if o.ran and not o.caches]
    if seen.keeps_cache and missing:
        return _line(name, [f"{label}: the probe names no cache" for label in missing], "")

    def judged(_: Observation, cache: CacheFact) -> str:
        if not math.prod(cache.shape):
            return "is empty"
        if cache.outside:
            return f"has no block for {cache.outside:,} of the numbers that the probe names"
        return "" if cache.new else "has no block for the new tokens"

    return _cache_line(seen, name, judged, "there in {count} cases")


def _cache_written(seen: Seen, name: str) -> Line:
    def judged(_: Observation, cache: CacheFact) -> str | None:
        if not cache.new:
            return None
        lost = cache.new - cache.written
        return f"{lost:,} of {cache.new:,} blocks stay blank" if lost else ""

    return _cache_line(seen, name, judged, "every blanked block is filled again, {count} cases")


def _cache_read(seen: Seen, name: str) -> Line:
    longest = Role.LONG if seen.of(Role.LONG) else None

    def judged(o: Observation, cache: CacheFact) -> str | None:
        # Where an indexer picks every token, only a longer past shows that it is read.
        picked = longest and o.asked.role is not longest and "index" in cache.name
        if cache.read is None or picked:
            return None
        change = cache.read.relative
        if change > LEAST_CHANGE or math.isnan(change):
            return ""
        return f"may be blanked: the output changes by {change:.1e}"

    if seen.keeps_cache and not any(c.read for o in seen.observations for c in o.caches):
        return _unseen(seen, name, tuple(Role)) or _line(
            name, ["no case has blocks of cached tokens alone"], ""
        )
    return _cache_line(seen, name, judged, "blanking the past changes the output, {count} cases")


# Rules over repetitions and pairs.


def _apart(difference: Difference, limit: float, cosine: float) -> bool:
    """Whether two outputs lie too far apart; nan does."""
    return not (difference.relative <= limit and difference.cosine >= cosine)


def _figures(difference: Difference) -> str:
    return (
        f"max error {difference.largest:.2e} ({difference.relative:.2%} of the largest value), "
        f"cosine {difference.cosine:.5f}"
    )


def _numbers(
    difference: Difference, limit: float, cosine: float
) -> dict[str, float | int | str | bool | None]:  # noqa: E501
    return {
        "equal": difference.equal, "max_error": difference.largest,
        "relative_error": difference.relative, "cosine": difference.cosine,
        "relative_limit": limit, "cosine_limit": cosine,
    }  # fmt: skip


def _repeatable(seen: Seen, name: str) -> Line:
    if line := _unseen(seen, name, tuple(Role)):
        return line
    problems, numbers, equal, worst = [], Numbers(), 0, 0.0
    found = [(o, o.repeated) for o in seen.observations if o.ran and o.repeated]
    for o, repeated in found:
        limit = tolerance(seen, o.dtype)
        numbers[o.label()] = _numbers(repeated, limit.same, limit.cosine)
        equal += repeated.equal
        worst = max(worst, repeated.relative)
        if _apart(repeated, limit.same, limit.cosine):
            problems.append(f"{o.label()}: {_figures(repeated)}")
    if not found:
        return Line(name, Outcome.NOT_RUN, "no forward has returned an output")
    good = f"bit for bit in {equal} of {len(found)} cases"
    if equal < len(found):
        good += f"; else within {worst:.2%} of the largest value"
    return _line(name, problems, good, numbers)


def _untouched(seen: Seen, name: str) -> Line:
    if line := _unseen(seen, name, tuple(Role)):
        return line
    problems = [
        f"{o.label()}: {item.name} is another after two forwards"
        for o in seen.observations
        for item in o.inputs
        if item.changed
    ]
    count = sum(len(o.inputs) for o in seen.observations)
    return _line(name, problems, f"{count} inputs the same after two forwards, bit for bit")


def _pairs(
    seen: Seen, name: str, wanted: Sequence[tuple[Role, Role]], same: bool
) -> tuple[list[str], list[str], list[str], Numbers]:
    """Problems, what was good, what could not be said, and numbers of some pairs of cases."""
    problems: list[str] = []
    good: list[str] = []
    mute: list[str] = []
    numbers: Numbers = {}
    for pair in seen.pairs:
        if (pair.first, pair.second) not in wanted:
            continue
        label, dtype = _pair_label(seen, pair), _dtype(seen, pair.first)
        limit = tolerance(seen, dtype)
        bound = limit.same if same else limit.other
        if pair.inputs:
            text = f"{label}: other values of {', '.join(pair.inputs)} for the same tokens"
            # Prompts begin alike and captures hold a request's rows; other recipes promise less.
            (problems if seen.inputs in ("tokens", "captured") else mute).append(text)
        elif pair.outputs is None:
            problems.append(f"{label}: outputs of different shapes")
        else:
            text = f"{label}: {_figures(pair.outputs)}, limits {bound:.0%} and {limit.cosine}"
            numbers[label] = _numbers(pair.outputs, bound, limit.cosine)
            (problems if _apart(pair.outputs, bound, limit.cosine) else good).append(text)
    return problems, good, mute, numbers


def _pair_label(seen: Seen, pair: Pair) -> str:
    labels = [seen.of(role)[0].label() for role in (pair.first, pair.second)]
    return " against ".join(labels)


def _dtype(seen: Seen, role: Role) -> str:
    return next((o.dtype for o in seen.of(role)), "")


def _pair_line(
    seen: Seen, name: str, wanted: Sequence[tuple[Role, Role]], same: bool, extra: list[str]
) -> Line:
    problems, good, mute, numbers = _pairs(seen, name, wanted, same)
    if problems or extra:
        return _line(name, [*extra, *problems], "", numbers)
    if good:
        return _line(name, [], "; ".join(good), numbers)
    if mute:
        return _absent(name, mute[0])
    return Line(name, Outcome.NOT_RUN, "the two cases did not both run with an output")


def _phases(seen: Seen, name: str) -> Line:
    wanted = ((Role.CONTEXT, Role.GENERATION), (Role.CONTEXT, Role.PREFIX))
    for roles in ((Role.CONTEXT,), (Role.GENERATION,)):
        if line := _unseen(seen, name, roles):
            return line
    return _pair_line(seen, name, wanted, same=False, extra=[])


def _large(seen: Seen, name: str) -> Line:
    """Large batches run, and their first request's output is that of the request alone."""
    alone = _runs(seen, name, _MANY)
    if alone.outcome is not Outcome.PASS:
        return alone
    wanted = (
        (Role.CONTEXT, Role.MANY_CONTEXT),
        (Role.GENERATION, Role.MANY_GENERATION),
    )
    problems, good, mute, numbers = _pairs(seen, name, wanted, same=False)
    if problems:
        return _line(name, problems, "", numbers)
    return _line(name, [], "; ".join([alone.detail, *good, *mute]), numbers)


def _graphs(seen: Seen, name: str) -> Line:
    """Capture works, and a replay leaves an output."""
    if seen.device != "cuda":
        return _absent(name, "no GPU here")
    uncaptured = [f"{o.label()}: {o.uncaptured}" for o in seen.of(*_GRAPHS) if o.uncaptured]
    if uncaptured:
        return _line(name, uncaptured, "")
    return _runs(seen, name, _GRAPHS)


def _graph_same(seen: Seen, name: str) -> Line:
    if seen.device != "cuda":
        return _absent(name, "no GPU here")
    if line := _unseen(seen, name, _GRAPHS):
        return line
    wanted = (
        (Role.GENERATION, Role.GRAPH),
        (Role.MANY_GENERATION, Role.MANY_GRAPH),
    )
    return _pair_line(seen, name, wanted, same=True, extra=[])


def _operands(seen: Seen, name: str) -> Line:
    if seen.operands_broke:
        return _line(name, [f"they cannot be sampled: {seen.operands_broke}"], "")
    if seen.operands is None:
        return Line(name, Outcome.NOT_RUN, "the check ended before")
    if not seen.operands:
        return _line(name, ["the mock samples no operand"], "")
    problems = [text for operand in seen.operands if (text := degenerate(operand))]
    numbers: Numbers = {
        item.name: {"distinct": item.distinct, "zeros": item.zeros, "equal_rows": item.equal_rows}
        for item in seen.operands
    }
    least = min(seen.operands, key=lambda item: item.distinct)
    good = f"{len(seen.operands)} sampled; least distinct {least.name} {least.distinct:.1%}"
    return _line(name, problems, good, numbers)


def _own(seen: Seen, name: str) -> Line:
    """Cases that only this op has, as it is collected."""
    found = seen.of(Role.OWN)
    problems = [_trouble(o) for o in found if o.broke]
    if not problems and (line := _unseen(seen, name, (Role.OWN,))):
        return line
    ran = [o for o in found if o.ran]
    problems += [p for o in ran for p in (*_misshapen(o), *_unsound(o))]
    left = [f"{o.label()} not here: {o.refused}" for o in found if o.refused]
    return _line(name, problems, "; ".join([f"{_listed(ran)} ran", *left]))


def _listed(observations: Sequence[Observation]) -> str:
    return ", ".join(o.label() for o in observations)
