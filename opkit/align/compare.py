"""Compare two alignments of one op, as before and after a framework upgrade: what changed.

Kernels are matched as an alignment matches them (``match.align_names``), A's engine against B's
engine and A's mock against B's mock, shape by shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from opkit.align.compare_facts import facts, warnings
from opkit.align.comparison import (
    AlignComparison,
    CaseChange,
    Change,
    Grouped,
    KernelChange,
    Limits,
    Pace,
    PhaseChange,
    SideChange,
)
from opkit.align.match import Pairing, align_names
from opkit.align.result import AlignResult, CaseMatch, KernelStat, Level, PhaseResult, SideSummary
from opkit.errors import WrongUsage
from opkit.layers.op import Case, Phase
from opkit.nsys_parsers.names import KernelName, parse_name

# Three runs of one vLLM build on H100s at unlocked clocks (opkit/recorded, tests/traces/collected,
# tests/traces/h100-process): a shape's GPU time moved by up to 5.2 %, the median of a kernel by up
# to 10 % where that is more than half a microsecond. A kernel's limit is KERNEL, which is what the
# policy allows between mock and engine too; a shape's is half of it.
KERNEL = 0.15
FLOOR_NS = 500
# As the policy's kernel_spread: four of the added deviations is what repeats of one run stay in.
SPREAD = 4.0
# Decode steps of one request mix differ by a token or so in what is cached: still the same shape.
PAST = 0.01

_CHANGES = {
    Level.SAME: Change.SAME,
    Level.VARIANT: Change.VARIANT,
    Level.DTYPE: Change.DTYPE,
}
Kind = tuple[str, str, tuple[str, ...], tuple[str, ...]]


def compare_alignments(
    a: AlignResult, b: AlignResult, names: tuple[str, str] = ("A", "B"), kernel: float = KERNEL
) -> AlignComparison:
    """What differs from A to B.

    Args:
        a, b: the alignments.
        names: what they are called.
        kernel: share by which a kernel's time must differ to have changed, beyond its spread.

    Raises:
        WrongUsage: they are of different ops, or one and the same.
    """
    if a == b:
        raise WrongUsage(
            f"{names[0]} and {names[1]} are one alignment", "`opkit status` lists the others"
        )
    if a.op != b.op:
        raise WrongUsage(
            f"{names[0]} is of {a.op} and {names[1]} of {b.op}: different ops launch different "
            "kernels",
            "compare two alignments of one op; `opkit status` lists them",
        )
    limits = Limits(kernel, kernel / 2, SPREAD, FLOOR_NS)
    found = [
        _phase(phase, _of(a, phase), _of(b, phase), limits)
        for phase in Phase
        if _of(a, phase) or _of(b, phase)
    ]
    return AlignComparison(
        names=names,
        op=a.op,
        backends=(a.backend, b.backend),
        verdicts=(a.verdict, b.verdict),
        created=(str(a.provenance.get("created", "")), str(b.provenance.get("created", ""))),
        facts=facts(a, b),
        warnings=warnings(a, b, sum(len(phase.cases) for phase in found)),
        limits=limits,
        phases=tuple(found),
    )


def _of(result: AlignResult, phase: Phase) -> PhaseResult | None:
    return next((found for found in result.phases if found.phase is phase), None)


def _phase(
    phase: Phase, a: PhaseResult | None, b: PhaseResult | None, limits: Limits
) -> PhaseChange:
    pairs, only_a, only_b = pair_cases(a.cases if a else (), b.cases if b else ())
    cases = tuple(_case(left, right, limits) for left, right in pairs)
    return PhaseChange(
        phase=phase,
        verdict_a=a.verdict if a else None,
        verdict_b=b.verdict if b else None,
        cases=cases,
        only_a=tuple(map(_label, only_a)),
        only_b=tuple(map(_label, only_b)),
        grouped=grouped(cases),
    )


def pair_cases(
    a: Sequence[CaseMatch], b: Sequence[CaseMatch]
) -> tuple[list[tuple[CaseMatch, CaseMatch]], list[CaseMatch], list[CaseMatch]]:
    """Pair the shapes of two alignments, the closest first: of equal shape and launch mode, of
    equal shape, of a cache length within ``PAST``; the shape of mock and engine both count, which
    differ only where an alignment failed. Returns pairs in A's order, and who is left."""
    rest_a, rest_b = list(a), list(b)
    partner: dict[int, CaseMatch] = {}
    for alike in (_equal, _same_shape, _near):
        for left in list(rest_a):
            right = next((case for case in rest_b if alike(left, case)), None)
            if right is not None:
                partner[id(left)] = right
                rest_a.remove(left)
                rest_b.remove(right)
    return [(left, partner[id(left)]) for left in a if id(left) in partner], rest_a, rest_b


