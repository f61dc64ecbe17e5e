"""What differs between two alignments of one op: plain data, made by ``compare``.

A is the first, B the second: an upgrade reads from A to B, and every ratio is B over A. Times are
integer nanoseconds of GPU execution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opkit.align.result import KernelStat, Outcome, SideSummary
from opkit.layers.op import Phase

SCHEMA = "opkit.compare/1"


class Change(StrEnum):
    """What became of a kernel at its place in the sequence."""

    SAME = "same"
    VARIANT = "other variant"  # same kernel, other tile or template numbers
    DTYPE = "other types"  # same kernel, other element types
    NEW = "new"  # A never launches it
    GONE = "gone"  # B never launches it
    MORE = "more often"  # both launch it, B more often a forward
    FEWER = "less often"  # both launch it, B less often a forward
    MOVED = "moved"  # both launch it equally often, elsewhere in the sequence


class Pace(StrEnum):
    """How B's time stands to A's, beyond their combined spread."""

    STEADY = "steady"
    SLOWER = "slower"
    FASTER = "faster"


@dataclass(frozen=True)
class Limits:
    """From when on a time has changed.

    Attributes:
        kernel: least share of the shorter time by which a kernel's median must differ.
        case: the same of a region's whole GPU time.
        spread: median absolute deviations, both sides added, by which either must differ.
        floor_ns: smaller differences of a kernel are never a change.
    """

    kernel: float
    case: float
    spread: float
    floor_ns: int


@dataclass(frozen=True)
class Fact:
    """One value of the provenance that differs; empty text where a side does not say it."""

    group: str
    name: str
    a: str
    b: str


@dataclass(frozen=True)
class KernelChange:
    """One place of the sequence in A and in B; one of the two is None when it stands alone.

    Attributes:
        position: place in B's launch order, from 1, or A's where B has none.
        launch: grid or block are known on both sides and differ.
        calls_a, calls_b: launches of this kernel, with its variants, in one forward.
    """

    position: int
    a: KernelStat | None
    b: KernelStat | None
    change: Change
    pace: Pace
    launch: bool
    calls_a: int
    calls_b: int

    @property
    def ratio(self) -> float | None:
        """B's median time over A's; None when one is missing."""
        if self.a is None or self.b is None or self.a.median_ns == 0:
            return None
        return self.b.median_ns / self.a.median_ns

    @property
    def ratio_spread(self) -> float | None:
        """The ratio's spread, propagated from both median absolute deviations, or None."""
        ratio = self.ratio
        if ratio is None or self.a is None or self.b is None or self.b.median_ns == 0:
            return None
        parts = (self.a.mad_ns / self.a.median_ns, self.b.mad_ns / self.b.median_ns)
        return ratio * math.hypot(*parts)

    @property
    def differs(self) -> bool:
        """Whether anything about it changed."""
        return self.change is not Change.SAME or self.pace is not Pace.STEADY or self.launch


@dataclass(frozen=True)
class SideChange:
    """One side (``mock`` or ``e2e``) of one case in A and in B."""

    side: str
    a: SideSummary
    b: SideSummary
    pace: Pace
    kernels: tuple[KernelChange, ...]

    @property
    def ratio(self) -> float | None:
        """GPU time of a forward, B over A; None when A's is 0."""
        return self.b.gpu_ns / self.a.gpu_ns if self.a.gpu_ns else None

    @property
    def ratio_spread(self) -> float | None:
        """The ratio's spread, from the median absolute deviations of single regions; None where a
        result of an older opkit holds none of these."""
        if self.ratio is None or not (self.a.samples_ns and self.b.samples_ns):
            return None
        parts = (side.mad_ns / max(1, side.gpu_ns) for side in (self.a, self.b))
        return self.ratio * math.hypot(*parts)

    @property
    def mode_differs(self) -> bool:
        """Eager in one and a graph in the other."""
        return self.a.mode is not self.b.mode

    @property
    def differs(self) -> bool:
        """Whether kernels, times or the launch mode changed."""
        changed = any(kernel.differs for kernel in self.kernels)
        return changed or self.mode_differs or self.pace is not Pace.STEADY


@dataclass(frozen=True)
class CaseChange:
    """One shape that both alignments ran; ``label`` is A's."""

    label: str
    label_b: str
    mock: SideChange
    e2e: SideChange

    @property
    def sides(self) -> tuple[SideChange, SideChange]:
        """Engine first: it is what an upgrade changes."""
        return self.e2e, self.mock

    @property
    def differs(self) -> bool:
        """Whether a side changed."""
        return any(side.differs for side in self.sides)


