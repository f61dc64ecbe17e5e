"""Rules over two outputs of the same tokens: repeated, replayed, in another phase or batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opkit.layers.check.cases import Role
from opkit.layers.check.facts import Difference, Pair, Seen
from opkit.layers.check.lines import absent, line, unseen
from opkit.layers.check.outputs import runs
from opkit.layers.check.result import Line, Numbers, Outcome

MANY = (Role.MANY_CONTEXT, Role.MANY_GENERATION)
GRAPHS = (Role.GRAPH, Role.MANY_GRAPH)


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


def tolerance(seen: Seen, dtype: str) -> Tolerance:
    """What an output of ``dtype`` is held to; see :data:`TOLERANCES`."""
    if any("8" in cache for cache in seen.cache_dtypes):
        return COARSE
    return TOLERANCES.get(dtype, TOLERANCES["bfloat16"])


def alike(difference: Difference | None, dtype: str) -> bool:
    """Whether inputs of the same tokens are the same but for rounding.

    What stands before an op (a projection, another op) may be another kernel for another batch.
    """
    limit = TOLERANCES.get(dtype, TOLERANCES["bfloat16"])
    return difference is not None and not _apart(difference, limit.other, limit.cosine)


def _apart(difference: Difference, limit: float, cosine: float) -> bool:
    """Whether two outputs lie too far apart; nan does."""
    return not (difference.relative <= limit and difference.cosine >= cosine)


def _figures(difference: Difference, limit: float, cosine: float) -> str:
    return (
        f"max error {difference.largest:.1e}, {100 * difference.relative:.2f} % of the largest "
        f"value (≤ {100 * limit:g} %), cosine {difference.cosine:.5f} (≥ {cosine:g})"
    )


def _numbers(
    difference: Difference, limit: float, cosine: float
) -> dict[str, float | int | str | bool | None]:
    return {
        "equal": difference.equal, "max_error": difference.largest,
        "relative_error": difference.relative, "cosine": difference.cosine,
        "relative_limit": limit, "cosine_limit": cosine,
    }  # fmt: skip


def repeatable(seen: Seen, name: str) -> Line:
    """Two forwards in a row give one output."""
    if early := unseen(seen, name, tuple(Role)):
        return early
    problems: list[str] = []
    numbers: Numbers = {}
    equal, worst = 0, 0.0
    found = [(o, o.repeated) for o in seen.observations if o.ran and o.repeated]
    for o, repeated in found:
        limit = tolerance(seen, o.dtype)
        numbers[o.label()] = _numbers(repeated, limit.same, limit.cosine)
        equal += repeated.equal
        worst = max(worst, repeated.relative)
        if _apart(repeated, limit.same, limit.cosine):
            problems.append(f"{o.label()}: {_figures(repeated, limit.same, limit.cosine)}")
    if not found:
        return Line(name, Outcome.NOT_RUN, "no forward has returned an output")
    good = f"bit for bit in {equal} of {len(found)} cases"
    if equal < len(found):
        good += f"; else within {100 * worst:.2f} % of the largest value"
    return line(name, problems, good, numbers)


def _pairs(
    seen: Seen, wanted: Sequence[tuple[Role, Role]], same: bool
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
            text = f"{label}: {_figures(pair.outputs, bound, limit.cosine)}"
            numbers[label] = _numbers(pair.outputs, bound, limit.cosine)
            (problems if _apart(pair.outputs, bound, limit.cosine) else good).append(text)
    return problems, good, mute, numbers


def _pair_label(seen: Seen, pair: Pair) -> str:
    labels = [seen.of(role)[0].label() for role in (pair.first, pair.second)]
    return " against ".join(labels)


def _dtype(seen: Seen, role: Role) -> str:
    return next((o.dtype for o in seen.of(role)), "")


def _pair_line(seen: Seen, name: str, wanted: Sequence[tuple[Role, Role]], same: bool) -> Line:
    problems, good, mute, numbers = _pairs(seen, wanted, same)
    if problems:
        return line(name, problems, "", numbers)
    if good:
        return line(name, [], "\n".join(good), numbers)
    if mute:
        return absent(name, mute[0])
    return Line(name, Outcome.NOT_RUN, "the two cases did not both run with an output")


def phases(seen: Seen, name: str) -> Line:
    """The same tokens give the same output in context and generation, and with a cached prefix."""
    wanted = ((Role.CONTEXT, Role.GENERATION), (Role.CONTEXT, Role.PREFIX))
    for roles in ((Role.CONTEXT,), (Role.GENERATION,)):
        if early := unseen(seen, name, roles):
            return early
    return _pair_line(seen, name, wanted, same=False)


def large(seen: Seen, name: str) -> Line:
    """Large batches run, and their first request's output is that of the request alone."""
    alone = runs(seen, name, MANY)
    if alone.outcome is not Outcome.PASS:
        return alone
    wanted = (
        (Role.CONTEXT, Role.MANY_CONTEXT),
        (Role.GENERATION, Role.MANY_GENERATION),
    )
    problems, good, mute, numbers = _pairs(seen, wanted, same=False)
    if problems:
        return line(name, problems, "", numbers)
    return line(name, [], "\n".join([alone.detail, *good, *mute]), numbers)


def graphs(seen: Seen, name: str) -> Line:
    """Capture works, and a replay leaves an output."""
    if seen.device != "cuda":
        return absent(name, "no GPU here")
    uncaptured = [f"{o.label()}: {o.uncaptured}" for o in seen.of(*GRAPHS) if o.uncaptured]
    if uncaptured:
        return line(name, uncaptured, "")
    return runs(seen, name, GRAPHS)


def graph_same(seen: Seen, name: str) -> Line:
    """A replay gives what the eager forward gives."""
    if seen.device != "cuda":
        return absent(name, "no GPU here")
    if early := unseen(seen, name, GRAPHS):
        return early
    wanted = (
        (Role.GENERATION, Role.GRAPH),
        (Role.MANY_GENERATION, Role.MANY_GRAPH),
    )
    return _pair_line(seen, name, wanted, same=True)