def _equal(a: CaseMatch, b: CaseMatch) -> bool:
    return _same_shape(a, b) and (a.mock.mode, a.e2e.mode) == (b.mock.mode, b.e2e.mode)


def _same_shape(a: CaseMatch, b: CaseMatch) -> bool:
    return (a.mock.case, a.e2e.case) == (b.mock.case, b.e2e.case)


def _near(a: CaseMatch, b: CaseMatch) -> bool:
    return _cached_alike(a.mock.case, b.mock.case) and _cached_alike(a.e2e.case, b.e2e.case)


def _cached_alike(left: Case, right: Case) -> bool:
    alike = (left.phase, left.batch, left.tokens) == (right.phase, right.batch, right.tokens)
    return alike and abs(left.past - right.past) <= PAST * max(left.past, right.past)


def _case(a: CaseMatch, b: CaseMatch, limits: Limits) -> CaseChange:
    mock = _side("mock", a.mock, b.mock, _kernels(a, "mock"), _kernels(b, "mock"), limits)
    e2e = _side("e2e", a.e2e, b.e2e, _kernels(a, "e2e"), _kernels(b, "e2e"), limits)
    return CaseChange(_label(a), _label(b), mock, e2e)


def _label(case: CaseMatch) -> str:
    label, engine = case.mock.case.label(), case.e2e.case.label()
    return label if label == engine else f"{label} (e2e {engine})"


def _kernels(case: CaseMatch, side: str) -> list[KernelStat]:
    return [kernel for pair in case.pairs if (kernel := getattr(pair, side)) is not None]


def _side(
    side: str,
    a: SideSummary,
    b: SideSummary,
    kernels_a: Sequence[KernelStat],
    kernels_b: Sequence[KernelStat],
    limits: Limits,
) -> SideChange:
    names_a, names_b = ([parse_name(k.name) for k in ks] for ks in (kernels_a, kernels_b))
    calls_a, calls_b = Counter(map(_kind, names_a)), Counter(map(_kind, names_b))
    rows = []
    for i, j, level in _laid_beside(names_a, names_b):
        left = kernels_a[i] if i is not None else None
        right = kernels_b[j] if j is not None else None
        kind = _kind(names_b[j] if j is not None else names_a[i or 0])
        change = _CHANGES.get(level) or _alone(level, calls_a[kind], calls_b[kind])
        rows.append(
            KernelChange(
                position=(j if j is not None else i or 0) + 1,
                a=left,
                b=right,
                change=change,
                pace=_kernel_pace(left, right, limits),
                launch=_launched_otherwise(left, right),
                calls_a=calls_a[_kind(names_a[i])] if i is not None else calls_a[kind],
                calls_b=calls_b[kind],
            )
        )
    return SideChange(side, a, b, _case_pace(a, b, limits), tuple(rows))