@dataclass(frozen=True)
class Grouped:
    """One change of a kernel, over all cases and places of a phase's side.

    Attributes:
        name_a, name_b: short names; empty where it stands alone on the other side.
        cases: labels of the cases it occurs in, in order.
        places: occurrences in all.
        calls: (A, B) launches a forward, each as (least, most) over the cases.
        ns: median times (A, B) of the occurrence that takes longest; None where it stands alone.
        ratios: least and largest ratio B over A; None when none can be told.
    """

    side: str
    name_a: str
    name_b: str
    change: Change
    pace: Pace
    launch: bool
    cases: tuple[str, ...]
    places: int
    calls: tuple[tuple[int, int], tuple[int, int]]
    ns: tuple[int | None, int | None]
    ratios: tuple[float, float] | None


@dataclass(frozen=True)
class PhaseChange:
    """One phase; a verdict is None where the alignment has no such phase.

    Attributes:
        cases: shapes that both ran.
        only_a, only_b: shapes that one ran.
        grouped: what changed, each change once, engine first, then by time.
    """

    phase: Phase
    verdict_a: Outcome | None
    verdict_b: Outcome | None
    cases: tuple[CaseChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    grouped: tuple[Grouped, ...]

    @property
    def differs(self) -> bool:
        """Whether verdict, shapes, kernels or times changed."""
        one_sided = bool(self.only_a or self.only_b)
        changed = any(case.differs for case in self.cases)
        return self.verdict_a != self.verdict_b or one_sided or changed


@dataclass(frozen=True)
class AlignComparison:
    """Two alignments of one op.

    Attributes:
        names: what A and B are called.
        op: the op of both.
        backends, verdicts, created: of A and B.
        facts: what differs in the provenance.
        warnings: why the two can hardly be compared: other GPU, other model, …
        limits: from when on a time has changed.
        phases: in the order context, generation.
    """

    names: tuple[str, str]
    op: str
    backends: tuple[str, str]
    verdicts: tuple[Outcome, Outcome]
    created: tuple[str, str]
    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]
    limits: Limits
    phases: tuple[PhaseChange, ...]

    @property
    def cases(self) -> int:
        """Shapes that were compared."""
        return sum(len(phase.cases) for phase in self.phases)

    @property
    def differs(self) -> bool:
        """Whether a verdict, a shape, a kernel or a time changed."""
        return self.verdicts[0] != self.verdicts[1] or any(p.differs for p in self.phases)


def comparison_json(found: AlignComparison) -> dict[str, Any]:
    """The comparison as JSON-ready data; every kernel row of every case, changed or not."""
    return {
        "schema": SCHEMA,
        "kind": "align",
        "op": found.op,
        "differs": found.differs,
        "a": _end(found, 0),
        "b": _end(found, 1),
        "warnings": list(found.warnings),
        "provenance": [vars(fact) for fact in found.facts],
        "limits": vars(found.limits),
        "phases": {str(phase.phase): _phase(phase) for phase in found.phases},
    }


def _end(found: AlignComparison, which: int) -> dict[str, Any]:
    return {
        "name": found.names[which],
        "backend": found.backends[which],
        "verdict": str(found.verdicts[which]),
        "created": found.created[which],
    }


def _phase(phase: PhaseChange) -> dict[str, Any]:
    return {
        "differs": phase.differs,
        "verdict_a": phase.verdict_a and str(phase.verdict_a),
        "verdict_b": phase.verdict_b and str(phase.verdict_b),
        "only_a": list(phase.only_a),
        "only_b": list(phase.only_b),
        "cases": [
            {
                "case": case.label,
                "case_b": case.label_b,
                "differs": case.differs,
                **{side.side: _side(side) for side in case.sides},
            }
            for case in phase.cases
        ],
    }


def _side(side: SideChange) -> dict[str, Any]:
    return {
        "gpu_ns_a": side.a.gpu_ns,
        "gpu_ns_b": side.b.gpu_ns,
        "ratio": side.ratio,
        "ratio_spread": side.ratio_spread,
        "pace": str(side.pace),
        "mode_a": side.a.mode and str(side.a.mode),
        "mode_b": side.b.mode and str(side.b.mode),
        "launches_a": side.a.launches,
        "launches_b": side.b.launches,
        "kernels": [_kernel(kernel) for kernel in side.kernels],
    }


def _kernel(row: KernelChange) -> dict[str, Any]:
    return {
        "position": row.position,
        "change": str(row.change),
        "pace": str(row.pace),
        "launch_differs": row.launch,
        "calls_a": row.calls_a,
        "calls_b": row.calls_b,
        "ratio": row.ratio,
        "ratio_spread": row.ratio_spread,
        "a": _stat(row.a),
        "b": _stat(row.b),
    }


def _stat(kernel: KernelStat | None) -> dict[str, Any] | None:
    if kernel is None:
        return None
    return {
        "name": kernel.name,
        "short": kernel.short,
        "family": kernel.family,
        "grid": kernel.grid and list(kernel.grid),
        "block": kernel.block and list(kernel.block),
        "median_ns": kernel.median_ns,
        "mad_ns": kernel.mad_ns,
    }