def _laid_beside(a: Sequence[KernelName], b: Sequence[KernelName]) -> list[Pairing]:
    """As :func:`align_names`; equal beginnings and ends, most of two like runs, take no search."""
    shorter = min(len(a), len(b))
    head = next((n for n in range(shorter) if a[n] != b[n]), shorter)
    tail = next((n for n in range(shorter - head) if a[-1 - n] != b[-1 - n]), shorter - head)
    middle = [
        (None if i is None else i + head, None if j is None else j + head, level)
        for i, j, level in align_names(a[head : len(a) - tail], b[head : len(b) - tail])
    ]
    same = Level.SAME
    ends = [(len(a) - n, len(b) - n, same) for n in range(tail, 0, -1)]
    return [*((n, n, same) for n in range(head)), *middle, *ends]


def _kind(name: KernelName) -> Kind:
    """What a kernel and its variants share."""
    return name.stem, name.family, name.dtypes, name.typed


def _alone(level: Level, calls_a: int, calls_b: int) -> Change:
    """A kernel that stands alone at its place, by how often each alignment launches it."""
    if level is Level.E2E_ONLY:  # only B has it here
        return Change.NEW if not calls_a else Change.MORE if calls_b > calls_a else Change.MOVED
    return Change.GONE if not calls_b else Change.FEWER if calls_b < calls_a else Change.MOVED


def _kernel_pace(a: KernelStat | None, b: KernelStat | None, limits: Limits) -> Pace:
    if a is None or b is None:
        return Pace.STEADY
    spread = limits.spread * (a.mad_ns + b.mad_ns)
    return _pace(a.median_ns, b.median_ns, limits.kernel, max(spread, limits.floor_ns))


def _case_pace(a: SideSummary, b: SideSummary, limits: Limits) -> Pace:
    """By the spread of single regions too, where the results hold any."""
    return _pace(a.gpu_ns, b.gpu_ns, limits.case, limits.spread * (a.mad_ns + b.mad_ns))


def _pace(a: int, b: int, share: float, least: float) -> Pace:
    # A share of the shorter time, so that B against A finds what A against B does.
    if abs(b - a) <= max(share * min(a, b), least):
        return Pace.STEADY
    return Pace.SLOWER if b > a else Pace.FASTER


def _launched_otherwise(a: KernelStat | None, b: KernelStat | None) -> bool:
    """Grid or block differ; None (differs from region to region) says nothing."""
    if a is None or b is None:
        return False
    return any(
        None not in (left, right) and left != right
        for left, right in ((a.grid, b.grid), (a.block, b.block))
    )


def grouped(cases: Sequence[CaseChange]) -> tuple[Grouped, ...]:
    """Each change once, over all cases: engine first, then the longest kernel first."""
    found: dict[tuple[object, ...], list[tuple[CaseChange, KernelChange]]] = {}
    for case in cases:
        for side in case.sides:
            for row in side.kernels:
                if row.differs:
                    names = (row.a and row.a.short, row.b and row.b.short)
                    key = (side.side, *names, row.change, row.pace, row.launch)
                    found.setdefault(key, []).append((case, row))
    made = [_group(str(key[0]), rows) for key, rows in found.items()]
    return tuple(sorted(made, key=lambda g: (g.side != "e2e", -max(ns or 0 for ns in g.ns))))


def _group(side: str, found: Sequence[tuple[CaseChange, KernelChange]]) -> Grouped:
    rows = [row for _, row in found]
    longest = max(rows, key=lambda row: max(_ns(row.a) or 0, _ns(row.b) or 0))
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return Grouped(
        side=side,
        name_a=longest.a.short if longest.a else "",
        name_b=longest.b.short if longest.b else "",
        change=longest.change,
        pace=longest.pace,
        launch=longest.launch,
        cases=tuple(dict.fromkeys(case.label for case, _ in found)),
        places=len(rows),
        calls=(_range(rows, lambda row: row.calls_a), _range(rows, lambda row: row.calls_b)),
        ns=(_ns(longest.a), _ns(longest.b)),
        ratios=(min(ratios), max(ratios)) if ratios else None,
    )


def _range(rows: Sequence[KernelChange], count: Callable[[KernelChange], int]) -> tuple[int, int]:
    return min(map(count, rows)), max(map(count, rows))


def _ns(kernel: KernelStat | None) -> int | None:
    return kernel.median_ns if kernel else None
